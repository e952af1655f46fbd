//! `flea bench stream --gpu`: report around [`crate::tools::bench_gpu`].

use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::bench::StreamArgs;
use super::table::Table;
use crate::engine::OpenOptions;
use crate::engine::gpu::{GpuModel, GpuOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ReaderKind;
use crate::plan::TierShare;
use crate::tools::bench_gpu::{self, Outcome, Pass};
use crate::units::{HumanBytes, MemorySpec};

/// Streams into VRAM and prints what came of it.
///
/// # Errors
/// Those of opening and streaming the model.
pub(super) fn stream(
    args: &StreamArgs,
    gpu_index: u32,
    options: OpenOptions,
    stop: &AtomicBool,
) -> Result<()> {
    let options_of_gpu = GpuOptions {
        index: gpu_index,
        vram_bytes: vram_bytes(args)?,
        slots_count: args.slots,
    };
    let model = GpuModel::open(&args.model, &options_of_gpu, options)?;
    let outcome = bench_gpu::measure(&model, args.passes, stop)?;
    if let Some(reason) = &outcome.stats.not_pinned {
        log::warn!("{reason}");
    }
    for fallback in &outcome.stats.host.fallbacks {
        log::warn!("{}", fallback.reason);
    }
    let verified_bytes = match args.verify {
        true => Some(bench_gpu::verify(&model, stop)?),
        false => None,
    };
    if args.json {
        super::print_json(&json(&model, &outcome, verified_bytes))
    } else {
        super::print(&table(&model, &outcome, verified_bytes).to_string())
    }
}

fn vram_bytes(args: &StreamArgs) -> Result<u64> {
    match args.vram {
        Some(MemorySpec::Bytes(bytes)) => Ok(bytes),
        Some(MemorySpec::Percent(percent)) => {
            let (catalog, _) = crate::engine::gpu::catalog_of(&args.model)?;
            Ok((catalog.model_bytes as f64 * percent / 100.0) as u64)
        }
        Some(MemorySpec::Auto) | None => Err(Error::new(
            ErrorKind::Invalid,
            "--gpu needs --vram: how much of the GPU's memory weights may take",
        )),
    }
}

/// Sums over all layers.
fn total(shares: &[TierShare]) -> TierShare {
    let sum = |bytes: fn(&TierShare) -> u64| shares.iter().map(bytes).sum();
    TierShare {
        vram_bytes: sum(|share| share.vram_bytes),
        memory_bytes: sum(|share| share.memory_bytes),
        drive_bytes: sum(|share| share.drive_bytes),
    }
}

fn json(model: &GpuModel, outcome: &Outcome, verified_bytes: Option<u64>) -> Value {
    let (stats, vram) = (&outcome.stats, model.vram());
    let tiers = total(&model.shares());
    let fallbacks: Vec<&str> = stats.host.fallbacks.iter().map(|f| f.kind.name()).collect();
    json!({
        "gpu": model.context().name(),
        "gpu_index": model.context().index(),
        "seconds": outcome.seconds,
        "passes": outcome.passes.iter().map(pass_json).collect::<Vec<_>>(),
        "layers": model.catalog().layers.len(),
        "model_bytes": model.catalog().model_bytes,
        "vram": {
            "budget_bytes": vram.plan.weight_budget_bytes,
            "held_bytes": model.pool().held_bytes(),
            "resident_bytes": vram.plan.resident_bytes,
            "ring_bytes": vram.plan.ring_bytes,
            "image_bytes": vram.image.len_bytes,
            "padding_bytes": vram.image.padding_bytes,
        },
        "tiers": {
            "vram_bytes": tiers.vram_bytes,
            "memory_bytes": tiers.memory_bytes,
            "drive_bytes": tiers.drive_bytes,
        },
        "packed": model.packed().is_some(),
        "link_bytes_per_pass": model.link_bytes_per_pass(),
        "link_weights_bytes_per_pass": vram.link_bytes_per_pass(),
        "unpacked_bytes": stats.unpacked_bytes,
        "h2d_bytes": stats.h2d_bytes,
        "h2d_pinned_bytes": stats.h2d_pinned_bytes,
        "h2d_resident_bytes": stats.h2d_resident_bytes,
        "copies": stats.copies,
        "pinned_bytes": stats.pinned_bytes,
        "not_pinned": stats.not_pinned,
        "bytes_read": stats.bytes_read,
        "acquires": stats.acquires,
        "loads": stats.loads,
        "stalls": stats.stalls,
        "stall_seconds": stats.stall_ns as f64 / 1e9,
        "reader": if model.is_direct() { ReaderKind::Gds } else { stats.host.reader }.name(),
        "direct_bytes": stats.direct_bytes,
        "direct_io": stats.host.direct_io,
        "fallbacks": fallbacks,
        "verified_bytes": verified_bytes,
    })
}

fn pass_json(pass: &Pass) -> Value {
    json!({
        "seconds": pass.seconds,
        "h2d_bytes": pass.h2d_bytes,
        "bytes_read": pass.bytes_read,
        "h2d_gb_per_second": pass.h2d_bytes as f64 / 1e9 / pass.seconds.max(1e-9),
    })
}

fn table(model: &GpuModel, outcome: &Outcome, verified_bytes: Option<u64>) -> Table {
    let (stats, vram) = (&outcome.stats, model.vram());
    let size = HumanBytes;
    let mut table = Table::fields();
    table.field(
        "GPU",
        format!("{}: {}", model.context().index(), model.context().name()),
    );
    table.field(
        "model",
        format!(
            "{} in {} layers",
            size(model.catalog().model_bytes),
            model.catalog().layers.len()
        ),
    );
    table.field(
        "VRAM",
        format!(
            "{} resident, {} ring",
            size(vram.plan.resident_bytes),
            size(vram.plan.ring_bytes)
        ),
    );
    let tiers = total(&model.shares());
    table.field(
        "per pass",
        format!(
            "{} over the link: {} from memory, {} from the drive",
            size(model.link_bytes_per_pass()),
            size(tiers.memory_bytes),
            size(tiers.drive_bytes)
        ),
    );
    for (index, pass) in outcome.passes.iter().enumerate() {
        table.field(
            &format!("pass {}", index + 1),
            format!(
                "{:.3} s, {} into VRAM ({:.2} GB/s), {} from the drive",
                pass.seconds,
                size(pass.h2d_bytes),
                pass.h2d_bytes as f64 / 1e9 / pass.seconds.max(1e-9),
                size(pass.bytes_read)
            ),
        );
    }
    table.field(
        "copies",
        format!(
            "{} of {}, {:.1} % of the bytes out of pinned memory",
            stats.copies,
            size(stats.h2d_bytes),
            100.0 * stats.h2d_pinned_bytes as f64 / (stats.h2d_bytes.max(1)) as f64
        ),
    );
    if model.packed().is_some() {
        let text = format!(
            "{} of weights per pass, out of {}; {} so far",
            size(vram.link_bytes_per_pass()),
            size(model.link_bytes_per_pass()),
            size(stats.unpacked_bytes)
        );
        table.field("unpacked in VRAM", text);
    }
    if model.is_direct() {
        let text = format!("{} from the drive into VRAM", size(stats.direct_bytes));
        table.field("GPUDirect Storage", text);
    }
    table.field(
        "waits",
        format!("{} of {} acquires", stats.stalls, stats.acquires),
    );
    if let Some(bytes) = verified_bytes {
        let text = format!("{} read back, all as in the file", size(bytes));
        table.field("verified", text);
    }
    table
}
