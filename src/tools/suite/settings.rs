//! Settings of the machine that a measurement needs, put back when it is over: huge pages for fio, the device's
//! read-ahead for programs that map files. And the lock that keeps others away meanwhile.
//!
//! Invariant: what was changed is put back when its guard is dropped, so also after a failure and after Ctrl-C.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, ErrorKind, Result};

const LOOK: Duration = Duration::from_millis(20);

/// A file of /proc or /sys that holds another value for now.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Writes `value` and remembers what stood there.
    ///
    /// # Errors
    /// The file cannot be read or written (only root may), or the kernel took another value.
    pub fn set(path: &Path, value: &str) -> Result<Self> {
        let before = read(path)?;
        let setting = Self {
            path: path.to_owned(),
            before,
        };
        if setting.before != value {
            write(path, value)?;
        }
        let found = read(path)?;
        if found == value {
            return Ok(setting);
        }
        let context = format!("{} was set to {value} and says {found}", path.display());
        Err(Error::new(ErrorKind::Refused, context))
    }

    /// At least `count` of the kernel's 2 MiB huge pages; `None` when there are enough free ones already.
    ///
    /// # Errors
    /// As [`Setting::set`]; the kernel may have too little contiguous memory.
    pub fn huge_pages(count: u64) -> Result<Option<Self>> {
        let directory = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB");
        let number = |name: &str| -> Result<u64> {
            let text = read(&directory.join(name))?;
            text.parse().map_err(|_| {
                Error::new(
                    ErrorKind::Io,
                    format!("{name} of {} is '{text}'", directory.display()),
                )
            })
        };
        let (total, free) = (number("nr_hugepages")?, number("free_hugepages")?);
        if free >= count {
            return Ok(None);
        }
        let wanted = total + count - free;
        Self::set(&directory.join("nr_hugepages"), &wanted.to_string()).map(Some)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if read(&self.path).is_ok_and(|now| now == self.before) {
            return;
        }
        if let Err(error) = write(&self.path, &self.before) {
            log::error!("{error}; write '{}' there yourself", self.before);
        }
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|error| Error::from_io(&error, format_args!("read {}", path.display())))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).map_err(|error| {
        Error::from_io(
            &error,
            format_args!("write '{value}' to {}", path.display()),
        )
    })
}

/// Files locked for this process alone, in the order given, as `flock` does it.
#[derive(Debug)]
pub struct Locks {
    _held: Vec<Flock<File>>,
}

impl Locks {
    /// Waits for all of them.
    ///
    /// # Errors
    /// A file that cannot be opened or locked; `Canceled` when `stop` is raised meanwhile.
    pub fn take(paths: &[PathBuf], stop: &AtomicBool) -> Result<Self> {
        let mut held = Vec::with_capacity(paths.len());
        for path in paths {
            held.push(lock(path, stop)?);
        }
        Ok(Self { _held: held })
    }
}

/// Waits in the kernel's queue, where it is somebody's turn at some time; asking again and again would always find
/// another one there. The waiting is done by a thread, which a stop leaves behind: the program ends then.
fn lock(path: &Path, stop: &AtomicBool) -> Result<Flock<File>> {
    let failed =
        |error: &std::io::Error| Error::from_io(error, format_args!("lock {}", path.display()));
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| failed(&error))?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let locked = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno);
        // Nobody waits for it any more: it is unlocked right away.
        drop(sender.send(locked));
    });
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "interrupted"));
        }
        match receiver.recv_timeout(LOOK) {
            Ok(Ok(lock)) => return Ok(lock),
            Ok(Err(errno)) => return Err(failed(&errno.into())),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "the thread that locks has gone away",
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_put_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("read_ahead_kb");
        fs::write(&path, "8192\n").unwrap();
        let setting = Setting::set(&path, "128").unwrap();
        assert_eq!(read(&path).unwrap(), "128");
        drop(setting);
        assert_eq!(read(&path).unwrap(), "8192");
        let missing = Setting::set(&directory.path().join("missing"), "1").unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_lock_keeps_others_out_and_waiting_ends_on_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = vec![directory.path().join("lock")];
        let stop = AtomicBool::new(false);
        let held = Locks::take(&path, &stop).unwrap();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(
            Locks::take(&path, &stop).unwrap_err().kind(),
            ErrorKind::Canceled
        );
        drop(held);
        stop.store(false, Ordering::Relaxed);
        Locks::take(&path, &stop).unwrap();
    }
}
