//! All models of the daemon, and the memory they divide between them.
//!
//! Only the worker thread changes anything here; the reactor looks models up. A model is opened only from an allowed
//! directory: its path is resolved first, and where its open files really lie is asked of the kernel afterwards, so that
//! a link swapped in between leads nowhere. The sum of all pools never passes the budget: what shrinks, shrinks first.

use super::divide::{Claim, divide};
use super::hosted::Hosted;
use super::settings::{Settings, WEIGHT_DEFAULT};
use crate::engine::read_catalog;
use crate::engine::share::Group;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::limits;
use crate::units::{HumanBytes, MemorySpec, PAGE_2M};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A plan is not changed for less than this share of it, as a divisor.
const WORTH_IT: u64 = 100;

/// The models, and what they live on.
#[derive(Debug)]
pub struct Shelf {
    models: Mutex<Vec<Arc<Hosted>>>,
    settings: Mutex<Settings>,
    /// Models on one drive share it: by device number.
    drives: Mutex<HashMap<u64, Arc<Group>>>,
    next_id: AtomicU32,
    /// The daemon ends: pools that are being filled are filled no further.
    cancel: Arc<AtomicBool>,
    /// What is configured, and what holds now.
    configured_bytes: AtomicU64,
    budget_bytes: AtomicU64,
}

impl Shelf {
    /// An empty shelf. The budget is settled now, from what the machine has.
    ///
    /// # Errors
    /// `Invalid` for a percentage; `Refused` for more than there is.
    pub fn new(settings: Settings) -> Result<Self> {
        let bytes = budget_of(&settings, 0)?;
        Ok(Self {
            models: Mutex::default(),
            settings: Mutex::new(settings),
            drives: Mutex::default(),
            next_id: AtomicU32::new(1),
            cancel: Arc::default(),
            configured_bytes: AtomicU64::new(bytes),
            budget_bytes: AtomicU64::new(bytes),
        })
    }

    fn list(&self) -> MutexGuard<'_, Vec<Arc<Hosted>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let settings = self.settings.lock();
        settings.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts other settings in force. Budget and weights are taken up by the next [`Shelf::rebalance`].
    pub fn set_settings(&self, settings: Settings) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// All models.
    #[must_use]
    pub fn models(&self) -> Vec<Arc<Hosted>> {
        self.list().clone()
    }

    /// What all pools together may take now, and what is configured.
    #[must_use]
    pub fn budget(&self) -> (u64, u64) {
        (
            self.budget_bytes.load(Ordering::Relaxed),
            self.configured_bytes.load(Ordering::Relaxed),
        )
    }

