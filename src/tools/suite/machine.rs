//! The machine that figures were taken on: what somebody needs to compare them with their own.
//!
//! Everything is read from /proc and /sys; what a machine does not tell is left empty, never guessed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

/// What its line is called.
const LOAD: &str = "load at the start";

/// Processor, memory, kernel, drive, and the settings that change figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Processors that may be used.
    pub cpu_count: usize,
    /// All memory.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// Block device below the models.
    pub device: String,
    /// What the drive calls itself.
    pub drive: String,
    /// Filesystem of the models.
    pub filesystem: String,
    /// I/O scheduler in use.
    pub scheduler: String,
    /// The device's read-ahead as it was found.
    pub read_ahead_kib: Option<u64>,
    /// Transparent huge pages: always, madvise or never.
    pub huge_pages: String,
    /// 1, 5 and 15 minute load when the measuring began.
    pub load: String,
}

impl Machine {
    /// This machine, as seen from the filesystem of `path`.
    #[must_use]
    pub fn look(path: &Path) -> Self {
        let queue = queue_of(path);
        let queue_text = |name: &str| {
            queue
                .as_ref()
                .map(|queue| text(&queue.join(name)))
                .unwrap_or_default()
        };
        let device = queue
            .as_ref()
            .and_then(|queue| queue.parent()?.file_name()?.to_str().map(str::to_owned))
            .unwrap_or_default();
        let cpuinfo = text(Path::new("/proc/cpuinfo"));
        Self {
            cpu: value_of(&cpuinfo, "model name")
                .unwrap_or_default()
                .to_owned(),
            cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_bytes(),
            kernel: text(Path::new("/proc/sys/kernel/osrelease")),
            drive: drive_name(queue.as_deref()),
            device,
            filesystem: filesystem(path),
            scheduler: chosen(&queue_text("scheduler")),
            read_ahead_kib: queue_text("read_ahead_kb").parse().ok(),
            huge_pages: chosen(&text(Path::new(
                "/sys/kernel/mm/transparent_hugepage/enabled",
            ))),
            load: text(Path::new("/proc/loadavg"))
                .split(' ')
                .take(3)
                .collect::<Vec<_>>()
                .join(" "),
        }
    }

    /// What is not as it is `there`, with how it is here; how busy it was changes always.
    #[must_use]
    pub fn differences(&self, there: &Self) -> Vec<(&'static str, String)> {
        let pairs = self.fields().into_iter().zip(there.fields());
        pairs
            .filter(|(ours, theirs)| ours != theirs && ours.0 != LOAD)
            .map(|(ours, _)| ours)
            .collect()
    }

    /// One line for each thing, for a table.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let or_unknown = |text: &str| {
            if text.is_empty() {
                "not told".to_owned()
            } else {
                text.to_owned()
            }
        };
        let read_ahead = self
            .read_ahead_kib
            .map_or("not told".to_owned(), |kib| format!("{kib} KiB"));
        vec![
            (
                "processor",
                format!("{}, {} used", or_unknown(&self.cpu), self.cpu_count),
            ),
            (
                "memory",
                crate::units::HumanBytes(self.memory_bytes).to_string(),
            ),
            ("kernel", or_unknown(&self.kernel)),
            (
                "drive",
                format!("{} ({})", or_unknown(&self.drive), or_unknown(&self.device)),
            ),
            ("filesystem", or_unknown(&self.filesystem)),
            ("scheduler", or_unknown(&self.scheduler)),
            ("read-ahead", read_ahead),
            ("transparent huge pages", or_unknown(&self.huge_pages)),
            (LOAD, or_unknown(&self.load)),
        ]
    }
}

/// The `queue` directory of the whole device below a file, also below a partition of it.
#[must_use]
pub fn queue_of(path: &Path) -> Option<PathBuf> {
    let device = fs::metadata(path).ok()?.dev();
    let link = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let directory = fs::canonicalize(link).ok()?;
    [directory.join("queue"), directory.parent()?.join("queue")]
        .into_iter()
        .find(|queue| queue.is_dir())
}

fn text(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn value_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

fn memory_bytes() -> u64 {
    let meminfo = text(Path::new("/proc/meminfo"));
    let kib = value_of(&meminfo, "MemTotal")
        .and_then(|value| value.strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn drive_name(queue: Option<&Path>) -> String {
    let Some(device) = queue.and_then(Path::parent) else {
        return String::new();
    };
    match text(&device.join("device/model")) {
        name if !name.is_empty() => name,
        // A virtual disk has no name, only a driver.
        _ => fs::read_link(device.join("device/driver"))
            .ok()
            .and_then(|driver| Some(driver.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_default(),
    }
}

/// The word in brackets of `none [mq-deadline] kyber`.
fn chosen(text: &str) -> String {
    let bracketed = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(text, |(word, _)| word).to_owned()
}

fn filesystem(path: &Path) -> String {
    let Ok(metadata) = fs::metadata(path) else {
        return String::new();
    };
    let number = format!("{}:{}", major(metadata.dev()), minor(metadata.dev()));
    let mounts = text(Path::new("/proc/self/mountinfo"));
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(number.as_str()));
    let kind = mount.and_then(|line| line.split_once(" - ")?.1.split(' ').next());
    kind.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_in_brackets_are_found() {
        assert_eq!(chosen("none [mq-deadline] kyber"), "mq-deadline");
        assert_eq!(chosen("ext4"), "ext4");
    }

    #[test]
    fn this_machine_has_a_processor_memory_and_a_kernel() {
        let machine = Machine::look(Path::new(env!("CARGO_MANIFEST_DIR")));
        assert!(machine.cpu_count > 0 && machine.memory_bytes > 0 && !machine.kernel.is_empty());
        assert!(!machine.filesystem.is_empty());
    }
}
