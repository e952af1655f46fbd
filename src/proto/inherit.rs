//! The descriptor that a service manager opened for us (socket activation).
#![allow(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes over descriptor `raw`, which nobody else in this process knows. What it is, the taker has to find out.
///
/// # Errors
/// `Invalid` for a descriptor that no service manager hands over, and for a second call in one process.
pub fn inherited(raw: RawFd) -> Result<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if raw < 3 || TAKEN.swap(true, Ordering::SeqCst) {
        let context = format!("descriptor {raw} of the service manager cannot be taken");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    // SAFETY: the service manager opened this descriptor for us before the program began (numbers 0 to 2 are not among
    // those), nothing else in the process knows it, and TAKEN lets it be taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
