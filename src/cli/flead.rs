//! `flead`: from the command line, the environment and a file to a daemon that serves.

use std::path::PathBuf;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::daemon::config::{self, Overrides};
use crate::daemon::service::Service;
use crate::daemon::{Listener, Server, notify};
use crate::error::Result;

/// Shown below `flead --help`.
pub const EXAMPLES: &str = "\
Examples:
  flead --models /srv/models --memory 16GiB
  flead --config /etc/flea/flead.toml
  flead --socket /tmp/flea.sock --models . --memory 4GiB &
  flea run --daemon /tmp/flea.sock model.gguf -p \"Once upon a time\"

flead stays in the foreground. SIGHUP reads the file again, SIGTERM ends it in order. A flag wins over FLEA_* variables,
those over the file.";

/// What `flead` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file to read [default: /etc/flea/flead.toml, where there is one]
    #[arg(long, value_name = "FILE", env = "FLEA_CONFIG")]
    config: Option<PathBuf>,

    /// Where to listen [default: /run/flea/flea.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// What all pools together may take: 16GiB, or auto
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,

    /// A directory that models may be opened from; may be given more than once
    #[arg(long, value_name = "DIR")]
    models: Vec<PathBuf>,

    /// What moves the weights: auto, io_uring or pread
    #[arg(long, value_name = "WHICH")]
    reader: Option<String>,

    /// A loopback address at which Prometheus may fetch /metrics [default: off]
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<String>,

    /// Any other key of flead.toml, such as limits.clients=16; may be given more than once
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
}

fn setting(text: &str) -> std::result::Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    let key = key.trim();
    if config::keys().iter().any(|known| known == key) {
        return Ok((key.to_owned(), value.trim().to_owned()));
    }
    Err(format!(
        "'{key}' is no key of flead.toml; `flea-ctl config show` lists them"
    ))
}

impl Args {
    fn overrides(&self) -> Overrides {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        let mut overrides = Overrides::from_environment(variables);
        let absolute = |path: &PathBuf| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            path.display().to_string()
        };
        if let Some(socket) = &self.socket {
            overrides.flag("socket", "--socket", absolute(socket));
        }
        let plain = [
            ("memory", "--memory", &self.memory),
            ("reader", "--reader", &self.reader),
            ("metrics_listen", "--metrics-listen", &self.metrics_listen),
        ];
        for (key, name, value) in plain {
            if let Some(value) = value {
                overrides.flag(key, name, value.clone());
            }
        }
        for (key, value) in &self.set {
            overrides.flag(key, "--set", value.clone());
        }
        if !self.models.is_empty() {
            let all: Vec<String> = self.models.iter().map(absolute).collect();
            overrides.flag("models", "--models", all.join(":"));
        }
        overrides
    }
}

/// A client takes four descriptors, and most shells start programs with 1024. The hard limit is what we were granted.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::warn!("the limit of open files stays as it is: {errno}");
    }
}

/// Serves until a signal ends it.
///
/// # Errors
/// What is wrong with the configuration or the socket; a model to preload that cannot be opened.
pub fn command(args: &Args, verbose: u8) -> Result<()> {
    let overrides = args.overrides();
    let loaded = config::load(args.config.as_deref(), &overrides)?;
    super::start_daemon_logging(&loaded.config.log, verbose);
    super::warn_about_environment();
    let settings = loaded.settings()?;
    raise_descriptors();
    let listener = match notify::listener()? {
        Some(fd) => Listener::inherited(fd)?,
        None => Listener::bind(&settings)?,
    };
    // The server first: it takes the signals for every thread that is started afterwards.
    let mut server = Server::new(settings, listener)?;
    let mut service = Service::new(loaded, args.config.clone(), overrides)?;
    server.run(&mut service)
}
