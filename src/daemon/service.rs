//! What surrounds the reactor on a real machine: the service manager, memory pressure, metrics, the configuration file.
//!
//! Everything here runs on the reactor's own thread, at its ticks, and none of it waits: that is what makes the watchdog
//! mean something. Place: around `file -> catalog -> plan -> reader -> pool -> lease -> host`, not in it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::config::{self, Changes, Loaded, Overrides};
use super::metrics::{self, Responder};
use super::notify::Notifier;
use super::pressure::{Bounds, Decision, Policy, Reading, Sources, Stall, some_avg10};
use super::server::{Server, Surroundings};
use super::settings::Settings;
use crate::error::Result;
use crate::mem::limits;
use crate::proto::snapshot::{Pressure, Snapshot};
use crate::units::HumanBytes;

/// How often available memory is looked at; an alarm is heard at the next tick.
const LOOK: Duration = Duration::from_millis(500);
/// How often systemd and the metrics' readers get a new picture.
const PUBLISH: Duration = Duration::from_secs(1);
/// How long a budget that did not come about is left alone.
const AGAIN: Duration = Duration::from_secs(5);
/// The rate that a start is given time for, besides 30 s: a slow disk, not a fast one.
const SLOW_BYTES_PER_SECOND: u64 = 50_000_000;

/// Systemd, pressure, metrics, flead.toml.
#[derive(Debug)]
pub struct Service {
    loaded: Loaded,
    file: Option<PathBuf>,
    overrides: Overrides,
    notifier: Notifier,
    watch: Option<Watch>,
    latest: Arc<Mutex<Snapshot>>,
    published: Option<(Instant, u64)>,
    _responder: Option<Responder>,
}

/// Memory pressure at work.
#[derive(Debug)]
struct Watch {
    sources: Sources,
    policy: Policy,
    began: Instant,
    looked: Option<Instant>,
    issued: Option<Instant>,
    told: Pressure,
}

impl Service {
    /// Begins to answer for metrics, if the settings say where, and to watch memory pressure. `file` and `overrides`
    /// are what `loaded` came from: SIGHUP reads them again.
    ///
    /// # Errors
    /// What binding the metrics' address says.
    pub fn new(loaded: Loaded, file: Option<PathBuf>, overrides: Overrides) -> Result<Self> {
        let latest = Arc::new(Mutex::new(Snapshot::default()));
        let shown = Arc::clone(&latest);
        let responder = loaded.config.metrics_listen.map(|address| {
            Responder::start(address, move || {
                metrics::text(&shown.lock().unwrap_or_else(PoisonError::into_inner))
            })
        });
        let responder = responder.transpose()?;
        if let Some(responder) = &responder {
            log::info!("metrics at http://{}/metrics", responder.address());
        }
        Ok(Self {
            loaded,
            file,
            overrides,
            notifier: Notifier::new(),
            watch: None,
            latest,
            published: None,
            _responder: responder,
        })
    }

    fn publish(&mut self, server: &Server) {
        let now = Instant::now();
        let due = self
            .published
            .is_none_or(|(at, _)| now.duration_since(at) >= PUBLISH);
        if !due {
            return;
        }
        let picture = server.snapshot();
        let read_bytes: u64 = picture
            .models
            .iter()
            .map(|model| model.bytes_read_total)
            .sum();
        let rate = self.published.map_or(0.0, |(at, before_bytes)| {
            read_bytes.saturating_sub(before_bytes) as f64 / now.duration_since(at).as_secs_f64()
        });
        self.published = Some((now, read_bytes));
        self.notifier.status(&status(&picture, rate));
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = picture;
    }
}

/// The line of `systemctl status`.
fn status(picture: &Snapshot, bytes_per_second: f64) -> String {
    let several = |count: usize, what: &str| {
        let end = if count == 1 { "" } else { "s" };
        format!("{count} {what}{end}")
    };
    let held_down = picture.budget_bytes < picture.budget_configured_bytes;
    format!(
        "{}, {}, streaming {:.1} GB/s, pools {} of {}{}",
        several(picture.models.len(), "model"),
        several(picture.clients.len(), "client"),
        bytes_per_second / 1e9,
        HumanBytes(picture.pool_bytes),
        HumanBytes(picture.budget_bytes),
        if held_down {
            ", held down by memory pressure"
        } else {
            ""
        }
    )
}

impl Surroundings for Service {
    fn starting(&mut self, what: &str, bytes: u64) {
        let seconds = 30 + bytes / SLOW_BYTES_PER_SECOND;
        self.notifier.starting(what, Duration::from_secs(seconds));
    }

    fn ready(&mut self, server: &Server) {
        let (_, configured_bytes) = server.shelf.budget();
        self.watch = Watch::open(&self.loaded.config.pressure, configured_bytes);
        let picture = server.snapshot();
        self.notifier.ready(&status(&picture, 0.0));
        self.publish(server);
    }

    fn tick(&mut self, server: &Server) -> Option<u64> {
        self.notifier.alive();
        self.publish(server);
        self.watch.as_mut()?.look(server)
    }

    fn pressure(&self) -> Option<Pressure> {
        self.watch.as_ref().map(|watch| watch.told.clone())
    }

    fn reload(&mut self, _present: &Settings) -> Option<Settings> {
        self.notifier.reloading();
        let settings = match self.read_again() {
            Ok(settings) => settings,
            Err(error) => {
                log::error!("the configuration stays as it is: {error}");
                None
            }
        };
        self.notifier.ready("reloaded");
        settings
    }

    fn stopping(&mut self) {
        self.notifier.stopping();
    }
}

