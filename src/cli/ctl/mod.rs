//! `flea-ctl`: asks a running flead over its socket, and prints what it says as a table or, with `--json`, as it came.
//!
//! Every verb is one request; nothing is decided here. A daemon that cannot be reached is exit code 3, with the path
//! that was tried and the remedy.

pub mod config;
mod show;
pub mod top;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};
use crate::proto::message::{self, Method};
use crate::proto::snapshot::{ClientState, LeaseState, ModelState, Snapshot};
use crate::proto::{Control, SOCKET_DEFAULT};
use crate::units::HumanBytes;

/// Shown below `flea-ctl --help`.
pub const EXAMPLES: &str = "\
Examples:
  flea-ctl status
  flea-ctl load /var/lib/flea/models/big.gguf --pin
  flea-ctl budget 12GiB
  flea-ctl top
  flea-ctl metrics --textfile /var/lib/node_exporter/flea.prom
  flea-ctl config check /etc/flea/flead.toml

Exit codes: 0 done, 1 failed, 2 usage, 3 daemon unreachable, 4 budget or resource refused, 5 not a model file or its \
bytes are the cause, 130 interrupted.";

/// Options of every verb.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The daemon's socket: a path, or unix:PATH [default: /run/flea/flea.sock]
    #[arg(
        long,
        value_name = "PATH",
        global = true,
        env = "FLEA_ENDPOINT",
        hide_env_values = true
    )]
    pub socket: Option<String>,

    /// Print one JSON object
    #[arg(long, global = true)]
    pub json: bool,

    /// Say more on stderr
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Arguments of `load`.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// The model, in one of the directories that flead may open models from
    #[arg(value_name = "MODEL")]
    pub path: PathBuf,

    /// Also keep it when memory is wanted for another
    #[arg(long)]
    pub pin: bool,
}

/// Arguments of `unload`, `pin` and `unpin`.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// The model's number or path, as `flea-ctl models` lists them
    #[arg(value_name = "MODEL")]
    pub model: String,
}

/// Arguments of `budget`.
#[derive(Debug, clap::Args)]
pub struct BudgetArgs {
    /// The new size: 12GiB, 12GB, 512M; left out, the present one is shown
    #[arg(value_name = "SIZE", value_parser = crate::cli::size)]
    pub bytes: Option<u64>,
}

/// Arguments of `metrics`.
#[derive(Debug, clap::Args)]
pub struct MetricsArgs {
    /// Write them to this file, all at once, for node_exporter's textfile collector
    #[arg(long, value_name = "FILE")]
    pub textfile: Option<PathBuf>,
}

impl Options {
    /// The socket's path: the argument or FLEA_ENDPOINT, without its `unix:`.
    pub(super) fn path(&self) -> &Path {
        let text = self.socket.as_deref().unwrap_or(SOCKET_DEFAULT);
        Path::new(text.strip_prefix("unix:").unwrap_or(text))
    }

    /// Connects to the daemon.
    fn connect(&self) -> Result<Control> {
        let name = concat!("flea-ctl/", env!("CARGO_PKG_VERSION"));
        Control::connect_as(self.path(), name).map_err(|error| unreachable(self.path(), &error))
    }

    /// One request.
    fn ask(&self, method: Method, parameters: &Value) -> Result<Value> {
        self.connect()?.call(method, parameters)
    }

    /// Prints an answer: as it came with `--json`, else as `text` shows it.
    fn answer(&self, answer: &Value, text: impl FnOnce() -> Result<String>) -> Result<()> {
        if self.json {
            crate::cli::print_json(answer)
        } else {
            crate::cli::print(&text()?)
        }
    }
}

/// Whatever the reason why there is no connection, the daemon is unreachable: the same exit code, and what to do.
fn unreachable(path: &Path, error: &Error) -> Error {
    let remedy = match error.kind() {
        ErrorKind::Permission => {
            "add yourself to the group of the socket (usermod -aG flea NAME) and log in again"
                .to_owned()
        }
        ErrorKind::Connection => format!(
            "start it (systemctl start flead.socket, or flead --socket {}), or name another socket with --socket or FLEA_ENDPOINT",
            path.display()
        ),
        _ => return error.clone(),
    };
    Error::new(ErrorKind::Connection, format!("{error}; {remedy}"))
}

/// What `flea-ctl status --json` prints.
///
/// # Errors
/// `Connection` when the daemon cannot be reached; what it answers.
pub(super) fn status_answer(options: &Options) -> Result<Value> {
    options.ask(Method::Status, &json!({}))
}

/// Runs `flea-ctl status`.
///
/// # Errors
/// `Connection` when the daemon cannot be reached; what it answers.
pub fn status(options: &Options) -> Result<()> {
    let answer = status_answer(options)?;
    options.answer(&answer, || Ok(show::status(&snapshot(&answer)?)))
}

/// Runs `flea-ctl models`.
///
/// # Errors
/// As [`status`].
pub fn models(options: &Options) -> Result<()> {
    let models = options.connect()?.list(Method::Models, "models")?;
    let answer = json!({ "models": models });
    options.answer(&answer, || {
        let models: Vec<ModelState> = message::from_value(answer["models"].clone())?;
        Ok(show::models(&models))
    })
}

/// What `flea-ctl stats --json` prints.
///
/// # Errors
/// As [`status`].
pub(super) fn stats_answer(options: &Options) -> Result<Value> {
    let mut daemon = options.connect()?;
    let models = daemon.list(Method::Stats, "models")?;
    // As many clients as a packet has room for; they come with every page of the models.
    let clients = daemon.call(Method::Stats, &json!({}))?["clients"].take();
    Ok(json!({ "models": models, "clients": clients }))
}

