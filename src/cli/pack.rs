//! `flea pack MODEL -o OUT`: arguments and reports around [`crate::tools::pack`] and [`crate::tools::compress`].

use std::path::PathBuf;

use super::synth::Progress;
use super::table::Table;
use crate::error::Result;
use crate::tools::compress::{Compressed, Restored, compress, decompress};
use crate::tools::pack::{PackOptions, Packed, pack};
use crate::units::HumanBytes;

const EXAMPLES: &str = "\
Examples:
  flea pack model.gguf -o packed.gguf
  flea pack model-00001-of-00004.gguf -o joined.gguf
  flea pack --compress model-bf16.gguf -o model.fleapack
  flea pack --decompress model.fleapack -o model-bf16.gguf

The result is a GGUF file that llama.cpp loads like the original: the same tensors, the same keys but general.alignment,
tensors in the order of use, each on a page of its own. Parts of a split model become one file. Needs as much free disk as
the model has; interrupted or killed, it leaves nothing. Whether it is worth it: measure both with `flea bench stream`.

With --compress the result is no GGUF: flea run and flea bench stream load it and decode what they read, llama.cpp does not.
bf16 weights take about two thirds of their bytes, f16 about 85 %, and --decompress gives the original file back, bit for bit
and checked; quantised weights get no shorter. The format is described in docs/packed-format.md.";

/// Rewrite a model in the order in which its weights are used, or compress it without loss
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The model: a GGUF file; of a split one, any part
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    /// Code bf16 and f16 weights without loss, into a file that only flea knows
    #[arg(long)]
    pub compress: bool,

    /// Write the GGUF that a compressed model was made of
    #[arg(long, conflicts_with = "compress")]
    pub decompress: bool,

    /// Replace what is there
    #[arg(long)]
    pub force: bool,

    /// Report as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Packs and reports.
///
/// # Errors
/// Those of [`pack`], [`compress`] and [`decompress`].
pub fn command(args: &Args) -> Result<()> {
    let options = PackOptions {
        model: args.model.clone(),
        output: args.output.clone(),
        force: args.force,
    };
    let stop = super::stop_on_signal()?;
    let mut bar = Progress::new();
    let mut tell = |done, total| bar.show(done, total);
    let (json, table) = if args.compress {
        let result = compress(&options, &stop, &mut tell);
        bar.clear();
        let compressed = result?;
        (
            compressed_json(args, &compressed),
            compressed_table(args, &compressed),
        )
    } else if args.decompress {
        let result = decompress(&options, &stop, &mut tell);
        bar.clear();
        let restored = result?;
        (
            restored_json(args, &restored),
            restored_table(args, &restored),
        )
    } else {
        let result = pack(&options, &stop, &mut tell);
        bar.clear();
        let packed = result?;
        (packed_json(args, &packed), packed_table(args, &packed))
    };
    if args.json {
        super::print_json(&json)
    } else {
        super::print(&table)
    }
}

fn gb_per_second(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e9 / seconds.max(1e-9)
}

fn written(bytes: u64, seconds: f64) -> String {
    format!(
        "in {seconds:.1} s, {:.2} GB/s",
        gb_per_second(bytes, seconds)
    )
}

fn change(bytes: u64, before_bytes: u64) -> f64 {
    (bytes as f64 / before_bytes.max(1) as f64 - 1.0) * 100.0
}

fn packed_json(args: &Args, packed: &Packed) -> serde_json::Value {
    serde_json::json!({
        "file": args.output.to_string_lossy(),
        "bytes": packed.bytes,
        "input_bytes": packed.input_bytes,
        "input_files": packed.files_count,
        "tensors": packed.tensors_count,
        "tensors_moved": packed.moved_count,
        "layers": packed.layers_count,
        "seconds": packed.seconds,
        "gb_per_second": gb_per_second(packed.bytes, packed.seconds),
    })
}

