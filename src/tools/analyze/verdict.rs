//! The verdict: whether a model runs on a device, how, and how fast the drive lets it.
//!
//! Four ways, each needing less memory than the one before: everything resident; the tables of per-layer embeddings left on
//! the drive, where rows are read as they are needed; layers streamed through two slots; and not at all. The bound of a
//! streamed model is the drive's rate over the bytes that a token needs and memory does not hold.

use super::breakdown::Breakdown;
use super::device::Device;
use crate::units::MIB;

/// Slots that layers are streamed through: one that is computed with, one that is filled.
const SLOT_COUNT: u64 = 2;
/// What streaming takes besides its slots: requests in flight.
const STREAM_BYTES: u64 = 16 * MIB;
/// Rows of per-layer embeddings that are kept at hand when the tables stay on the drive.
const ROW_CACHE_BYTES: u64 = 8 * MIB;

/// How a model runs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// All of it in memory.
    Resident,
    /// Tables of rows stay on the drive, the rest is in memory.
    Rows,
    /// Layers are read for every token.
    Streamed,
    /// Not even that.
    Infeasible,
}

impl Verdict {
    /// As tables and JSON name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::Rows => "rows",
            Self::Streamed => "streamed",
            Self::Infeasible => "infeasible",
        }
    }

    /// The exit code of `flea analyze`.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Resident => 0,
            Self::Rows => 10,
            Self::Streamed => 11,
            Self::Infeasible => 12,
        }
    }
}

/// A verdict, and what it is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judgement {
    /// How it runs.
    pub verdict: Verdict,
    /// What it holds that way; of what does not run, the least it would hold.
    pub need_bytes: u64,
    /// Memory that is left; 0 where it streams, as it takes what there is, and where it does not run.
    pub headroom_bytes: u64,
    /// Memory that is missing; 0 where it runs.
    pub missing_bytes: u64,
    /// The least memory that it runs with.
    pub smallest_bytes: u64,
    /// Bytes of weights read for a token: of routed experts only those that it chooses.
    pub streamed_bytes_per_token: u64,
    /// Tokens per second that the drive allows, or memory where everything is in it and its rate is known.
    pub tokens_per_second: Option<f64>,
    /// The bytes read where layers come with all their experts, as through the daemon; `None` without experts.
    pub whole_bytes_per_token: Option<u64>,
    /// The tokens per second of that.
    pub whole_tokens_per_second: Option<f64>,
}

/// Holds a model of these bytes against a device.
#[must_use]
pub fn judge(model: &Breakdown, device: &Device) -> Judgement {
    let memory_bytes = device.memory_bytes;
    let has_rows = model.row_table_bytes > 0;
    let row_cache_bytes = if has_rows { ROW_CACHE_BYTES } else { 0 };
    let resident_bytes = model.total_bytes();
    let with_rows_bytes = resident_bytes - model.row_table_bytes + row_cache_bytes;
    let ring_bytes = model
        .largest_layer_bytes
        .saturating_mul(SLOT_COUNT)
        .saturating_add(STREAM_BYTES);
    let streamed_least_bytes = model
        .held_bytes()
        .saturating_add(row_cache_bytes)
        .saturating_add(ring_bytes);
    // A model of one or two layers takes less whole than through slots.
    let smallest_bytes = resident_bytes
        .min(with_rows_bytes)
        .min(streamed_least_bytes);
    let verdict = if resident_bytes <= memory_bytes {
        Verdict::Resident
    } else if has_rows && with_rows_bytes <= memory_bytes {
        Verdict::Rows
    } else if streamed_least_bytes <= memory_bytes {
        Verdict::Streamed
    } else {
        Verdict::Infeasible
    };
    let need_bytes = match verdict {
        Verdict::Resident => resident_bytes,
        Verdict::Rows => with_rows_bytes,
        Verdict::Streamed => memory_bytes,
        Verdict::Infeasible => smallest_bytes,
    };
    let mut judgement = Judgement {
        verdict,
        need_bytes,
        headroom_bytes: memory_bytes.saturating_sub(need_bytes),
        missing_bytes: need_bytes.saturating_sub(memory_bytes),
        smallest_bytes,
        streamed_bytes_per_token: 0,
        tokens_per_second: None,
        whole_bytes_per_token: None,
        whole_tokens_per_second: None,
    };
    match verdict {
        Verdict::Resident | Verdict::Rows => {
            let by_drive = device
                .drive_gb_per_second
                .filter(|_| model.kv_drive_bytes > 0)
                .map(|rate| rate * 1e9 / model.kv_drive_bytes as f64);
            let by_memory = memory_bound(model, device);
            judgement.tokens_per_second = match (by_memory, by_drive) {
                (Some(memory), Some(drive)) => Some(memory.min(drive)),
                (memory, drive) => memory.or(drive),
            };
        }
        Verdict::Streamed => {
            let streamed_bytes = with_rows_bytes - memory_bytes + ring_bytes;
            judgement.stream(model, device, streamed_bytes.min(model.streamable_bytes()));
        }
        Verdict::Infeasible => {}
    }
    judgement
}

