//! `flea run`: text out of a model that does not fit in memory. Parses the command line, shows tokens as they come and
//! the figures at the end; the work is in [`crate::host`]. Answers go to stdout, everything else to stderr; with
//! `--json` stdout gets one object on one line and nothing else.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::flag;

use crate::cli;
use crate::cli::run::answer::{print_answer, say_summary};
use crate::cli::run::gpu::GpuArgs;
use crate::cli::run::kv_disk::KvArgs;
use crate::cli::run::logits::LogitsFile;
use crate::cli::run::progress::{Loading, Reading};
use crate::cli::trace::TraceFile;
use crate::cli::values;
use crate::error::{Error, ErrorKind, Result};
use crate::ffi::types;
use crate::host::session::prompt_tokens;
use crate::host::{
    Chat, End, Generation, SampleOptions, Sampler, Session, SessionOptions, Step, StreamOptions,
    Token, process,
};
use crate::proto::SOCKET_DEFAULT;
use crate::units::MemorySpec;

mod answer;
mod gpu;
mod kv_disk;
mod logits;
mod progress;

/// Set by SIGINT and SIGTERM: stop cleanly.
static STOP: AtomicBool = AtomicBool::new(false);
/// A signal ends the process at once: after the first one, and while standard input is waited for.
static EXIT_AT_ONCE: AtomicBool = AtomicBool::new(false);

/// Generate text from a GGUF model, also one larger than memory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without -p, -f and --prompt-tokens the prompt is read from standard input; --chat alone is a conversation.
--memory bounds everything the process holds: weights, KV cache, compute memory and itself. A percentage means that
share of the weights, with the rest on top. Left out, it is what is free under every limit, less a margin.
--gpu N --vram SIZE computes on a GPU too small for the model: what does not stay in its memory is kept in host memory, as far
as --memory allows, or read from the drive, and copied in before each layer runs. --gpu 0,1 divides the layers over several.
--kv-disk keeps --kv-slots layers of the KV cache in memory and reads the others once per pass: each token then reads
what the context holds. States of recurrent models stay in memory; models without flash attention are refused.")]
pub struct Args {
    /// GGUF file; any shard of a split model
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// The prompt
    #[arg(short = 'p', long, value_name = "TEXT", conflicts_with_all = ["file", "prompt_tokens"])]
    prompt: Option<String>,

    /// Read the prompt from a file; - is standard input
    #[arg(
        short = 'f',
        long,
        value_name = "FILE",
        conflicts_with = "prompt_tokens"
    )]
    file: Option<PathBuf>,

    /// The prompt as token ids: 1,5,9
    #[arg(
        long,
        value_name = "IDS",
        value_delimiter = ',',
        num_args = 1,
        conflicts_with = "chat"
    )]
    prompt_tokens: Option<Vec<Token>>,

    /// Tokens to generate; left out, until the text or the context ends
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    tokens: Option<usize>,

    /// Memory for the whole process: 4GiB, 4GB, 512M, or a share of the weights, 50%
    #[arg(long, value_name = "SIZE", env = "FLEA_MEMORY", value_parser = memory, allow_hyphen_values = true)]
    memory: Option<String>,

    /// Tokens the context holds [default: the model's own, at most 4096]
    #[arg(long, value_name = "TOKENS", value_parser = cli::count)]
    ctx: Option<u32>,

    /// Temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = values::temperature)]
    temp: f32,

    /// Choose among the K likeliest tokens only; 0 = all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: i32,

    /// Choose among the likeliest tokens that make up this share
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = values::probability)]
    top_p: f32,

    /// Seed of the dice
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u32,

    /// Computing threads [default: one per core]
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    threads: Option<u32>,

    /// Prompt tokens computed in one pass over the weights
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = cli::count)]
    ubatch: u32,

    /// Write the raw f32 logits, one row per generated token
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,

    /// One JSON object on standard output, and nothing else there
    #[arg(long)]
    json: bool,

    /// Never choose a token that ends the text
    #[arg(long)]
    ignore_eos: bool,

    /// Use the model's chat template; without a prompt, hold a conversation
    #[arg(long)]
    chat: bool,

    /// llama.cpp's CPU backend alone: weights mapped by llama.cpp, no budget
    #[arg(long)]
    no_stream: bool,

    /// Write what drive and compute did when, in Chrome's trace format (ui.perfetto.dev)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["no_stream", "daemon"])]
    trace: Option<PathBuf>,
    /// Stream from flead, which listens on this socket; memory and reader are then the daemon's
    #[arg(
        long,
        value_name = "SOCKET",
        num_args = 0..=1,
        default_missing_value = SOCKET_DEFAULT,
        conflicts_with_all = ["no_stream", "slots", "page_bytes", "request_bytes", "depth"]
    )]
    daemon: Option<PathBuf>,

    #[command(flatten)]
    gpu: GpuArgs,

    #[command(flatten)]
    kv: KvArgs,

    #[command(flatten)]
    streaming: StreamingArgs,
}

