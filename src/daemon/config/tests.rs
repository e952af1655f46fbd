//! Tests of flead.toml: precedence, origins, the words of every mistake, and what a reload takes over.

use super::*;
use crate::units::{GIB, MIB};
use proptest::prelude::*;

fn at() -> &'static Path {
    Path::new("/etc/flea/flead.toml")
}

fn file(text: &str) -> Result<Loaded> {
    parse(Some((at(), text)), &Overrides::default())
}

fn refusal(text: &str) -> String {
    let error = file(text).expect_err("must be refused");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    error.to_string()
}

fn environment(pairs: &[(&str, &str)]) -> Overrides {
    let owned = pairs
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
    Overrides::from_environment(owned)
}

#[test]
fn an_empty_file_is_the_defaults() {
    let loaded = file("").unwrap();
    assert_eq!(loaded.config, Config::default());
    assert_eq!(loaded.origin("socket"), Origin::Default);
}

#[test]
fn every_kind_of_value_is_read() {
    let text = r#"
socket = "/tmp/f.sock"
memory = "24GiB"
models = ["/srv/models", "/data"]
users = ["alice"]
admins = ["root"]
slots = 4
page_bytes = "2MiB"
huge_pages = "require"
numa = false
reader = "pread"
depth = "auto"
request_bytes = 1048576
metrics_listen = "[::1]:9464"
log = "info,flea::io=debug"

[limits]
clients = 3
packet_bytes = "16KiB"
lease_timeout = "5s"

[pressure]
watch = false
reserve = "2GiB"
stall = "100ms"

[weights]
"/srv/models/big.gguf" = 300
"small.gguf" = 50
"#;
    let config = file(text).unwrap().config;
    assert_eq!(config.memory, MemorySpec::Bytes(24 * GIB));
    assert_eq!(
        config.models,
        [Path::new("/srv/models"), Path::new("/data")]
    );
    assert_eq!((config.slots, config.depth), (4, 0));
    assert_eq!((config.page_bytes, config.request_bytes), (2 * MIB, MIB));
    assert_eq!(config.huge_pages, HugePages::Require);
    assert_eq!(config.reader, ReaderKind::Pread);
    assert_eq!(config.metrics_listen, "[::1]:9464".parse().ok());
    assert_eq!(config.limits.clients, 3);
    assert_eq!(config.limits.models, Limits::default().models);
    assert_eq!(config.limits.packet_bytes, 16 << 10);
    assert_eq!(config.limits.lease_timeout_ns, 5_000_000_000);
    assert!(!config.pressure.watch && !config.numa);
    assert_eq!(config.pressure.reserve_bytes, 2 * GIB);
    assert_eq!(config.weight_of(Path::new("/srv/models/big.gguf")), 300);
    assert_eq!(config.weight_of(Path::new("/data/small.gguf")), 50);
    assert_eq!(
        config.weight_of(Path::new("/data/other.gguf")),
        WEIGHT_DEFAULT
    );
}

#[test]
fn a_flag_beats_the_environment_beats_the_file() {
    let text = "memory = \"1GiB\"\n\n[limits]\nclients = 1\nmodels = 1\nleases = 1\n";
    let mut overrides = environment(&[
        ("FLEA_LIMITS_CLIENTS", "2"),
        ("FLEA_LIMITS_MODELS", "2"),
        ("FLEA_MODELS", "/a:/b"),
        ("FLEA_NUMA", "false"),
        ("FLEA_ENDPOINT", "unix:/not/ours"),
    ]);
    overrides.flag("limits.clients", "--limit-clients", "3");
    let loaded = parse(Some((at(), text)), &overrides).unwrap();
    let limits = &loaded.config.limits;
    assert_eq!((limits.clients, limits.models, limits.leases), (3, 2, 1));
    assert_eq!(loaded.config.models, [Path::new("/a"), Path::new("/b")]);
    let shown = |key: &str| loaded.origin(key).to_string();
    assert_eq!(shown("limits.clients"), "flag --limit-clients");
    assert_eq!(
        shown("limits.models"),
        "environment variable FLEA_LIMITS_MODELS"
    );
    assert_eq!(shown("limits.leases"), "/etc/flea/flead.toml:6");
    assert_eq!(shown("memory"), "/etc/flea/flead.toml:1");
    assert_eq!(shown("numa"), "environment variable FLEA_NUMA");
    assert_eq!(shown("socket"), "default");
}

