//! What the page may show and ask for: models, devices, settings, files, and the secret of its address.
//!
//! Invariant: a request names things that were named on the command line or are built in; it cannot make the program
//! read another file or fetch another URL.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::Parser;
use serde_json::{Value, json};

use super::measure::{Measurer, What};
use crate::cli::{analyze, ctl, first_paragraph};
use crate::error::{Error, ErrorKind, Result};
use crate::tools::analyze::{Source, Strip, device, registry};

/// Bytes of the secret in the address.
const SECRET_BYTES: usize = 16;
/// Longest file of results that is read.
const RESULT_BYTES_MAX: u64 = 64 << 20;
/// The choice of every device there is.
const ALL: &str = "all";
/// The choice of this machine as it is now.
const HERE: &str = "here";

/// Settings of a request, or of the command line: names as in the options of `flea analyze`, with their values.
pub(super) type Settings = Vec<(String, String)>;

/// A model that can be chosen.
struct Shown {
    /// As it was typed.
    name: String,
    source: Source,
    given: bool,
}

/// Devices that can be chosen together.
struct Place {
    name: String,
    label: String,
    /// The options of `flea analyze` that mean them.
    options: Vec<String>,
}

/// Vectors to compare codecs on.
struct Vectors {
    file: PathBuf,
    kind: String,
    dim: u32,
}

/// Everything the page is made of.
pub(super) struct Board {
    models: Vec<Shown>,
    places: Vec<Place>,
    first: Settings,
    daemon: ctl::Options,
    vectors: Option<Vectors>,
    table: PathBuf,
    secret: String,
    address: OnceLock<SocketAddr>,
    pub(super) measurer: Measurer,
}

#[derive(Debug, Parser)]
#[command(name = "flea analyze", no_binary_name = true)]
struct AnalyzeLine {
    #[command(flatten)]
    args: analyze::Args,
}

/// Parses options as the command line does.
pub(super) fn parse_line<T: Parser>(line: &[String]) -> Result<T> {
    T::try_parse_from(line).map_err(|error| {
        let said = first_paragraph(&error.render().to_string());
        Error::new(ErrorKind::Invalid, said)
    })
}

/// Settings as options, `--name=value`; empty ones are left to their defaults.
///
/// # Errors
/// `Invalid` for a name that is not among `allowed`.
pub(super) fn options(settings: &Settings, allowed: &[&str]) -> Result<Vec<String>> {
    let mut line = Vec::new();
    for (name, value) in settings {
        if !allowed.contains(&name.as_str()) {
            let known = allowed.join(", ");
            let said = format!("no setting is called '{name}'; there are {known}");
            return Err(Error::new(ErrorKind::Invalid, said));
        }
        if !value.is_empty() {
            line.push(format!("--{name}={value}"));
        }
    }
    Ok(line)
}

impl Board {
    /// Finds everything that the arguments name.
    ///
    /// # Errors
    /// A model that cannot be found or cannot be asked about as the arguments do; files that hold something else.
    pub(super) fn new(args: &super::Args) -> Result<Self> {
        let mut models = Vec::new();
        for name in &args.models {
            models.push(Shown {
                source: Source::find(name)?,
                name: name.clone(),
                given: true,
            });
        }
        for known in registry::models()? {
            let name = known.recipe.name;
            models.push(Shown {
                source: Source::find(&name)?,
                name,
                given: false,
            });
        }
        let board = Self {
            first: first(args, &models[0].name),
            models,
            places: places(&args.device)?,
            daemon: ctl::Options {
                socket: args.socket.clone(),
                json: true,
                verbose: 0,
            },
            vectors: args
                .vectors
                .clone()
                .zip(args.dim)
                .map(|(file, dim)| Vectors {
                    file,
                    dim,
                    kind: args.kind.clone(),
                }),
            table: args.table.clone(),
            secret: secret()?,
            address: OnceLock::new(),
            measurer: Measurer::default(),
        };
        board.check(args)?;
        Ok(board)
    }

