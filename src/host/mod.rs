//! llama.cpp in process: the host of `flea run`. The last room of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`, behind feature `run`.
//!
//! `session` ties it together: it opens the model through the C ABI like any host (`device`), lets llama.cpp load it
//! through a stream that reads headers and host-kept tensors only (`file`, `header`), makes a context (`context`)
//! and generates (`vocab`, `sample`, `chat`, `text`). A plain run takes the same road with llama.cpp's CPU
//! backend and no device, so the two differ in where weights come from and in nothing else.
//!
//! Invariants: llama.cpp prints nothing (`log`); no panic crosses into C; computing and waiting stop on request.

pub mod chat;
pub mod compute;
pub mod context;
mod device;
pub mod figures;
pub mod file;
pub mod header;
pub mod kv_disk;
pub mod kv_gate;
pub mod kv_state;
pub mod log;
pub mod process;
pub mod sample;
pub mod session;
pub mod text;
mod vocab;

pub use chat::Chat;
pub use context::{KvType, Token};
pub use device::{GpuRun, StreamOptions};
pub use figures::{Figures, GpuFigures};
pub use sample::{SampleOptions, Sampler};
pub use session::{End, Generation, Monitor, Session, SessionOptions, Step};
