//! `flea bench stream --gpu`: report around [`crate::tools::bench_gpu`].

use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::bench::StreamArgs;
use super::table::Table;
use crate::engine::OpenOptions;
use crate::engine::gpu::{GpuModel, Gpus, Part};
use crate::error::Result;
use crate::io::ReaderKind;
use crate::plan::TierShare;
use crate::proto::gpus::{self, GpuShare};
use crate::tools::bench_gpu::{self, Outcome, Pass};
use crate::units::HumanBytes;

/// Streams into VRAM and prints what came of it.
///
/// # Errors
/// Those of opening and streaming the model.
pub(super) fn stream(
    args: &StreamArgs,
    gpus: &[GpuShare],
    options: OpenOptions,
    stop: &AtomicBool,
) -> Result<()> {
    let chosen = gpus::options(&args.model, gpus, args.slots)?;
    let model = Gpus::open(&args.model, &chosen, options)?;
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

/// Sums over all layers.
fn total(shares: &[TierShare]) -> TierShare {
    let sum = |bytes: fn(&TierShare) -> u64| shares.iter().map(bytes).sum();
    TierShare {
        vram_bytes: sum(|share| share.vram_bytes),
        memory_bytes: sum(|share| share.memory_bytes),
        drive_bytes: sum(|share| share.drive_bytes),
    }
}

/// Sums over all GPUs.
fn sum(model: &Gpus, bytes: fn(&GpuModel) -> u64) -> u64 {
    model.parts().iter().map(|part| bytes(part.model())).sum()
}

fn shares(model: &Gpus) -> Vec<TierShare> {
    let parts = model.parts().iter();
    parts.flat_map(|part| part.model().shares()).collect()
}

fn is_direct(model: &Gpus) -> bool {
    model.parts().iter().any(|part| part.model().is_direct())
}

fn json(model: &Gpus, outcome: &Outcome, verified_bytes: Option<u64>) -> Value {
    let stats = &outcome.stats;
    let first = model.parts()[0].model().context();
    let tiers = total(&shares(model));
    let fallbacks: Vec<&str> = stats.host.fallbacks.iter().map(|f| f.kind.name()).collect();
    json!({
        "gpu": first.name(),
        "gpu_index": first.index(),
        "gpus": model.parts().iter().map(part_json).collect::<Vec<_>>(),
        "seconds": outcome.seconds,
        "passes": outcome.passes.iter().map(pass_json).collect::<Vec<_>>(),
        "layers": model.catalog().layers.len(),
        "model_bytes": model.catalog().model_bytes,
        "vram": {
            "budget_bytes": sum(model, |gpu| gpu.vram().plan.weight_budget_bytes),
            "held_bytes": sum(model, |gpu| gpu.pool().held_bytes()),
            "resident_bytes": sum(model, |gpu| gpu.vram().plan.resident_bytes),
            "ring_bytes": sum(model, |gpu| gpu.vram().plan.ring_bytes),
            "image_bytes": sum(model, |gpu| gpu.vram().image.len_bytes),
            "padding_bytes": sum(model, |gpu| gpu.vram().image.padding_bytes),
        },
        "tiers": tiers_json(&tiers),
        "packed": model.packed().is_some(),
        "link_bytes_per_pass": sum(model, GpuModel::link_bytes_per_pass),
        "link_weights_bytes_per_pass": sum(model, |gpu| gpu.vram().link_bytes_per_pass()),
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
        "reader": if is_direct(model) { ReaderKind::Gds } else { stats.host.reader }.name(),
        "direct_bytes": stats.direct_bytes,
        "direct_io": stats.host.direct_io,
        "fallbacks": fallbacks,
        "verified_bytes": verified_bytes,
    })
}

fn tiers_json(tiers: &TierShare) -> Value {
    json!({
        "vram_bytes": tiers.vram_bytes,
        "memory_bytes": tiers.memory_bytes,
        "drive_bytes": tiers.drive_bytes,
    })
}

/// One of the GPUs.
fn part_json(part: &Part) -> Value {
    let (gpu, layers) = (part.model(), part.layers());
    let stats = gpu.stats();
    json!({
        "gpu": gpu.context().name(),
        "gpu_index": gpu.context().index(),
        "first_layer": layers.start,
        "layers": layers.len(),
        "budget_bytes": gpu.vram().plan.weight_budget_bytes,
        "held_bytes": gpu.pool().held_bytes(),
        "resident_bytes": gpu.vram().plan.resident_bytes,
        "ring_bytes": gpu.vram().plan.ring_bytes,
        "tiers": tiers_json(&total(&gpu.shares())),
        "link_bytes_per_pass": gpu.link_bytes_per_pass(),
        "h2d_bytes": stats.h2d_bytes,
        "h2d_resident_bytes": stats.h2d_resident_bytes,
        "pinned_bytes": stats.pinned_bytes,
        "bytes_read": stats.bytes_read,
        "host_budget_bytes": gpu.host_budget().map(|budget| budget.weight_budget_bytes),
        "acquires": stats.acquires,
        "loads": stats.loads,
        "stalls": stats.stalls,
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

fn table(model: &Gpus, outcome: &Outcome, verified_bytes: Option<u64>) -> Table {
    let stats = &outcome.stats;
    let size = HumanBytes;
    let mut table = Table::fields();
    for part in model.parts() {
        let (context, layers) = (part.model().context(), part.layers());
        let text = match model.parts().len() {
            1 => String::new(),
            _ => format!(", layers {} to {}", layers.start, layers.end - 1),
        };
        let name = format!("{}: {}{text}", context.index(), context.name());
        table.field("GPU", name);
    }
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
            size(sum(model, |gpu| gpu.vram().plan.resident_bytes)),
            size(sum(model, |gpu| gpu.vram().plan.ring_bytes))
        ),
    );
    let tiers = total(&shares(model));
    table.field(
        "per pass",
        format!(
            "{} over the link: {} from memory, {} from the drive",
            size(sum(model, GpuModel::link_bytes_per_pass)),
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
            size(sum(model, |gpu| gpu.vram().link_bytes_per_pass())),
            size(sum(model, GpuModel::link_bytes_per_pass)),
            size(stats.unpacked_bytes)
        );
        table.field("unpacked in VRAM", text);
    }
    if is_direct(model) {
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
