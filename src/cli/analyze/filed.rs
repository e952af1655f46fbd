//! A model whose files (or their headers) are there: the plan that `flea run` would make on a device, by `flea plan`.
//!
//! Invariant: memory and tokens per second are those of `flea plan` with the same memory, context and drive, because it is
//! asked. What it does not know comes on top: states of layers, and keys and values stored otherwise than in f16. Tables of
//! rows count whole where everything fits, and else as the cache that reads their rows.

use std::path::{Path, PathBuf};

use super::super::plan;
use super::report::DeviceReport;
use crate::error::{ErrorKind, Result};
use crate::io::coded_file::CodedFile;
use crate::io::profile::Found;
use crate::model::arch::{CONTEXT_MAX, Geometry};
use crate::model::{Catalog, LayerKind, Role};
use crate::plan::budget::{HostShape, smallest_total_bytes};
use crate::plan::{SLOTS_DEFAULT, rows};
use crate::tools::analyze::verdict::largest;
use crate::tools::analyze::{Breakdown, Device, KvStore, Question, Source, Verdict};
use crate::units::MemorySpec;

/// Bytes of an f16.
const F16_BYTES: f64 = 2.0;

/// A model with a catalog, and what is asked about it.
pub(super) struct Filed<'a> {
    catalog: &'a Catalog,
    /// What it is compressed in.
    coded: Option<&'a CodedFile>,
    geometry: &'a Geometry,
    question: &'a Question,
    path: PathBuf,
    /// Bytes of keys and values in memory over those in f16.
    kv_share: f64,
    /// The same for the drive.
    kv_stored_share: f64,
    pub(super) breakdown: Breakdown,
}

impl<'a> Filed<'a> {
    /// `catalog` is that of `source`.
    pub(super) fn new(
        catalog: &'a Catalog,
        source: &'a Source,
        question: &'a Question,
        path: &Path,
    ) -> Result<Self> {
        let geometry = &source.geometry;
        let mut filed = Self {
            catalog,
            coded: source.coded.as_deref(),
            geometry,
            question,
            path: path.to_path_buf(),
            kv_share: kv_share(geometry, question.kv_in_memory())?,
            kv_stored_share: kv_share(geometry, question.kv)?,
            breakdown: Breakdown::new(geometry, question)?,
        };
        filed.count();
        Ok(filed)
    }

    /// The components as they are in the files and as the host holds them; their sum is what a resident model takes.
    fn count(&mut self) {
        let shape = self.shape(self.question.context_count, true);
        let layers = |wanted: fn(LayerKind) -> bool| -> u64 {
            let chosen = self
                .catalog
                .layers
                .iter()
                .filter(|layer| wanted(layer.kind));
            chosen.map(|layer| layer.bytes).sum()
        };
        let kept = |wanted: fn(Role) -> bool| -> u64 {
            let chosen = self
                .catalog
                .tensors
                .iter()
                .filter(|t| t.host_kept && wanted(t.role));
            chosen.map(|tensor| tensor.extent.len_bytes).sum()
        };
        let blocks = layers(|kind| matches!(kind, LayerKind::Block(_)));
        let head_bytes = layers(|kind| matches!(kind, LayerKind::Head { .. }));
        let embedding_bytes = kept(|role| role == Role::TokenEmbedding);
        let row_table_bytes = kept(|role| role == Role::PerLayerEmbedding);
        let others = self
            .catalog
            .host_tensor_bytes
            .saturating_sub(embedding_bytes + row_table_bytes);
        let in_f16 = shape.kv_bytes();
        let kv = self.kv_bytes(in_f16);
        let on_drive = self.question.kv_slots_count.is_some();
        // Windows save nothing in llama.cpp's cache as `flea run` sets it up: their layers keep the whole context.
        let (full, windowed) = self.geometry.kv_layer_counts();
        let windowed = (kv as f64 * windowed as f64 / (full + windowed).max(1) as f64) as u64;
        let rest = shape.host_bytes().saturating_sub(shape.host_tensor_bytes);
        let rest = rest
            .saturating_sub(in_f16)
            .saturating_sub(shape.compute_bytes());
        let largest = self.catalog.layers.iter().map(|layer| layer.bytes).max();
        let experts = self
            .catalog
            .tensors
            .iter()
            .filter(|t| t.experts.is_some() && t.layers.is_some());
        let expert_bytes: u64 = experts.map(|tensor| tensor.extent.len_bytes).sum();
        let used = self
            .geometry
            .experts()
            .map_or(0.0, |e| e.used_count as f64 / e.count as f64);
        self.breakdown = Breakdown {
            decoder_bytes: blocks.saturating_add(others),
            embedding_bytes,
            head_bytes,
            row_table_bytes,
            kv_full_bytes: if on_drive { 0 } else { kv - windowed },
            kv_windowed_bytes: if on_drive { 0 } else { windowed },
            kv_ring_bytes: if on_drive { kv } else { 0 },
            kv_drive_bytes: self.kv_drive_bytes(&shape),
            activation_bytes: shape.compute_bytes(),
            runtime_bytes: rest,
            largest_layer_bytes: largest.unwrap_or(0),
            expert_bytes,
            active_expert_bytes: (expert_bytes as f64 * used) as u64,
            ..self.breakdown.clone()
        };
    }

