//! One connection: who it is, what it may do, and the model it is attached to.

use super::hosted::Hosted;
use crate::proto::Socket;
use nix::sys::epoll::Epoll;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::UnixCredentials;
use std::sync::Arc;
use std::time::Instant;

/// What a client kicks. The client has the same eventfd: closing ours alone would leave it in the epoll, and the reactor
/// awake, for as long as he keeps his.
#[derive(Debug)]
pub struct Kick {
    /// The eventfd.
    pub event: EventFd,
    /// Where it is listened to.
    pub heard_by: Arc<Epoll>,
}

impl Drop for Kick {
    fn drop(&mut self) {
        // One that was never listened to is not in there; that is all that can go wrong.
        let _ = self.heard_by.delete(&self.event);
    }
}

/// A model that a session is attached to.
#[derive(Debug)]
pub struct Attachment {
    /// The model.
    pub model: Arc<Hosted>,
    /// What the client kicks.
    pub kick: Kick,
    /// Since when.
    pub since: Instant,
    /// Ticks in a row that found it holding more than it may.
    pub excess_ticks: u32,
    /// Kicks since the last tick.
    pub kicks: u32,
    /// Not listened to until the next tick.
    pub paused: bool,
}

impl Attachment {
    /// True when client `id` says that it holds more than a client may.
    #[must_use]
    pub fn holds_too_much(&self, id: u64, leases_max: u32) -> bool {
        let model = &self.model;
        let leases = model.board.leases(id);
        if leases.len() > leases_max as usize {
            return true;
        }
        let most = model.holds_max();
        if leases.len() <= most as usize {
            return false;
        }
        let streamed = leases.iter().filter(|(layer, _)| model.streams(*layer));
        streamed.count() > most as usize
    }
}

/// A connection.
#[derive(Debug)]
pub struct Session {
    /// Its number, which is also its number on boards.
    pub id: u64,
    /// The connection.
    pub socket: Socket,
    /// Who it is, as the kernel says.
    pub peer: UnixCredentials,
    /// What it calls itself; `None` until it has said hello.
    pub name: Option<String>,
    /// When it connected.
    pub since: Instant,
    /// What it is attached to.
    pub attached: Option<Attachment>,
    /// Its last request is with the worker: nothing more is read until that is answered.
    pub busy: bool,
    /// It asked too much: nothing more is read until the next tick.
    pub paused: bool,
    /// Requests it may still make; grows with time.
    tokens: f64,
    refilled: Instant,
}

impl Session {
    /// A connection that has just been made.
    #[must_use]
    pub fn new(id: u64, socket: Socket, peer: UnixCredentials) -> Self {
        let now = Instant::now();
        Self {
            id,
            socket,
            peer,
            name: None,
            since: now,
            attached: None,
            busy: false,
            paused: false,
            tokens: 100.0,
            refilled: now,
        }
    }

    /// Whether it may make a request now. `per_second` on average, that many at once at most.
    pub fn may_ask(&mut self, per_second: u32) -> bool {
        let now = Instant::now();
        let rate = f64::from(per_second.max(1));
        let earned = now.duration_since(self.refilled).as_secs_f64() * rate;
        self.tokens = (self.tokens + earned).min(rate.max(100.0));
        self.refilled = now;
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }

    /// Leaves its model: everything it held is free.
    pub fn detach(&mut self) {
        if let Some(attached) = self.attached.take() {
            attached.model.board.detach(self.id);
            if let Ok(mut used) = attached.model.used.lock() {
                *used = Instant::now();
            }
            attached.model.wake();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.detach();
    }
}
