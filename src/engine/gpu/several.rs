//! A model on one GPU or on several: the same leases, each on the GPU that has the layer.
//!
//! Every GPU has a run of the layers ([`spread`]) and a [`GpuModel`] of its own for it: its pool in VRAM, its threads, its memory
//! below. So the slots of one fill while another computes. They share two things: the host's memory, divided once all that
//! the host needs is known, and the drive, whose depth goes to who has something to read ([`Group`]). A layer has one number
//! here and another, counted from the first of its run, on its GPU. Invariants: a layer is on one GPU; a lease goes to the GPU that
//! gave it. Place in `file -> catalog -> plan -> reader -> pool -> **lease** -> host`, above each of the GPUs.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::source::least_bytes;
use super::{GpuModel, GpuOptions, GpuStats, open_files, sums};
use crate::engine::model::{available_bytes, host_bytes};
use crate::engine::options::{BudgetSpec, OpenOptions};
use crate::engine::share::{Group, Member};
use crate::engine::stats::BudgetReport;
use crate::engine::stream::Shared;
use crate::engine::trace::Trace;
use crate::error::{Error, ErrorKind, Result};
use crate::io::coded_file::CodedFile;
use crate::io::{ShardFile, mirror};
use crate::mem::cuda::{Event, Stream};
use crate::model::Catalog;
use crate::plan::budget::{self, smallest_total_bytes};
use crate::plan::spread::{self, Wants};
use crate::plan::{self, Plan};
use crate::units::{HumanBytes, MIB};

/// One GPU and its layers.
#[derive(Debug)]
pub struct Part {
    layers: Range<u32>,
    model: GpuModel,
    /// Its part of the drive; one GPU has all of it.
    share: Option<Arc<Member>>,
}

impl Part {
    /// Which layers of the model it has.
    #[must_use]
    pub const fn layers(&self) -> &Range<u32> {
        &self.layers
    }

    /// The GPU with these layers, which it counts from 0.
    #[must_use]
    pub const fn model(&self) -> &GpuModel {
        &self.model
    }
}

/// A model on one GPU or on several.
#[derive(Debug)]
pub struct Gpus {
    parts: Vec<Part>,
    /// All layers, where each GPU has some of them.
    whole: Option<Catalog>,
    options: OpenOptions,
    starting: Mutex<()>,
    /// Set once memory is divided.
    budget: OnceLock<BudgetReport>,
    started: OnceLock<()>,
}

