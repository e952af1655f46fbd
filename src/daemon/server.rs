//! The reactor: one thread that listens, answers, passes kicks on to streams, and keeps the rules.
//!
//! It never waits for a client, a drive or the worker: packets are taken and given without waiting, what takes time is a
//! job. A client that does not read its answers, asks too often, or lies in its page costs itself its connection.

use super::answer::{self, Answer};
use super::bar::Bars;
use super::listener::{Listener, admits};
use super::session::Session;
use super::settings::Settings;
use super::shelf::Shelf;
use super::worker::{Done, Job, News, Worker};
use crate::engine::board::place;
use crate::error::{Error, ErrorKind, Result};
use crate::proto::message::{Method, Request, encode_reply};
use crate::proto::snapshot::Pressure;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::Value;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod life;

/// How often the reactor looks after its clients, whatever happens.
pub const TICK: Duration = Duration::from_millis(100);
/// A connection that has not said hello by then is closed.
const HELLO: Duration = Duration::from_secs(5);
/// Packets taken from one connection before the others have their turn.
const PACKETS_PER_TURN: usize = 8;
/// Kicks of one client in one tick; more are looked at in the next.
const KICKS_PER_TICK: u32 = 2000;
/// What the requests of one user, over all connections, may take of a tick; the rest of them wait for the next one.
const USER_TIME: Duration = Duration::from_millis(50);
/// A client that holds too much for so many ticks in a row is given up.
const EXCESS_TICKS: u32 = 10;
const LISTENER: u64 = 0;
const WORKER: u64 = 1;
const SIGNALS: u64 = 2;
const KICKS: u64 = 3;
/// Sessions count from here.
const FIRST_SESSION: u64 = 8;

/// What surrounds the reactor: service manager, memory pressure, the configuration file.
pub trait Surroundings {
    /// About to do something that may take as long as reading `bytes`, before clients are served.
    fn starting(&mut self, _what: &str, _bytes: u64) {}
    /// Clients are served from now on.
    fn ready(&mut self, _server: &Server) {}
    /// Called every [`TICK`]. A budget in bytes is put in force, as a measure and not for good.
    fn tick(&mut self, _server: &Server) -> Option<u64> {
        None
    }
    /// What is known about memory pressure.
    fn pressure(&self) -> Option<Pressure> {
        None
    }
    /// SIGHUP: the settings to go on with; `None` = the present ones.
    fn reload(&mut self, _present: &Settings) -> Option<Settings> {
        None
    }
    /// The end has begun.
    fn stopping(&mut self) {}
}

/// Nothing around.
#[derive(Debug)]
pub struct Alone;
impl Surroundings for Alone {}

/// The daemon.
#[derive(Debug)]
pub struct Server {
    /// Its models.
    pub shelf: Arc<Shelf>,
    /// The worker.
    pub worker: Worker,
    /// The connections.
    pub sessions: HashMap<u64, Session>,
    /// When it was ready.
    pub since: Instant,
    /// Clients given up.
    pub revoked_total: u64,
    /// Connections refused or closed for breaking a rule.
    pub refused_total: u64,
    /// Processes that may not attach for now.
    pub bars: Bars,
    /// Memory pressure at the last tick.
    pub pressure: Option<Pressure>,
    /// The settings in force.
    pub settings: Settings,
    /// The clients' kicks, by session: heard before every request, so that nobody's requests keep a lease waiting.
    pub kicks: Arc<Epoll>,
    listener: Listener,
    /// What each user's requests took in this tick.
    spent: HashMap<u32, Duration>,
    /// SIGHUP came before clients were served.
    reload_due: bool,
    /// The last accept failed: nobody is listened for until the next tick.
    deaf: bool,
    epoll: Epoll,
    signals: SignalFd,
    next_session: u64,
}

impl Server {
    /// A daemon that listens on `listener` and serves nobody yet. Takes SIGTERM, SIGINT and SIGHUP for the whole process:
    /// call it before any thread is started.
    ///
    /// # Errors
    /// What the kernel says; what the shelf of models says about the budget.
    pub fn new(settings: Settings, listener: Listener) -> Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block()
            .map_err(|errno| Error::os(errno as i32, "block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|errno| Error::os(errno as i32, "make a signalfd"))?;
        let make_epoll = || Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC);
        let failed = |errno| Error::os(errno as i32, "make an epoll");
        let (epoll, kicks) = (make_epoll().map_err(failed)?, make_epoll().map_err(failed)?);
        let shelf = Arc::new(Shelf::new(settings.clone())?);
        let server = Self {
            worker: Worker::start(Arc::clone(&shelf))?,
            shelf,
            sessions: HashMap::new(),
            since: Instant::now(),
            revoked_total: 0,
            refused_total: 0,
            bars: Bars::default(),
            pressure: None,
            settings,
            kicks: Arc::new(kicks),
            listener,
            spent: HashMap::new(),
            reload_due: false,
            deaf: false,
            epoll,
            signals,
            next_session: FIRST_SESSION,
        };
        server.watch(&server.listener, LISTENER)?;
        server.watch(server.worker.event(), WORKER)?;
        server.watch(&server.signals, SIGNALS)?;
        server.watch(&server.kicks.0, KICKS)?;
        Ok(server)
    }

