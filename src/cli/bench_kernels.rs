//! `flea bench kernels`: arguments and report around [`crate::tools::bench_kernels`].

use std::time::Duration;

use clap::Args as ClapArgs;

use crate::error::Result;
use crate::units::parse_size;

const EXAMPLES: &str = "\
Examples:
  flea bench kernels --gpu 0
  flea bench kernels --gpu 1 --size 1GiB --rounds 11 --json

Needs as much VRAM as --size says, twice. Traffic is what is read and written: a copy of 1 GB moves 2.
Unpacking is what flea pack --compress asks for: it has to be faster than the link, or it would be the limit.";

/// What `flea bench kernels` takes.
#[derive(Debug, Clone, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct KernelsArgs {
    /// Which GPU, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub gpu: u32,

    /// What the longest work on
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size)]
    pub size: u64,

    /// How often each is measured, in turn with the others; the figures are medians
    #[arg(long, value_name = "N", default_value = "5", value_parser = super::count)]
    pub rounds: u32,

    /// How long each is measured, each time
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = super::probe::duration)]
    pub seconds: Duration,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// At least a tile of weights and some; whole pieces.
fn size(text: &str) -> std::result::Result<u64, String> {
    match parse_size(text)? {
        bytes @ 1_048_576..=68_719_476_736 if bytes.is_multiple_of(4096) => Ok(bytes),
        _ => Err(format!(
            "'{text}' is not a multiple of 4 KiB from 1 MiB to 64 GiB"
        )),
    }
}

/// Measures and prints.
///
/// # Errors
/// Without CUDA in this build, driver or GPU; what measuring gives.
#[cfg(feature = "cuda")]
pub(super) fn command(args: &KernelsArgs) -> Result<()> {
    use crate::tools::bench_kernels::{KernelsOptions, measure};

    let options = KernelsOptions {
        gpu_index: args.gpu,
        len_bytes: args.size,
        rounds: args.rounds,
        span: args.seconds,
    };
    let stop = super::stop_on_signal()?;
    let report = measure(&options, &stop)?;
    let gpus = crate::mem::gpu::gpus()?;
    let driver = gpus.get(args.gpu as usize).map(ToString::to_string);
    if args.json {
        super::print_json(&report::json(&report, args.gpu, driver.as_deref()))
    } else {
        super::print(&report::table(&report, driver.as_deref()))
    }
}

/// Says that this build cannot.
///
/// # Errors
/// `Unsupported`.
#[cfg(not(feature = "cuda"))]
pub(super) fn command(_args: &KernelsArgs) -> Result<()> {
    Err(crate::mem::gpu::not_built())
}

#[cfg(feature = "cuda")]
mod report {
    use serde_json::{Value, json};

    use super::super::table::{Align, Table};
    use crate::tools::bench_kernels::{KernelRate, KernelsReport};
    use crate::units::HumanBytes;

    pub(super) fn json(report: &KernelsReport, gpu_index: u32, description: Option<&str>) -> Value {
        let kernel = |rate: &KernelRate| {
            json!({
                "name": rate.name,
                "traffic_gb_per_second": rate.traffic_gb_per_second,
                "result_gb_per_second": rate.result_gb_per_second,
                "of_copy": rate.of_copy,
            })
        };
        json!({
            "gpu": report.gpu,
            "gpu_index": gpu_index,
            "description": description,
            "bytes": report.len_bytes,
            "copy_traffic_gb_per_second": report.copy_gb_per_second,
            "pinned_to_device_gb_per_second": report.link_gb_per_second,
            "kernels": report.kernels.iter().map(kernel).collect::<Vec<_>>(),
            "unpack": {"coded_ratio": report.coded_ratio, "of_link": report.unpack_of_link},
        })
    }

    pub(super) fn table(report: &KernelsReport, description: Option<&str>) -> String {
        let mut table = Table::new(&[
            ("kernel", Align::Left),
            ("traffic GB/s", Align::Right),
            ("of a copy", Align::Right),
            ("result GB/s", Align::Right),
        ]);
        let cells = |name: &str, traffic: f64, part: f64, result: f64| {
            [
                name.to_owned(),
                format!("{traffic:.1}"),
                format!("{part:.3}"),
                format!("{result:.1}"),
            ]
        };
        let copy = report.copy_gb_per_second;
        table.row(cells("copy within VRAM", copy, 1.0, copy / 2.0));
        for rate in &report.kernels {
            let traffic = rate.traffic_gb_per_second;
            table.row(cells(
                &rate.name,
                traffic,
                rate.of_copy,
                rate.result_gb_per_second,
            ));
        }
        format!(
            "GPU {}\n\n{table}\nworking on {}; sums and unpacked weights are right\npinned memory to VRAM: {:.2} GB/s; unpacking gives {:.1} \
             times as many bytes, out of {:.3} of them\n",
            description.unwrap_or(&report.gpu),
            HumanBytes(report.len_bytes),
            report.link_gb_per_second,
            report.unpack_of_link,
            report.coded_ratio,
        )
    }
}
