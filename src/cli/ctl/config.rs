//! `flea-ctl config`: reads flead.toml as flead would, without a daemon.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::Options;
use crate::cli::table::{Align, Table};
use crate::daemon::config::{self, KEYS_LIVE, Loaded, Overrides};
use crate::error::Result;

/// What to do with the file.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Say whether flead could start with this file, and warn of what it would stumble over later
    Check(FileArgs),
    /// Show every value and who set it: a FLEA_* variable, a line of the file, or nobody
    Show(FileArgs),
}

/// Which file.
#[derive(Debug, clap::Args)]
pub struct FileArgs {
    /// The file [default: /etc/flea/flead.toml, which need not exist]
    #[arg(value_name = "FILE", env = "FLEA_CONFIG")]
    pub file: Option<PathBuf>,
}

/// Runs `flea-ctl config`.
///
/// # Errors
/// `NotFound` for the file, `Invalid` for what stands in it.
pub fn command(options: &Options, command: &Command) -> Result<()> {
    match command {
        Command::Check(args) => check(options, args),
        Command::Show(args) => show(options, args),
    }
}

fn load(args: &FileArgs) -> Result<Loaded> {
    let variables = std::env::vars_os()
        .filter_map(|(name, text)| Some((name.into_string().ok()?, text.into_string().ok()?)));
    let overrides = Overrides::from_environment(variables);
    config::load(args.file.as_deref(), &overrides)
}

fn check(options: &Options, args: &FileArgs) -> Result<()> {
    let loaded = load(args)?;
    loaded.settings()?;
    let warnings = warnings(&loaded);
    if options.json {
        return crate::cli::print_json(&json!({ "ok": true, "warnings": warnings }));
    }
    for warning in &warnings {
        crate::cli::print(&format!("warning: {warning}\n"))?;
    }
    crate::cli::print("ok\n")
}

/// What is allowed and will not work: directories and models that are not there yet.
fn warnings(loaded: &Loaded) -> Vec<String> {
    let mut warnings = Vec::new();
    let missing = |key: &str, path: &PathBuf, what: &str| {
        let origin = loaded.origin(key);
        format!("{origin}: {key}: {} is not {what}", path.display())
    };
    for path in &loaded.config.models {
        if !path.is_dir() {
            warnings.push(missing("models", path, "a directory"));
        }
    }
    for path in &loaded.config.preload {
        if !path.exists() {
            warnings.push(missing("preload", path, "there"));
        }
        if !loaded
            .config
            .models
            .iter()
            .any(|directory| path.starts_with(directory))
        {
            warnings.push(missing("preload", path, "below any directory of models"));
        }
    }
    warnings
}

fn show(options: &Options, args: &FileArgs) -> Result<()> {
    let loaded = load(args)?;
    let leaves = loaded.config.leaves();
    let is_live = |key: &str| KEYS_LIVE.contains(&key.split('.').next().unwrap_or(key));
    if options.json {
        let mut keys = Map::new();
        for (key, value) in leaves {
            let (origin, live) = (loaded.origin(&key).to_string(), is_live(&key));
            keys.insert(
                key,
                json!({ "value": plain(&value), "origin": origin, "reload": live }),
            );
        }
        return crate::cli::print_json(&Value::Object(keys));
    }
    let mut table = Table::new(&[
        ("key", Align::Left),
        ("value", Align::Left),
        ("from", Align::Left),
        ("reload", Align::Left),
    ]);
    for (key, value) in leaves {
        let (origin, reload) = (
            loaded.origin(&key).to_string(),
            if is_live(&key) { "live" } else { "restart" },
        );
        table.row([key, value.to_string(), origin, reload.to_owned()]);
    }
    crate::cli::print(&table.to_string())
}

/// A value of the file as JSON.
fn plain(value: &toml::Value) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}