/// How weights are moved; the defaults are what was measured to be best.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Streaming")]
struct StreamingArgs {
    /// What moves the weights: auto, io_uring, pread
    #[arg(long, value_name = "READER", default_value = "auto", env = "FLEA_READER", value_parser = reader)]
    reader: u32,

    /// What slots are made of: private, shared
    #[arg(long, value_name = "BACKING", default_value = "private", value_parser = backing)]
    backing: u32,

    /// A directory with a copy of the model's files, to be read from as well; may be given several times. Lengths, holes and
    /// samples of the bytes are compared with the model, not every byte
    #[arg(long, value_name = "DIR")]
    mirror: Vec<PathBuf>,

    /// Slots of the ring, 2 to 64 [default: 3]
    #[arg(long, value_name = "N", value_parser = values::slots)]
    slots: Option<u32>,

    /// Page size: 4KiB, 2MiB [default: by the size of a layer]
    #[arg(long, value_name = "SIZE", value_parser = values::page_bytes)]
    page_bytes: Option<u64>,

    /// Bytes of one read [default: by the page size]
    #[arg(long, value_name = "SIZE", value_parser = values::request_bytes)]
    request_bytes: Option<u32>,

    /// Reads in flight, 1 to 256 [default: 32 MiB worth, 4 to 16]
    #[arg(long, value_name = "N", value_parser = values::depth)]
    depth: Option<u32>,

    /// Compute with a layer only when all of it is there, not as its parts arrive: to compare
    #[arg(long)]
    whole_layers: bool,

    /// Stream a layer with all its experts instead of fetching those that are chosen
    #[arg(long)]
    whole_experts: bool,

    /// While a token is computed, read the experts that the next layer's router will probably choose; turns itself off where
    /// more guesses are wrong than right
    #[arg(long, conflicts_with = "whole_experts")]
    expert_prefetch: bool,

    /// Keep token and per-layer embeddings whole in memory instead of reading the rows that are needed
    #[arg(long)]
    host_rows: bool,
}

/// Checks a memory size early; the engine takes the text.
fn memory(text: &str) -> std::result::Result<String, String> {
    text.parse::<MemorySpec>().map(|_| text.to_owned())
}

fn reader(text: &str) -> std::result::Result<u32, String> {
    match text {
        "auto" => Ok(types::FLEA_READER_AUTO),
        "io_uring" => Ok(types::FLEA_READER_IO_URING),
        "pread" => Ok(types::FLEA_READER_PREAD),
        _ => Err(format!(
            "'{text}' is not a reader; it is auto, io_uring or pread"
        )),
    }
}

fn backing(text: &str) -> std::result::Result<u32, String> {
    match text {
        "private" => Ok(types::FLEA_BACKING_PRIVATE),
        "shared" => Ok(types::FLEA_BACKING_SHARED),
        _ => Err(format!(
            "'{text}' is not a backing; it is private or shared"
        )),
    }
}

