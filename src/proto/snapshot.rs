//! The daemon in one object: what `status`, `models`, `stats` and `leases` answer, and what metrics are made of.
//!
//! Plain data with the names of the wire. Fields are only added. `_total` counters grow from the daemon's start (of a
//! model: from its load) and survive a change of the budget.

use serde::{Deserialize, Serialize};

/// Answer of `status`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Version of flead.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it was ready.
    pub uptime_seconds: f64,
    /// Where it listens.
    pub socket: String,
    /// What all pools together may take now.
    pub budget_bytes: u64,
    /// What was configured; more than `budget_bytes` while memory pressure holds it down.
    pub budget_configured_bytes: u64,
    /// What all pools together were planned to take.
    pub planned_bytes: u64,
    /// What the pools' files really hold, as the kernel counts.
    pub pool_bytes: u64,
    /// Open connections.
    pub connections: u32,
    /// Connections closed because a lease was held too long or a control page lied.
    pub revoked_total: u64,
    /// Connections refused or closed for breaking a limit.
    pub refused_total: u64,
    /// Processes that may not attach for now, because a lease of theirs had to be taken back.
    #[serde(default)]
    pub barred: u32,
    /// Memory pressure, where it is watched.
    pub pressure: Option<Pressure>,
    /// The models, by number.
    pub models: Vec<ModelState>,
    /// The clients that are attached to a model.
    pub clients: Vec<ClientState>,
}

/// What is known about memory pressure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// Where it is read: a path.
    pub source: String,
    /// Share of the last 10 s in which some task waited for memory, percent.
    pub some_avg10: f64,
    /// Times the budget was cut.
    pub shrinks_total: u64,
    /// Times it was given back.
    pub grows_total: u64,
    /// `calm`, `shrunk`, or `exhausted`: as small as the models in use allow, and memory is still short.
    #[serde(default)]
    pub state: String,
    /// What can still be had without the OOM killer.
    #[serde(default)]
    pub available_bytes: u64,
    /// Why the budget was changed last.
    #[serde(default)]
    pub reason: String,
}

/// One model in the daemon.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelState {
    /// Its number, for commands.
    pub id: u32,
    /// Where it was opened.
    pub path: String,
    /// Its architecture.
    pub architecture: String,
    /// `loading`, `ready`, `changing` (a new plan), `failed`.
    pub state: String,
    /// Kept when memory is wanted for another.
    pub pinned: bool,
    /// Its share of memory and drive against other models.
    pub weight: u32,
    /// Clients attached.
    pub clients: u32,
    /// Number of the plan in force.
    pub generation: u32,
    /// Layers of a pass.
    pub layers: u32,
    /// All tensors.
    pub model_bytes: u64,
    /// What its plan may take.
    pub weight_budget_bytes: u64,
    /// The smallest that works.
    pub smallest_budget_bytes: u64,
    /// Weights that stay in memory.
    pub resident_bytes: u64,
    /// All slots.
    pub ring_bytes: u64,
    /// Slots.
    pub slots_count: u32,
    /// Page size.
    pub page_bytes: u64,
    /// Bytes read per pass once the resident part is in.
    pub streamed_bytes_per_pass: u64,
    /// What its pool's file really holds.
    pub pool_bytes: u64,
    /// `io_uring` or `pread`.
    pub reader: String,
    /// Every shard is read with O_DIRECT.
    pub direct_io: bool,
    /// Measured share of huge pages, 0 to 1.
    pub huge_page_share: f64,
    /// What did not come out as wished: `buffered`, `pread`, `small_pages`, `numa`.
    pub fallbacks: Vec<String>,
    /// Bytes the drive delivered.
    pub bytes_read_total: u64,
    /// Reads.
    pub reads_total: u64,
    /// Reads tried again.
    pub retries_total: u64,
    /// Nanoseconds with at least one read in flight.
    pub read_ns_total: u64,
    /// Transient runs read to the end.
    pub loads_total: u64,
    /// Acquires seen in the clients' pages.
    pub acquires_total: u64,
    /// Acquires that had to wait for the drive.
    pub stalls_total: u64,
    /// Nanoseconds for which somebody waited for a layer.
    #[serde(default)]
    pub stall_ns_total: u64,
    /// How many of the stalls waited up to each of [`crate::engine::STALL_BOUNDS_NS`]; the last number: longer.
    #[serde(default)]
    pub stall_counts: Vec<u64>,
    /// Slots with nothing in them.
    #[serde(default)]
    pub slots_free: u32,
    /// Slots with a layer's pages, there or on their way.
    #[serde(default)]
    pub slots_used: u32,
    /// Slots that are never used again: the kernel has not given back a read into them.
    #[serde(default)]
    pub slots_quarantined: u32,
    /// Acquires that the learned order had not foreseen.
    pub mispredicts_total: u64,
    /// Waits that were put off while others got on: for layers that their client had less than a pass ago.
    #[serde(default)]
    pub put_off_total: u64,
    /// Loads into another slot than the plan's, because that one was held.
    #[serde(default)]
    pub away_loads_total: u64,
}

/// One client that is attached to a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientState {
    /// Its number.
    pub id: u64,
    /// Its process, as the kernel says.
    pub pid: i32,
    /// Its user, as the kernel says.
    pub uid: u32,
    /// What it calls itself.
    pub name: String,
    /// The model's number.
    pub model: u32,
    /// Seconds since it attached.
    pub attached_seconds: f64,
    /// Layers it holds now.
    pub leases: u32,
    /// The layer it acquired last.
    pub layer: Option<u32>,
    /// Acquires it says it made.
    pub acquires_total: u64,
}

/// One line of `leases`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LeaseState {
    /// The client's number.
    pub client: u64,
    /// Its process.
    pub pid: i32,
    /// The model's number.
    pub model: u32,
    /// The layer.
    pub layer: u32,
    /// How often it says it holds it.
    pub count: u32,
}
