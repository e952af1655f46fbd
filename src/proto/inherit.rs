//! The listening socket that a service manager opened for us (socket activation).
#![allow(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes over descriptor `raw`, which must be a listening SOCK_SEQPACKET socket.
///
/// # Errors
/// `Invalid` where it is something else, and for a second call in one process.
pub fn inherited_listener(raw: RawFd) -> Result<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let wrong = |what: &str| {
        let context = format!(
            "descriptor {raw} from the service manager {what}; flead.socket needs ListenSequentialPacket= and nothing else"
        );
        Error::new(ErrorKind::Invalid, context)
    };
    if raw < 3 || TAKEN.swap(true, Ordering::SeqCst) {
        return Err(wrong("cannot be taken"));
    }
    // SAFETY: the service manager opened this descriptor for us before the program began (numbers 0 to 2 are not among
    // those), nothing else in the process knows it, and TAKEN lets it be taken once.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    match getsockopt(&fd, sockopt::SockType) {
        Ok(SockType::SeqPacket) => {}
        Ok(_) => return Err(wrong("is a socket of another type")),
        Err(_) => return Err(wrong("is no socket")),
    }
    match getsockopt(&fd, sockopt::AcceptConn) {
        Ok(true) => Ok(fd),
        _ => Err(wrong("does not listen")),
    }
}