impl Gpus {
    /// Opens the model at `path` on these GPUs, in the order of its layers. As [`GpuModel::open`], which it is for one.
    ///
    /// # Errors
    /// As [`GpuModel::open`], with the GPU's number; `Invalid` for a GPU that is named twice and for more GPUs than layers.
    pub fn open(path: &Path, gpus: &[GpuOptions], options: OpenOptions) -> Result<Self> {
        let numbers: Vec<u32> = gpus.iter().map(|gpu| gpu.index).collect();
        if let Some(twice) = (1..numbers.len()).find(|at| numbers[..*at].contains(&numbers[*at])) {
            let context = format!("GPU {} is named twice", numbers[twice]);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if options.trace.is_some() && gpus.len() > 1 {
            let context = "what several GPUs do is not traced: trace one of them";
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let (parts, whole) = match gpus {
            [gpu] => (
                vec![alone(GpuModel::open(path, gpu, options.clone())?)],
                None,
            ),
            gpus => {
                let (parts, catalog) = open_parts(path, gpus, &options)?;
                (parts, Some(catalog))
            }
        };
        let gpus = Self {
            parts,
            whole,
            starting: Mutex::new(()),
            budget: OnceLock::new(),
            started: OnceLock::new(),
            options,
        };
        if !gpus.options.defer_plan {
            gpus.start()?;
        }
        Ok(gpus)
    }

    /// Divides host memory and starts to read, once. What is refused may be tried again.
    fn start(&self) -> Result<()> {
        if self.started.get().is_some() {
            return Ok(());
        }
        let _one_at_a_time = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.parts.len() > 1 && self.budget.get().is_none() {
            self.divide()?;
        }
        for part in &self.parts {
            part.model.start().map_err(|error| self.on(part, error))?;
        }
        let _ = self.started.set(());
        Ok(())
    }

    /// Gives every GPU its part of host memory and of the drive.
    fn divide(&self) -> Result<()> {
        let wants = self.parts.iter().map(|part| {
            let model = &part.model;
            let options = &self.options;
            let (vram, layout) = (&model.vram, &model.core.layout);
            let packed = model.packed.as_deref();
            let least_bytes = match model.core.direct {
                Some(_) => 0,
                None => least_bytes(&model.catalog, vram, layout, options, packed)?,
            };
            Ok(Wants {
                least_bytes,
                link_bytes: vram.link_bytes_per_pass(),
            })
        });
        let wants = wants.collect::<Result<Vec<_>>>()?;
        let report = self.report()?;
        let refused = |error: Error| self.with_smallest(&error, &wants, &report);
        let shares = spread::memory(report.weight_budget_bytes, &wants).map_err(refused)?;
        for ((part, share), wants) in self.parts.iter().zip(shares).zip(&wants) {
            let model = &part.model;
            let mut waiting = model.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(waiting) = waiting.as_mut() {
                waiting.options.budget = BudgetSpec::Pool(share);
            }
            if let Some(member) = &part.share {
                let weight = u32::try_from(wants.link_bytes / MIB).unwrap_or(u32::MAX);
                member.set_weight(weight);
            }
            log::info!(
                "GPU {}: layers {} to {}, {} of host memory",
                model.context().index(),
                part.layers.start,
                part.layers.end - 1,
                HumanBytes(share)
            );
        }
        let _ = self.budget.set(report);
        Ok(())
    }

    /// What the options allow, with the process as it is now.
    fn report(&self) -> Result<BudgetReport> {
        let (process_bytes, host_bytes) = host_bytes(&self.options)?;
        match self.options.budget {
            BudgetSpec::Pool(bytes) => Ok(BudgetReport {
                total_bytes: host_bytes.saturating_add(bytes),
                host_bytes,
                weight_budget_bytes: bytes,
            }),
            BudgetSpec::Memory(spec) => {
                let available_bytes = available_bytes(spec, process_bytes)?;
                let model_bytes = self.catalog().model_bytes;
                budget::resolve(spec, available_bytes, model_bytes, host_bytes)
            }
        }
    }

    fn with_smallest(&self, error: &Error, wants: &[Wants], report: &BudgetReport) -> Error {
        let least: u64 = wants.iter().map(|wants| wants.least_bytes).sum();
        let smallest = match self.options.budget {
            BudgetSpec::Pool(_) => String::new(),
            BudgetSpec::Memory(_) => {
                let total_bytes = smallest_total_bytes(least, report.host_bytes);
                format!(
                    "; the smallest total that works is {} ({total_bytes} bytes)",
                    HumanBytes(total_bytes)
                )
            }
        };
        let context = format!("{}{smallest}", error.context());
        error.clone().with_context(context)
    }

    /// Sends events to `trace` from now on, where there is one GPU; else false. As [`super::super::Model::trace_into`].
    pub fn trace_into(&self, trace: Arc<Trace>) -> bool {
        match self.parts.as_slice() {
            [part] => {
                part.model.trace_into(trace);
                true
            }
            _ => false,
        }
    }

    /// The GPUs, in the order of their layers.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The GPU that has a layer.
    ///
    /// # Errors
    /// `Invalid` for a layer that does not exist.
    pub fn part_of(&self, layer: u32) -> Result<&Part> {
        let after = self
            .parts
            .partition_point(|part| part.layers.start <= layer);
        let found = after.checked_sub(1).map(|index| &self.parts[index]);
        found
            .filter(|part| part.layers.contains(&layer))
            .ok_or_else(|| {
                let count = self.catalog().layers.len();
                let context = format!("layer {layer} does not exist, the model has {count} layers");
                Error::new(ErrorKind::Invalid, context)
            })
    }

    /// What is in the files.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        match &self.whole {
            Some(catalog) => catalog,
            None => self.parts[0].model.catalog(),
        }
    }

    /// The compressed model that this one is, if it is one.
    #[must_use]
    pub fn packed(&self) -> Option<&CodedFile> {
        self.parts[0].model.packed()
    }

