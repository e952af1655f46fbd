//! `flea synth`: arguments, progress and report around [`crate::tools::synth`].

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::table::Table;
use crate::error::Result;
use crate::tools::synth::shape::{Arch, Quant, Shape, Wish};
use crate::tools::synth::{Report, Spec, generate, router};
use crate::units::HumanBytes;

const EXAMPLES: &str = "\
Examples:
  flea synth --size 4GiB -o big.gguf
  flea synth --arch qwen3moe --type q4_k_m --size 2GiB --split-bytes 500M -o moe.gguf
  flea synth --arch gpt-oss --type mxfp4 --size 8GiB --experts 32 --router-skew hot -o oss.gguf
  flea synth --layers 12 --embd 768 --heads 12 --vocab 8000 --type f16 -o small.gguf

With --size, what is not given is chosen so that the file comes out within 5 % of it.
The same options and seed give the same bytes on every machine.";

fn arch_parser() -> impl TypedValueParser<Value = Arch> {
    PossibleValuesParser::new(Arch::ALL.map(Arch::name)).try_map(|name| name.parse::<Arch>())
}

fn quant_parser() -> impl TypedValueParser<Value = Quant> {
    PossibleValuesParser::new(Quant::ALL.map(Quant::name)).try_map(|name| name.parse::<Quant>())
}

fn router_skew(text: &str) -> std::result::Result<f32, String> {
    match text {
        "even" => Ok(router::EVEN),
        "hot" => Ok(router::HOT),
        _ => text
            .parse()
            .ok()
            .filter(|skew| (0.0..=router::SKEW_MAX).contains(skew))
            .ok_or_else(|| format!("even, hot, or a number from 0 to {}", router::SKEW_MAX)),
    }
}

/// Write a synthetic model of any size that llama.cpp loads
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The file to write; with --split-bytes FILE-00001-of-0000N.gguf
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    /// Architecture
    #[arg(long, default_value = "llama", value_parser = arch_parser())]
    pub arch: Arch,

    /// How the weights are stored; q4_k_m is llama.cpp's mix, the others are one type throughout
    #[arg(long = "type", value_name = "TYPE", default_value = "q8_0", value_parser = quant_parser())]
    pub quant: Quant,

    /// Size of the model [default: 1GiB, where no dimension is given]
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    pub size: Option<u64>,

    /// Transformer layers
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub layers: Option<u32>,

    /// Width of the model
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub embd: Option<u32>,

    /// Width of the feed-forward part, of one expert where there are experts
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub ffn: Option<u32>,

    /// Attention heads
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub heads: Option<u32>,

    /// Heads of keys and values
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub kv_heads: Option<u32>,

    /// Width of a head [default: embd / heads]
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub head_dim: Option<u32>,

    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub vocab: Option<u32>,

    /// Experts per layer (mixtral, qwen3moe, gpt-oss)
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub experts: Option<u32>,

    /// Experts used per token
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub experts_used: Option<u32>,

    /// How unevenly the experts are used: even, hot (a tenth gets 4/5 of the uses) or a number, 0 to 8
    #[arg(long, value_name = "SKEW", default_value = "even", value_parser = router_skew)]
    pub router_skew: f32,

    /// Context length the model claims [default: 4096]
    #[arg(long, value_name = "N", value_parser = super::count)]
    pub ctx: Option<u32>,

    /// Embeddings and output head share one tensor (always so for gemma3 and gemma3n)
    #[arg(long)]
    pub tied: bool,

    /// Cut the model into files of at most this size
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    pub split_bytes: Option<u64>,

    /// Where all randomness comes from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Replace what is there
    #[arg(long)]
    pub force: bool,

    /// Report as one JSON object
    #[arg(long)]
    pub json: bool,
}

impl Args {
    fn wish(&self) -> Wish {
        let wide = |value: Option<u32>| value.map(u64::from);
        let no_dimension = [
            self.layers,
            self.embd,
            self.ffn,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.vocab,
            self.experts,
        ]
        .iter()
        .all(Option::is_none);
        Wish {
            size_bytes: self.size.or(no_dimension.then_some(1 << 30)),
            layers: wide(self.layers),
            embd: wide(self.embd),
            ffn: wide(self.ffn),
            heads: wide(self.heads),
            kv_heads: wide(self.kv_heads),
            head_dim: wide(self.head_dim),
            vocab: wide(self.vocab),
            experts: wide(self.experts),
            experts_used: wide(self.experts_used),
            ctx: wide(self.ctx),
            tied: self.tied,
        }
    }
}

