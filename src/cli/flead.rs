//! `flead`: from the command line, the environment and a file to a daemon that serves; and what surrounds it: the
//! service manager, SIGHUP.

use std::path::PathBuf;

use crate::daemon::config::{self, Overrides};
use crate::daemon::notify::{self, Notifier};
use crate::daemon::{Listener, Server, Settings, Surroundings};
use crate::error::Result;
use crate::units::HumanBytes;

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
    #[arg(long, value_name = "FILE")]
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
        if let Some(memory) = &self.memory {
            overrides.flag("memory", "--memory", memory.clone());
        }
        if !self.models.is_empty() {
            let all: Vec<String> = self.models.iter().map(absolute).collect();
            overrides.flag("models", "--models", all.join(":"));
        }
        overrides
    }

    fn load(&self) -> Result<config::Loaded> {
        config::load(self.config.as_deref(), &self.overrides())
    }
}

/// Serves until a signal ends it.
///
/// # Errors
/// What is wrong with the configuration or the socket; a model to preload that cannot be opened.
pub fn command(args: &Args) -> Result<()> {
    let loaded = args.load()?;
    let settings = loaded.settings()?;
    let listener = match notify::listener()? {
        Some(fd) => Listener::inherited(fd)?,
        None => Listener::bind(&settings)?,
    };
    let mut server = Server::new(settings, listener)?;
    let mut around = Around {
        args,
        loaded,
        notifier: Notifier::new(),
    };
    around.notifier.starting("opening models");
    server.run(&mut around)
}

/// What surrounds the daemon.
struct Around<'a> {
    args: &'a Args,
    loaded: config::Loaded,
    notifier: Notifier,
}

impl Around<'_> {
    fn status(server: &Server) -> String {
        let (budget_bytes, _) = server.budget();
        format!(
            "{} models, {} connections, budget {}",
            server.models_count(),
            server.sessions_count(),
            HumanBytes(budget_bytes)
        )
    }
}

impl Surroundings for Around<'_> {
    fn ready(&mut self, server: &Server) {
        self.notifier.ready(&Self::status(server));
    }

    fn tick(&mut self, server: &Server) -> Option<u64> {
        self.notifier.alive();
        self.notifier.status(&Self::status(server));
        None
    }

    fn reload(&mut self, present: &Settings) -> Option<Settings> {
        self.notifier.reloading();
        let taken = self.args.load().and_then(|new| {
            let mut new = new;
            log::info!(
                "{}",
                config::Changes::between(&self.loaded.config, &new.config)
            );
            new.config = config::reloaded(&self.loaded.config, &new.config);
            let settings = new.settings()?;
            Ok((new, settings))
        });
        let answer = match taken {
            Ok((loaded, settings)) => {
                self.loaded = loaded;
                (settings != *present).then_some(settings)
            }
            Err(error) => {
                log::error!("not reloaded: {error}");
                None
            }
        };
        self.notifier.ready("reloaded");
        answer
    }

    fn stopping(&mut self) {
        self.notifier.stopping();
    }
}