    /// Asks once what the page will ask first: a mistake is told now, and not on the page.
    fn check(&self, args: &super::Args) -> Result<()> {
        self.analyze(&self.first)?;
        for name in &args.models {
            self.analyze(&with(&self.first, "model", name))?;
        }
        let vectors = self.vectors.as_ref().map(|vectors| &vectors.file);
        for path in vectors.into_iter().chain([&self.table]) {
            std::fs::metadata(path).map_err(|error| Error::from_io(&error, path.display()))?;
        }
        for (what, file) in [
            (What::KvBench, &args.kv_bench),
            (What::KvCompare, &args.kv_compare),
            (What::Rows, &args.rows),
        ] {
            if let Some(path) = file {
                let from = format!("from {}", path.display());
                self.measurer.keep(what, from, load(path, what)?);
            }
        }
        Ok(())
    }

    /// Says where the page is served from now on. Gives its whole address.
    pub(super) fn open(&self, address: SocketAddr) -> String {
        let address = self.address.get_or_init(|| address);
        format!("http://{address}/{}/", self.secret)
    }

    /// Whether a Host header names this program: not another name that a foreign page had resolved to the loopback.
    pub(super) fn is_host(&self, host: &str) -> bool {
        let Some(address) = self.address.get() else {
            return false;
        };
        let names = ["localhost".to_owned(), address.ip().to_string()];
        let port = address.port();
        host == address.to_string()
            || names.iter().any(|name| host == format!("{name}:{port}"))
            // A browser leaves the port of HTTP out.
            || port == 80 && names.iter().any(|name| host.trim_matches(['[', ']']) == name)
    }

    /// Whether `text` is the secret. Looks at every letter, however early one differs.
    pub(super) fn is_secret(&self, text: &str) -> bool {
        let pairs = text.bytes().zip(self.secret.bytes());
        text.len() == self.secret.len() && pairs.fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }

    /// The settings that the page begins with.
    pub(super) fn first(&self) -> Settings {
        self.first.clone()
    }

