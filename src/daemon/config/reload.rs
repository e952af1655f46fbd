//! SIGHUP: what a new configuration changes, what of it a running daemon takes over, and what needs a restart. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use toml::{Table, Value};

use super::{Config, check, join};

/// One value that a new configuration has otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The key.
    pub key: String,
    /// What it was, as it stands in the file.
    pub old: String,
    /// What it is to be.
    pub new: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.old, self.new)
    }
}

/// What a reload changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// Taken over at once.
    pub live: Vec<Change>,
    /// Only a restart takes these over.
    pub restart: Vec<Change>,
}

impl Changes {
    /// The differences between two configurations.
    #[must_use]
    pub fn between(old: &Config, new: &Config) -> Self {
        let mut changes = Self::default();
        let old: BTreeMap<String, Value> = old.leaves().into_iter().collect();
        let new: BTreeMap<String, Value> = new.leaves().into_iter().collect();
        let shown =
            |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), Value::to_string);
        let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            if old.get(key) == new.get(key) {
                continue;
            }
            let change = Change {
                key: key.clone(),
                old: shown(old.get(key)),
                new: shown(new.get(key)),
            };
            if check::is_live(key) {
                changes.live.push(change);
            } else {
                changes.restart.push(change);
            }
        }
        changes
    }

    /// True when there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live.is_empty() && self.restart.is_empty()
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing changed");
        }
        let lines: Vec<String> = (self.live.iter().map(|change| format!("applied {change}")))
            .chain((self.restart.iter()).map(|change| format!("needs a restart {change}")))
            .collect();
        f.write_str(&lines.join("; "))
    }
}

/// What a running daemon has after a reload: the new values of the live keys, the old ones of all others.
#[must_use]
pub fn reloaded(old: &Config, new: &Config) -> Config {
    let mut table = old.table();
    // A section whose keys are free, such as weights, is replaced as a whole.
    for (key, value) in new.table() {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(kept)), Value::Table(fresh)) if check::is_live(&key) => {
                *kept = fresh;
            }
            (Some(Value::Table(kept)), Value::Table(fresh)) => {
                let live = |name: &String| check::is_live(&join(&key, name));
                kept.extend(fresh.into_iter().filter(|(name, _)| live(name)));
            }
            (kept, value) if check::is_live(&key) => match kept {
                Some(kept) => *kept = value,
                None => drop(table.insert(key, value)),
            },
            _ => {}
        }
    }
    Table::try_into(table).expect("values of two good configurations make a good one")
}