    /// What the plans in force may take together.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.list().iter().map(|model| model.budget_bytes()).sum()
    }

    /// The model of this number or path.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn named(&self, name: &str) -> Result<Arc<Hosted>> {
        let id: Option<u32> = name.parse().ok();
        let path = std::fs::canonicalize(name).ok();
        let list = self.list();
        let found = list.iter().find(|model| {
            Some(model.id) == id
                || path.as_deref() == Some(&*model.path)
                || Path::new(name) == model.path
        });
        found
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no model '{name}' is loaded")))
    }

    /// The loaded model at `path`, if it may be opened and is loaded.
    ///
    /// # Errors
    /// Those of [`Shelf::resolve`].
    pub fn loaded(&self, path: &str) -> Result<Option<Arc<Hosted>>> {
        let path = self.resolve(path)?;
        Ok(self.list().iter().find(|model| model.path == path).cloned())
    }

    /// Resolves a client's path, and refuses it when it does not lie in an allowed directory.
    ///
    /// # Errors
    /// `Invalid` for a path that is not absolute, `Permission`. What lies outside is not told apart from what is not there.
    pub fn resolve(&self, path: &str) -> Result<PathBuf> {
        if !path.starts_with('/') || path.contains('\0') {
            let context = format!("'{path}': the daemon takes absolute paths");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let settings = self.settings();
        let forbidden = || {
            Error::new(
                ErrorKind::Permission,
                format!(
                    "{path}: no model in a directory that flead may open models from (models = ... in flead.toml, --models)"
                ),
            )
        };
        let resolved = std::fs::canonicalize(path).map_err(|error| {
            // Inside an allowed directory a client may know that a file is missing.
            let inside = settings
                .models
                .iter()
                .any(|dir| Path::new(path).starts_with(dir));
            let plain = !path.split('/').any(|part| part == "..");
            if inside && plain {
                Error::from_io(&error, path)
            } else {
                forbidden()
            }
        })?;
        if inside(&resolved, &settings) {
            Ok(resolved)
        } else {
            Err(forbidden())
        }
    }

    // ---- the worker's part ----------------------------------------------------------------------------------

    /// Opens a model, unless it is there, and divides the memory anew.
    ///
    /// # Errors
    /// Those of [`Shelf::resolve`] and of reading its headers; `Refused` when its smallest plan does not fit beside the
    /// others.
    pub fn load(&self, path: &str, pin: bool, revoke: &dyn Fn(Vec<u64>)) -> Result<Arc<Hosted>> {
        let resolved = self.resolve(path)?;
        let there = self
            .list()
            .iter()
            .find(|model| model.path == resolved)
            .cloned();
        let model = match there {
            Some(model) if model.budget_bytes() > 0 && model.is_current() => model,
            Some(old) => self.reopen(&old, resolved, revoke)?,
            None => self.open(resolved, revoke)?,
        };
        if pin {
            model.pinned.store(true, Ordering::Relaxed);
        }
        Ok(model)
    }

    /// Opens a model anew whose last plan could not be had, or whose files are others now: who attaches reads its header
    /// from those, and must not get the weights of the ones before.
    fn reopen(
        &self,
        old: &Arc<Hosted>,
        path: PathBuf,
        revoke: &dyn Fn(Vec<u64>),
    ) -> Result<Arc<Hosted>> {
        let clients = old.clients_count();
        if clients > 0 && old.budget_bytes() > 0 {
            let context = format!(
                "{}: it was replaced or written to, and {clients} clients still use what was there before; try again when they have left",
                path.display()
            );
            return Err(Error::new(ErrorKind::Changed, context));
        }
        log::info!("{}: opened anew", path.display());
        self.remove(old);
        let model = self.open(path, revoke)?;
        let pinned = old.pinned.load(Ordering::Relaxed);
        model.pinned.store(pinned, Ordering::Relaxed);
        Ok(model)
    }

    fn open(&self, path: PathBuf, revoke: &dyn Fn(Vec<u64>)) -> Result<Arc<Hosted>> {
        let settings = self.settings();
        if self.list().len() >= settings.models_max {
            let context = format!(
                "{} models are loaded, as many as may be",
                settings.models_max
            );
            return Err(Error::new(ErrorKind::Refused, context));
        }
        let parts = read_catalog(&path)?;
        for file in &parts.1 {
            if !inside(&file.real_path()?, &settings) {
                let context = format!(
                    "{}: a file of this model lies outside the directories that flead may open models from",
                    file.path().display()
                );
                return Err(Error::new(ErrorKind::Permission, context));
            }
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let weight = weight_of(&path, &settings);
        let group = self.drive_of(&path)?;
        let model = Hosted::new(id, path, parts, &settings, (&group, &self.cancel), weight)?;
        self.make_room(model.smallest_bytes)?;
        let model = Arc::new(model);
        self.list().push(Arc::clone(&model));
        let result = self.rebalance(revoke);
        if model.budget_bytes() == 0 {
            model.close("failed");
            self.list().retain(|other| other.id != model.id);
            self.rebalance(revoke)?;
            result?;
            let context = format!("{}: no plan could be made", model.path.display());
            return Err(Error::new(ErrorKind::Internal, context));
        }
        Ok(model)
    }

    /// Who shares the drive of a model.
    fn drive_of(&self, path: &Path) -> Result<Arc<Group>> {
        let metadata =
            std::fs::metadata(path).map_err(|error| Error::from_io(&error, path.display()))?;
        let mut drives = self.drives.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(drives.entry(metadata.dev()).or_default()))
    }

    /// Unloads models that nobody uses, longest unused first, until the smallest plans and `more_bytes` fit.
    fn make_room(&self, more_bytes: u64) -> Result<()> {
        let (budget_bytes, _) = self.budget();
        let stays = |model: &&Arc<Hosted>| {
            model.clients_count() > 0 || model.pinned.load(Ordering::Relaxed)
        };
        let models = self.models();
        let kept: u64 = (models.iter().filter(stays))
            .map(|model| model.smallest_bytes)
            .sum();
        if kept.saturating_add(more_bytes) > budget_bytes {
            // Nobody goes for what will be refused all the same.
            return Err(too_small(budget_bytes, kept, more_bytes));
        }
        loop {
            let models = self.models();
            let needed: u64 = models.iter().map(|model| model.smallest_bytes).sum();
            if needed.saturating_add(more_bytes) <= budget_bytes {
                return Ok(());
            }
            let idle = models.iter().filter(|model| !stays(model));
            let last_used =
                |model: &&Arc<Hosted>| *model.used.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(victim) = idle.min_by_key(last_used) else {
                return Err(too_small(budget_bytes, needed, more_bytes));
            };
            log::info!("{} goes to make room", victim.path.display());
            self.remove(victim);
        }
    }

    fn remove(&self, model: &Arc<Hosted>) {
        self.list().retain(|other| other.id != model.id);
        model.close("unloaded");
    }

    /// Closes a model that nobody is attached to.
    ///
    /// # Errors
    /// `Busy` while clients are attached.
    pub fn unload(&self, model: &Arc<Hosted>, revoke: &dyn Fn(Vec<u64>)) -> Result<()> {
        let clients = model.clients_count();
        if clients > 0 {
            let context = format!("{}: {clients} clients are attached", model.path.display());
            return Err(Error::new(ErrorKind::Busy, context));
        }
        self.remove(model);
        self.rebalance(revoke)
    }

    /// Changes what all pools together may take. When this returns, memory that was given up is back with the system.
    /// `configured`: this is the new normal, not a measure against pressure.
    ///
    /// # Errors
    /// `Refused` when the smallest plans of the models that are in use do not fit, or the machine has not got that much.
    pub fn set_budget(
        &self,
        bytes: u64,
        configured: bool,
        revoke: &dyn Fn(Vec<u64>),
    ) -> Result<()> {
        let (before_bytes, _) = self.budget();
        if bytes > before_bytes {
            let wanted = Settings {
                memory: MemorySpec::Bytes(bytes),
                ..self.settings()
            };
            budget_of(&wanted, self.held_bytes())?;
        }
        self.budget_bytes.store(bytes, Ordering::Relaxed);
        if let Err(error) = self.make_room(0) {
            self.budget_bytes.store(before_bytes, Ordering::Relaxed);
            return Err(error);
        }
        if configured {
            self.configured_bytes.store(bytes, Ordering::Relaxed);
        }
        self.rebalance(revoke)
    }

    /// Divides the budget between the models and makes new plans where that is worth it; what shrinks first.
    ///
    /// # Errors
    /// The first error of a change; the others are tried all the same.
    pub fn rebalance(&self, revoke: &dyn Fn(Vec<u64>)) -> Result<()> {
        let settings = self.settings();
        let models = self.models();
        let claims: Vec<Claim> = models
            .iter()
            .map(|model| {
                model.set_weight(weight_of(&model.path, &settings));
                Claim {
                    smallest_bytes: model.smallest_bytes,
                    largest_bytes: model.largest_bytes,
                    weight: model.weight(),
                }
            })
            .collect();
        let (budget_bytes, _) = self.budget();
        let Some(parts) = divide(budget_bytes, &claims) else {
            let needed = claims.iter().map(|claim| claim.smallest_bytes).sum();
            return Err(too_small(budget_bytes, needed, 0));
        };
        let mut changes: Vec<(u64, u64, &Arc<Hosted>)> = models
            .iter()
            .zip(&parts)
            .map(|(model, part)| (model.budget_bytes(), *part, model))
            // The last little is always worth it: without it a model that fits would be read from for ever.
            .filter(|(now, part, model)| {
                now > part || part - now > now / WORTH_IT || *part == model.largest_bytes
            })
            .collect();
        changes.sort_by_key(|(now, part, _)| *now == 0 || part > now);
        let mut result = Ok(());
        for (now, part, model) in changes {
            if now == part {
                continue;
            }
            log::info!(
                "{}: {} for weights, before {}",
                model.path.display(),
                HumanBytes(part),
                HumanBytes(now)
            );
            let changed = model.change(part, settings.lease_timeout, revoke);
            if let Err(error) = &changed {
                log::error!("{}: {error}", model.path.display());
            }
            result = result.and(changed);
        }
        result
    }

    /// Ends what the worker is at, as far as that can be; before [`Shelf::close`].
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Ends everything.
    pub fn close(&self) {
        for model in self.list().drain(..) {
            model.close("unloaded");
        }
    }
}