    /// What all pools together may take now, and what is configured.
    #[must_use]
    pub fn budget(&self) -> (u64, u64) {
        self.shelf.budget()
    }

    /// How many models there are.
    #[must_use]
    pub fn models_count(&self) -> usize {
        self.shelf.models().len()
    }

    /// How many connections there are.
    #[must_use]
    pub fn sessions_count(&self) -> usize {
        self.sessions.len()
    }

    /// The daemon in one object.
    #[must_use]
    pub fn snapshot(&self) -> crate::proto::snapshot::Snapshot {
        answer::snapshot(self)
    }

    fn watch(&self, fd: impl AsFd, token: u64) -> Result<()> {
        watch(&self.epoll, fd, token)
    }

    fn listen_to(&self, fd: impl AsFd, token: u64, on: bool) {
        listen_to(&self.epoll, fd, token, on);
    }

    /// Opens and pins the models that were asked for beforehand, then serves until a signal ends it.
    ///
    /// # Errors
    /// What a preload says; what epoll says.
    pub fn run(&mut self, surroundings: &mut dyn Surroundings) -> Result<()> {
        for path in self.settings.preload.clone() {
            let path = path.display().to_string();
            surroundings.starting(&format!("opening {path}"), self.budget().0);
            if !self.preload(path)? {
                self.end(surroundings);
                return Ok(());
            }
        }
        self.since = Instant::now();
        log::info!("listening at {}", self.settings.socket.display());
        surroundings.ready(self);
        if self.reload_due {
            self.reload(surroundings);
        }
        self.pressure = surroundings.pressure();
        let mut events = [EpollEvent::empty(); 64];
        let mut ticked = Instant::now();
        loop {
            let left = TICK.saturating_sub(ticked.elapsed());
            let timeout = EpollTimeout::try_from(left).unwrap_or(EpollTimeout::ZERO);
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(errno) => return Err(Error::os(errno as i32, "wait for clients")),
            };
            for event in &events[..count] {
                if self.handle(event, surroundings) {
                    self.end(surroundings);
                    return Ok(());
                }
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.tick(surroundings);
            }
        }
    }

    /// One event; true when it is the end.
    fn handle(&mut self, event: &EpollEvent, surroundings: &mut dyn Surroundings) -> bool {
        match event.data() {
            LISTENER => self.accept(),
            WORKER => self.hear_worker(),
            SIGNALS => return self.signal(surroundings),
            KICKS => self.hear_kicks(),
            id => {
                let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
                if self.serve(id).is_err() || event.events().intersects(gone) {
                    self.close(id);
                }
            }
        }
        false
    }

    // ---- connections ----------------------------------------------------------------------------------------

    fn accept(&mut self) {
        for _ in 0..PACKETS_PER_TURN {
            match self.listener.accept() {
                Ok(None) => return,
                Err(error) => {
                    // Out of descriptors, most likely: the listener stays readable, so look again at the next tick.
                    if !std::mem::replace(&mut self.deaf, true) {
                        log::error!("{error}; connections wait until that is better");
                    }
                    self.listen_to(&self.listener, LISTENER, false);
                    return;
                }
                Ok(Some((socket, peer))) => {
                    self.deaf = false;
                    let of_user = self
                        .sessions
                        .values()
                        .filter(|s| s.peer.uid() == peer.uid());
                    let refusal = if !admits(&peer, &self.settings) {
                        let context = format!("user {} may not use this daemon", peer.uid());
                        Some(Error::new(ErrorKind::Permission, context))
                    } else if self.sessions.len() >= self.settings.connections_max
                        || of_user.count() >= self.settings.connections_per_user_max
                    {
                        let context = "the daemon has as many connections as it takes";
                        Some(Error::new(ErrorKind::Busy, context))
                    } else {
                        None
                    };
                    match refusal {
                        None => self.begin(socket, peer),
                        Some(error) => {
                            self.refused_total += 1;
                            let _ = socket.send(&encode_reply(&Err(error)), &[], true);
                        }
                    }
                }
            }
        }
    }

    fn begin(&mut self, socket: crate::proto::Socket, peer: nix::sys::socket::UnixCredentials) {
        let id = self.next_session;
        self.next_session += 1;
        let session = Session::new(id, socket, peer);
        match self.watch(&session.socket, id) {
            Ok(()) => drop(self.sessions.insert(id, session)),
            Err(error) => log::error!("{error}"),
        }
    }

    fn close(&mut self, id: u64) {
        if let Some(session) = self.sessions.remove(&id) {
            log::debug!("session {id} (pid {}) is over", session.peer.pid());
        }
    }

    /// Takes what a connection has sent. An error ends the connection.
    fn serve(&mut self, id: u64) -> Result<()> {
        for _ in 0..PACKETS_PER_TURN {
            self.hear_kicks();
            let Some(session) = self.sessions.get_mut(&id) else {
                return Ok(());
            };
            if session.busy || session.paused {
                return Ok(());
            }
            let uid = session.peer.uid();
            if self.spent.get(&uid).is_some_and(|spent| *spent > USER_TIME) {
                session.paused = true;
                let session = &self.sessions[&id];
                self.listen_to(&session.socket, id, false);
                return Ok(());
            }
            let packet = match session.socket.receive(false, true) {
                Ok(Some(packet)) => packet,
                Ok(None) => return Err(Error::new(ErrorKind::Connection, "hung up")),
                Err(error) if error.kind() == ErrorKind::Again => return Ok(()),
                Err(error) => {
                    self.refused_total += 1;
                    return Err(error);
                }
            };
            if packet.bytes.len() > self.settings.packet_bytes_max {
                self.refused_total += 1;
                return Err(Error::new(ErrorKind::Invalid, "a packet that is too long"));
            }
            let Some(session) = self.sessions.get_mut(&id) else {
                return Ok(());
            };
            if !session.may_ask(self.settings.requests_per_second) {
                session.paused = true;
                let session = &self.sessions[&id];
                self.listen_to(&session.socket, id, false);
            }
            let began = Instant::now();
            let answered = self.request(id, &packet.bytes);
            *self.spent.entry(uid).or_default() += began.elapsed();
            answered?;
        }
        Ok(())
    }

    fn request(&mut self, id: u64, packet: &[u8]) -> Result<()> {
        let parsed = Request::parse(packet);
        let greeted = self.sessions.get(&id).is_some_and(|s| s.name.is_some());
        let is_hello = matches!(&parsed, Ok(request) if request.method == Method::Hello);
        if !greeted && !is_hello {
            let why = Error::new(ErrorKind::Invalid, "the first packet must be hello");
            self.reply(id, &Err(parsed.err().unwrap_or(why)), &[])?;
            self.refused_total += 1;
            return Err(Error::new(ErrorKind::Invalid, "no hello"));
        }
        let answer = match parsed {
            Ok(request) => answer::answer(self, id, &request),
            Err(error) => Answer::Now(Err(error), Vec::new()),
        };
        match answer {
            Answer::Now(reply, descriptors) => {
                self.reply(id, &reply, &descriptors)?;
                match (is_hello, reply) {
                    // A stranger to the protocol is told why, and goes.
                    (true, Err(error)) => Err(error),
                    _ => Ok(()),
                }
            }
            Answer::Later => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.busy = true;
                }
                if let Some(session) = self.sessions.get(&id) {
                    self.listen_to(&session.socket, id, false);
                }
                Ok(())
            }
        }
    }

    /// Answers without waiting: who does not read his answers is closed.
    fn reply(&mut self, id: u64, reply: &Result<Value>, descriptors: &[OwnedFd]) -> Result<()> {
        let Some(session) = self.sessions.get(&id) else {
            return Ok(());
        };
        // Descriptors that nobody takes count against this user's limit, and then nobody gets any.
        if !descriptors.is_empty() && session.socket.unread() {
            self.refused_total += 1;
            return Err(Error::new(ErrorKind::Again, "answers are not read"));
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = session.socket.send(&encode_reply(reply), &raw, true);
        if sent.is_err() {
            self.refused_total += 1;
        }
        sent
    }

    /// Begins to listen to a client's kicks.
    ///
    /// # Errors
    /// What epoll says.
    pub fn listen_for_kicks(&self, id: u64) -> Result<()> {
        match self.sessions.get(&id).and_then(|s| s.attached.as_ref()) {
            Some(attached) => watch(&self.kicks, &attached.kick.event, id),
            None => Ok(()),
        }
    }

    fn hear_kicks(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        let count = self.kicks.wait(&mut events, EpollTimeout::ZERO);
        for event in &events[..count.unwrap_or(0)] {
            self.kicked(event.data());
        }
    }

    fn kicked(&mut self, id: u64) {
        let session = self.sessions.get_mut(&id);
        let Some(attached) = session.and_then(|session| session.attached.as_mut()) else {
            return;
        };
        let _ = attached.kick.event.read();
        attached.kicks += 1;
        attached.model.wake();
        if attached.kicks > KICKS_PER_TICK {
            attached.paused = true;
            listen_to(&self.kicks, &attached.kick.event, id, false);
        }
    }

    // ---- the worker -----------------------------------------------------------------------------------------

    fn hear_worker(&mut self) {
        for news in self.worker.news() {
            match news {
                News::Revoke(clients) => {
                    for id in clients {
                        self.revoke(id, "it holds leases of a plan that has to go");
                    }
                }
                News::Done(done) => self.done(done),
            }
        }
    }

    fn done(&mut self, done: Done) {
        let Some(id) = done.session else {
            if let Err(error) = done.result {
                log::error!("{error}");
            }
            return;
        };
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.busy = false;
        let (reply, descriptors) = answer::finish(self, id, done);
        let sent = self.reply(id, &reply, &descriptors);
        drop(descriptors);
        match self.sessions.get(&id) {
            Some(session) if sent.is_ok() => {
                self.listen_to(&session.socket, id, !session.paused);
            }
            _ => self.close(id),
        }
    }

    // ---- the rules ------------------------------------------------------------------------------------------

    fn revoke(&mut self, id: u64, why: &str) {
        let Some(session) = self.sessions.get(&id) else {
            return;
        };
        log::warn!(
            "client {id} (pid {}, user {}) is given up: {why}",
            session.peer.pid(),
            session.peer.uid()
        );
        if let Some(attached) = &session.attached {
            let clients = attached.model.board.clients();
            if let Some(client) = clients.iter().find(|client| client.id == id) {
                let status = ErrorKind::Revoked.status().unsigned_abs();
                client.page.store(place::REVOKED, status);
            }
        }
        self.revoked_total += 1;
        self.close(id);
    }

    /// The process of client `id` may not attach for a while.
    fn bar(&mut self, id: u64) {
        if let Some(session) = self.sessions.get(&id) {
            let timeout = self.settings.lease_timeout;
            self.bars.add(session.peer.pid(), timeout, Instant::now());
        }
    }

    fn tick(&mut self, surroundings: &mut dyn Surroundings) {
        self.pressure = surroundings.pressure();
        if self.deaf {
            self.listen_to(&self.listener, LISTENER, true);
        }
        if let Some(bytes) = surroundings.tick(self)
            && let Err(error) = self.worker.give(
                None,
                Job::Budget {
                    bytes,
                    configured: false,
                },
            )
        {
            log::error!("{error}");
        }
        for model in self.shelf.models() {
            for id in model.overdue(self.settings.lease_timeout) {
                self.bar(id);
                self.revoke(id, "it held a layer for too long while others waited");
            }
        }
        self.spent.clear();
        let mut ids: Vec<u64> = self.sessions.keys().copied().collect();
        // Who is woken first is served first: not the same one every time.
        let first = self.since.elapsed().as_millis() as usize % ids.len().max(1);
        ids.rotate_left(first);
        for id in ids {
            self.look_after(id);
        }
    }

    fn look_after(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        if session.name.is_none() && session.since.elapsed() > HELLO {
            self.refused_total += 1;
            self.close(id);
            return;
        }
        let woken = std::mem::take(&mut session.paused);
        let mut kicks_woken = false;
        let mut liar = false;
        if let Some(attached) = &mut session.attached {
            attached.kicks = 0;
            kicks_woken = std::mem::take(&mut attached.paused);
            attached.excess_ticks = match attached.holds_too_much(id, self.settings.leases_max) {
                true => attached.excess_ticks + 1,
                false => 0,
            };
            liar = attached.excess_ticks > EXCESS_TICKS;
        }
        let session = &self.sessions[&id];
        if woken && !session.busy {
            self.listen_to(&session.socket, id, true);
        }
        if let Some(attached) = session.attached.as_ref().filter(|_| kicks_woken) {
            listen_to(&self.kicks, &attached.kick.event, id, true);
        }
        if liar {
            self.revoke(id, "it holds more layers than a client may");
        }
    }
}

fn watch(epoll: &Epoll, fd: impl AsFd, token: u64) -> Result<()> {
    epoll
        .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
        .map_err(|errno| Error::os(errno as i32, "watch a descriptor"))
}

/// Whether a descriptor is listened to. A hang-up is heard all the same.
fn listen_to(epoll: &Epoll, fd: impl AsFd, token: u64, on: bool) {
    let flags = match on {
        true => EpollFlags::EPOLLIN,
        false => EpollFlags::empty(),
    };
    if let Err(errno) = epoll.modify(fd, &mut EpollEvent::new(flags, token)) {
        log::error!("epoll: {errno}");
    }
}
