//! The kernel's alarms about memory, as descriptors to poll.
//!
//! PSI triggers wake with POLLPRI when tasks stalled for longer than asked, `memory.events` of cgroup v2 when its
//! counters moved, `memory.pressure_level` of cgroup v1 through an eventfd. Where writing a trigger is not allowed (a
//! read-only /sys/fs/cgroup), the same file's average is looked at instead. What cannot be watched at all is named, never silently left out.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Settings;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::limits::{CgroupVersion, own_memory_cgroups};

/// PSI measures within this window; without CAP_SYS_RESOURCE it has to be a multiple of 2 s.
const WINDOW_NS: u64 = 2_000_000_000;

/// What an alarm says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// Nothing.
    None,
    /// Tasks wait for memory, or a cgroup ran into its limit.
    Memory,
}

#[derive(Debug)]
enum Alarm {
    /// The kernel tells us when the stall is reached.
    Trigger { file: File },
    /// The kernel only tells the average of 10 s: percent of time in which some task waited.
    Average { file: File, percent: f64 },
    /// `memory.events`: counters, and an edge when one moved.
    Events { file: File, counted: u64 },
    /// `memory.pressure_level`: an eventfd that counts. The two files must stay open for it.
    Level { event: EventFd, _files: [File; 2] },
}

/// Everything that is watched.
#[derive(Debug)]
pub struct Sources {
    alarms: Vec<(PathBuf, Alarm)>,
    missing: Vec<String>,
}

impl Sources {
    /// Opens what this system offers. Nothing that is missing is an error: it is named by [`Sources::missing`], and
    /// available memory is watched in any case.
    #[must_use]
    pub fn open(settings: &Settings) -> Self {
        let mut sources = Self {
            alarms: Vec::new(),
            missing: Vec::new(),
        };
        if !settings.watch {
            return sources;
        }
        sources.add(Path::new("/proc/pressure/memory"), |path| {
            open_psi(path, settings.stall_ns)
        });
        for (directory, version) in own_memory_cgroups() {
            match version {
                CgroupVersion::V2 => {
                    sources.add(&directory.join("memory.pressure"), |path| {
                        open_psi(path, settings.stall_ns)
                    });
                    sources.add(&directory.join("memory.events"), open_events);
                }
                CgroupVersion::V1 => {
                    sources.add(&directory.join("memory.pressure_level"), open_level);
                }
            }
        }
        sources
    }

    fn add(&mut self, path: &Path, open: impl Fn(&Path) -> Result<Alarm>) {
        match open(path) {
            Ok(alarm) => self.alarms.push((path.to_owned(), alarm)),
            Err(error) => self.missing.push(error.to_string()),
        }
    }

    /// Descriptors to poll: for POLLPRI, and POLLIN where `true`.
    pub fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool)> {
        self.alarms.iter().filter_map(|(_, alarm)| match alarm {
            Alarm::Trigger { file } | Alarm::Events { file, .. } => Some((file.as_fd(), false)),
            Alarm::Level { event, .. } => Some((event.as_fd(), true)),
            Alarm::Average { .. } => None,
        })
    }

    /// The files that are watched, for `flea-ctl status`.
    pub fn watched(&self) -> impl Iterator<Item = &Path> {
        self.alarms.iter().map(|(path, _)| path.as_path())
    }

    /// Why the others are not.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Whether anything was reported since the last call. `woken` says of a descriptor (as
    /// [`Sources::descriptors`] gives them) that poll reported it: a PSI trigger tells nothing else.
    ///
    /// # Errors
    /// A file that could be read before cannot be read now.
    pub fn take(&mut self, woken: impl Fn(BorrowedFd<'_>) -> bool) -> Result<Stall> {
        let mut stalled = false;
        for (path, alarm) in &mut self.alarms {
            stalled |= match alarm {
                Alarm::Trigger { file } => woken(file.as_fd()),
                Alarm::Average { file, percent } => {
                    some_avg10(&reread(file, path)?).is_some_and(|now| now >= *percent)
                }
                Alarm::Events { file, counted } => {
                    let now = limit_events(&reread(file, path)?);
                    std::mem::replace(counted, now) < now
                }
                Alarm::Level { event, .. } => event.read().is_ok_and(|count| count > 0),
            };
        }
        Ok(if stalled { Stall::Memory } else { Stall::None })
    }
}

/// A trigger on a PSI file; its average where the file may only be read.
fn open_psi(path: &Path, stall_ns: u64) -> Result<Alarm> {
    let trigger = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .and_then(|mut file| {
            let text = format!("some {} {}\0", stall_ns / 1000, WINDOW_NS / 1000);
            file.write_all(text.as_bytes()).map(|()| file)
        });
    match trigger {
        Ok(file) => Ok(Alarm::Trigger { file }),
        Err(refused) => {
            let mut file = open(path)?;
            if some_avg10(&reread(&mut file, path)?).is_none() {
                return Err(Error::from_io(
                    &refused,
                    format_args!("watch {}", path.display()),
                ));
            }
            let percent = stall_ns as f64 / WINDOW_NS as f64 * 100.0;
            Ok(Alarm::Average { file, percent })
        }
    }
}

fn open_events(path: &Path) -> Result<Alarm> {
    let mut file = open(path)?;
    let counted = limit_events(&reread(&mut file, path)?);
    Ok(Alarm::Events { file, counted })
}

/// cgroup v1: "eventfd, file, level" written to cgroup.event_control.
fn open_level(path: &Path) -> Result<Alarm> {
    let level = open(path)?;
    let control_path = path.with_file_name("cgroup.event_control");
    let watch = |error: &std::io::Error| {
        Error::from_io(
            error,
            format_args!(
                "watch {} through {}",
                path.display(),
                control_path.display()
            ),
        )
    };
    let mut control = OpenOptions::new()
        .write(true)
        .open(&control_path)
        .map_err(|error| watch(&error))?;
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
        .map_err(|errno| Error::os(errno as i32, "make an eventfd"))?;
    let text = format!("{} {} medium", event.as_fd().as_raw_fd(), level.as_raw_fd());
    control
        .write_all(text.as_bytes())
        .map_err(|error| watch(&error))?;
    Ok(Alarm::Level {
        event,
        _files: [level, control],
    })
}

fn open(path: &Path) -> Result<File> {
    File::open(path)
        .map_err(|error| Error::from_io(&error, format_args!("open {}", path.display())))
}

/// The file from its start: kernel files are made anew for every read.
fn reread(file: &mut File, path: &Path) -> Result<String> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_string(&mut text))
        .map_err(|error| {
            Error::from_io(&error, format_args!("read {}", path.display())).with_kind(ErrorKind::Io)
        })?;
    Ok(text)
}

/// `some avg10=1.23 ...` of a PSI file, in percent.
#[must_use]
pub fn some_avg10(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let field = line
        .split(' ')
        .find_map(|field| field.strip_prefix("avg10="))?;
    field.parse().ok()
}

/// How often a cgroup v2 met a limit: `high`, `max`, `oom` and `oom_kill` of memory.events.
pub(super) fn limit_events(text: &str) -> u64 {
    const COUNTED: [&str; 4] = ["high", "max", "oom", "oom_kill"];
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| COUNTED.contains(name))
        .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
        .sum()
}
