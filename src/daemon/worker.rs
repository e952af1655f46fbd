//! The daemon's one thread for what takes time: opening models, making plans, filling and giving back pools.
//!
//! Jobs are done one after the other, so two changes never meet. The reactor hands them over and hears of their end
//! through an eventfd; the worker asks it the same way to revoke clients that stand in the way.

use super::hosted::Hosted;
use super::settings::Settings;
use super::shelf::Shelf;
use crate::error::{Error, ErrorKind, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What is to be done.
#[derive(Debug)]
pub enum Job {
    /// Open a model; `attach`: for a client that wants to attach to it.
    Load {
        /// Its path.
        path: String,
        /// Pin it.
        pin: bool,
        /// The client attaches to it.
        attach: bool,
    },
    /// Close a model.
    Unload(Arc<Hosted>),
    /// Change the budget; `configured`: for good.
    Budget {
        /// To this.
        bytes: u64,
        /// Not only while there is pressure.
        configured: bool,
    },
    /// Take up new settings.
    Settings(Box<Settings>),
}

/// What became of a job.
#[derive(Debug)]
pub struct Done {
    /// The session that asked; `None` = the daemon itself.
    pub session: Option<u64>,
    /// The job.
    pub job: Job,
    /// The model it was about, or what went wrong.
    pub result: Result<Option<Arc<Hosted>>>,
}

/// What the worker tells the reactor.
#[derive(Debug)]
pub enum News {
    /// A job is done.
    Done(Done),
    /// These clients hold leases of an old plan for too long.
    Revoke(Vec<u64>),
}

/// The worker, from the reactor's side.
#[derive(Debug)]
pub struct Worker {
    jobs: Option<Sender<(Option<u64>, Job)>>,
    news: Arc<Mailbox>,
    /// Jobs that were handed over and are not done.
    pending: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Mailbox {
    event: EventFd,
    items: Mutex<Vec<News>>,
}

impl Mailbox {
    fn post(&self, news: News) {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        items.push(news);
        if let Err(errno) = self.event.write(1) {
            log::error!("the reactor could not be told: {errno}");
        }
    }
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// What eventfd and thread creation say.
    pub fn start(shelf: Arc<Shelf>) -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Error::os(errno as i32, "make an eventfd"))?;
        let news = Arc::new(Mailbox {
            event,
            items: Mutex::default(),
        });
        let (jobs, receiver) = channel();
        let mailbox = Arc::clone(&news);
        let pending = Arc::new(AtomicUsize::new(0));
        let done = Arc::clone(&pending);
        let thread = std::thread::Builder::new()
            .name("flead-work".to_owned())
            .spawn(move || work(&shelf, &receiver, &mailbox, &done))
            .map_err(|error| Error::from_io(&error, "start the worker's thread"))?;
        Ok(Self {
            jobs: Some(jobs),
            news,
            pending,
            thread: Some(thread),
        })
    }

    /// Hands a job over.
    ///
    /// # Errors
    /// `Internal` when the thread is gone.
    pub fn give(&self, session: Option<u64>, job: Job) -> Result<()> {
        self.pending.fetch_add(1, Ordering::Relaxed);
        let sent = self.jobs.as_ref().map(|jobs| jobs.send((session, job)));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Internal,
                "the worker's thread is gone",
            )),
        }
    }

    /// True while anything is being done: memory that pools hold and what is told of it do not agree then.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.pending.load(Ordering::Acquire) > 0
    }

    /// What becomes readable when there is news.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.news.event.as_fd()
    }

    /// The news since the last call.
    #[must_use]
    pub fn news(&self) -> Vec<News> {
        let _ = self.news.event.read();
        let mut items = self
            .news
            .items
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *items)
    }

    /// True when the thread has ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the worker's thread had panicked");
        }
    }
}

fn work(
    shelf: &Shelf,
    jobs: &Receiver<(Option<u64>, Job)>,
    mailbox: &Mailbox,
    pending: &AtomicUsize,
) {
    // Signals are for the reactor.
    let _ = nix::sys::signal::SigSet::all().thread_block();
    let revoke = |clients: Vec<u64>| mailbox.post(News::Revoke(clients));
    while let Ok((session, job)) = jobs.recv() {
        let result = carry_out(shelf, &job, &revoke);
        pending.fetch_sub(1, Ordering::Release);
        mailbox.post(News::Done(Done {
            session,
            job,
            result,
        }));
    }
}

fn carry_out(shelf: &Shelf, job: &Job, revoke: &dyn Fn(Vec<u64>)) -> Result<Option<Arc<Hosted>>> {
    match job {
        Job::Load { path, pin, .. } => shelf.load(path, *pin, revoke).map(Some),
        Job::Unload(model) => shelf.unload(model, revoke).map(|()| None),
        Job::Budget { bytes, configured } => {
            shelf.set_budget(*bytes, *configured, revoke).map(|()| None)
        }
        Job::Settings(settings) => {
            let before = shelf.settings().memory;
            shelf.set_settings((**settings).clone());
            // The budget stays what it is, also where pressure holds it down; weights may be others.
            if settings.memory == before {
                return shelf.rebalance(revoke).map(|()| None);
            }
            let changed = super::shelf::budget_of(settings, shelf.held_bytes())
                .and_then(|bytes| shelf.set_budget(bytes, true, revoke));
            if changed.is_err() {
                // Everything else holds all the same; the next reload tries the memory again.
                log::error!("reload: memory stays what it was, the rest is taken over");
                shelf.set_settings(Settings {
                    memory: before,
                    ..(**settings).clone()
                });
                shelf.rebalance(revoke)?;
            }
            changed.map(|()| None)
        }
    }
}
