//! What a session tells about memory and streaming: the figures behind `--json`. Invariant: they are only appended to, as
//! the fields of the answer are. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the host's account.

use crate::engine::Stats;
use crate::host::kv_disk::KvDiskFigures;
use crate::io::mirror::CopyStats;
use crate::proto::gpus;

/// Everything `--json` says about memory and streaming. In a plain run counters are 0 and what a plan would say is absent.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// All tensors of the model.
    pub model_bytes: u64,
    /// What the process may hold.
    pub total_bytes: Option<u64>,
    /// What it holds besides the weight budget.
    pub host_bytes: Option<u64>,
    /// Resident, ring and straddling pages.
    pub weight_budget_bytes: Option<u64>,
    /// Resident pages.
    pub resident_bytes: Option<u64>,
    /// Read for each pass over the layers.
    pub streamed_bytes_per_pass: Option<u64>,
    /// Headers and host-kept tensors, read once while loading.
    pub loader_bytes: u64,
    /// What could not be had as wished.
    pub fallbacks: Vec<&'static str>,
    /// Read by flea's reader.
    pub bytes_read: u64,
    /// Time with at least one request in flight.
    pub read_seconds: f64,
    /// Time acquires waited.
    pub stall_seconds: f64,
    /// Leases given.
    pub acquires: u64,
    /// Transient runs read.
    pub loads: u64,
    /// Pieces of graphs computed before their layer was whole.
    pub early_pieces: u64,
    /// Slots for experts that are fetched one by one.
    pub expert_cache_bytes: u64,
    /// How often a graph was cut to see which experts a router had chosen.
    pub expert_cuts: u64,
    /// Experts' parts of tensors that were in memory when they were needed.
    pub expert_hits: u64,
    /// Those that had to be read.
    pub expert_misses: u64,
    /// Bytes read for them.
    pub expert_bytes_read: u64,
    /// Experts' parts of tensors that were read ahead of their use.
    pub expert_reads_ahead: u64,
    /// Bytes read for those.
    pub expert_bytes_read_ahead: u64,
    /// Of those bytes: evicted before they were used.
    pub expert_bytes_unused: u64,
    /// Experts guessed for the next layer.
    pub expert_guesses: u64,
    /// Of those: chosen by its router.
    pub expert_guesses_right: u64,
    /// What was read after the last prompt.
    pub decode: DecodeFigures,
    /// Memory of reading rows of embeddings; 0 where the host keeps them.
    pub rows_bytes: u64,
    /// Rows of embeddings read or found in their cache.
    pub rows: u64,
    /// Reads for them.
    pub row_reads: u64,
    /// Bytes of those.
    pub row_bytes_read: u64,
    /// `io_uring`, `pread`, or `none` in a plain run.
    pub reader: &'static str,
    /// O_DIRECT on every shard.
    pub direct_io: bool,
    /// Page size of the plan.
    pub page_bytes: u64,
    /// Measured share of the pool on huge pages.
    pub huge_page_share: f64,
    /// Highest anonymous, shared and huge-page memory of this process.
    pub peak_memory_bytes: u64,
    /// What is known about the drive the model lies on.
    pub profile: String,
    /// What each copy of the model has served, the model itself first; empty without mirrors.
    pub mirrors: Vec<CopyStats>,
    /// Keys and values that were moved out of memory; `None` where all stayed.
    pub kv_disk: Option<KvDiskFigures>,
    /// Weights on a GPU; `None` where they are in host memory.
    pub gpu: Option<GpuFigures>,
}

/// What the memory of GPUs held, and what came into it.
#[derive(Debug, Clone, Default)]
pub struct GpuFigures {
    /// Each of them, in the order of their layers.
    pub each: Vec<gpus::GpuFigures>,
    /// Leases that were given back behind an event of the GPU, nobody waiting.
    pub releases_behind_gpu: u64,
}

/// What tokens cost after the prompt, apart from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct DecodeFigures {
    /// Read by flea's reader.
    pub bytes_read: u64,
    /// Experts' parts of tensors that were in memory when they were needed.
    pub expert_hits: u64,
    /// Those that had to be read.
    pub expert_misses: u64,
    /// Bytes read for them.
    pub expert_bytes_read: u64,
    /// How often a graph was cut to see which experts a router had chosen.
    pub expert_cuts: u64,
    /// Time with reads in flight.
    pub read_seconds: f64,
}

impl GpuFigures {
    /// All of them together.
    #[must_use]
    pub fn all(&self) -> gpus::GpuFigures {
        let all = self.each.iter().copied().reduce(gpus::GpuFigures::with);
        all.unwrap_or_default()
    }
}

impl DecodeFigures {
    pub(super) fn between((before, cuts): &(Stats, u64), (now, now_cuts): &(Stats, u64)) -> Self {
        Self {
            bytes_read: now.bytes_read - before.bytes_read,
            expert_hits: now.experts.hits - before.experts.hits,
            expert_misses: now.experts.misses - before.experts.misses,
            expert_bytes_read: now.experts.bytes - before.experts.bytes,
            expert_cuts: now_cuts - cuts,
            read_seconds: (now.read_ns - before.read_ns) as f64 / 1e9,
        }
    }
}