#[test]
fn mistakes_name_file_line_key_and_remedy() {
    for (text, expected) in [
        (
            "\nmemroy = \"1GiB\"\n",
            "/etc/flea/flead.toml:2: memroy: there is no such key here; did you mean memory?",
        ),
        (
            "[limits]\nclient = 3\n",
            "/etc/flea/flead.toml:2: client: there is no such key here; did you mean limits.clients?",
        ),
        (
            "frobnicate = 3\n",
            "/etc/flea/flead.toml:1: frobnicate: there is no such key here; flead.toml(5) lists the keys",
        ),
        (
            "memory = \"lots\"\n",
            "/etc/flea/flead.toml:1: memory: 'lots' is not a size; write 4GiB, 4GB, 512M, a number of bytes, or a percentage such as 50%",
        ),
        (
            "memory = \"50%\"\n",
            "/etc/flea/flead.toml:1: memory: '50%' is a share of a model, and flead serves many; write a size such as 24GiB, or auto",
        ),
        (
            "# first\nmetrics_listen = \"0.0.0.0:9464\"\n",
            "/etc/flea/flead.toml:2: metrics_listen: 0.0.0.0:9464 is not a loopback address, and flead answers no other machine; \
             write 127.0.0.1:9464, and let an exporter on this machine fetch from there",
        ),
        (
            "models = []\n",
            "/etc/flea/flead.toml:1: models: the list is empty, so no model could be opened; list at least one directory that models may be opened from",
        ),
        (
            "[limits]\npacket_bytes = \"1MiB\"\n",
            "/etc/flea/flead.toml:2: limits.packet_bytes: 1048576 is out of bounds; write 4096 to 65536",
        ),
        (
            "[weights]\n\"m.gguf\" = 0\n",
            "/etc/flea/flead.toml:2: weights.m.gguf: 0 is out of bounds; write 1 to 10000",
        ),
        (
            "page_bytes = \"1MiB\"\n",
            "/etc/flea/flead.toml:1: page_bytes: there are no pages of 1048576 bytes; write 4KiB, 2MiB or auto",
        ),
        (
            "log = \"loud\"\n",
            "/etc/flea/flead.toml:1: log: 'loud' names no level; write one of off, error, warn, info, debug, trace, or a list such as info,flea::io=debug",
        ),
    ] {
        assert_eq!(refusal(text), expected, "{text}");
    }
}

#[test]
fn wrong_types_and_broken_files_name_their_place() {
    for (text, place, says) in [
        ("socket = 3\n", ":1: socket: ", "string"),
        (
            "\n[limits]\nclients = \"x\"\n",
            ":3: limits.clients: ",
            "u32",
        ),
        ("[limits]\nclients = -1\n", ":2: limits.clients: ", "u32"),
        (
            "[limits]\nlease_timeout = 30\n",
            ":2: limits.lease_timeout: ",
            "with its unit",
        ),
        (
            "huge_pages = \"maybe\"\n",
            ":1: huge_pages: ",
            "`auto` or `require`",
        ),
        ("a = 1\nsocket = \"x\n", ":2: ", "string"),
        ("depth = 1\ndepth = 2\n", ":2: ", "duplicate"),
        (
            "socket = \"relative.sock\"\n",
            ":1: socket: ",
            "not an absolute path",
        ),
        (
            "socket_mode = \"0999\"\n",
            ":1: socket_mode: ",
            "write 0660",
        ),
        ("slots = 1\n", ":1: slots: ", "write 2 to 64, or auto"),
        (
            "request_bytes = 5000\n",
            ":1: request_bytes: ",
            "a multiple of 4KiB",
        ),
        ("depth = 100000\n", ":1: depth: ", "at most"),
        ("users = [\"\"]\n", ":1: users: ", "a name is empty"),
        (
            "[pressure]\nstall = \"3s\"\n",
            ":2: pressure.stall: ",
            "write 1ms to 1s",
        ),
    ] {
        let said = refusal(text);
        assert!(
            said.contains(place) && said.contains(says),
            "{text:?}: {said}"
        );
    }
}

#[test]
fn overrides_are_checked_and_blamed() {
    let refused = |overrides: &Overrides| parse(None, overrides).unwrap_err().to_string();
    assert_eq!(
        refused(&environment(&[("FLEA_MEMORY", "lots")])),
        "environment variable FLEA_MEMORY: memory: 'lots' is not a size; write 4GiB, 4GB, 512M, a number of bytes, or a percentage such as 50%"
    );
    let mut flags = Overrides::default();
    flags.flag("metrics_listen", "--metrics-listen", "192.168.0.1:80");
    let said = refused(&flags);
    assert!(
        said.starts_with("flag --metrics-listen: metrics_listen: "),
        "{said}"
    );
    let said = refused(&environment(&[("FLEA_LIMITS_CLIENTS", "many")]));
    assert!(
        said.starts_with("environment variable FLEA_LIMITS_CLIENTS: limits.clients: "),
        "{said}"
    );
}

#[test]
fn a_named_file_must_be_there_and_the_default_one_need_not() {
    let missing = Path::new("/nonexistent/flead.toml");
    let error = load(Some(missing), &Overrides::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("/nonexistent/flead.toml"));
}

