//! What the daemon is told: plain data, filled from the command line, the environment and a file.

use crate::io::ReaderKind;
use crate::units::MemorySpec;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that can be set. [`Settings::default`] has the defaults; a model directory has none and must be given.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where to listen. Cannot be reloaded.
    pub socket: PathBuf,
    /// Mode of the socket. Cannot be reloaded.
    pub socket_mode: u32,
    /// Directories that models may lie in; links are resolved first.
    pub models: Vec<PathBuf>,
    /// What all pools together may take.
    pub memory: MemorySpec,
    /// Slots of a model's ring; one more than in process, so that one client can hold two layers at once.
    pub slots_count: u32,
    /// What moves the weights.
    pub reader: ReaderKind,
    /// Requests in flight, and the length of one; 0 = automatic.
    pub depth: u32,
    /// See `depth`.
    pub request_bytes: u32,
    /// Bind pools and reader threads to the drive's NUMA node.
    pub numa: bool,
    /// Refuse pools that do not get 2 MiB pages.
    pub require_huge_pages: bool,
    /// Page size; `None` chooses by the size of the layers.
    pub page_bytes: Option<u64>,
    /// A lease that others wait for is taken back after this long.
    pub lease_timeout: Duration,
    /// Users that may connect, besides root and the daemon's own; empty with `groups` empty: whoever the socket's mode lets in.
    pub users: Vec<u32>,
    /// Groups (primary, as SO_PEERCRED tells) that may connect.
    pub groups: Vec<u32>,
    /// Users that may change things (budget, load, unload, pin), besides root and the daemon's own.
    pub admins: Vec<u32>,
    /// Most connections at a time.
    pub connections_max: usize,
    /// Most connections of one user at a time.
    pub connections_per_user_max: usize,
    /// Most models loaded at a time.
    pub models_max: usize,
    /// Most layers a client may hold at a time.
    pub leases_max: u32,
    /// Longest packet that is read.
    pub packet_bytes_max: usize,
    /// Requests a connection may make per second, on average.
    pub requests_per_second: u32,
    /// Share of memory and drive of a model against others: by path; 100 where nothing is said.
    pub weights: Vec<(PathBuf, u32)>,
    /// Models opened, and pinned, before anybody asks.
    pub preload: Vec<PathBuf>,
    /// Loopback address for Prometheus; off by default. Cannot be reloaded.
    pub metrics_listen: Option<SocketAddr>,
    /// Give memory back under pressure.
    pub pressure: bool,
}

/// Weight of a model of which nothing is said.
pub const WEIGHT_DEFAULT: u32 = 100;

impl Default for Settings {
    fn default() -> Self {
        Self {
            socket: PathBuf::from(crate::proto::SOCKET_DEFAULT),
            socket_mode: 0o660,
            models: Vec::new(),
            memory: MemorySpec::Auto,
            slots_count: 4,
            reader: ReaderKind::Auto,
            depth: 0,
            request_bytes: 0,
            numa: true,
            require_huge_pages: false,
            page_bytes: None,
            lease_timeout: Duration::from_secs(30),
            users: Vec::new(),
            groups: Vec::new(),
            admins: Vec::new(),
            connections_max: 1024,
            connections_per_user_max: 256,
            models_max: 32,
            leases_max: 4096,
            packet_bytes_max: crate::proto::PACKET_BYTES_MAX,
            requests_per_second: 1000,
            weights: Vec::new(),
            preload: Vec::new(),
            metrics_listen: None,
            pressure: true,
        }
    }
}
