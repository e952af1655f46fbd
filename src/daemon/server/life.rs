//! Beginning and end of the reactor: what is loaded before clients are served, and the signals.

use super::{Server, Surroundings};
use crate::daemon::worker::{Job, News};
use crate::error::{Error, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::os::fd::AsFd;

impl Server {
    /// Hears the signals; true when one of them ends the daemon.
    pub(super) fn signal(&mut self, surroundings: &mut dyn Surroundings) -> bool {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo != Signal::SIGHUP as u32 {
                return true;
            }
            self.reload(surroundings);
        }
        false
    }

    pub(super) fn reload(&mut self, surroundings: &mut dyn Surroundings) {
        self.reload_due = false;
        if let Some(settings) = surroundings.reload(&self.settings) {
            self.settings = settings.clone();
            if let Err(error) = self.worker.give(None, Job::Settings(Box::new(settings))) {
                log::error!("{error}");
            }
        }
    }

    /// Ends all there is. A pool that the worker fills this moment is filled no further.
    pub(super) fn end(&mut self, surroundings: &mut dyn Surroundings) {
        log::info!("stopping");
        surroundings.stopping();
        self.shelf.cancel();
        self.sessions.clear();
        self.shelf.close();
    }

    /// Has the worker open and pin a model, before clients are served. False when a signal to end came first.
    pub(super) fn preload(&mut self, path: String) -> Result<bool> {
        let job = Job::Load {
            path,
            pin: true,
            attach: false,
        };
        self.worker.give(None, job)?;
        loop {
            let mut waits = [
                PollFd::new(self.worker.event(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Error::os(errno as i32, "wait for a model")),
            }
            while let Ok(Some(info)) = self.signals.read_signal() {
                if info.ssi_signo != Signal::SIGHUP as u32 {
                    return Ok(false);
                }
                self.reload_due = true;
            }
            for news in self.worker.news() {
                if let News::Done(done) = news {
                    return done.result.map(|_| true);
                }
            }
        }
    }
}
