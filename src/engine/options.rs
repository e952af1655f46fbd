//! How a model is opened: what bounds its memory, where its weights live, how they are read.

use super::stream::Shared;
use super::trace::Trace;
use crate::io::ReaderOptions;
use crate::mem::Backing;
use crate::plan;
use crate::units::MemorySpec;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What bounds the memory of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BudgetSpec {
    /// Weights may take this many bytes; the host looks after the rest itself.
    Pool(u64),
    /// The whole process may take this much.
    Memory(MemorySpec),
}

/// How to open a model. The default takes all memory that is free and 3 slots.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// What bounds the memory.
    pub budget: BudgetSpec,
    /// Plan at the first acquire instead of at open.
    pub defer_plan: bool,
    /// Where the weights live.
    pub backing: Backing,
    /// How they are read.
    pub reader: ReaderOptions,
    /// Slots of the ring.
    pub slots_count: u32,
    /// Page size; `None` chooses by the size of the layers.
    pub page_bytes: Option<u64>,
    /// The host acquires routed experts by their ranges ([`super::Model::acquire_ranges`]), so that only those it needs have
    /// to be there; a lease of a layer is then one of everything else. Private backing only.
    pub experts: bool,
    /// Bind memory and the reader's thread to the drive's NUMA node.
    pub numa: bool,
    /// Bytes the host has reserved but not touched yet; read once, when the plan is made.
    pub host_pending_bytes: Arc<AtomicU64>,
    /// Directories with copies of the model's files, to be read from as well.
    pub mirrors: Vec<PathBuf>,
    /// Where events go; `None` traces nothing.
    pub trace: Option<Arc<Trace>>,
    /// For a model in the daemon: its clients, and its part of the drive.
    pub shared: Shared,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            budget: BudgetSpec::Memory(MemorySpec::Auto),
            defer_plan: false,
            backing: Backing::Private,
            reader: ReaderOptions::default(),
            slots_count: plan::SLOTS_DEFAULT,
            page_bytes: None,
            experts: false,
            numa: true,
            host_pending_bytes: Arc::default(),
            mirrors: Vec::new(),
            trace: None,
            shared: Shared::default(),
        }
    }
}