    /// What there is to choose from, and what is chosen first.
    ///
    /// # Errors
    /// None; what is built in is tested.
    pub(super) fn describe(&self) -> Result<Value> {
        let model = |shown: &Shown| {
            let geometry = &shown.source.geometry;
            json!({
                "name": shown.name,
                "label": geometry.name,
                "given": shown.given,
                "filed": shown.source.catalog.is_some(),
                "context_max_count": geometry.context_max_count,
                "encoders": geometry.encoders.iter().map(|e| &e.name).collect::<Vec<_>>(),
            })
        };
        let place = |place: &Place| json!({"name": place.name, "label": place.label, "options": place.options});
        let first: serde_json::Map<String, Value> = self
            .first
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "known": analyze::listing()?,
            "models": self.models.iter().map(model).collect::<Vec<_>>(),
            "devices": self.places.iter().map(place).collect::<Vec<_>>(),
            "first": first,
            "weight_bits_default": analyze::WEIGHT_BITS_DEFAULT,
            "strip_all": Strip::ALL,
            "socket": self.daemon.path().to_string_lossy(),
            "table": std::path::absolute(&self.table).unwrap_or_else(|_| self.table.clone()).to_string_lossy(),
            "vectors": self.vectors.as_ref().map(|v| json!({
                "file": v.file.to_string_lossy(), "type": v.kind, "dim": v.dim,
            })),
        }))
    }

    /// The names of all models.
    pub(super) fn model_names(&self) -> impl Iterator<Item = &str> {
        self.models.iter().map(|shown| shown.name.as_str())
    }

    /// The answer of `flea analyze` with these settings.
    ///
    /// # Errors
    /// `Invalid` for a model or device that is not on the page, and what `flea analyze` refuses.
    pub(super) fn analyze(&self, settings: &Settings) -> Result<analyze::Report> {
        let wanted = |name: &str| {
            let found = settings.iter().find(|(own, _)| own == name);
            found.map_or("", |(_, value)| value.as_str())
        };
        let model = wanted("model");
        let shown = self.models.iter().find(|shown| shown.name == model);
        let shown = shown.ok_or_else(|| {
            let names: Vec<&str> = self.model_names().collect();
            unknown("model", model, &names)
        })?;
        let place = match wanted("device") {
            "" => ALL,
            name => name,
        };
        let found = self.places.iter().find(|own| own.name == place);
        let found = found.ok_or_else(|| {
            let names: Vec<&str> = self.places.iter().map(|own| own.name.as_str()).collect();
            unknown("device", place, &names)
        })?;
        let rest = settings
            .iter()
            .filter(|(name, _)| name != "model" && name != "device");
        let rest: Settings = rest.cloned().collect();
        let mut line = options(&rest, &["context", "weight-bits", "kv-type", "strip"])?;
        line.extend(found.options.iter().cloned());
        line.extend(["--".to_owned(), model.to_owned()]);
        let parsed: AnalyzeLine = parse_line(&line)?;
        analyze::examine(&parsed.args, model, &shown.source)
    }

    /// What `flea-ctl status --json` prints.
    ///
    /// # Errors
    /// `Connection`, with the path that was tried; what the daemon says.
    pub(super) fn status(&self) -> Result<Value> {
        ctl::status_answer(&self.daemon)
    }

    /// What `flea-ctl stats --json` prints.
    ///
    /// # Errors
    /// As [`Board::status`].
    pub(super) fn stats(&self) -> Result<Value> {
        ctl::stats_answer(&self.daemon)
    }

    /// Begins a measurement.
    ///
    /// # Errors
    /// `Invalid` for settings that cannot be, `Busy` while another runs.
    pub(super) fn measure(&self, what: What, settings: &Settings) -> Result<()> {
        let fixed = match (what, &self.vectors) {
            (What::KvBench, _) => Vec::new(),
            (What::Rows, _) => vec!["--".to_owned(), self.table.to_string_lossy().into_owned()],
            (What::KvCompare, Some(vectors)) => vec![
                format!("--dim={}", vectors.dim),
                format!("--type={}", vectors.kind),
                "--".to_owned(),
                vectors.file.to_string_lossy().into_owned(),
            ],
            (What::KvCompare, None) => {
                let said =
                    "there are no vectors to compare codecs on; begin with --vectors FILE --dim N";
                return Err(Error::new(ErrorKind::Invalid, said));
            }
        };
        self.measurer.start(what, settings, fixed)
    }
}

/// The same settings with another value of one.
pub(super) fn with(settings: &Settings, name: &str, value: &str) -> Settings {
    let mut changed: Settings = settings.clone();
    changed.retain(|(own, _)| own != name);
    changed.push((name.to_owned(), value.to_owned()));
    changed
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    let known = known.join(", ");
    let said = format!("no {what} of this page is called '{name}'; there are {known}");
    Error::new(ErrorKind::Invalid, said)
}

