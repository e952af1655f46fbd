//! A memory cgroup of our own, version 1 or 2: a hard limit for a program that is measured or tested.
//!
//! Invariant: it is gone when dropped (as far as nobody is in it any more). A program enters it before it is executed,
//! so every page it ever touches is charged there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A memory cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    peak: &'static str,
    events: &'static str,
}

impl Cgroup {
    /// Makes one with a limit. Needs root, or a delegated cgroup.
    ///
    /// # Errors
    /// It cannot be made or limited here.
    pub fn new(name: &str, limit_bytes: u64) -> Result<Self> {
        let (root, limit, peak, events) = if Path::new(V1).is_dir() {
            (
                V1,
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
                "memory.oom_control",
            )
        } else {
            (V2, "memory.max", "memory.peak", "memory.events")
        };
        let path = Path::new(root).join(format!("flea-{name}-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| {
            Error::from_io(
                &error,
                format_args!("make the memory cgroup {}", path.display()),
            )
        })?;
        let group = Self { path, peak, events };
        fs::write(group.path.join(limit), limit_bytes.to_string()).map_err(|error| {
            Error::from_io(
                &error,
                format_args!("limit the memory cgroup {}", group.path.display()),
            )
        })?;
        Ok(group)
    }

    /// The command, started inside: a shell moves itself in and becomes the program. `FLEA_*` is not handed down.
    #[must_use]
    pub fn wrap(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside
            .arg("-c")
            .arg(r#"echo $$ > "$0/cgroup.procs" && exec "$@""#)
            .arg(&self.path);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FLEA_") {
                inside.env_remove(name);
            }
        }
        inside
    }

    /// How often the kernel has killed somebody in here for memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.number(self.events, "oom_kill ")
    }

    /// The most memory charged at once.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.number(self.peak, "")
    }

    fn number(&self, file: &str, key: &str) -> u64 {
        let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap_or("0");
        value.trim().parse().unwrap_or(0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            log::debug!("remove {}: {error}", self.path.display());
        }
    }
}
