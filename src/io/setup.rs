//! What the ring needs before it runs: the ring itself with the flags this kernel knows, and the waker's eventfd.
//!
//! Place: part of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::IoUring;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, ErrorKind};

/// Why there is no ring.
#[derive(Debug)]
pub(super) struct Refused {
    /// The system does not have or allow it, as opposed to: it broke.
    pub(super) absent: bool,
    pub(super) error: Error,
}

/// Ends the ring's wait: an eventfd that the ring reads.
pub struct WakeEvent {
    event: EventFd,
    /// Set while a wake is on its way, so that many wakes cost one write.
    pending: AtomicBool,
}

impl fmt::Debug for WakeEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WakeEvent")
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

impl WakeEvent {
    pub(super) fn new() -> Result<Self, Refused> {
        match EventFd::from_flags(EfdFlags::EFD_CLOEXEC) {
            Ok(event) => Ok(Self {
                event,
                pending: AtomicBool::new(false),
            }),
            Err(errno) => Err(Refused {
                absent: false,
                error: Error::os(errno as i32, "eventfd for the reader's waker"),
            }),
        }
    }

    /// What the ring reads.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// The wake arrived; the next one is a new one.
    pub(super) fn taken(&self) {
        // A swap, not a store: it also makes visible what a waker that found `pending` set wrote before.
        self.pending.swap(false, Ordering::AcqRel);
    }

    pub(super) fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel)
            && let Err(errno) = self.event.write(1)
        {
            log::error!("waking the reader failed: {errno}");
        }
    }
}

/// Requests that a ring keeps: twice the depth, because those that the kernel keeps after their deadline must not stop
/// the others.
pub(super) const fn entry_count(depth: usize) -> usize {
    depth * 2
}

/// The ring, with as much as the kernel knows of what helps one thread: SINGLE_ISSUER is Linux 6.0, COOP_TASKRUN 5.19.
/// `any_thread`: without the former, which binds the ring to the thread that enables it.
pub(super) fn build_ring(depth: usize, any_thread: bool) -> Result<IoUring, Refused> {
    // Room for a read and a cancellation of each, and for the waker.
    let sqe_count = (entry_count(depth) * 2 + 2).next_power_of_two() as u32;
    let mut best = IoUring::builder();
    best.setup_clamp().setup_coop_taskrun();
    if !any_thread {
        best.setup_single_issuer().setup_r_disabled();
    }
    let plain = IoUring::builder();
    let built = match best.build(sqe_count) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain.build(sqe_count),
        built => built,
    };
    let ring = built.map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(0);
        let (absent, kind, remedy) = match errno {
            libc::EPERM | libc::EACCES => (
                true,
                ErrorKind::Permission,
                "io_uring_setup is not allowed; see sysctl kernel.io_uring_disabled and the container's seccomp profile",
            ),
            libc::ENOSYS => (
                true,
                ErrorKind::Unsupported,
                "this kernel has no io_uring (or a sandbox hides it)",
            ),
            libc::ENOMEM => (
                true,
                ErrorKind::NoMemory,
                "no memory for the ring; on kernels before 5.12 raise the memlock limit (ulimit -l)",
            ),
            _ => (false, ErrorKind::Io, "io_uring_setup failed"),
        };
        Refused {
            absent,
            error: Error::os(errno, remedy).with_kind(kind),
        }
    })?;
    require_features(&ring)?;
    Ok(ring)
}

fn require_features(ring: &IoUring) -> Result<(), Refused> {
    let params = ring.params();
    if params.is_feature_ext_arg() && params.is_feature_nodrop() {
        return Ok(());
    }
    Err(Refused {
        absent: true,
        error: Error::new(
            ErrorKind::Unsupported,
            "this kernel's io_uring cannot wait with a time limit; Linux 5.11 can",
        ),
    })
}
