//! What makes a configuration good: bounds of every value, the words for what is wrong, and which keys are live.

use std::path::Path;

use super::{Config, Limits, Mistake, keys};
use crate::io::DEPTH_MOST;
use crate::plan::{SLOTS_MAX, SLOTS_MIN};
use crate::proto::PACKET_BYTES_MAX;
use crate::units::{GIB, HumanBytes, KIB, MIB, MemorySpec, PAGE_2M, PAGE_4K};

/// Keys, and sections as a whole, that a running daemon takes over at SIGHUP. All others need a restart.
pub const KEYS_LIVE: [&str; 8] = [
    "memory", "models", "users", "groups", "admins", "limits", "pressure", "weights",
];

/// A Unix socket's address has room for this many bytes, the closing zero aside.
const SOCKET_PATH_MOST: usize = 107;
/// The shortest packet that every request fits in.
const PACKET_LEAST_BYTES: u64 = 4 * KIB;
/// The longest packet of the protocol.
const PACKET_MOST_BYTES: u64 = PACKET_BYTES_MAX as u64;
const RESERVE_MOST_BYTES: u64 = 1024 * GIB;
const SECOND_NS: u64 = 1_000_000_000;

/// Whether a running daemon takes `key` over.
pub(super) fn is_live(key: &str) -> bool {
    let section = key.split('.').next().unwrap_or(key);
    KEYS_LIVE.contains(&section)
}

/// The first value that cannot be, in the order of the file.
pub(super) fn first_mistake(config: &Config) -> Option<Mistake> {
    socket(config)
        .or_else(|| memory(config))
        .or_else(|| paths(config))
        .or_else(|| names(config))
        .or_else(|| reading(config))
        .or_else(|| metrics(config))
        .or_else(|| log(config))
        .or_else(|| limits(&config.limits))
        .or_else(|| pressure(config))
        .or_else(|| weights(config))
}

fn mistake(key: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Option<Mistake> {
    Some(Mistake {
        key: key.to_owned(),
        problem: problem.into(),
        remedy: remedy.into(),
    })
}

/// A mistake unless `value` lies in the bounds, both included.
fn within(key: &str, value: u64, least: u64, most: u64) -> Option<Mistake> {
    if (least..=most).contains(&value) {
        return None;
    }
    mistake(
        key,
        format!("{value} is out of bounds"),
        format!("write {least} to {most}"),
    )
}

fn absolute(key: &str, path: &Path) -> Option<Mistake> {
    if path.is_absolute() {
        return None;
    }
    let problem = format!("'{}' is not an absolute path", path.display());
    mistake(
        key,
        problem,
        "write the path from the root, beginning with /",
    )
}

fn socket(config: &Config) -> Option<Mistake> {
    let length = config.socket.as_os_str().len();
    absolute("socket", &config.socket).or_else(|| {
        (length > SOCKET_PATH_MOST).then_some(())?;
        let problem =
            format!("the path has {length} bytes, a socket's may have {SOCKET_PATH_MOST}");
        mistake(
            "socket",
            problem,
            "choose a shorter one, such as /run/flea/flea.sock",
        )
    })
}

fn memory(config: &Config) -> Option<Mistake> {
    match config.memory {
        MemorySpec::Percent(percent) => mistake(
            "memory",
            format!("'{percent}%' is a share of a model, and flead serves many"),
            "write a size such as 24GiB, or auto",
        ),
        MemorySpec::Bytes(bytes) if bytes < 32 * MIB => {
            let problem = format!("{} is too little for any model", HumanBytes(bytes));
            mistake("memory", problem, "write at least 32MiB, or auto")
        }
        MemorySpec::Auto | MemorySpec::Bytes(_) => None,
    }
}

fn paths(config: &Config) -> Option<Mistake> {
    if config.models.is_empty() {
        let remedy = "list at least one directory that models may be opened from";
        return mistake(
            "models",
            "the list is empty, so no model could be opened",
            remedy,
        );
    }
    let models = config
        .models
        .iter()
        .find_map(|path| absolute("models", path));
    models.or_else(|| {
        config
            .preload
            .iter()
            .find_map(|path| absolute("preload", path))
    })
}

fn names(config: &Config) -> Option<Mistake> {
    for (key, names) in [
        ("users", &config.users),
        ("groups", &config.groups),
        ("admins", &config.admins),
    ] {
        if names
            .iter()
            .any(|name| name.trim().is_empty() || name.contains(['\0', ':']))
        {
            return mistake(
                key,
                "a name is empty or has a colon",
                "write names as in /etc/passwd or /etc/group",
            );
        }
    }
    None
}

fn reading(config: &Config) -> Option<Mistake> {
    let (slots, page, request) = (config.slots, config.page_bytes, config.request_bytes);
    if slots != 0 && !(u64::from(SLOTS_MIN)..=u64::from(SLOTS_MAX)).contains(&slots) {
        let remedy = format!("write {SLOTS_MIN} to {SLOTS_MAX}, or auto");
        return mistake("slots", format!("{slots} is out of bounds"), remedy);
    }
    if ![0, PAGE_4K, PAGE_2M].contains(&page) {
        let problem = format!("there are no pages of {page} bytes");
        return mistake("page_bytes", problem, "write 4KiB, 2MiB or auto");
    }
    if config.depth > u64::from(DEPTH_MOST) {
        let problem = format!("{} requests in flight are too many", config.depth);
        return mistake(
            "depth",
            problem,
            format!("write at most {DEPTH_MOST}, or auto"),
        );
    }
    if !request.is_multiple_of(PAGE_4K) || request > GIB {
        let problem = format!("{request} bytes cannot be one request");
        return mistake(
            "request_bytes",
            problem,
            "write a multiple of 4KiB, at most 1GiB, or auto",
        );
    }
    None
}

fn metrics(config: &Config) -> Option<Mistake> {
    let address = config.metrics_listen?;
    if address.ip().is_loopback() {
        return None;
    }
    mistake(
        "metrics_listen",
        format!("{address} is not a loopback address, and flead answers no other machine"),
        "write 127.0.0.1:9464, and let an exporter on this machine fetch from there",
    )
}

fn log(config: &Config) -> Option<Mistake> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let good = |part: &str| {
        let level = part
            .rsplit_once('=')
            .map_or(part, |(_, level)| level)
            .trim();
        LEVELS.contains(&level)
    };
    if config.log.split(',').all(good) {
        return None;
    }
    let remedy = format!(
        "write one of {}, or a list such as info,flea::io=debug",
        LEVELS.join(", ")
    );
    mistake("log", format!("'{}' names no level", config.log), remedy)
}

