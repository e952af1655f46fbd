//! What flead tells systemd, and the socket systemd may hand it.
//!
//! READY comes after the pools are pinned; while gigabytes are being filled the start's time limit is pushed out, and
//! the watchdog is fed by the reactor itself, so that a reactor that hangs is noticed. Without systemd (no NOTIFY_SOCKET)
//! every call here does nothing. A message that cannot be sent is logged, once: flead works on.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::inherited;

/// How often STATUS changes at most.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// The line to the service manager.
#[derive(Debug)]
pub struct Notifier {
    /// Feed the watchdog this often: half of what the unit asks for.
    watchdog: Option<Duration>,
    fed: Option<Instant>,
    status: Option<(Instant, String)>,
    failed: bool,
}

impl Default for Notifier {
    fn default() -> Self {
        Self::new()
    }
}

impl Notifier {
    /// Reads what the service manager put into the environment.
    #[must_use]
    pub fn new() -> Self {
        Self::with_watchdog(sd_notify::watchdog_enabled())
    }

    fn with_watchdog(interval: Option<Duration>) -> Self {
        Self {
            watchdog: interval.map(|interval| interval / 2),
            fed: None,
            status: None,
            failed: false,
        }
    }

    /// How long the reactor may sleep at most for the watchdog's sake.
    #[must_use]
    pub const fn interval(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Still starting: what is done now may take this long.
    pub fn starting(&mut self, status: &str, time: Duration) {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.send(&[
            NotifyState::ExtendTimeoutUsec(micros),
            NotifyState::Status(status),
        ]);
    }

    /// The pools are pinned and the socket answers.
    pub fn ready(&mut self, status: &str) {
        self.send(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// What `systemctl status` shows: sent when it changed, once a second at most.
    pub fn status(&mut self, status: &str) {
        let now = Instant::now();
        let last = self.status.as_ref();
        if last.is_some_and(|(_, text)| text == status)
            || !due(last.map(|(at, _)| *at), now, STATUS_EVERY)
        {
            return;
        }
        self.status = Some((now, status.to_owned()));
        self.send(&[NotifyState::Status(status)]);
    }

    /// The reactor went round: feeds the watchdog when it is time. Call it from the reactor and from nowhere else.
    pub fn alive(&mut self) {
        let now = Instant::now();
        if let Some(interval) = self.watchdog
            && due(self.fed, now, interval / 2)
        {
            self.fed = Some(now);
            self.send(&[NotifyState::Watchdog]);
        }
    }

    /// A SIGHUP is being followed; [`Notifier::ready`] ends it.
    pub fn reloading(&mut self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(error) => log::warn!("cannot read the clock for systemd: {error}"),
        }
    }

    /// Going down in order.
    pub fn stopping(&mut self) {
        self.send(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
    }

    fn send(&mut self, states: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(states)
            && !std::mem::replace(&mut self.failed, true)
        {
            log::warn!(
                "cannot tell systemd ({error}); NOTIFY_SOCKET may be out of reach for this user"
            );
        }
    }
}

/// The socket that systemd listens on for us, where flead.socket started this process.
///
/// # Errors
/// `Invalid` where it handed over something else, or more than one.
pub fn listener() -> Result<Option<OwnedFd>> {
    let wrong = |why: String| Error::new(ErrorKind::Invalid, format!("socket activation: {why}"));
    let mut handed = sd_notify::listen_fds().map_err(|error| wrong(error.to_string()))?;
    match (handed.next(), handed.len()) {
        (None, _) => Ok(None),
        (Some(raw), 0) => inherited(raw).map(Some),
        (Some(_), more) => Err(wrong(format!(
            "{} sockets were handed over; flead.socket may have one Listen line",
            more + 1
        ))),
    }
}

fn due(last: Option<Instant>, now: Instant, every: Duration) -> bool {
    last.is_none_or(|last| now.duration_since(last) >= every)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_fed_in_time_and_not_for_every_turn() {
        let mut notifier = Notifier::with_watchdog(Some(Duration::from_secs(30)));
        assert_eq!(notifier.interval(), Some(Duration::from_secs(15)));
        notifier.alive();
        let first = notifier.fed.expect("fed at the first turn");
        notifier.alive();
        assert_eq!(notifier.fed, Some(first), "not again at once");
        notifier.fed = first.checked_sub(Duration::from_secs(8));
        notifier.alive();
        assert!(notifier.fed > Some(first));
        let mut none = Notifier::with_watchdog(None);
        none.alive();
        assert_eq!(none.fed, None);
    }

    #[test]
    fn a_status_is_sent_when_it_changed_and_not_too_often() {
        let mut notifier = Notifier::with_watchdog(None);
        notifier.status("one");
        let first = notifier.status.clone();
        notifier.status("two");
        assert_eq!(notifier.status, first, "within a second");
        notifier.status = Instant::now()
            .checked_sub(STATUS_EVERY)
            .map(|at| (at, "one".to_owned()));
        notifier.status("two");
        assert_eq!(
            notifier.status.map(|(_, text)| text).as_deref(),
            Some("two")
        );
    }
}