    /// What `--memory 50%` is half of, and what comes on top.
    pub(super) fn budget_base(&self) -> (u64, u64) {
        let host_bytes = self.host_bytes(self.question.context_count, false);
        (self.catalog.model_bytes, host_bytes)
    }

    fn kv_bytes(&self, in_f16: u64) -> u64 {
        (in_f16 as f64 * self.kv_share).ceil() as u64
    }

    /// What the drive holds of keys and values.
    fn kv_drive_bytes(&self, shape: &HostShape) -> u64 {
        match self.question.kv_slots_count {
            Some(_) => (shape.kv_cache_bytes() as f64 * self.kv_stored_share).ceil() as u64,
            None => 0,
        }
    }

    /// What `flea plan` is asked. `whole_tables`: memory holds the tables whose rows `flea run` would read.
    fn args(&self, device: Option<&Device>, context_count: u64, whole_tables: bool) -> plan::Args {
        plan::Args {
            whole_experts: false,
            host_rows: whole_tables,
            expert_skew: 0.0,
            model: self.path.clone(),
            memory: device.map_or(MemorySpec::Auto, |device| {
                MemorySpec::Bytes(device.memory_bytes)
            }),
            vram: None,
            link_gbps: None,
            host_bytes: None,
            slots: SLOTS_DEFAULT,
            page_bytes: None,
            ctx: Some(u32::try_from(context_count).unwrap_or(u32::MAX)),
            ubatch: plan::UBATCH_DEFAULT_COUNT,
            kv: plan::KvArgs::default(),
            drive_gbps: device.and_then(|device| device.drive_gb_per_second),
            compute_seconds: None,
            layers: false,
            json: false,
        }
    }

    /// The host that `flea plan` would take, with keys and values in f16.
    fn shape(&self, context_count: u64, whole_tables: bool) -> HostShape {
        let args = self.args(None, context_count, whole_tables);
        HostShape {
            kv_slots_count: self.question.kv_slots_count.map_or(0, u64::from),
            ..plan::host_shape(&args, self.catalog)
        }
    }

    /// What the host holds besides weights.
    fn host_bytes(&self, context_count: u64, whole_tables: bool) -> u64 {
        let shape = self.shape(context_count, whole_tables);
        let more = self.breakdown.state_bytes;
        let in_f16 = shape.kv_bytes();
        let without = shape.host_bytes().saturating_sub(in_f16);
        without
            .saturating_add(self.kv_bytes(in_f16))
            .saturating_add(more)
    }

    /// Whether the host holds what `flea plan` does not estimate.
    fn knows_more(&self) -> bool {
        self.kv_share != 1.0
            || self.breakdown.state_bytes > 0
            || self.question.kv_slots_count.is_some()
    }