/// Writes the model and reports what it is.
///
/// # Errors
/// Numbers that do not go together, an output that exists, a full disk, Ctrl-C.
pub fn command(args: &Args) -> Result<()> {
    let spec = Spec {
        shape: Shape::choose(args.arch, args.quant, &args.wish())?,
        seed: args.seed,
        router_skew: args.router_skew,
        split_bytes: args.split_bytes,
        force: args.force,
    };
    log::debug!("{:?}", spec.shape);
    let stop = super::stop_on_signal()?;
    let mut bar = Progress::new();
    let result = generate(&spec, &args.output, &stop, |done, total| {
        bar.show(done, total)
    });
    bar.clear();
    let report = result?;
    if args.json {
        super::print_json(&json(&spec, &report))
    } else {
        super::print(&table(&spec, &report))
    }
}

/// One line on a terminal's stderr, several times a second; nothing anywhere else.
pub(super) struct Progress {
    active: bool,
    began: Instant,
    shown: Option<Instant>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            active: std::io::stderr().is_terminal(),
            began: Instant::now(),
            shown: None,
        }
    }

    pub(super) fn show(&mut self, done_bytes: u64, total_bytes: u64) {
        let due = |shown: Instant| shown.elapsed() >= Duration::from_millis(200);
        if !self.active || !self.shown.is_none_or(due) {
            return;
        }
        self.shown = Some(Instant::now());
        let rate = done_bytes as f64 / 1e9 / self.began.elapsed().as_secs_f64().max(1e-3);
        let share = 100.0 * done_bytes as f64 / total_bytes.max(1) as f64;
        // A terminal that cannot be written to is no reason to stop the work.
        let _ = write!(
            std::io::stderr(),
            "\r{share:3.0} %  {} of {}  {rate:.2} GB/s\x1b[K",
            HumanBytes(done_bytes),
            HumanBytes(total_bytes)
        );
    }

    pub(super) fn clear(&self) {
        if self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn gb_per_second(report: &Report) -> f64 {
    report.bytes as f64 / 1e9 / report.seconds.max(1e-9)
}

fn json(spec: &Spec, report: &Report) -> serde_json::Value {
    let shape = &spec.shape;
    serde_json::json!({
        "files": report.files,
        "bytes": report.bytes,
        "architecture": shape.arch.gguf_name(),
        "type": shape.quant.name(),
        "parameters": report.parameters,
        "tensors": report.tensors_count,
        "layers": shape.layers,
        "embd": shape.embd,
        "ffn": shape.ffn,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab": shape.vocab,
        "experts": shape.experts,
        "experts_used": shape.experts_used,
        "router_skew": spec.router_skew,
        "ctx": shape.ctx,
        "tied": shape.tied,
        "seed": spec.seed,
        "seconds": report.seconds,
        "gb_per_second": gb_per_second(report),
    })
}

fn table(spec: &Spec, report: &Report) -> String {
    let shape = &spec.shape;
    let mut table = Table::fields();
    for file in &report.files {
        table.field("file", file.display());
    }
    table.field(
        "model",
        format!(
            "{} {}, {:.2} billion weights in {} tensors",
            shape.arch,
            shape.quant,
            report.parameters as f64 / 1e9,
            report.tensors_count
        ),
    );
    table.field(
        "shape",
        format!(
            "{} layers, embd {}, ffn {}, heads {}/{} of {}, vocab {}{}",
            shape.layers,
            shape.embd,
            shape.ffn,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.vocab,
            if shape.tied { ", tied" } else { "" }
        ),
    );
    if shape.experts > 0 {
        let experts = format!(
            "{} of {} per token, router skew {}",
            shape.experts_used, shape.experts, spec.router_skew
        );
        table.field("experts", experts);
    }
    table.field(
        "written",
        format!(
            "{} in {:.1} s, {:.2} GB/s",
            HumanBytes(report.bytes),
            report.seconds,
            gb_per_second(report)
        ),
    );
    table.to_string()
}