/// Runs `flea-ctl stats`.
///
/// # Errors
/// As [`status`].
pub fn stats(options: &Options) -> Result<()> {
    let answer = stats_answer(options)?;
    options.answer(&answer, || {
        let models: Vec<ModelState> = message::from_value(answer["models"].clone())?;
        let clients: Vec<ClientState> = message::from_value(answer["clients"].clone())?;
        Ok(show::stats(&models, &clients))
    })
}

/// Runs `flea-ctl load`.
///
/// # Errors
/// As [`status`]; `NotFound`, `Permission` for a path outside of the allowed directories, `Refused` for the budget.
pub fn load(options: &Options, args: &LoadArgs) -> Result<()> {
    // The daemon has another working directory; links are its business.
    let path = std::path::absolute(&args.path)
        .map_err(|error| Error::from_io(&error, args.path.display()))?;
    let Some(path) = path.to_str() else {
        let context = format!("{}: the path is not UTF-8", path.display());
        return Err(Error::new(ErrorKind::Invalid, context));
    };
    let parameters = json!({ "path": path, "pin": args.pin });
    let answer = options.ask(Method::Load, &parameters)?;
    options.answer(&answer, || Ok(format!("loaded {path}\n")))
}

/// Runs `flea-ctl unload`.
///
/// # Errors
/// As [`status`]; `NotFound`, `Busy` while clients are attached.
pub fn unload(options: &Options, args: &ModelArgs) -> Result<()> {
    named(options, Method::Unload, args, "unloaded")
}

/// Runs `flea-ctl pin`.
///
/// # Errors
/// As [`status`]; `NotFound`.
pub fn pin(options: &Options, args: &ModelArgs) -> Result<()> {
    named(options, Method::Pin, args, "pinned")
}

/// Runs `flea-ctl unpin`.
///
/// # Errors
/// As [`status`]; `NotFound`.
pub fn unpin(options: &Options, args: &ModelArgs) -> Result<()> {
    named(options, Method::Unpin, args, "unpinned")
}

fn named(options: &Options, method: Method, args: &ModelArgs, done: &str) -> Result<()> {
    // A number, or a path: the daemon has another working directory.
    let model = match args.model.parse::<u32>() {
        Ok(_) => args.model.clone(),
        Err(_) => std::path::absolute(&args.model)
            .map_err(|error| Error::from_io(&error, &args.model))?
            .display()
            .to_string(),
    };
    let answer = options.ask(method, &json!({ "model": model }))?;
    options.answer(&answer, || Ok(format!("{done} {}\n", args.model)))
}

/// Runs `flea-ctl leases`.
///
/// # Errors
/// As [`status`].
pub fn leases(options: &Options) -> Result<()> {
    let leases = options.connect()?.list(Method::Leases, "leases")?;
    let answer = json!({ "leases": leases });
    options.answer(&answer, || {
        let leases: Vec<LeaseState> = message::from_value(answer["leases"].clone())?;
        Ok(show::leases(&leases))
    })
}

/// Runs `flea-ctl budget`.
///
/// # Errors
/// As [`status`]; `Refused` with the smallest size that works.
pub fn budget(options: &Options, args: &BudgetArgs) -> Result<()> {
    let parameters = args
        .bytes
        .map_or_else(|| json!({}), |bytes| json!({ "bytes": bytes }));
    let answer = options.ask(Method::Budget, &parameters)?;
    options.answer(&answer, || Ok(show::fields(&answer)))
}

/// Runs `flea-ctl metrics`.
///
/// # Errors
/// As [`status`]; the file cannot be written.
pub fn metrics(options: &Options, args: &MetricsArgs) -> Result<()> {
    let lines = options.connect()?.list(Method::Metrics, "lines")?;
    let mut text = String::new();
    for line in lines.iter().filter_map(Value::as_str) {
        text.push_str(line);
        text.push('\n');
    }
    if let Some(path) = &args.textfile {
        write_whole(path, &text)?;
        let answer = json!({ "textfile": path.display().to_string(), "bytes": text.len() });
        let bytes = HumanBytes(text.len() as u64);
        return options.answer(&answer, || Ok(format!("{bytes} in {}\n", path.display())));
    }
    options.answer(&json!({ "metrics": text }), || Ok(text.clone()))
}

/// A collector that looks at any moment finds the old file or the new one, never a part.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let written = std::fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|error| {
        // Best effort: the failure itself is what has to be told.
        let _ = std::fs::remove_file(&temporary);
        Error::from_io(&error, format_args!("write {}", path.display()))
    })
}

/// Runs `flea-ctl version`. A daemon that cannot be reached is no failure here: it is told.
///
/// # Errors
/// stdout cannot be written.
pub fn version(options: &Options) -> Result<()> {
    let own = env!("CARGO_PKG_VERSION");
    let daemon = options.connect().map(|daemon| daemon.welcome().clone());
    let answer = json!({
        "flea_ctl": own,
        "protocol": crate::proto::PROTOCOL,
        "daemon": daemon.as_ref().ok(),
    });
    options.answer(&answer, || {
        let flead = match &daemon {
            Ok(welcome) => format!("{} (pid {})", welcome.version, welcome.pid),
            Err(error) => format!("not reached: {error}"),
        };
        Ok(format!(
            "flea-ctl {own}, protocol {}\nflead {flead}\n",
            crate::proto::PROTOCOL
        ))
    })
}

fn snapshot(answer: &Value) -> Result<Snapshot> {
    message::from_value(answer.clone())
}
