//! A memory cgroup of our own, version 1 or 2: a hard limit for a program that is measured or tested.
//!
//! Invariant: it is gone when dropped (as far as nobody is in it any more). A program enters it before it is executed,
//! so every page it ever touches is charged there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::child::{Finished, without_flea_variables};
use crate::error::{Error, ErrorKind, Result};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A memory cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    limit_bytes: u64,
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
        let group = Self {
            path,
            limit_bytes,
            peak,
            events,
        };
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
        without_flea_variables(&mut inside);
        inside
    }

    /// How often the kernel has killed somebody in here for memory; 0 where it does not say.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.number(self.events, "oom_kill ").unwrap_or(0)
    }

    /// That a program has not been killed in here for memory.
    ///
    /// # Errors
    /// `NoMemory`: it has.
    pub fn check_survived(&self, done: &Finished) -> Result<()> {
        if done.was_killed() && self.oom_kills() > 0 {
            return Err(Error::new(ErrorKind::NoMemory, "killed: out of memory"));
        }
        Ok(())
    }

    /// The most memory charged at once; `None` where the kernel does not say (version 2 before Linux 5.19).
    #[must_use]
    pub fn peak_bytes(&self) -> Option<u64> {
        self.number(self.peak, "")
    }

    /// The most memory charged at once, of the limit.
    #[must_use]
    pub fn peak_of_limit(&self) -> Option<f64> {
        let peak_bytes = self.peak_bytes()?;
        Some(peak_bytes as f64 / self.limit_bytes.max(1) as f64)
    }

    fn number(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.path.join(file)).ok()?;
        let value = text.lines().find_map(|line| line.strip_prefix(key))?;
        value.trim().parse().ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            log::debug!("remove {}: {error}", self.path.display());
        }
    }
}