fn inside(path: &Path, settings: &Settings) -> bool {
    settings.models.iter().any(|directory| {
        std::fs::canonicalize(directory).is_ok_and(|directory| path.starts_with(directory))
    })
}

fn weight_of(path: &Path, settings: &Settings) -> u32 {
    let by_path = settings.weights.iter().find(|(named, _)| {
        named == path || std::fs::canonicalize(named).is_ok_and(|named| named == path)
    });
    // A file name has no directory in it; a path says more, so it wins.
    let name = path.file_name();
    let by_name = || (settings.weights.iter()).find(|(named, _)| Some(named.as_os_str()) == name);
    let named = by_path.or_else(by_name);
    named.map_or(WEIGHT_DEFAULT, |(_, weight)| *weight)
}

/// What all pools together may take by the settings; `held_bytes` is what they hold already.
///
/// # Errors
/// `Invalid` for a percentage, `Refused` for more than there is.
pub fn budget_of(settings: &Settings, held_bytes: u64) -> Result<u64> {
    match settings.memory {
        MemorySpec::Auto => Ok(limits::available_memory_bytes()?.saturating_add(held_bytes)),
        MemorySpec::Bytes(bytes) if bytes < PAGE_2M => Err(Error::new(
            ErrorKind::Invalid,
            format!("a budget of {bytes} bytes is less than a page: is a unit missing (8GiB)?"),
        )),
        MemorySpec::Bytes(bytes) => {
            let free_bytes = limits::free_memory()?.bytes;
            if bytes <= free_bytes.saturating_add(held_bytes) {
                return Ok(bytes);
            }
            let context = format!(
                "a budget of {} is more than there is: {} are free, the pools hold {}",
                HumanBytes(bytes),
                HumanBytes(free_bytes),
                HumanBytes(held_bytes)
            );
            Err(Error::new(ErrorKind::Refused, context))
        }
        MemorySpec::Percent(_) => Err(Error::new(
            ErrorKind::Invalid,
            "the daemon's memory is a size, such as 8GiB: it has no one model to be a share of",
        )),
    }
}

fn too_small(budget_bytes: u64, needed_bytes: u64, more_bytes: u64) -> Error {
    let smallest = needed_bytes.saturating_add(more_bytes);
    Error::new(
        ErrorKind::Refused,
        format!(
            "a budget of {} ({budget_bytes} bytes) is too small: the models that are in use need {}, this one {} more; \
             the smallest budget that works is {} ({smallest} bytes)",
            HumanBytes(budget_bytes),
            HumanBytes(needed_bytes),
            HumanBytes(more_bytes),
            HumanBytes(smallest),
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_goes_by_path_or_by_file_name() {
        let settings = Settings {
            weights: vec![("big.gguf".into(), 300), ("/x/big.gguf".into(), 7)],
            ..Settings::default()
        };
        let weight = |path: &str| weight_of(Path::new(path), &settings);
        assert_eq!(weight("/y/big.gguf"), 300);
        assert_eq!(weight("/x/big.gguf"), 7, "the path says more");
        assert_eq!(weight("/y/small.gguf"), WEIGHT_DEFAULT);
    }
}
