//! llama.cpp's voice: its log goes to the `log` facade at debug level (target `flea::llama`), not to the user's terminal,
//! and the last errors are kept so that a failed call can say why. An assertion inside ggml ends the process with one
//! line and the exit code that fits, not with a backtrace. Stands beside the last step of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};
use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use llama_cpp_sys_2 as llama;

use crate::error::{Error, ErrorKind};

/// Errors kept for messages; more would only repeat the consequence of the first.
const KEPT_ERRORS_MAX: usize = 4;

#[derive(Debug)]
struct Kept {
    line: String,
    level: llama::ggml_log_level,
    errors: Vec<String>,
}

static KEPT: Mutex<Kept> = Mutex::new(Kept {
    line: String::new(),
    level: 0,
    errors: Vec::new(),
});

/// Exit code of an assertion inside ggml: the model's fault while it is loaded, ours later.
static ABORT_EXIT_CODE: AtomicU8 = AtomicU8::new(1);

/// Routes the log of llama.cpp and ggml, and the message of a failed assertion, through this module.
pub fn install() {
    // SAFETY: the callbacks are functions without state that live as long as the program and never unwind.
    unsafe {
        llama::llama_log_set(Some(on_log), std::ptr::null_mut());
        llama::ggml_set_abort_callback(Some(on_abort));
    }
}

/// Says whose fault an assertion inside ggml is from now on.
pub fn blame_model(yes: bool) {
    let code = if yes {
        ErrorKind::Format.exit_code()
    } else {
        1
    };
    ABORT_EXIT_CODE.store(code, Ordering::Relaxed);
}

/// Forgets the errors kept so far: call before a call whose failure is to be explained.
pub fn forget_errors() {
    if let Ok(mut kept) = KEPT.lock() {
        kept.errors.clear();
    }
}

/// An error of `kind`: `context`, then what llama.cpp said about it.
pub fn explain(kind: ErrorKind, context: &str) -> Error {
    let said = KEPT
        .lock()
        .map(|mut kept| std::mem::take(&mut kept.errors))
        .unwrap_or_default();
    if said.is_empty() {
        Error::new(kind, context)
    } else {
        Error::new(kind, format!("{context}: {}", said.join("; ")))
    }
}

extern "C" fn on_log(level: llama::ggml_log_level, text: *const c_char, _user_data: *mut c_void) {
    let _ = catch_unwind(|| {
        if text.is_null() {
            return;
        }
        // SAFETY: ggml passes a NUL-terminated string that lives until this function returns.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        if let Ok(mut kept) = KEPT.lock() {
            kept.take(level, &text);
        }
    });
}

impl Kept {
    /// Collects a line from the pieces ggml prints, and passes it on when it ends.
    fn take(&mut self, level: llama::ggml_log_level, text: &str) {
        if level != llama::GGML_LOG_LEVEL_CONT {
            self.flush();
            self.level = level;
        }
        self.line.push_str(text);
        if self.line.ends_with('\n') {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let line = self.line.trim();
        if !line.is_empty() {
            log::debug!(target: "flea::llama", "{line}");
            if self.level == llama::GGML_LOG_LEVEL_ERROR && self.errors.len() < KEPT_ERRORS_MAX {
                self.errors.push(without_function(line).to_owned());
            }
        }
        self.line.clear();
    }
}

/// `llama_model_load: error loading model: x` -> `error loading model: x`.
fn without_function(line: &str) -> &str {
    match line.split_once(": ") {
        Some((name, rest))
            if name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | ':' | '~')) =>
        {
            rest
        }
        _ => line,
    }
}

extern "C" fn on_abort(message: *const c_char) {
    let _ = catch_unwind(|| {
        let text = if message.is_null() {
            "no message".into()
        } else {
            // SAFETY: ggml_abort passes its NUL-terminated message, alive until this function returns.
            unsafe { CStr::from_ptr(message) }.to_string_lossy()
        };
        eprintln!("error: llama.cpp gave up: {text}");
    });
    // SAFETY: _exit has no preconditions; destructors and atexit handlers must not run over a state that failed an assertion.
    unsafe { libc::_exit(i32::from(ABORT_EXIT_CODE.load(Ordering::Relaxed))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_become_lines_and_errors_are_kept() {
        let mut kept = Kept {
            line: String::new(),
            level: 0,
            errors: Vec::new(),
        };
        kept.take(llama::GGML_LOG_LEVEL_ERROR, "llama_model_load: error ");
        kept.take(llama::GGML_LOG_LEVEL_CONT, "loading model\n");
        kept.take(llama::GGML_LOG_LEVEL_WARN, "load: only a warning\n");
        assert_eq!(kept.errors, ["error loading model"]);
    }
}