impl Service {
    /// Reads the file again; `None` where nothing changed that can be taken over.
    fn read_again(&mut self) -> Result<Option<Settings>> {
        let mut fresh = config::load(self.file.as_deref(), &self.overrides)?;
        let changes = Changes::between(&self.loaded.config, &fresh.config);
        log::info!("reload: {changes}");
        for change in &changes.restart {
            log::warn!("{change} needs a restart of flead");
        }
        // Groups may have other members now, whatever the file says.
        fresh.config = config::reloaded(&self.loaded.config, &fresh.config);
        let settings = fresh.settings()?;
        if fresh.config.pressure != self.loaded.config.pressure {
            self.watch = match self.watch.take() {
                Some(watch) => watch.reopened(&fresh.config.pressure),
                None => Watch::open(&fresh.config.pressure, 0),
            };
        }
        self.loaded = fresh;
        Ok(Some(settings))
    }
}

impl Watch {
    /// `None` where the settings say not to watch.
    fn open(settings: &super::pressure::Settings, wanted_bytes: u64) -> Option<Self> {
        if !settings.watch {
            return None;
        }
        let sources = Sources::open(settings);
        for missing in sources.missing() {
            log::info!("memory pressure: {missing}");
        }
        let watched: Vec<String> = sources
            .watched()
            .map(|path| path.display().to_string())
            .collect();
        let told = Pressure {
            source: watched.join(", "),
            state: super::pressure::State::Calm.name().to_owned(),
            ..Pressure::default()
        };
        Some(Self {
            sources,
            policy: Policy::new(settings.clone(), wanted_bytes),
            began: Instant::now(),
            looked: None,
            issued: None,
            told,
        })
    }

    /// The same watch under other settings; what was learned stays. Switched off it says once more what the budget is.
    fn reopened(mut self, settings: &super::pressure::Settings) -> Option<Self> {
        self.policy.set(settings.clone());
        self.sources = Sources::open(settings);
        Some(self)
    }

    /// Hears the alarms, looks at available memory now and then; `Some` is a new budget for the time being.
    fn look(&mut self, server: &Server) -> Option<u64> {
        let stalled = self.stalled();
        let due = self.looked.is_none_or(|at| at.elapsed() >= LOOK);
        // While pools are being made, what they hold and what is free do not add up; and nothing could be done.
        if server.worker.busy() || (!stalled && !due) {
            return None;
        }
        self.looked = Some(Instant::now());
        let free = match limits::free_memory() {
            Ok(free) => free,
            Err(error) => {
                log::warn!("memory pressure: {error}");
                return None;
            }
        };
        self.told.available_bytes = free.bytes;
        self.told.some_avg10 = std::fs::read_to_string("/proc/pressure/memory")
            .ok()
            .and_then(|text| some_avg10(&text))
            .unwrap_or(0.0);
        let reading = Reading {
            now_ns: u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX),
            available_bytes: free.bytes,
            stalled,
            pool_bytes: server.shelf.held_bytes(),
        };
        let decision = self.policy.step(&reading, &bounds(server));
        self.told.state = self.policy.state().name().to_owned();
        self.issue(server.shelf.budget().0, decision)
    }

    /// What has to be put in force so that the budget is what the policy says. A decision that did not come about (the
    /// models did not fit, a reload came between) is issued again later.
    fn issue(&mut self, budget_bytes: u64, decision: Option<Decision>) -> Option<u64> {
        let target_bytes = self.policy.target_bytes();
        let again = self.issued.is_none_or(|at| at.elapsed() >= AGAIN);
        if target_bytes == budget_bytes || (decision.is_none() && !again) {
            return None;
        }
        self.issued = Some(Instant::now());
        if let Some(decision) = decision {
            let smaller = target_bytes < budget_bytes;
            let (level, word) = match smaller {
                true => (log::Level::Warn, "smaller"),
                false => (log::Level::Info, "larger"),
            };
            let size = HumanBytes(target_bytes);
            log::log!(
                level,
                "the budget becomes {word}, {size}: {}",
                decision.reason
            );
            self.told.shrinks_total += u64::from(smaller);
            self.told.grows_total += u64::from(!smaller);
            self.told.reason = decision.reason;
        }
        Some(target_bytes)
    }

    /// Asks, without waiting, whether any alarm went off.
    fn stalled(&mut self) -> bool {
        let woken = self.woken();
        match self.sources.take(|fd| woken.contains(&fd.as_raw_fd())) {
            Ok(stall) => stall == Stall::Memory,
            Err(error) => {
                log::warn!("memory pressure: {error}");
                false
            }
        }
    }

    fn woken(&self) -> Vec<i32> {
        let mut entries: Vec<PollFd<'_>> = self
            .sources
            .descriptors()
            .map(|(fd, readable)| {
                let flags = if readable {
                    PollFlags::POLLIN
                } else {
                    PollFlags::POLLPRI
                };
                PollFd::new(fd, flags)
            })
            .collect();
        match poll(&mut entries, PollTimeout::ZERO) {
            Ok(0) | Err(_) => Vec::new(),
            Ok(_) => entries
                .iter()
                .filter(|entry| entry.any().unwrap_or(false))
                .map(|entry| raw(entry.as_fd()))
                .collect(),
        }
    }
}

fn raw(fd: BorrowedFd<'_>) -> i32 {
    fd.as_raw_fd()
}

/// Models that somebody uses, or that are pinned, keep their smallest plan; others go before that.
fn bounds(server: &Server) -> Bounds {
    let (_, wanted_bytes) = server.shelf.budget();
    let models = server.shelf.models();
    let kept = models
        .iter()
        .filter(|model| model.clients_count() > 0 || model.pinned.load(Ordering::Relaxed));
    Bounds {
        floor_bytes: kept.map(|model| model.smallest_bytes).sum(),
        wanted_bytes,
    }
}
