//! A memory cgroup for one test.

#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A memory cgroup of our own, gone when dropped. Version 1 and 2.
pub struct Cgroup {
    pub path: PathBuf,
    peak: &'static str,
    events: &'static str,
}

impl Cgroup {
    pub fn new(name: &str, limit_bytes: u64) -> Result<Self, String> {
        let (root, limit, peak, events) = if Path::new("/sys/fs/cgroup/memory").is_dir() {
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
                "memory.oom_control",
            )
        } else {
            (
                "/sys/fs/cgroup",
                "memory.max",
                "memory.peak",
                "memory.events",
            )
        };
        let path = Path::new(root).join(format!("flea-test-{name}-{}", std::process::id()));
        fs::create_dir(&path)
            .map_err(|error| format!("no memory cgroup of our own can be made: {error}"))?;
        let group = Self { path, peak, events };
        fs::write(group.path.join(limit), limit_bytes.to_string())
            .map_err(|error| format!("no memory cgroup of our own can be limited: {error}"))?;
        Ok(group)
    }

    /// The command, started inside: a shell moves itself in and becomes the program.
    pub fn wrap(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside
            .arg("-c")
            .arg(r#"echo $$ > "$0/cgroup.procs" && exec "$@""#)
            .arg(&self.path);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FLEA_") {
                inside.env_remove(name);
            }
        }
        inside
    }

    pub fn number(&self, file: &str, key: &str) -> u64 {
        let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap_or("0");
        value.trim().parse().unwrap_or(0)
    }

    pub fn oom_kills(&self) -> u64 {
        self.number(self.events, "oom_kill ")
    }

    pub fn peak_bytes(&self) -> u64 {
        self.number(self.peak, "")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}
