//! flead.toml: what may be set, where a value came from, and what of it a running daemon can take over.
//!
//! A value comes from a flag, else from a `FLEA_*` variable, else from the file, else from the defaults; the origin of
//! every key is kept and can be shown. Nothing unknown is ignored: a key that flea does not have is an error that names
//! file, line, key and remedy. Reading the file is the only I/O; everything else is a pure function, so that
//! `flea-ctl config check`, the daemon's start and its SIGHUP agree. Place: beside
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`; it holds what the daemon gives the rooms to go by.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::pressure;
use super::settings::WEIGHT_DEFAULT;
use crate::error::{Error, ErrorKind, Result};
use crate::io::ReaderKind;
use crate::proto::{PACKET_BYTES_MAX, SOCKET_DEFAULT};
use crate::units::MemorySpec;

mod check;
mod reload;
mod settings;
pub(super) mod text;

#[cfg(test)]
mod tests;

pub use check::KEYS_LIVE;
pub use reload::{Change, Changes, reloaded};

/// Where the file is when nobody says otherwise.
pub const PATH_DEFAULT: &str = "/etc/flea/flead.toml";

/// Everything that can be set. The field names are the keys of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The Unix socket that clients attach to.
    pub socket: PathBuf,
    /// The mode of that socket, in octal.
    #[serde(with = "text::mode")]
    pub socket_mode: u32,
    /// Everything flead may hold: a size, or `auto`.
    #[serde(with = "text::memory")]
    pub memory: MemorySpec,
    /// Directories that models may be opened from, symlinks resolved; nothing outside of them.
    pub models: Vec<PathBuf>,
    /// Models that are opened before flead says that it is ready, and stay open.
    pub preload: Vec<PathBuf>,
    /// Users that may attach, by name or number. With no user and no group named, whoever the socket's mode lets in.
    pub users: Vec<String>,
    /// Groups whose members may attach, by name or number.
    pub groups: Vec<String>,
    /// Users that may change things (budget, load, unload, pin); root and flead's own user always may.
    pub admins: Vec<String>,
    /// Slots of a model's ring; 0 = automatic.
    #[serde(with = "text::auto")]
    pub slots: u64,
    /// Page size of the windows; 0 = by the size of the layers.
    #[serde(with = "text::auto_size")]
    pub page_bytes: u64,
    /// Whether anything but 2 MiB pages is refused.
    pub huge_pages: HugePages,
    /// Whether pools and reader threads are bound to the drive's NUMA node.
    pub numa: bool,
    /// How weights are read.
    #[serde(with = "text::reader")]
    pub reader: ReaderKind,
    /// Requests in flight; 0 = automatic.
    #[serde(with = "text::auto")]
    pub depth: u64,
    /// Length of one request; 0 = automatic.
    #[serde(with = "text::auto_size")]
    pub request_bytes: u64,
    /// Where Prometheus may fetch metrics: a loopback address, or `off`.
    #[serde(with = "text::listen")]
    pub metrics_listen: Option<SocketAddr>,
    /// What is logged: `warn`, `info`, `debug`, or per module `info,flea::io=debug`.
    pub log: String,
    /// What one client, and all of them, may take.
    pub limits: Limits,
    /// When the pool gives memory back to the machine.
    pub pressure: pressure::Settings,
    /// Shares of the drive and the memory by model: a path or a file name, 1 to 10000.
    pub weights: BTreeMap<String, u32>,
}

/// The section `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections at a time.
    pub clients: u32,
    /// Connections of one user at a time.
    pub clients_per_user: u32,
    /// Models loaded at a time.
    pub models: u32,
    /// Layers that one client may hold; the ring's own bound, slots - 2, holds besides.
    pub leases: u32,
    /// The longest packet that is read.
    #[serde(with = "text::size")]
    pub packet_bytes: u64,
    /// Requests of one client per second, on average.
    pub requests_per_second: u32,
    /// A lease older than this that others wait for is revoked.
    #[serde(rename = "lease_timeout", with = "text::duration")]
    pub lease_timeout_ns: u64,
}

/// What becomes of a pool that gets no 2 MiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// It works with 4 KiB pages, and says so in `flea-ctl status`.
    #[default]
    Auto,
    /// It is refused.
    Require,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: SOCKET_DEFAULT.into(),
            socket_mode: 0o660,
            memory: MemorySpec::Auto,
            models: vec!["/var/lib/flea/models".into()],
            preload: Vec::new(),
            users: Vec::new(),
            groups: Vec::new(),
            admins: Vec::new(),
            slots: 0,
            page_bytes: 0,
            huge_pages: HugePages::Auto,
            numa: true,
            reader: ReaderKind::Auto,
            depth: 0,
            request_bytes: 0,
            metrics_listen: None,
            log: "info".to_owned(),
            limits: Limits::default(),
            pressure: pressure::Settings::default(),
            weights: BTreeMap::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 1024,
            clients_per_user: 256,
            models: 32,
            leases: 4096,
            packet_bytes: PACKET_BYTES_MAX as u64,
            requests_per_second: 1000,
            lease_timeout_ns: 30_000_000_000,
        }
    }
}

