//! One line on a terminal's stderr while a model is loaded and its resident weights are read; nothing where stderr is no
//! terminal. Invariant: the line is wiped before anything else is written.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::host::Monitor;
use crate::units::HumanBytes;

/// Often enough for the eye; each look measures the pool's pages.
const LOOK: Duration = Duration::from_millis(500);
const WIPE: &str = "\r\x1b[K";

fn show(line: &str) {
    let mut err = std::io::stderr().lock();
    // Nobody is left to tell when stderr is gone.
    let _ = write!(err, "{WIPE}{line}").and_then(|()| err.flush());
}

/// What llama.cpp has loaded, in percent.
#[derive(Debug)]
pub struct Loading {
    visible: bool,
    shown: Option<u32>,
}

impl Loading {
    /// Starts; `quiet` shows nothing.
    pub fn start(quiet: bool) -> Self {
        Self {
            visible: !quiet && std::io::stderr().is_terminal(),
            shown: None,
        }
    }

    /// Shows the share that is loaded, where it changed.
    pub fn show(&mut self, share: f32) {
        let percent = (share.clamp(0.0, 1.0) * 100.0) as u32;
        if self.visible && self.shown != Some(percent) {
            self.shown = Some(percent);
            show(&format!("loading {percent} %"));
        }
    }

    /// Wipes the line.
    pub fn finish(self) {
        if self.shown.is_some() {
            show("");
        }
    }
}

/// What has been read before the first token.
#[derive(Debug)]
pub struct Reading {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reading {
    /// Starts a thread that looks; `quiet`, a plain run or no terminal: none.
    pub fn start(monitor: Option<Monitor>, quiet: bool) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let visible = !quiet && std::io::stderr().is_terminal();
        let thread = monitor.filter(|_| visible).and_then(|monitor| {
            let done = Arc::clone(&done);
            std::thread::Builder::new()
                .name("progress".to_owned())
                .spawn(move || watch(&monitor, &done))
                .ok()
        });
        Self { done, thread }
    }

    /// Wipes the line; more calls do nothing.
    pub fn finish(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.done.store(true, Ordering::Release);
            thread.thread().unpark();
            // A progress line that panicked is not worth a word.
            let _ = thread.join();
            show("");
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.finish();
    }
}

fn watch(monitor: &Monitor, done: &AtomicBool) {
    while !done.load(Ordering::Acquire) {
        std::thread::park_timeout(LOOK);
        if done.load(Ordering::Acquire) {
            return;
        }
        if let Some((read_bytes, resident_bytes)) = monitor.read_of_resident() {
            show(&format!(
                "reading weights: {} read, {} stay resident",
                HumanBytes(read_bytes),
                HumanBytes(resident_bytes)
            ));
        }
    }
}
