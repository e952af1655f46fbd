//! `flea dashboard`: what `flea analyze`, `flea kv`, `flea probe rows` and a running flead say, on one page in the browser.
//!
//! Invariants: the page is part of the program and asks nobody but this program; every figure is the JSON of the command
//! of that name, made by the same function; whoever does not know the secret part of the address learns nothing and
//! starts nothing. `--export` writes the same page with the figures in it. The tail of everything: beside the pipeline.

mod api;
mod board;
mod export;
mod measure;
mod page;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use crate::daemon::http::HttpServer;
use crate::error::{Error, ErrorKind, Result};
use crate::tools::analyze::{KvStore, weight_bits};
use board::Board;

/// Threads that answer: a browser asks six things at a time.
const THREADS_COUNT: usize = 8;
/// How often the signal is looked for.
const TICK: Duration = Duration::from_millis(100);

const EXAMPLES: &str = "\
Examples:
  flea dashboard
  flea dashboard model.gguf --context 32768 --kv-type q8_0
  flea dashboard --export report.html --kv-bench bench.json --rows rows.json
  flea dashboard --vectors keys.bin --dim 128 --type f16 --table /models --listen 8417

The page needs no network: it comes from this program, on this machine's loopback, and its address holds a secret that
is new each time. It shows the JSON of flea analyze, flea kv bench, flea kv compare, flea probe rows, flea-ctl status and
flea-ctl stats. Measurements begin on the page's buttons only, one at a time, or come from the files given.
Exit codes: 0 ended by Ctrl-C, or the report is written; 1 the port is taken; 2 usage, an address that other machines
can reach among it.";

/// Show models, devices, codecs, rows and a running flead on a page in the browser
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Models besides the known ones: files, directories, URLs, as for flea analyze
    #[arg(value_name = "MODEL")]
    models: Vec<String>,

    /// Where to serve the page: an address of the loopback, or a port of it; port 0 is any that is free
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", value_parser = loopback)]
    listen: SocketAddr,

    /// Tokens of context that the page begins with [default: the model's own, at most 4096]
    #[arg(long, visible_alias = "ctx", value_name = "N", value_parser = super::analyze::context)]
    context: Option<u64>,

    /// Bits of a weight that the page begins with, or a type of ggml such as q4_K [default: what a GGUF holds, else 4.5]
    #[arg(long, value_name = "BITS", value_parser = weight_bits)]
    weight_bits: Option<f64>,

    /// How keys and values are stored when the page begins: f16, q8_0, tq:4, or a number of bits
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv_type: KvStore,

    /// Devices besides those built in, from a file (.toml) or a profile of flea probe (.json); one name is shown first
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    device: Vec<String>,

    /// The daemon's socket: a path, or unix:PATH [default: /run/flea/flea.sock]
    #[arg(
        long,
        value_name = "PATH",
        env = "FLEA_ENDPOINT",
        hide_env_values = true
    )]
    socket: Option<String>,

    /// Show what `flea kv bench --json` wrote
    #[arg(long, value_name = "FILE")]
    kv_bench: Option<PathBuf>,

    /// Show what `flea kv compare --json` wrote
    #[arg(long, value_name = "FILE")]
    kv_compare: Option<PathBuf>,

    /// Show what `flea probe rows --json` wrote
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,

    /// Vectors that the page may run `flea kv compare` on
    #[arg(long, value_name = "FILE", requires = "dim")]
    vectors: Option<PathBuf>,

    /// Values of one of the vectors
    #[arg(long, value_name = "N", requires = "vectors", value_parser = super::count)]
    dim: Option<u32>,

    /// Type of the values: f32, f16 or bf16
    #[arg(long = "type", value_name = "TYPE", default_value = "f32", value_parser = ["f32", "f16", "bf16"])]
    kind: String,

    /// What the page may run `flea probe rows` on: a model, a file, or a directory for a temporary table
    #[arg(long, value_name = "PATH", default_value = ".")]
    table: PathBuf,

    /// Write the page with its figures to a file instead of serving it
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,

    /// Print one JSON object: the address, or the file
    #[arg(long)]
    json: bool,
}

/// An address of this machine that no other can reach.
fn loopback(text: &str) -> std::result::Result<SocketAddr, String> {
    let text = text.trim();
    let port = || Some(SocketAddr::from((Ipv4Addr::LOCALHOST, text.parse().ok()?)));
    let address = text.parse().ok().or_else(port).ok_or_else(|| {
        format!("'{text}' is no address and no port (0 to 65535); write 127.0.0.1:8417 or 8417")
    })?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err(format!(
        "'{text}' can be reached by other machines; the page is for this one: write 127.0.0.1:{}",
        address.port()
    ))
}

/// Serves the page until a signal ends it, or writes it.
///
/// # Errors
/// A model, a setting or a file that cannot be; what listening and writing say.
pub fn command(args: &Args) -> Result<()> {
    let board = Board::new(args)?;
    if let Some(path) = &args.export {
        let html = export::report(&board, &board.first())?;
        std::fs::write(path, &html)
            .map_err(|error| Error::from_io(&error, format_args!("write {}", path.display())))?;
        return tell(
            args.json,
            &json!({ "export": path.to_string_lossy(), "bytes": html.len() }),
            &path.display().to_string(),
        );
    }
    let stop = super::stop_on_signal()?;
    let board = Arc::new(board);
    let served = Arc::clone(&board);
    let server = HttpServer::start(
        "--listen",
        args.listen,
        ("flea-dashboard", THREADS_COUNT),
        move |request| api::answer(&served, request),
    )
    .map_err(taken)?;
    let url = board.open(server.address());
    tell(args.json, &json!({ "url": url }), &url)?;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
    }
    // Nobody waits for an answer or a measurement that is still being made: their threads end with the program.
    std::mem::forget(server);
    Ok(())
}

fn tell(json: bool, value: &serde_json::Value, text: &str) -> Result<()> {
    if json {
        super::print_json(value)
    } else {
        super::print(&format!("{text}\n"))
    }
}

/// A port that cannot be had: what else to write.
fn taken(error: Error) -> Error {
    let remedy = match error.kind() {
        ErrorKind::Io | ErrorKind::Permission => "; name another port, or leave --listen out",
        _ => "",
    };
    let context = format!("{error}{remedy}");
    error.with_context(context)
}
