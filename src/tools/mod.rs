//! What the programs offer besides running: synthetic models, measurements. No argument parsing here (that is `cli`),
//! no printing: functions take plain values and give plain values back, so that tests and other tools can call them.

pub mod analyze;
#[cfg(feature = "cuda")]
pub mod bench_gpu;
#[cfg(feature = "cuda")]
pub mod bench_kernels;
pub mod bench_stream;
pub mod compress;
pub mod doctor;
pub mod gguf_write;
pub mod kv_bench;
pub mod pack;
pub mod policies;
pub mod probe;
pub mod raw;
pub mod suite;
pub mod svg;
pub mod synth;
