//! A flead of the test's own, and clients for it.

#![allow(dead_code, unsafe_code)]

use flea::proto::snapshot::{ModelState, Snapshot};
use flea::proto::{Attached, Control, message};
use serde_json::json;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A daemon; killed when it is dropped, and by the kernel when the test dies.
pub struct Daemon {
    child: Child,
    pub socket: PathBuf,
    pub models: PathBuf,
    settings: Vec<(&'static str, &'static str)>,
    _directory: tempfile::TempDir,
}

/// A number of 0 to `below`, from a seed.
pub fn random(seed: &mut u64, below: u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed % below
}

fn spawn(socket: &Path, models: &Path, settings: &[(&str, &str)]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flead"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FLEA_") {
            command.env_remove(name);
        }
    }
    command
        .arg("--socket")
        .arg(socket)
        .arg("--models")
        .arg(models)
        .args(["--memory", "256MiB"])
        // What else runs on the machine must not change a test's budget; tests/pressure.rs is about that.
        .args(["--set", "pressure.watch=false"])
        .envs(settings.iter().copied())
        .stdin(Stdio::null());
    // SAFETY: prctl is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.spawn().expect("flead starts")
}

impl Daemon {
    /// Starts a daemon that opens models from where test models are kept.
    pub fn start(settings: &[(&'static str, &'static str)]) -> Self {
        Self::start_in(&crate::common::models(), settings)
    }

    pub fn start_in(models: &Path, settings: &[(&'static str, &'static str)]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("flea.sock");
        let daemon = Self {
            child: spawn(&socket, models, settings),
            socket,
            models: models.to_owned(),
            settings: settings.to_vec(),
            _directory: directory,
        };
        daemon.wait_until_it_answers();
        daemon
    }

    fn wait_until_it_answers(&self) {
        let began = Instant::now();
        while Control::connect(&self.socket).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "flead does not answer"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn control(&self) -> Control {
        Control::connect(&self.socket).expect("a connection")
    }

    pub fn status(&self) -> Snapshot {
        let answer = self.control().request("status", json!({}));
        message::from_value(answer.expect("status")).expect("a snapshot")
    }

    pub fn budget(&self, bytes: u64) {
        let answer = self.control().request("budget", json!({ "bytes": bytes }));
        answer.expect("a new budget");
    }

    pub fn attach(&self, path: &Path) -> Attached {
        Attached::open(&self.socket, path).expect("attached")
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Starts it again at the same place.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.socket, &self.models, &self.settings);
        self.wait_until_it_answers();
    }

    /// Waits for a state of the daemon.
    pub fn until(&self, what: &str, within: Duration, is: impl Fn(&Snapshot) -> bool) {
        let began = Instant::now();
        loop {
            let status = self.status();
            if is(&status) {
                return;
            }
            assert!(began.elapsed() < within, "{what}: {status:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The smallest pool that a model plans with, on the daemon's slots.
pub fn smallest(path: &Path) -> u64 {
    let (catalog, _) = flea::engine::read_catalog(path).expect("a model");
    let options = flea::plan::PlanOptions {
        slots_count: 4,
        page_bytes: 4096,
    };
    flea::plan::smallest_budget_bytes(&catalog, &options).expect("it can be planned")
}

/// The one model that a daemon has open.
pub fn only_model(daemon: &Daemon) -> ModelState {
    let status = daemon.status();
    assert_eq!(status.models.len(), 1, "{status:?}");
    status.models[0].clone()
}

/// Descriptors that a process has open.
pub fn open_files(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("fds")
        .count()
}

/// Compares every byte of a layer that is held with the file.
pub fn check_layer(model: &Attached, path: &Path, layer: u32) {
    let layer = &model.catalog().layers[layer as usize];
    crate::common::check_layer(layer, path, |shard, offset| model.address(shard, offset));
}

/// Walks over all layers and compares every byte.
pub fn walk(model: &Attached, path: &Path, passes: u32) {
    for _ in 0..passes {
        for layer in 0..model.catalog().layers.len() as u32 {
            model.acquire(layer, None, None).expect("acquire");
            check_layer(model, path, layer);
            model.release(layer).expect("release");
        }
    }
}
