//! Who may not attach for a while: processes of which a lease had to be taken back.
//!
//! A client that keeps a layer until it is revoked has cost the others a part of their ring. If it could come back at once
//! it would cost them that for ever; so its process waits [`WAIT`] times as long as it kept the others waiting, and
//! twice as long every further time. A process is its number and when it started: a number that is used again is another
//! process. What the kernel does not let us see (a client in a pid namespace beside ours) cannot be barred.

use crate::error::{Error, ErrorKind};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a process may not attach after a lease of it was taken back, in lease timeouts.
const WAIT: u32 = 10;
/// Twice as long every further time, up to this, unless one wait is longer.
const LONGEST: Duration = Duration::from_secs(3600);

/// A process that cannot be mistaken for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Process {
    pid: i32,
    /// Clock ticks after boot.
    started: u64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    until: Instant,
    wait: Duration,
}

/// The processes that are barred, or were not long ago.
#[derive(Debug, Default)]
pub struct Bars {
    bars: HashMap<Process, Bar>,
}

impl Process {
    fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything, also brackets. Behind it: state is field 3, the start is field 22.
        let (_, fields) = stat.rsplit_once(')')?;
        let started = fields.split_whitespace().nth(19)?.parse().ok()?;
        (pid > 0).then_some(Self { pid, started })
    }
}

impl Bars {
    /// A lease of process `pid` was taken back after `lease_timeout`.
    pub fn add(&mut self, pid: i32, lease_timeout: Duration, now: Instant) {
        // Who behaved for as long as he had to wait starts anew.
        self.bars.retain(|_, bar| now < bar.until + bar.wait);
        let Some(process) = Process::of(pid) else {
            return;
        };
        let first = lease_timeout * WAIT;
        let wait = match self.bars.get(&process) {
            // Another connection of a process that waits already.
            Some(bar) if now < bar.until => bar.wait,
            Some(bar) => (bar.wait * 2).min(LONGEST.max(first)),
            None => first,
        };
        let until = now + wait;
        self.bars.insert(process, Bar { until, wait });
    }

    /// Refuses a process that is barred.
    ///
    /// # Errors
    /// `Revoked`: why, and for how long.
    pub fn check(&self, pid: i32, now: Instant) -> Result<(), Error> {
        if self.bars.is_empty() {
            return Ok(());
        }
        let bar = Process::of(pid).and_then(|process| self.bars.get(&process));
        match bar.map(|bar| bar.until.saturating_duration_since(now)) {
            Some(left) if !left.is_zero() => Err(Error::new(
                ErrorKind::Revoked,
                format!(
                    "process {pid} held a layer for too long while others waited and was given up; it may attach again in {:.1} s (lease_timeout in flead.toml)",
                    left.as_secs_f64()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// How many processes are barred.
    #[must_use]
    pub fn count(&self, now: Instant) -> u32 {
        let barred = self.bars.values().filter(|bar| now < bar.until);
        u32::try_from(barred.count()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_waits_ten_timeouts_and_twice_as_long_the_next_time() {
        let (mut bars, timeout) = (Bars::default(), Duration::from_secs(1));
        let pid = std::process::id() as i32;
        let mut now = Instant::now();
        assert!(bars.check(pid, now).is_ok() && bars.count(now) == 0);
        for seconds in [10, 20, 40] {
            bars.add(pid, timeout, now);
            let refused = bars.check(pid, now).expect_err("it waits");
            assert_eq!(refused.kind(), ErrorKind::Revoked);
            let left = format!("again in {seconds}.0 s");
            assert!(refused.context().contains(&left), "{refused}");
            bars.add(pid, timeout, now);
            assert_eq!(bars.count(now), 1, "another connection of it");
            now += Duration::from_secs(seconds);
            assert!(bars.check(pid, now).is_ok() && bars.count(now) == 0);
        }
        now += Duration::from_secs(40);
        bars.add(pid, timeout, now);
        assert!(
            bars.check(pid, now + Duration::from_secs(10)).is_ok(),
            "it had behaved for long enough"
        );
    }

    #[test]
    fn others_are_not_barred_and_a_number_alone_is_nobody() {
        let (mut bars, now) = (Bars::default(), Instant::now());
        bars.add(0, Duration::from_secs(1), now);
        bars.add(-1, Duration::from_secs(1), now);
        assert_eq!(bars.count(now), 0, "nobody that we could see");
        bars.add(std::process::id() as i32, Duration::from_secs(1), now);
        assert!(bars.check(1, now).is_ok());
        let later = Process {
            started: u64::MAX,
            ..Process::of(std::process::id() as i32).expect("this process")
        };
        assert!(!bars.bars.contains_key(&later), "the number is used again");
    }

    #[test]
    fn no_wait_is_longer_than_an_hour_but_the_first() {
        let pid = std::process::id() as i32;
        for (timeout, longest) in [(30, 3600), (3600, 36_000)] {
            let (mut bars, mut now) = (Bars::default(), Instant::now());
            for _ in 0..8 {
                bars.add(pid, Duration::from_secs(timeout), now);
                now = bars.bars.values().next().expect("a bar").until;
            }
            let wait = bars.bars.values().next().expect("a bar").wait;
            assert_eq!(wait.as_secs(), longest);
        }
    }
}
