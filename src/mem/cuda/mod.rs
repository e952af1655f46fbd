//! Memory of NVIDIA GPUs: the driver found at run time, pools of VRAM, and host memory pinned for it.
//!
//! * `driver`: whether there is a driver, and what its errors mean. * [`context`]: the GPUs. * [`stream`]: copies in order,
//!   and the events that tell when. * [`memory`]: VRAM and the addresses it is seen at. * [`pin`]: host memory that copies
//!   read without a detour. * [`rate`]: how fast that is. * [`stage`]: a pool of host memory that
//!   copies go out of, [`readback`]: and back. * [`pool`]: the window of a model's image, with slots that serve many layers.
//! * [`area`]: VRAM to work in. * [`kernels`]: what is computed there. * [`unpack`]: weights that arrive coded.
//!
//! Invariants: nothing synchronises a device; what one stream must not do before another has finished is said by an event.
//! A GPU that fails makes errors and no panics. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the
//! pool, on the far side of the link.

pub mod area;
pub mod context;
mod driver;
pub mod kernels;
pub mod memory;
pub mod pin;
pub mod pool;
pub mod rate;
pub mod readback;
pub mod stage;
pub mod stream;
pub mod unpack;

pub use area::{DeviceArea, Span, VramArea};
pub use context::Context;
pub use kernels::{Coded, Kernels, NO_DAMAGE, Narrow, Quantised};
pub use pin::Pinned;
pub use pool::{VramPart, VramPool, VramView};
pub use readback::Readback;
pub use stage::Stage;
pub use stream::{Event, Stream};
pub use unpack::Unpacker;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