#[test]
fn a_reload_takes_live_keys_and_names_the_others() {
    let old = Config::default();
    let text =
        "memory = \"2GiB\"\nreader = \"pread\"\n[limits]\nclients = 9\n[weights]\n\"a.gguf\" = 7\n";
    let new = file(text).unwrap().config;
    let changes = Changes::between(&old, &new);
    assert_eq!(
        changes.to_string(),
        "applied limits.clients: 1024 -> 9; applied memory: \"auto\" -> \"2GiB\"; \
         applied weights.a.gguf: unset -> 7; needs a restart reader: \"auto\" -> \"pread\""
    );
    let running = reloaded(&old, &new);
    assert_eq!(running.reader, ReaderKind::Auto);
    assert_eq!(running.memory, MemorySpec::Bytes(2 * GIB));
    assert_eq!(running.weights, new.weights);
    assert_eq!(Changes::between(&old, &old).to_string(), "nothing changed");
    // Weights that the new file does not have any more are gone.
    assert!(reloaded(&new, &old).weights.is_empty());
}

#[test]
fn what_is_live_is_named_by_keys_that_exist() {
    let keys = keys();
    for live in KEYS_LIVE {
        let found = keys
            .iter()
            .any(|key| key == live || key.starts_with(&format!("{live}.")));
        assert!(found || live == "weights", "{live}");
    }
}

/// The sample: as it is, and with every line of it switched on, it is the defaults.
#[test]
fn the_sample_shows_every_key_and_its_default() {
    let sample = include_str!("../../../systemd/flead.toml");
    assert_eq!(file(sample).unwrap().config, Config::default());
    let is_setting = |line: &str| {
        line.strip_prefix('#')
            .is_some_and(|rest| rest.contains(" = ") && !rest.starts_with(' '))
    };
    let switched_on: Vec<&str> = sample
        .lines()
        .map(|line| if is_setting(line) { &line[1..] } else { line })
        .collect();
    let mut loaded = file(&switched_on.join("\n")).unwrap();
    for key in keys() {
        assert_ne!(
            loaded.origin(&key),
            Origin::Default,
            "{key} is not in the sample"
        );
    }
    // These two have no default to show.
    loaded.config.preload.clear();
    loaded.config.weights.clear();
    assert_eq!(loaded.config, Config::default());
}

#[test]
fn the_manual_page_has_every_key() {
    let page = include_str!("../../../docs/flead.toml.5");
    for key in keys() {
        let name = key.rsplit('.').next().unwrap();
        let said = page.lines().any(|line| {
            line.starts_with(".BR") && line.split([' ', ',', '"']).any(|word| word == name)
        });
        assert!(said, "{key} is missing in docs/flead.toml.5");
    }
}

fn any_config() -> impl Strategy<Value = Config> {
    let sizes = prop_oneof![Just(0u64), Just(4096), Just(2 * MIB)];
    let weights = proptest::collection::btree_map("[a-z./\"]{1,12}", 1u32..=10_000, 0..4);
    (
        sizes,
        0u64..=64,
        1u32..10_000,
        1u64..=36_000,
        any::<bool>(),
        weights,
        1u64..=64,
    )
        .prop_map(|(page_bytes, depth, clients, tenths, flag, weights, gib)| {
            let mut config = Config {
                page_bytes,
                depth,
                numa: flag,
                weights,
                memory: if flag {
                    MemorySpec::Auto
                } else {
                    MemorySpec::Bytes(gib * GIB)
                },
                metrics_listen: flag.then(|| "127.0.0.1:9464".parse().unwrap()),
                ..Config::default()
            };
            config.limits.clients = clients;
            config.limits.lease_timeout_ns = tenths * 100_000_000;
            config
        })
}

proptest! {
    /// What `flea-ctl config show` writes is a file that means the same.
    #[test]
    fn what_is_written_is_read_back(config in any_config()) {
        prop_assert_eq!(file(&config.to_string()).unwrap().config, config);
    }

    /// After a reload only keys that need a restart differ from the new file, and none of the live ones.
    #[test]
    fn a_reload_leaves_nothing_live_behind(old in any_config(), new in any_config()) {
        let running = reloaded(&old, &new);
        prop_assert!(Changes::between(&running, &new).live.is_empty());
        prop_assert!(Changes::between(&old, &running).restart.is_empty());
    }

    /// Any text is a configuration or an error with a place; never a panic.
    #[test]
    fn any_text_is_answered(text in "([a-z_]{1,9}( = )?[\"0-9\\[\\]a-zA-Z\n.]{0,9}\n?){0,6}") {
        if let Err(error) = file(&text) {
            prop_assert!(error.to_string().starts_with("/etc/flea/flead.toml:"), "{error}");
        }
    }
}
