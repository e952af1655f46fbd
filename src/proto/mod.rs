//! The protocol between programs and the daemon: messages over a socket, and the way of a lease through shared memory.
//!
//! Set-up goes over a SOCK_SEQPACKET socket, one JSON object per packet, the version first ([`message`]); file
//! descriptors travel with the replies that need them. Leases do not: they are counted in shared words
//! and cost no system call when the layer is there. [`Control`] is the client that only
//! asks; [`Attached`] is a model in the daemon, with the calls of [`crate::engine::Model`]. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: lease, for hosts in another process.

mod attached;
mod control;
mod fetch;
pub mod gpus;
mod inherit;
mod lease;
pub mod message;
pub mod opened;
pub mod plan;
pub mod snapshot;
mod socket;

pub use attached::Attached;
pub use control::Control;
pub use inherit::inherited;
pub use opened::Opened;
pub use socket::{Packet, Socket};

/// The version of the protocol: the first packet of both sides names it, and unequal versions part.
pub const PROTOCOL: u32 = 1;
/// Longest packet, either way.
pub const PACKET_BYTES_MAX: usize = 64 << 10;
/// Most file descriptors in one packet.
pub const DESCRIPTORS_MAX: usize = 4;
/// Where the daemon listens unless told otherwise.
pub const SOCKET_DEFAULT: &str = "/run/flea/flea.sock";