/// Runs the command.
///
/// # Errors
/// What [`Session`] says, or a file or stdout that cannot be used.
pub fn command(args: &Args) -> Result<ExitCode> {
    process::restart_with_short_spins();
    process::tune_allocator();
    catch_signals()?;
    if args.no_stream && args.memory.is_some() {
        log::warn!("--memory bounds nothing with --no-stream: llama.cpp maps the whole model");
    }
    let options = session_options(args)?;
    // Read before the model is loaded: a missing prompt should not take a minute to be noticed.
    let prompt = Prompt::read(args)?;
    let mut rows = args
        .logits
        .as_deref()
        .map(|path| LogitsFile::create(path, &args.model))
        .transpose()?;

    let trace = TraceFile::create(args.trace.as_deref())?;
    let mut loading = Loading::start(args.json);
    let mut session = Session::open(&options, &mut |share| {
        loading.show(share);
        !STOP.load(Ordering::Relaxed)
    })?;
    loading.finish();
    if let Some(trace) = &trace {
        session.trace_into(trace.trace())?;
    }

    let mut sampler = Sampler::new(session.model(), &sample_options(args))?;
    let outcome = match prompt {
        Prompt::Conversation => converse(&mut session, &mut sampler, args),
        Prompt::Text(text) => {
            let tokens = text_tokens(&session, &text, args.chat)?;
            answer(&mut session, &mut sampler, &tokens, args, rows.as_mut())
        }
        Prompt::Tokens(tokens) => answer(&mut session, &mut sampler, &tokens, args, rows.as_mut()),
    };
    let label = |layer| session.layer_label(layer);
    let written = trace.map_or(Ok(()), |trace| trace.write(&label));
    let outcome = cli::trace::both(outcome, written);
    match rows {
        Some(rows) if outcome.is_ok() => rows.finish()?,
        _ => {}
    }
    outcome
}

/// The first signal asks for a clean stop, the second ends the process at once.
fn catch_signals() -> Result<()> {
    let register = |signal| {
        // In this order: the first signal must not see the flag that it sets itself.
        let exit_code = i32::from(ErrorKind::Canceled.exit_code());
        flag::register_conditional_shutdown(signal, exit_code, &EXIT_AT_ONCE)?;
        flag::register(signal, &STOP)?;
        flag::register(signal, &EXIT_AT_ONCE)
    };
    // A closed terminal is a stop like any other.
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        register(signal)
            .map_err(|error| Error::from_io(&error, "catch SIGINT, SIGTERM and SIGHUP"))?;
    }
    Ok(())
}

