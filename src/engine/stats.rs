//! What a model tells about itself: the arithmetic of its budget, and counters.

use super::experts::ExpertCounts;
use super::latency::Latency;
use crate::io::ReaderKind;
use crate::io::mirror::CopyStats;
use crate::mem::{self, Backing};

/// The budget a plan was made for.
pub type BudgetReport = crate::plan::Budget;

/// A setting that did not come out as wished. None of them is silent: each is listed here, in `flea_stats` and in
/// every `--json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// Which one, as a bit of `flea_stats_data.fallbacks`.
    pub kind: FallbackKind,
    /// Why, for people.
    pub reason: String,
}

impl Fallback {
    /// A copy that is used no more.
    pub(super) fn of_mirror(copy: CopyStats) -> Self {
        Self {
            kind: FallbackKind::Mirror,
            reason: format!(
                "the copy in {} failed and is used no more",
                copy.directory.display()
            ),
        }
    }

    /// What the pool reports, under the numbers of the ABI.
    pub(super) fn of_memory(fallback: &mem::Fallback) -> Self {
        let kind = match fallback {
            mem::Fallback::SmallPages { .. } => FallbackKind::SmallPages,
            mem::Fallback::NotBound { .. } => FallbackKind::Numa,
        };
        Self {
            kind,
            reason: fallback.to_string(),
        }
    }
}

/// The kinds of fallback, as bits. ABI: never renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum FallbackKind {
    /// O_DIRECT refused: reads go through the page cache and are dropped behind.
    Buffered = 1,
    /// io_uring refused: pread threads.
    Pread = 2,
    /// 2 MiB pages wanted, 4 KiB pages got for more than a tenth of the pool.
    SmallPages = 4,
    /// Memory could not be bound to the drive's NUMA node.
    Numa = 8,
    /// A copy of the model failed and is used no more.
    Mirror = 16,
    /// cuFile refused or not believed: through host memory into VRAM.
    Gds = 32,
}

impl FallbackKind {
    /// The word in `--json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Pread => "pread",
            Self::SmallPages => "small_pages",
            Self::Numa => "numa",
            Self::Mirror => "mirror",
            Self::Gds => "gds",
        }
    }
}

/// Upper bounds of [`Stats::stall_counts`], nanoseconds: 1 ms to 3 s, a half decade each.
pub const STALL_BOUNDS_NS: [u64; 8] = [
    1_000_000,
    3_000_000,
    10_000_000,
    30_000_000,
    100_000_000,
    300_000_000,
    1_000_000_000,
    3_000_000_000,
];

/// How many slots are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Nothing in them.
    pub free: u32,
    /// A layer's pages, there or on their way.
    pub used: u32,
    /// Never used again: the kernel has not given back a read into them.
    pub quarantined: u32,
}

/// What reading rows of embeddings has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowStats {
    /// Rows copied out.
    pub rows: u64,
    /// Reads they took.
    pub reads: u64,
    /// Bytes of those: whole pages.
    pub bytes: u64,
    /// Pages that rows lay in, counted for each row.
    pub page_uses: u64,
    /// Of those: found in the cache.
    pub page_hits: u64,
}

/// Counters of a model since it was opened. `_ns` are nanoseconds.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// The reader at work.
    pub reader: ReaderKind,
    /// Where the weights live.
    pub backing: Backing,
    /// True when every shard is read with O_DIRECT.
    pub direct_io: bool,
    /// What did not come out as wished.
    pub fallbacks: Vec<Fallback>,
    /// What each copy has served, the model itself first; empty without mirrors.
    pub mirrors: Vec<CopyStats>,
    /// Leases given; a further acquire of a layer that the thread holds extends its lease and is not counted.
    pub acquires: u64,
    /// Releases.
    pub releases: u64,
    /// Transient runs read to the end.
    pub loads: u64,
    /// Bytes asked of the kernel: resident, transient, experts and rows.
    pub bytes_read: u64,
    /// Requests completed.
    pub reads: u64,
    /// Requests tried again.
    pub retries: u64,
    /// Acquires that waited.
    pub stalls: u64,
    /// Time acquires waited.
    pub stall_ns: u64,
    /// How many of them waited up to each of [`STALL_BOUNDS_NS`]; the last ones longer.
    pub stall_counts: [u64; STALL_BOUNDS_NS.len() + 1],
    /// The ring's slots.
    pub slots: SlotCounts,
    /// Time with at least one request in flight.
    pub read_ns: u64,
    /// How long transient runs took, from aiming their slot to their last byte.
    pub load_latency: Latency,
    /// What the cache of experts has done; zeros without one.
    pub experts: ExpertCounts,
    /// What reading rows of embeddings has done; zeros where the host keeps them.
    pub rows: RowStats,
    /// Acquires that the learned order had not foreseen.
    pub mispredicts: u64,
    /// Bytes of resident pages in the plan.
    pub resident_bytes: u64,
    /// Page size of the pool.
    pub page_bytes: u64,
    /// Measured share of the pool that lies on huge pages, 0 to 1.
    pub huge_page_share: f64,
}