fn limits(limits: &Limits) -> Option<Mistake> {
    let packet = limits.packet_bytes;
    let per_user = u64::from(limits.clients_per_user);
    within("limits.clients", limits.clients.into(), 1, 10_000)
        .or_else(|| within("limits.clients_per_user", per_user, 1, 10_000))
        .or_else(|| within("limits.models", limits.models.into(), 1, 1000))
        .or_else(|| within("limits.leases", limits.leases.into(), 1, 65_536))
        .or_else(|| {
            within(
                "limits.packet_bytes",
                packet,
                PACKET_LEAST_BYTES,
                PACKET_MOST_BYTES,
            )
        })
        .or_else(|| {
            within(
                "limits.requests_per_second",
                limits.requests_per_second.into(),
                1,
                1_000_000,
            )
        })
        .or_else(|| {
            (!(SECOND_NS / 10..=3600 * SECOND_NS).contains(&limits.lease_timeout_ns))
                .then_some(())?;
            mistake(
                "limits.lease_timeout",
                "out of bounds",
                "write 100ms to 60m",
            )
        })
}

fn pressure(config: &Config) -> Option<Mistake> {
    let settings = &config.pressure;
    if !(SECOND_NS / 1000..=SECOND_NS).contains(&settings.stall_ns) {
        let problem = "the stall that counts as pressure is measured within 2 s";
        return mistake("pressure.stall", problem, "write 1ms to 1s");
    }
    if settings.reserve_bytes > RESERVE_MOST_BYTES {
        return mistake(
            "pressure.reserve",
            "no machine can keep so much",
            "write at most 1024GiB, or auto",
        );
    }
    if !(SECOND_NS..=3600 * SECOND_NS).contains(&settings.hold_ns) {
        return mistake("pressure.hold", "out of bounds", "write 1s to 60m");
    }
    None
}

fn weights(config: &Config) -> Option<Mistake> {
    config.weights.iter().find_map(|(model, weight)| {
        within(&format!("weights.{model}"), (*weight).into(), 1, 10_000)
    })
}

/// What to say about a key that there is not: the nearest one that there is.
pub(super) fn unknown_key(name: &str) -> Mistake {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let nearest = keys()
        .into_iter()
        .map(|key| (distance(name, &last(&key)), key))
        .min()
        .filter(|(steps, _)| *steps <= 1 + name.len() / 4);
    let remedy = match nearest {
        Some((_, key)) => format!("did you mean {key}?"),
        None => "flead.toml(5) lists the keys".to_owned(),
    };
    Mistake {
        key: name.to_owned(),
        problem: "there is no such key here".to_owned(),
        remedy,
    }
}

/// Letters to add, drop or change to get from one word to the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (index, letter) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, other) in to.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}
