//! The C ABI: thin, panic-proof, and all there is to it in `include/flea.h` (generated from `types` and `calls`).
//!
//! Every call runs inside `guard`: an error becomes a status and a text in this thread's last error; a panic
//! becomes `FLEA_E_INTERNAL` and never crosses the border. Nothing here prints, exits or keeps global state.

#![allow(unsafe_code)]

pub mod calls;
pub(crate) mod handle;
pub mod types;

use crate::error::{Error, ErrorKind, Result};
use std::cell::RefCell;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The last error of a thread: its text and its errno.
struct LastError {
    text: CString,
    errno: i32,
}

thread_local! {
    static LAST: RefCell<LastError> = RefCell::new(LastError { text: CString::default(), errno: 0 });
}

fn remember(error: &Error) {
    let text = CString::new(error.context().replace('\0', "?")).unwrap_or_default();
    // A thread that is being torn down has no place for the text any more; the status still reaches the host.
    let _ = LAST.try_with(|last| {
        *last.borrow_mut() = LastError {
            text,
            errno: error.errno().unwrap_or(0),
        }
    });
}

/// Runs a call: its value, or the negative status of what went wrong.
fn guard(call: impl FnOnce() -> Result<i32>) -> i32 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => {
            remember(&error);
            error.kind().status()
        }
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            remember(&Error::new(
                ErrorKind::Internal,
                format!("a defect in flea: {text}"),
            ));
            ErrorKind::Internal.status()
        }
    }
}

fn invalid(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, context)
}
