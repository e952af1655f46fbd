//! `flea pack MODEL -o OUT.gguf`: arguments and report around [`crate::tools::pack`].

use std::path::PathBuf;

use super::synth::Progress;
use super::table::Table;
use crate::error::Result;
use crate::tools::pack::{PackOptions, Packed, pack};
use crate::units::HumanBytes;

const EXAMPLES: &str = "\
Examples:
  flea pack model.gguf -o packed.gguf
  flea pack model-00001-of-00004.gguf -o joined.gguf

The result is a GGUF file that llama.cpp loads like the original: the same tensors, the same keys but general.alignment,
tensors in the order of use, each on a page of its own. Parts of a split model become one file. Needs as much free disk as
the model has; interrupted, it leaves nothing. Whether it is worth it: measure both with `flea bench stream`.";

/// Rewrite a model in the order in which its weights are used
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The model: a GGUF file; of a split one, any part
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

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
/// Those of [`pack`].
pub fn command(args: &Args) -> Result<()> {
    let options = PackOptions {
        model: args.model.clone(),
        output: args.output.clone(),
        force: args.force,
    };
    let stop = super::stop_on_signal()?;
    let mut bar = Progress::new();
    let result = pack(&options, &stop, |done, total| bar.show(done, total));
    bar.clear();
    let packed = result?;
    if args.json {
        super::print_json(&json(args, &packed))
    } else {
        super::print(&table(args, &packed))
    }
}

fn gb_per_second(packed: &Packed) -> f64 {
    packed.bytes as f64 / 1e9 / packed.seconds.max(1e-9)
}

fn json(args: &Args, packed: &Packed) -> serde_json::Value {
    serde_json::json!({
        "file": args.output.to_string_lossy(),
        "bytes": packed.bytes,
        "input_bytes": packed.input_bytes,
        "input_files": packed.files_count,
        "tensors": packed.tensors_count,
        "tensors_moved": packed.moved_count,
        "layers": packed.layers_count,
        "seconds": packed.seconds,
        "gb_per_second": gb_per_second(packed),
    })
}

fn table(args: &Args, packed: &Packed) -> String {
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
            (packed.bytes as f64 / packed.input_bytes.max(1) as f64 - 1.0) * 100.0,
            HumanBytes(packed.input_bytes),
            packed.files_count,
            if packed.files_count == 1 { "" } else { "s" }
        ),
    );
    table.field(
        "written",
        format!(
            "in {:.1} s, {:.2} GB/s",
            packed.seconds,
            gb_per_second(packed)
        ),
    );
    table.to_string()
}