/// Waits for standard input: a signal has nothing to stop cleanly then, and must not be held up by the wait.
fn from_stdin<T>(
    read: impl FnOnce(std::io::StdinLock<'static>) -> std::io::Result<T>,
) -> Result<T> {
    EXIT_AT_ONCE.store(true, Ordering::SeqCst);
    let got = read(std::io::stdin().lock());
    EXIT_AT_ONCE.store(STOP.load(Ordering::SeqCst), Ordering::SeqCst);
    got.map_err(|error| Error::from_io(&error, "read standard input"))
}

/// Where the prompt comes from.
#[derive(Debug)]
enum Prompt {
    Text(String),
    Tokens(Vec<Token>),
    Conversation,
}

impl Prompt {
    fn read(args: &Args) -> Result<Self> {
        if let Some(tokens) = &args.prompt_tokens {
            return Ok(Self::Tokens(tokens.clone()));
        }
        if let Some(text) = &args.prompt {
            return Ok(Self::Text(text.clone()));
        }
        match args.file.as_deref() {
            Some(path) if path != Path::new("-") => {
                let text = std::fs::read_to_string(path).map_err(|error| {
                    Error::from_io(
                        &error,
                        format_args!("read the prompt from {}", path.display()),
                    )
                })?;
                Ok(Self::Text(without_last_newline(text)))
            }
            None if args.chat && !args.json => Ok(Self::Conversation),
            None if std::io::stdin().is_terminal() => Err(Error::new(
                ErrorKind::Invalid,
                "no prompt; give one with -p TEXT, -f FILE or on standard input, or --chat for a conversation",
            )),
            _ => {
                let text = from_stdin(std::io::read_to_string)?;
                Ok(Self::Text(without_last_newline(text)))
            }
        }
    }
}

/// A file ends with a newline that is not part of the prompt; llama.cpp's own programs take it off as well.
fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

fn session_options(args: &Args) -> Result<SessionOptions> {
    let streaming = &args.streaming;
    Ok(SessionOptions {
        path: args.model.clone(),
        stream: (!args.no_stream).then(|| StreamOptions {
            memory: args.memory.clone(),
            endpoint: args
                .daemon
                .as_ref()
                .map(|socket| format!("unix:{}", socket.display())),
            backing: match args.daemon {
                None => streaming.backing,
                Some(_) => types::FLEA_BACKING_SHARED,
            },
            reader: streaming.reader,
            slots_count: streaming.slots.unwrap_or(0),
            page_bytes: streaming.page_bytes.unwrap_or(0) as u32, // 4 KiB or 2 MiB
            request_bytes: streaming.request_bytes.unwrap_or(0),
            depth: streaming.depth.unwrap_or(0),
            whole_layers: streaming.whole_layers,
            whole_experts: streaming.whole_experts,
            expert_prefetch: streaming.expert_prefetch,
            host_rows: streaming.host_rows,
            mirrors: streaming.mirror.clone(),
            gpu: args.gpu.run(),
        }),
        context_tokens: args.ctx,
        ubatch_tokens: args.ubatch,
        threads_count: args.threads,
        kv_type: args.kv.kv_type(),
        kv_disk: args.kv.disk()?,
        stop: &STOP,
    })
}

fn sample_options(args: &Args) -> SampleOptions {
    SampleOptions {
        temperature: args.temp,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        ignore_end: args.ignore_eos,
    }
}

fn text_tokens(session: &Session, text: &str, chat: bool) -> Result<Vec<Token>> {
    if chat {
        let text = Chat::new(session.model())?.ask(text)?;
        prompt_tokens(session.model(), &text, true)
    } else {
        prompt_tokens(session.model(), text, true)
    }
}

/// One prompt, one answer.
fn answer(
    session: &mut Session,
    sampler: &mut Sampler,
    tokens: &[Token],
    args: &Args,
    mut rows: Option<&mut LogitsFile>,
) -> Result<ExitCode> {
    let mut reading = Reading::start(session.monitor(), args.json);
    let mut printed = false;
    let generation = session.generate(tokens, args.tokens, sampler, &mut |step| match step {
        Step::Row(row) => {
            reading.finish();
            rows.as_mut().map_or(Ok(()), |rows| rows.write(row))
        }
        Step::Text(_) if args.json => Ok(()),
        Step::Text(text) => {
            printed = true;
            cli::print(text)
        }
    });
    reading.finish();
    if generation.is_err() && printed {
        // What came before the failure stays, and the message gets a line of its own.
        cli::print("\n")?;
    }
    let generation = generation?;
    let figures = session.figures()?;
    if args.json {
        print_answer(session, &generation, &figures)?;
    } else {
        cli::print("\n")?;
    }
    say_summary(&generation, &figures);
    Ok(exit_code(&generation))
}

/// Question and answer until the input ends.
fn converse(session: &mut Session, sampler: &mut Sampler, args: &Args) -> Result<ExitCode> {
    let mut chat = Chat::new(session.model())?;
    let interactive = std::io::stdin().is_terminal();
    let mut first = true;
    loop {
        if interactive {
            cli::print("> ")?;
        }
        let mut question = String::new();
        if from_stdin(|mut input| input.read_line(&mut question))? == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        if question.trim().is_empty() {
            continue;
        }
        let text = chat.ask(&question)?;
        let tokens = prompt_tokens(session.model(), &text, first)?;
        first = false;
        let mut reading = Reading::start(session.monitor(), false);
        let generation = session.generate(&tokens, args.tokens, sampler, &mut |step| match step {
            Step::Row(_) => {
                reading.finish();
                Ok(())
            }
            Step::Text(text) => cli::print(text),
        });
        reading.finish();
        let generation = generation?;
        cli::print("\n")?;
        say_summary(&generation, &session.figures()?);
        match generation.end {
            End::Stopped => return Ok(exit_code(&generation)),
            End::ContextFull => {
                log::warn!(
                    "the context of {} tokens is full; give a larger --ctx",
                    session.context_tokens()
                );
                return Ok(ExitCode::SUCCESS);
            }
            End::Limit | End::Text => chat.answered(&generation.text)?,
        }
    }
}

fn exit_code(generation: &Generation) -> ExitCode {
    if generation.end == End::Stopped {
        ExitCode::from(ErrorKind::Canceled.exit_code())
    } else {
        ExitCode::SUCCESS
    }
}