    /// The plan for so many tokens; `None` where there is none.
    fn plan(
        &self,
        device: &Device,
        (context_count, whole_tables): (u64, bool),
        compute_seconds: Option<f64>,
        found: &Found,
    ) -> Result<Option<plan::Report>> {
        let args = plan::Args {
            host_bytes: self
                .knows_more()
                .then(|| self.host_bytes(context_count, whole_tables)),
            compute_seconds,
            ..self.args(Some(device), context_count, whole_tables)
        };
        // Whatever was asked for: the device need not be this machine.
        match plan::Report::new(&args, (self.catalog, self.coded), u64::MAX, found) {
            Ok(report) => Ok(Some(report)),
            Err(error) if error.kind() == ErrorKind::Refused => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The verdict, and the plan it comes from: with whole tables where everything fits so, else with rows that are read.
    fn verdict(
        &self,
        device: &Device,
        compute_seconds: Option<f64>,
        found: &Found,
    ) -> Result<(Verdict, Option<plan::Report>)> {
        let context_count = self.question.context_count;
        let with = |whole| self.plan(device, (context_count, whole), compute_seconds, found);
        let report = with(false)?;
        let Some(rows) = &report else {
            return Ok((Verdict::Infeasible, None));
        };
        if !rows.is_resident() {
            return Ok((Verdict::Streamed, report));
        }
        if rows.rows.is_none() {
            return Ok((Verdict::Resident, report));
        }
        Ok(match with(true)? {
            Some(whole) if whole.is_resident() => (Verdict::Resident, Some(whole)),
            _ => (Verdict::Rows, report),
        })
    }

    /// What the model does on `device`.
    pub(super) fn judge(
        &self,
        device: &Device,
        compute_seconds: Option<f64>,
    ) -> Result<DeviceReport> {
        let found = match &device.profile {
            Some(profile) => Found::Measured(profile.clone()),
            None => Found::Nothing,
        };
        let (verdict, report) = self.verdict(device, compute_seconds, &found)?;
        let smallest_bytes = self.smallest_bytes(self.question.context_count)?;
        let most = self
            .geometry
            .context_max_count
            .unwrap_or(CONTEXT_MAX)
            .min(u64::from(u32::MAX));
        let runs = |count| {
            self.smallest_bytes(count)
                .is_ok_and(|bytes| bytes <= device.memory_bytes)
        };
        let resident = |count| {
            let report = self.plan(device, (count, true), None, &Found::Nothing);
            report.is_ok_and(|report| report.is_some_and(|report| report.is_resident()))
        };
        let has_tables = !rows::tables(self.catalog).is_empty();
        let report = DeviceReport::planned(
            device,
            verdict,
            report,
            smallest_bytes,
            largest(most, runs),
            largest(most, resident),
        );
        let report = report.with_kv_read(self.breakdown.kv_drive_bytes);
        Ok(report.with_tables(has_tables))
    }

    /// The least memory that `flea run` would begin with.
    fn smallest_bytes(&self, context_count: u64) -> Result<u64> {
        let args = self.args(None, context_count, false);
        let weights = plan::method(&args, self.catalog).smallest_budget_bytes(self.catalog)?;
        Ok(smallest_total_bytes(
            weights,
            self.host_bytes(context_count, false),
        ))
    }
}

/// Stored bytes of keys and values over those in f16; exactly 1 for f16 itself.
fn kv_share(geometry: &Geometry, kv: KvStore) -> Result<f64> {
    let (mut stored, mut in_f16) = (0.0, 0.0);
    for group in geometry.kv_groups(1) {
        let count = group.count as f64;
        stored += kv.vector_bytes(group.vector_count)? * count;
        in_f16 += group.vector_count as f64 * F16_BYTES * count;
    }
    Ok(if in_f16 > 0.0 { stored / in_f16 } else { 1.0 })
}