fn packed_table(args: &Args, packed: &Packed) -> String {
    let mut table = Table::fields();
    table.field("file", args.output.display());
    table.field(
        "tensors",
        format!(
            "{} in {} layers, {} moved",
            packed.tensors_count, packed.layers_count, packed.moved_count
        ),
    );
    table.field(
        "size",
        format!(
            "{} ({:+.2} % of the {} in {} file{})",
            HumanBytes(packed.bytes),
            change(packed.bytes, packed.input_bytes),
            HumanBytes(packed.input_bytes),
            packed.files_count,
            if packed.files_count == 1 { "" } else { "s" }
        ),
    );
    table.field("written", written(packed.bytes, packed.seconds));
    table.to_string()
}

/// `gb_per_second` counts the bytes of the original.
fn compressed_json(args: &Args, compressed: &Compressed) -> serde_json::Value {
    serde_json::json!({
        "file": args.output.to_string_lossy(),
        "bytes": compressed.bytes,
        "input_bytes": compressed.input_bytes,
        "tensors": compressed.tensors_count,
        "tensors_coded": compressed.coded_count,
        "weights_bytes": compressed.weights_bytes,
        "weights_coded_bytes": compressed.coded_bytes,
        "threads": compressed.threads_count,
        "seconds": compressed.seconds,
        "gb_per_second": gb_per_second(compressed.input_bytes, compressed.seconds),
        "coding_thread_seconds": compressed.coding_seconds,
        "coding_gb_per_second_per_thread": gb_per_second(compressed.weights_bytes, compressed.coding_seconds),
    })
}

fn compressed_table(args: &Args, compressed: &Compressed) -> String {
    let mut table = Table::fields();
    table.field("file", args.output.display());
    table.field(
        "tensors",
        format!(
            "{}, of which {} are coded: {} of weights in {} ({:+.1} %)",
            compressed.tensors_count,
            compressed.coded_count,
            HumanBytes(compressed.weights_bytes),
            HumanBytes(compressed.coded_bytes),
            change(compressed.coded_bytes, compressed.weights_bytes)
        ),
    );
    table.field(
        "size",
        format!(
            "{} ({:+.1} % of {})",
            HumanBytes(compressed.bytes),
            change(compressed.bytes, compressed.input_bytes),
            HumanBytes(compressed.input_bytes)
        ),
    );
    table.field(
        "written",
        format!(
            "{} of the original; {} threads, {:.2} GB/s each",
            written(compressed.input_bytes, compressed.seconds),
            compressed.threads_count,
            gb_per_second(compressed.weights_bytes, compressed.coding_seconds)
        ),
    );
    table.to_string()
}

fn restored_json(args: &Args, restored: &Restored) -> serde_json::Value {
    serde_json::json!({
        "file": args.output.to_string_lossy(),
        "original": restored.original,
        "bytes": restored.bytes,
        "packed_bytes": restored.packed_bytes,
        "parts_checked": restored.parts_count,
        "seconds": restored.seconds,
        "gb_per_second": gb_per_second(restored.bytes, restored.seconds),
        "coding_thread_seconds": restored.coding_seconds,
        "coding_gb_per_second_per_thread": gb_per_second(restored.weights_bytes, restored.coding_seconds),
    })
}

fn restored_table(args: &Args, restored: &Restored) -> String {
    let mut table = Table::fields();
    table.field("file", args.output.display());
    table.field("original", &restored.original);
    table.field(
        "size",
        format!(
            "{} out of {}",
            HumanBytes(restored.bytes),
            HumanBytes(restored.packed_bytes)
        ),
    );
    table.field(
        "checked",
        format!("CRC32C of {} parts, all as they were", restored.parts_count),
    );
    table.field(
        "written",
        format!(
            "{}; decoded at {:.2} GB/s per thread",
            written(restored.bytes, restored.seconds),
            gb_per_second(restored.weights_bytes, restored.coding_seconds)
        ),
    );
    table.to_string()
}