impl Judgement {
    fn stream(&mut self, model: &Breakdown, device: &Device, streamed_bytes: u64) {
        let rate = device.drive_gb_per_second.map(|rate| rate * 1e9);
        // Weights, and the keys and values of a full context.
        let per_second = |bytes: u64| {
            let bytes = bytes.saturating_add(model.kv_drive_bytes);
            rate.filter(|_| bytes > 0).map(|rate| rate / bytes as f64)
        };
        self.streamed_bytes_per_token = streamed_bytes;
        if model.expert_bytes > 0 {
            self.whole_bytes_per_token = Some(streamed_bytes);
            self.whole_tokens_per_second = per_second(streamed_bytes);
            self.streamed_bytes_per_token = chosen_bytes(model, streamed_bytes);
        }
        self.tokens_per_second = per_second(self.streamed_bytes_per_token);
    }
}

/// Bytes that a token reads: memory holds first what every token uses and then experts, and of those only the chosen
/// ones are read: the share of them that is not in memory.
fn chosen_bytes(model: &Breakdown, streamed_bytes: u64) -> u64 {
    let always_bytes = model.streamable_bytes().saturating_sub(model.expert_bytes);
    let in_memory_bytes = model.streamable_bytes().saturating_sub(streamed_bytes);
    let always_read_bytes = always_bytes.saturating_sub(in_memory_bytes);
    let experts_in_memory_bytes = in_memory_bytes
        .saturating_sub(always_bytes)
        .min(model.expert_bytes);
    let missing_share = 1.0 - experts_in_memory_bytes as f64 / model.expert_bytes as f64;
    always_read_bytes + (model.active_expert_bytes as f64 * missing_share).ceil() as u64
}

/// Tokens per second at which memory is read: all weights that a token uses, and the keys and values of a full context.
fn memory_bound(model: &Breakdown, device: &Device) -> Option<f64> {
    let experts_idle_bytes = model.expert_bytes.saturating_sub(model.active_expert_bytes);
    // The embedding is read where it is the head too.
    let table_bytes = if model.head_bytes == 0 {
        0
    } else {
        model.embedding_bytes
    };
    let read_bytes = model
        .streamable_bytes()
        .saturating_sub(table_bytes)
        .saturating_sub(experts_idle_bytes);
    let read_bytes = read_bytes.saturating_add(model.kv_bytes());
    device
        .memory_gb_per_second
        .map(|rate| rate * 1e9 / read_bytes.max(1) as f64)
}

/// The largest number from 1 to `most` for which `runs` holds; `None` if not even 1 does. `runs` holds up to some number
/// and never beyond it.
pub fn largest(most: u64, runs: impl Fn(u64) -> bool) -> Option<u64> {
    if most == 0 || !runs(1) {
        return None;
    }
    let (mut low, mut high) = (1, most);
    while low < high {
        let middle = high - (high - low) / 2;
        if runs(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Some(low)
}
