//! `--gpu` and `--vram`: weights in the memory of a GPU, and ggml-cuda computing with them; and what `--json` says of it.

use std::path::PathBuf;

use serde::Serialize;

use crate::cli::values;
use crate::host::{GpuFigures, GpuRun};
use crate::proto::gpus::{self, GpuList, VramList};

/// Where weights are and who computes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "GPU")]
pub struct GpuArgs {
    /// Compute on this NVIDIA GPU, from 0, with weights streamed into its memory; --memory is then what keeps the rest. On
    /// several, 0,1, each has a run of the layers
    #[arg(long, value_name = "N,...", requires = "vram",
        conflicts_with_all = ["no_stream", "daemon", "kv_disk", "backing", "expert_prefetch"])]
    gpu: Option<GpuList>,

    /// What weights may take of the GPU's memory: 8GiB, or of the model, 25%. KV cache and computing come on top. With several
    /// GPUs of the memory of each, or 8GiB,4GiB
    #[arg(long, value_name = "SIZE,...", requires = "gpu", value_parser = vram)]
    vram: Option<String>,

    /// Slots of the ring in the GPU's memory, 2 to 64 [default: 3]
    #[arg(long, value_name = "N", requires = "gpu", value_parser = values::slots)]
    vram_slots: Option<u32>,

    /// The libggml-cuda.so that computes, of a llama.cpp with the same version of ggml as this program
    #[arg(long, value_name = "FILE", env = "FLEA_GGML_CUDA")]
    ggml_cuda: Option<PathBuf>,
}

/// Checks a size early; the engine takes the text.
fn vram(text: &str) -> Result<String, String> {
    text.parse::<VramList>().map(|_| text.to_owned())
}

impl GpuArgs {
    /// Which GPU, and how much of it.
    pub fn run(&self) -> Option<GpuRun> {
        Some(GpuRun {
            indices: self.gpu.clone()?.0,
            vram: self.vram.clone()?,
            slots_count: self.vram_slots.unwrap_or(0),
            library: self.ggml_cuda.clone(),
        })
    }
}

/// The GPU's part of the answer.
#[derive(Debug, Serialize)]
pub struct GpuAnswer {
    index: u32,
    vram_budget_bytes: u64,
    vram_resident_bytes: u64,
    vram_ring_bytes: u64,
    link_bytes_per_pass: u64,
    link_weights_bytes_per_pass: u64,
    h2d_bytes: u64,
    h2d_pinned_bytes: u64,
    h2d_resident_bytes: u64,
    copies: u64,
    pinned_bytes: u64,
    unpacked_bytes: u64,
    first_layer: u32,
    layer_count: u32,
}

/// All GPUs together, under the number of the first, and each of them.
#[derive(Debug, Serialize)]
pub struct GpusAnswer {
    #[serde(flatten)]
    all: GpuAnswer,
    releases_behind_gpu: u64,
    each: Vec<GpuAnswer>,
}

impl From<&gpus::GpuFigures> for GpuAnswer {
    fn from(figures: &gpus::GpuFigures) -> Self {
        Self {
            index: figures.index,
            vram_budget_bytes: figures.vram_budget_bytes,
            vram_resident_bytes: figures.vram_resident_bytes,
            vram_ring_bytes: figures.vram_ring_bytes,
            link_bytes_per_pass: figures.link_bytes_per_pass,
            link_weights_bytes_per_pass: figures.link_weights_bytes_per_pass,
            h2d_bytes: figures.link.h2d_bytes,
            h2d_pinned_bytes: figures.link.h2d_pinned_bytes,
            h2d_resident_bytes: figures.link.h2d_resident_bytes,
            copies: figures.link.copies,
            pinned_bytes: figures.link.pinned_bytes,
            unpacked_bytes: figures.link.unpacked_bytes,
            first_layer: figures.first_layer,
            layer_count: figures.layer_count,
        }
    }
}

impl From<&GpuFigures> for GpusAnswer {
    fn from(figures: &GpuFigures) -> Self {
        Self {
            all: GpuAnswer::from(&figures.all()),
            releases_behind_gpu: figures.releases_behind_gpu,
            each: figures.each.iter().map(GpuAnswer::from).collect(),
        }
    }
}

/// What the last line on stderr says of it.
pub fn summary(gpu: &GpuFigures) -> String {
    let all = gpu.all();
    let planned_bytes = all.vram_resident_bytes + all.link_weights_bytes_per_pass;
    let share = all.vram_resident_bytes as f64 / (planned_bytes.max(1)) as f64;
    format!(
        ", {:.0} % in VRAM, {:.2} GB over the link",
        share.min(1.0) * 100.0,
        all.link.h2d_bytes as f64 / 1e9
    )
}
