//! Runs a program that is measured: one at a time, with a limit in time, and with what the kernel counted for it.
//!
//! Invariants: a child never outlives the call, whatever ends it; its figures are its own, because nothing else that
//! this process starts is waited for meanwhile.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;

use crate::error::{Error, ErrorKind, Result};

const LOOK: Duration = Duration::from_millis(2);
/// How long a child may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(3);
/// The kernel counts blocks of this size for a process.
const BLOCK_BYTES: u64 = 512;

/// A program that has ended by itself.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// Its answer.
    pub stdout: String,
    /// What else it said.
    pub stderr: String,
    /// From spawn to its end.
    pub seconds: f64,
    /// User and system time.
    pub cpu_seconds: f64,
    /// Page faults that waited for a drive.
    pub major_faults: u64,
    /// What it made the block layer read.
    pub read_bytes: u64,
}

impl Finished {
    /// True when something killed it the way the OOM killer does.
    #[must_use]
    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(nix::libc::SIGKILL)
    }

    /// The last lines it said, for a report.
    #[must_use]
    pub fn last_words(&self) -> String {
        let said: Vec<&str> = self
            .stderr
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let tail = said[said.len().saturating_sub(2)..].join(" / ");
        let short: String = tail.chars().take(300).collect();
        format!("{}: {short}", self.status)
    }
}

/// Runs `command` to its end.
///
/// # Errors
/// `NotFound` when there is no such program, `Timeout` when it took longer than `limit`, `Canceled` when `stop` is raised:
/// in the last two it has been ended, by force where it had to be.
pub fn run(command: &mut Command, limit: Duration, stop: &AtomicBool) -> Result<Finished> {
    let name = command.get_program().to_string_lossy().into_owned();
    let before = usage()?;
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::from_io(&error, format_args!("start {name}")))?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let ended = wait(&mut child, &name, began, limit, stop);
    let seconds = began.elapsed().as_secs_f64();
    let (stdout, stderr) = (text(stdout), text(stderr));
    let status = ended?;
    let after = usage()?;
    let difference = |count: fn(&Usage) -> i64| (count(&after) - count(&before)).max(0) as u64;
    Ok(Finished {
        status,
        stdout,
        stderr,
        seconds,
        cpu_seconds: cpu_seconds(&after) - cpu_seconds(&before),
        major_faults: difference(|usage| usage.major_page_faults()),
        read_bytes: difference(|usage| usage.block_reads()) * BLOCK_BYTES,
    })
}

/// Hands nothing of `FLEA_*` down: what is measured is what was asked for on its command line.
pub fn without_flea_variables(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FLEA_") {
            command.env_remove(name);
        }
    }
}

fn wait(
    child: &mut Child,
    name: &str,
    began: Instant,
    limit: Duration,
    stop: &AtomicBool,
) -> Result<ExitStatus> {
    loop {
        let ended = child
            .try_wait()
            .map_err(|error| Error::from_io(&error, format_args!("wait for {name}")))?;
        if let Some(status) = ended {
            return Ok(status);
        }
        let refusal = if stop.load(Ordering::Relaxed) {
            Some(Error::new(ErrorKind::Canceled, "interrupted"))
        } else if began.elapsed() > limit {
            let context = format!("{name} had not ended after {} s", limit.as_secs());
            Some(Error::new(ErrorKind::Timeout, context))
        } else {
            None
        };
        if let Some(error) = refusal {
            end(child);
            return Err(error);
        }
        std::thread::sleep(LOOK);
    }
}

/// Asks a child to end, so that it takes down what it has made, and kills one that does not.
fn end(child: &mut Child) {
    // Gone already is as good as ended.
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let asked = Instant::now();
    while asked.elapsed() < PATIENCE {
        if let Ok(Some(_)) | Err(_) = child.try_wait() {
            return;
        }
        std::thread::sleep(LOOK);
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Pipes are emptied by threads of their own: a child that says more than a pipe holds would wait for ever.
fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe
            && let Err(error) = pipe.read_to_end(&mut bytes)
        {
            log::debug!("read what a child says: {error}");
        }
        bytes
    })
}

fn text(thread: JoinHandle<Vec<u8>>) -> String {
    let bytes = thread.join().unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn usage() -> Result<Usage> {
    getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_err(|errno| Error::os(errno as i32, "ask what children have used"))
}

fn cpu_seconds(usage: &Usage) -> f64 {
    let microseconds =
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    microseconds as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration, stop: &AtomicBool) -> Result<Finished> {
        run(Command::new("/bin/sh").args(["-c", script]), limit, stop)
    }

    #[test]
    fn children_are_heard_counted_and_ended() {
        let (go, long) = (AtomicBool::new(false), Duration::from_secs(60));
        let done = shell("echo out; echo err >&2; exit 3", long, &go).unwrap();
        assert_eq!(
            (done.stdout.as_str(), done.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert!(done.status.code() == Some(3) && !done.was_killed());
        assert!(shell("kill -9 $$", long, &go).unwrap().was_killed());
        let slow = shell("exec sleep 50", Duration::from_millis(30), &go).unwrap_err();
        assert_eq!(slow.kind(), ErrorKind::Timeout);
        let stopped = shell("exec sleep 50", long, &AtomicBool::new(true)).unwrap_err();
        assert_eq!(stopped.kind(), ErrorKind::Canceled);
        let directory = tempfile::tempdir().unwrap();
        let tidied = directory.path().join("tidied");
        let script = format!(
            "trap 'echo > {}; exit 1' TERM; echo; while :; do sleep 0.01; done",
            tidied.display()
        );
        shell(&script, Duration::from_millis(300), &go).unwrap_err();
        assert!(tidied.exists(), "a child may take down what it has made");
        let began = Instant::now();
        shell(
            "trap '' TERM; while :; do sleep 0.01; done",
            Duration::from_millis(300),
            &go,
        )
        .unwrap_err();
        assert!(began.elapsed() >= PATIENCE, "one that does not is killed");
        let missing = run(&mut Command::new("/nowhere/fio"), long, &go).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
}