impl Config {
    /// The weight of the model at `path`: by its path, else by its file name, else [`WEIGHT_DEFAULT`].
    #[must_use]
    pub fn weight_of(&self, path: &Path) -> u32 {
        let by_path = path.to_str().and_then(|path| self.weights.get(path));
        let name = path.file_name().and_then(|name| name.to_str());
        by_path
            .or_else(|| self.weights.get(name?))
            .copied()
            .unwrap_or(WEIGHT_DEFAULT)
    }

    /// Every key and its value, in the order of the file.
    #[must_use]
    pub fn leaves(&self) -> Vec<(String, Value)> {
        let mut leaves = Vec::new();
        collect_leaves("", &Value::Table(self.table()), &mut leaves);
        leaves
    }

    fn table(&self) -> Table {
        Table::try_from(self).expect("every value has a form in TOML")
    }
}

/// As a file that means the same.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.table())
    }
}

/// Flattens tables to dotted keys.
fn collect_leaves(prefix: &str, value: &Value, leaves: &mut Vec<(String, Value)>) {
    let Value::Table(table) = value else {
        leaves.push((prefix.to_owned(), value.clone()));
        return;
    };
    for (key, value) in table {
        collect_leaves(&join(prefix, key), value, leaves);
    }
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() {
        key.to_owned()
    } else {
        format!("{prefix}.{key}")
    }
}

/// Who set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody.
    Default,
    /// The file, on this line.
    File {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// This variable of the environment.
    Environment(String),
    /// This flag, with its dashes.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// A configuration and the origin of each of its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// Keys that somebody set; all others are defaults.
    origins: BTreeMap<String, Origin>,
}

impl Loaded {
    /// Who set `key` (dotted, as in [`Config::leaves`]).
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }
}

/// What stands above the file: values as text, by key, with their origin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    values: Vec<(String, String, Origin)>,
}

impl Overrides {
    /// The `FLEA_*` variables that name a key: `FLEA_MEMORY`, `FLEA_LIMITS_CLIENTS`. Lists are split at colons, like PATH.
    #[must_use]
    pub fn from_environment(variables: impl Iterator<Item = (String, String)>) -> Self {
        let known: BTreeMap<String, String> = keys()
            .into_iter()
            .map(|key| (variable_of(&key), key))
            .collect();
        let values = variables
            .filter_map(|(name, text)| {
                let key = known.get(&name)?.clone();
                Some((key, text, Origin::Environment(name)))
            })
            .collect();
        Self { values }
    }

    /// Adds a flag; it wins over everything that was there before.
    pub fn flag(&mut self, key: &str, name: &str, text: impl Into<String>) {
        let origin = Origin::Flag(name.to_owned());
        self.values.push((key.to_owned(), text.into(), origin));
    }
}

/// Every key that has a fixed name; the models under `[weights]` have none.
#[must_use]
pub fn keys() -> Vec<String> {
    let leaves = Config::default().leaves();
    leaves.into_iter().map(|(key, _)| key).collect()
}

/// The variable that sets `key`.
#[must_use]
pub fn variable_of(key: &str) -> String {
    format!("FLEA_{}", key.replace('.', "_").to_ascii_uppercase())
}

/// Reads the configuration: the file at `path`, or at [`PATH_DEFAULT`] if there is one, under the `overrides`.
///
/// # Errors
/// `NotFound` where a file was named and is not there; `Invalid` with file, line, key and remedy.
pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Loaded> {
    let chosen = path.unwrap_or_else(|| Path::new(PATH_DEFAULT));
    match std::fs::read_to_string(chosen) {
        Ok(text) => parse(Some((chosen, &text)), overrides),
        Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            parse(None, overrides)
        }
        Err(error) => Err(Error::from_io(
            &error,
            format_args!("read the configuration {}", chosen.display()),
        )),
    }
}

