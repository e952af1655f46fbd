//! `flea kv gate`: what codecs for keys and values do to a model's answers.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::cli;
use crate::cli::table::{Align, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::host::kv_gate::{GateOptions, Guard, Pair, Verdict, measure};
use crate::host::{Session, SessionOptions};
use crate::kv::Choice;

const HELP: &str = "\
Examples:
  flea kv gate model.gguf
  flea kv gate model.gguf --no-guard q8_0 q4_0 tq:4 q8_0/tq:3

The model writes passages, each is computed with its own keys and values and again with coded ones. KL is the mean
divergence of the next token's distribution in nats, top-1 the share of tokens whose likeliest successor stays.
KEY/VALUE names a codec for each. Unless --no-guard, two layers at each end, the first 4 and the last 128 tokens before the
question stay at 8 bits, and their bits count.";

/// What `flea kv gate` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub struct GateArgs {
    /// GGUF file
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// Codecs, or KEY/VALUE pairs of them [default: a choice of all]
    #[arg(value_name = "CODEC", value_parser = parse_pair)]
    pairs: Vec<Pair>,

    /// Put everything through the codec
    #[arg(long)]
    no_guard: bool,

    /// Passages
    #[arg(long, value_name = "N", default_value = "4", value_parser = cli::count)]
    passages: u32,

    /// Tokens whose answers are compared, per passage
    #[arg(long, value_name = "N", default_value = "96", value_parser = cli::count)]
    question: u32,

    /// Tokens of a passage and its question [default: the model's context, at most 4096]
    #[arg(long, value_name = "N", value_parser = cli::count)]
    ctx: Option<u32>,

    /// Computing threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = cli::count)]
    threads: Option<u32>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn parse_pair(text: &str) -> Result<Pair> {
    let (key, value) = text.split_once('/').unwrap_or((text, text));
    Ok(Pair {
        key: key.parse()?,
        value: value.parse()?,
    })
}

const DEFAULT: [&str; 14] = [
    "q8_0",
    "q4_0",
    "tq:2",
    "tq:3",
    "tq:4",
    "tq:6",
    "tq-ec:3",
    "tq-ec:4",
    "tcq:3",
    "tcq:4",
    "rotor:4",
    "spectral:3",
    "dh013:3",
    "dh013:4",
];

/// Runs the measurement and prints it.
///
/// # Errors
/// What the model, its KV state or the codecs refuse.
pub fn command(args: &GateArgs) -> Result<()> {
    // It has to outlive every context; one per process is not too many.
    let stop: &'static AtomicBool = Box::leak(Box::new(cli::stop_on_signal()?));
    let session_options = SessionOptions {
        path: args.model.clone(),
        stream: None,
        context_tokens: args.ctx,
        ubatch_tokens: 512,
        threads_count: args.threads,
        kv_type: "f32"
            .parse()
            .map_err(|text: String| Error::new(ErrorKind::Internal, text))?,
        kv_disk: None,
        stop,
    };
    let mut watch = |_: f32| !stop.load(Ordering::Relaxed);
    let mut session = Session::open(&session_options, &mut watch)?;
    let pairs = if args.pairs.is_empty() {
        DEFAULT
            .iter()
            .map(|text| parse_pair(text))
            .collect::<Result<_>>()?
    } else {
        args.pairs.clone()
    };
    let options = GateOptions {
        pairs,
        guard: if args.no_guard {
            Guard::NONE
        } else {
            Guard::DEFAULT
        },
        passages: args.passages,
        question_tokens: args.question as usize,
    };
    let verdicts = measure(&mut session, &options)?;
    if args.json {
        let list: Vec<_> = verdicts.iter().map(verdict_json).collect();
        return cli::print_json(&json!({
            "model": args.model, "guarded": !args.no_guard, "passages": args.passages,
            "tokens": session.context_tokens(), "question_tokens": args.question, "codecs": list,
        }));
    }
    cli::print(&table(&verdicts))
}

fn name(pair: &Pair) -> String {
    let same: (Choice, Choice) = (pair.key, pair.value);
    if same.0 == same.1 {
        same.0.to_string()
    } else {
        format!("{}/{}", same.0, same.1)
    }
}

fn verdict_json(verdict: &Verdict) -> serde_json::Value {
    json!({
        "key": verdict.pair.key.to_string(),
        "value": verdict.pair.value.to_string(),
        "stored_bits": verdict.bits,
        "divergence_nats": verdict.divergence,
        "divergence_max_nats": verdict.divergence_max,
        "top1_agreement": verdict.top1,
        "loss_nats": verdict.loss,
        "key_nmse": verdict.key_nmse,
        "value_nmse": verdict.value_nmse,
        "spectral_fallbacks": verdict.fallbacks,
        "rows": verdict.rows,
    })
}

fn table(verdicts: &[Verdict]) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("codec", Align::Left),
        ("bits", right),
        ("KL", right),
        ("KL max", right),
        ("top-1", right),
        ("loss", right),
        ("K nmse", right),
        ("V nmse", right),
        ("rows", right),
    ]);
    for verdict in verdicts {
        table.row([
            name(&verdict.pair),
            format!("{:.3}", verdict.bits),
            format!("{:.5}", verdict.divergence),
            format!("{:.4}", verdict.divergence_max),
            format!("{:.2} %", 100.0 * verdict.top1),
            format!("{:+.4}", verdict.loss),
            format!("{:.2e}", verdict.key_nmse),
            format!("{:.2e}", verdict.value_nmse),
            verdict.rows.to_string(),
        ]);
    }
    table.to_string()
}