fn first(args: &super::Args, model: &str) -> Settings {
    let place = match args.device.as_slice() {
        [only] => only.as_str(),
        _ => ALL,
    };
    let or_empty = |value: Option<String>| value.unwrap_or_default();
    [
        ("model", model.to_owned()),
        (
            "context",
            or_empty(args.context.map(|count| count.to_string())),
        ),
        (
            "weight-bits",
            or_empty(args.weight_bits.map(|bits| bits.to_string())),
        ),
        ("kv-type", args.kv_type.to_string()),
        ("device", place.to_owned()),
        ("strip", String::new()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// All of them, each that is built in, those that were given, and this machine.
fn places(given: &[String]) -> Result<Vec<Place>> {
    let built_in = device::built_in()?;
    let option = |name: &str| vec!["--device".to_owned(), name.to_owned()];
    let is_file = |name: &&String| name.ends_with(".toml") || name.ends_with(".json");
    let mut all = option(ALL);
    all.extend(given.iter().filter(is_file).flat_map(|name| option(name)));
    let mut places = vec![Place {
        name: ALL.to_owned(),
        label: "every device".to_owned(),
        options: all,
    }];
    for device in &built_in {
        places.push(Place {
            name: device.name.clone(),
            label: device.label.clone(),
            options: option(&device.name),
        });
    }
    for name in given {
        if is_file(&name) {
            places.push(Place {
                name: name.clone(),
                label: "as given".to_owned(),
                options: option(name),
            });
        } else if name != ALL {
            // By its name or its alias; an unknown one is told here.
            let device = device::find(&built_in, name)?;
            if device.name != *name {
                places.push(Place {
                    name: name.clone(),
                    label: device.label.clone(),
                    options: option(name),
                });
            }
        }
    }
    places.push(Place {
        name: HERE.to_owned(),
        label: "this machine, memory that is free now".to_owned(),
        options: vec!["--memory".to_owned(), "auto".to_owned()],
    });
    Ok(places)
}

/// Letters that nobody can guess.
pub(super) fn secret() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; SECRET_BYTES];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Error::from_io(&error, "read /dev/urandom"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The JSON that a measurement of this kind wrote.
fn load(path: &Path, what: What) -> Result<Value> {
    use std::io::Read;
    let failed =
        |error: std::io::Error| Error::from_io(&error, format_args!("read {}", path.display()));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(RESULT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let invalid = |why: &str| {
        let said = format!(
            "{}: {why}; `{} --json` writes one",
            path.display(),
            what.verb()
        );
        Error::new(ErrorKind::Invalid, said)
    };
    if bytes.len() as u64 > RESULT_BYTES_MAX {
        return Err(invalid("too long for a result"));
    }
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| invalid(&format!("this is no JSON ({error})")))?;
    if !value[what.list()].is_array() {
        return Err(invalid(&format!("it has no list of {}", what.list())));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    #[command(no_binary_name = true)]
    struct Line {
        #[command(flatten)]
        args: super::super::Args,
    }

    fn board(line: &str) -> Result<Board> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        Board::new(&parse_line::<Line>(&words)?.args)
    }

    #[test]
    fn a_host_is_an_own_name_with_the_own_port() {
        let own = board("--context 512").expect("a board");
        assert!(!own.is_host("127.0.0.1:80"), "nothing is served yet");
        own.open("[::1]:80".parse().expect("an address"));
        for host in ["[::1]:80", "[::1]", "localhost", "localhost:80"] {
            assert!(own.is_host(host), "{host}");
        }
        for host in [
            "",
            "::2",
            "localhost:81",
            "localhost.evil.example",
            "[::1]:8",
            "127.0.0.1",
        ] {
            assert!(!own.is_host(host), "{host}");
        }
    }

    #[test]
    fn secrets_differ_and_no_other_is_taken() {
        let (a, b) = (
            board("--context 1").expect("a"),
            board("--context 1").expect("b"),
        );
        assert_ne!(a.secret, b.secret);
        assert!(a.is_secret(&a.secret.clone()) && !a.is_secret(&b.secret));
        assert!(!a.is_secret("") && !a.is_secret(&a.secret[1..]));
    }

    #[test]
    fn settings_become_options_of_the_command() {
        let settings = |text: &str| -> Settings {
            let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
            pairs.map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
        };
        let allowed = ["context", "strip"];
        assert_eq!(
            options(&settings("context=5&strip="), &allowed).expect("options"),
            ["--context=5"]
        );
        let error = options(&settings("list=1"), &allowed).expect_err("no setting");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let own = board("--kv-type q8_0 --device tablet_ufs3").expect("a board");
        let line =
            serde_json::to_value(own.analyze(&own.first()).expect("a report")).expect("JSON");
        assert_eq!(
            (&line["kv_type"], &line["devices"][0]["name"]),
            (&json!("q8_0"), &json!("tablet-3072"))
        );
        let twice = with(&own.first(), "model", "llama-3.2-1b");
        assert_eq!(twice.iter().filter(|(name, _)| name == "model").count(), 1);
        let mut both = twice.clone();
        both.extend([
            ("context".to_owned(), "5".to_owned()),
            ("context".to_owned(), "6".to_owned()),
        ]);
        assert_eq!(
            own.analyze(&both).expect_err("twice").kind(),
            ErrorKind::Invalid
        );
    }
}