    /// Whether host memory is planned.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.parts.iter().all(|part| part.model.is_started())
    }

    /// The plans of the host memory below; none where everything is in VRAM.
    pub fn host_plans(&self) -> impl Iterator<Item = &Plan> {
        self.parts.iter().filter_map(|part| part.model.host_plan())
    }

    /// The budget that the host memory below was planned for; `None` where everything is in VRAM, or nothing planned yet.
    #[must_use]
    pub fn host_budget(&self) -> Option<BudgetReport> {
        match self.parts.as_slice() {
            [part] => part.model.host_budget(),
            _ => self
                .budget
                .get()
                .copied()
                .filter(|_| self.host_plans().next().is_some()),
        }
    }

    /// The constant address of byte `offset_bytes` of a shard, on the GPU that has its layer. See [`GpuModel::address`].
    #[must_use]
    pub fn address(&self, shard_index: u32, offset_bytes: u64) -> Option<u64> {
        let mut parts = self.parts.iter();
        parts.find_map(|part| part.model.address(shard_index, offset_bytes))
    }

    /// The layer that the weight byte at an address of one of the GPUs belongs to: no two GPUs of a process have an address
    /// in common. Lock-free.
    #[must_use]
    pub fn layer_of(&self, address: u64) -> Option<u32> {
        self.parts.iter().find_map(|part| {
            let local = part.model.layer_of(address)?;
            Some(part.layers.start + local)
        })
    }

    /// See [`GpuModel::acquire`].
    ///
    /// # Errors
    /// As [`GpuModel::acquire`].
    pub fn acquire(
        &self,
        layer: u32,
        range: Option<(u64, u64)>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let part = self.part_of(layer)?;
        self.start()?;
        part.model
            .acquire(layer - part.layers.start, range, timeout)
            .map_err(|error| self.about(part, layer, error))
    }

    /// See [`GpuModel::hint`].
    ///
    /// # Errors
    /// As [`GpuModel::hint`].
    pub fn hint(&self, layers: &[u32]) -> Result<()> {
        layers
            .iter()
            .try_for_each(|layer| self.part_of(*layer).map(|_| ()))?;
        self.start()?;
        for part in &self.parts {
            let local = layers.iter().filter(|layer| part.layers.contains(layer));
            let local: Vec<u32> = local.map(|layer| layer - part.layers.start).collect();
            if !local.is_empty() {
                part.model.hint(&local)?;
            }
        }
        Ok(())
    }

    /// See [`GpuModel::release`].
    ///
    /// # Errors
    /// As [`GpuModel::release`].
    pub fn release(&self, layer: u32) -> Result<()> {
        let part = self.part_of(layer)?;
        let released = part.model.release(layer - part.layers.start);
        released.map_err(|error| self.about(part, layer, error))
    }

    /// See [`GpuModel::release_after`]: `event` is one of the GPU that has the layer.
    ///
    /// # Errors
    /// As [`GpuModel::release_after`].
    pub fn release_after(&self, layer: u32, event: Event) -> Result<()> {
        let part = self.part_of(layer)?;
        let released = part.model.release_after(layer - part.layers.start, event);
        released.map_err(|error| self.about(part, layer, error))
    }

    /// See [`GpuModel::relay`]: that of the GPU that has a layer.
    ///
    /// # Errors
    /// `Invalid` for a layer that does not exist.
    pub fn relay(&self, layer: u32) -> Result<&Stream> {
        Ok(self.part_of(layer)?.model.relay())
    }

    /// Counters so far, of all GPUs together.
    #[must_use]
    pub fn stats(&self) -> GpuStats {
        let mut sum = GpuStats::default();
        for part in &self.parts {
            sums::add(&mut sum, part.model.stats());
        }
        sum
    }

    /// An error of one of several GPUs, with its number.
    fn on(&self, part: &Part, error: Error) -> Error {
        match self.parts.len() {
            1 => error,
            _ => named(part.model.context().index(), error),
        }
    }

    /// An error about a layer, which that GPU counts otherwise.
    fn about(&self, part: &Part, layer: u32, error: Error) -> Error {
        let is_about_time = matches!(
            error.kind(),
            ErrorKind::Again | ErrorKind::Timeout | ErrorKind::Busy
        );
        if self.parts.len() == 1 || is_about_time {
            return error;
        }
        let index = part.model.context().index();
        let context = format!(
            "layer {layer}, on GPU {index}, which counts from layer {}: {}",
            part.layers.start,
            error.context()
        );
        error.with_context(context)
    }
}

fn named(index: u32, error: Error) -> Error {
    let context = format!("GPU {index}: {}", error.context());
    error.with_context(context)
}

/// A GPU with all layers.
fn alone(model: GpuModel) -> Part {
    let count = u32::try_from(model.catalog().layers.len()).unwrap_or(u32::MAX);
    Part {
        layers: 0..count,
        model,
        share: None,
    }
}

/// Opens each GPU with its layers; nothing is read yet.
fn open_parts(
    path: &Path,
    gpus: &[GpuOptions],
    options: &OpenOptions,
) -> Result<(Vec<Part>, Catalog)> {
    let (packed, catalog, files) = open_files(path)?;
    let files: Arc<[ShardFile]> = mirror::open(files, &options.mirrors)?.into();
    let budgets: Vec<u64> = gpus.iter().map(|gpu| gpu.vram_bytes).collect();
    let runs = spread::layers(&catalog, &budgets)?;
    let page_bytes = options
        .page_bytes
        .unwrap_or_else(|| plan::default_page_bytes(&catalog));
    let drive = Arc::new(Group::default());
    let parts = gpus.iter().zip(runs).map(|(gpu, run)| {
        let mut own = catalog.clone();
        own.layers = catalog.layers[run.clone()].to_vec();
        let share = drive.join(1);
        let options = OpenOptions {
            defer_plan: true,
            page_bytes: Some(page_bytes),
            shared: Shared {
                share: Some(Arc::clone(&share)),
                ..options.shared.clone()
            },
            ..options.clone()
        };
        let parts = (packed.clone(), own, Arc::clone(&files));
        let model = GpuModel::of(parts, gpu, options).map_err(|error| named(gpu.index, error))?;
        let number = |layer: usize| u32::try_from(layer).unwrap_or(u32::MAX);
        Ok(Part {
            layers: number(run.start)..number(run.end),
            model,
            share: Some(share),
        })
    });
    Ok((parts.collect::<Result<Vec<_>>>()?, catalog))
}