/// As [`load`], with the file's text at hand.
///
/// # Errors
/// `Invalid` with file, line, key and remedy.
pub fn parse(file: Option<(&Path, &str)>, overrides: &Overrides) -> Result<Loaded> {
    let mut table = Table::new();
    let mut origins = BTreeMap::new();
    if let Some((path, text)) = file {
        table = parse_file(path, text, &mut origins)?;
    }
    for (key, text, origin) in &overrides.values {
        apply_override(&mut table, key, text, origin)?;
        origins.insert(key.clone(), origin.clone());
    }
    let config: Config = Table::try_into(table)
        .map_err(|error: toml::de::Error| Error::new(ErrorKind::Invalid, error.message()))?;
    let loaded = Loaded { config, origins };
    match check::first_mistake(&loaded.config) {
        None => Ok(loaded),
        Some(mistake) => Err(invalid(&loaded.origin(&mistake.key), &mistake)),
    }
}

/// A value that cannot be, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mistake {
    key: String,
    problem: String,
    remedy: String,
}

fn invalid(origin: &Origin, mistake: &Mistake) -> Error {
    let Mistake {
        key,
        problem,
        remedy,
    } = mistake;
    let key = if key.is_empty() {
        String::new()
    } else {
        format!("{key}: ")
    };
    let remedy = if remedy.is_empty() {
        String::new()
    } else {
        format!("; {remedy}")
    };
    Error::new(
        ErrorKind::Invalid,
        format!("{origin}: {key}{problem}{remedy}"),
    )
}

/// The file as a table, and the line of each of its keys. Types are checked here, where their place is still known.
fn parse_file(path: &Path, text: &str, origins: &mut BTreeMap<String, Origin>) -> Result<Table> {
    let mut places = Vec::new();
    let origin_at = |at: usize| Origin::File {
        path: path.to_owned(),
        line: line_of(text, at),
    };
    let describe = |error: &toml::de::Error, places: &[(String, Range<usize>)]| {
        let at = error.span().map_or(0, |span| span.start);
        let unknown = unknown_field(error.message());
        let key = match &unknown {
            Some(name) => name.clone(),
            None => places
                .iter()
                .filter(|(_, range)| range.contains(&at))
                .map(|(key, _)| key.clone())
                .next_back()
                .unwrap_or_default(),
        };
        let mistake = match unknown {
            Some(name) => check::unknown_key(&name),
            None => Mistake {
                key,
                problem: error.message().replace('\n', ", "),
                remedy: String::new(),
            },
        };
        invalid(&origin_at(at), &mistake)
    };
    let document = DeTable::parse(text).map_err(|error| describe(&error, &[]))?;
    collect_places("", document.get_ref(), &mut places);
    // Types and unknown keys, with the place of the first mistake.
    toml::from_str::<Config>(text).map_err(|error| describe(&error, &places))?;
    for (key, range) in &places {
        origins.insert(key.clone(), origin_at(range.start));
    }
    toml::from_str(text).map_err(|error| describe(&error, &places))
}

/// Where each leaf of the document stands, from its key to the end of its value.
fn collect_places(prefix: &str, table: &DeTable<'_>, places: &mut Vec<(String, Range<usize>)>) {
    for (key, value) in table.iter() {
        let name = join(prefix, key.get_ref());
        match value.get_ref() {
            DeValue::Table(inner) => collect_places(&name, inner, places),
            _ => places.push((name, key.span().start..value.span().end + 1)),
        }
    }
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// The name in serde's "unknown field `x`, expected one of ...".
fn unknown_field(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    Some(rest.split('`').next()?.to_owned())
}

/// Puts a value given as text in its place. It takes the type of the key's default.
fn apply_override(table: &mut Table, key: &str, text: &str, origin: &Origin) -> Result<()> {
    let value = typed(key, text);
    let mut alone = Table::new();
    place(&mut alone, key, value.clone());
    let checked: std::result::Result<Config, toml::de::Error> = Table::try_into(alone);
    if let Err(error) = checked {
        let mistake = Mistake {
            key: key.to_owned(),
            problem: error.message().replace('\n', ", "),
            remedy: String::new(),
        };
        return Err(invalid(origin, &mistake));
    }
    place(table, key, value);
    Ok(())
}

fn typed(key: &str, text: &str) -> Value {
    let defaults = Config::default().leaves();
    let default = defaults.into_iter().find(|(name, _)| name == key);
    match default.map(|(_, value)| value) {
        Some(Value::Array(_)) => text
            .split(':')
            .filter(|part| !part.is_empty())
            .map(|part| Value::String(part.to_owned()))
            .collect::<Vec<_>>()
            .into(),
        Some(Value::Integer(_)) => text
            .parse::<i64>()
            .map_or_else(|_| text.into(), Value::Integer),
        Some(Value::Boolean(_)) => text
            .parse::<bool>()
            .map_or_else(|_| text.into(), Value::Boolean),
        _ => text.into(),
    }
}

/// Sets `a.b` in nested tables.
fn place(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let inner = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                place(inner, rest, value);
            }
        }
    }
}
