//! Which thread of this process holds which layer, and how often.
//!
//! Small and linear: a host holds as many layers as it has threads, not thousands. Used by the state of a model in this
//! process, and by a client of the daemon for its own part.

use crate::error::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicU64, Ordering};

/// Most leases one model may have out at a time, over all threads. A host needs one per thread; the limit turns a
/// host that never releases into an error instead of memory growth.
pub const LEASES_MAX: usize = 4096;

/// A number for the calling thread, never used twice in a process.
#[must_use]
pub fn thread_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static ID: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    ID.with(|id| *id)
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    thread: u64,
    layer: u32,
    count: u32,
}

/// The leases of one process.
#[derive(Debug)]
pub struct Leases {
    list: Vec<Lease>,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            list: Vec::with_capacity(64),
        }
    }
}

impl Leases {
    /// Books a lease of `layer` for `thread`, or extends the one it has: true for a new one.
    ///
    /// # Errors
    /// `Busy` when [`LEASES_MAX`] are out.
    pub fn add(&mut self, layer: u32, thread: u64) -> Result<bool> {
        let same = |lease: &Lease| lease.thread == thread && lease.layer == layer;
        match self.list.iter().position(same) {
            Some(index) => {
                self.list[index].count += 1;
                Ok(false)
            }
            None if self.list.len() >= LEASES_MAX => Err(Error::new(
                ErrorKind::Busy,
                format!("{LEASES_MAX} leases are out; release some first"),
            )),
            None => {
                self.list.push(Lease {
                    thread,
                    layer,
                    count: 1,
                });
                Ok(true)
            }
        }
    }

    /// Takes a lease back: this thread's if it has one, else any (a lease may be released on another thread). True when
    /// all of it has come back.
    ///
    /// # Errors
    /// `Invalid` when the layer is not leased.
    pub fn remove(&mut self, layer: u32, thread: u64) -> Result<bool> {
        let of_layer = |lease: &Lease| lease.layer == layer;
        let mine = |lease: &Lease| of_layer(lease) && lease.thread == thread;
        let found = self.list.iter().position(mine);
        let Some(index) = found.or_else(|| self.list.iter().position(of_layer)) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("layer {layer} is released but nobody acquired it"),
            ));
        };
        // Not counted down to 0 first: reading a lease whole right after writing a part of it stalls the processor.
        let last = self.list[index].count == 1;
        if last {
            self.list.swap_remove(index);
        } else {
            self.list[index].count -= 1;
        }
        Ok(last)
    }

    /// True when nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// True when `thread` holds `layer`.
    #[must_use]
    pub fn holds(&self, layer: u32, thread: u64) -> bool {
        let same = |lease: &Lease| lease.thread == thread && lease.layer == layer;
        self.list.iter().any(same)
    }

    /// The layers that are held, each with its thread; a layer that two threads hold stands there twice.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.list.iter().map(|lease| (lease.layer, lease.thread))
    }
}
