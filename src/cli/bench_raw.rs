//! `flea bench raw PATH`: the drive's ceiling, as a table or as one JSON object.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::io::ReaderKind;
use crate::tools::raw::{DEPTHS, Point, REQUEST_BYTES, RawOptions, RawReport, measure};
use crate::units::{HumanBytes, PAGE_2M, PAGE_4K, parse_size};

/// Measures the drive's ceiling: the best O_DIRECT sequential read over request length and depth.
#[derive(Debug, Clone, Args)]
pub struct RawArgs {
    /// A file, which is only read, or a directory, where a temporary file is written and removed.
    pub path: PathBuf,
    /// Length of the temporary file.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub size: u64,
    /// Seconds per point; there are 35.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.7, value_parser = parse_seconds)]
    pub seconds: f64,
    /// Which reader: auto, io_uring or pread.
    #[arg(long, default_value = "auto")]
    pub reader: ReaderKind,
    /// Page size of the memory that is read into: 2M or 4K.
    #[arg(long, value_name = "SIZE", default_value = "2M", value_parser = parse_page)]
    pub page: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!(
            "'{text}' is not a number of seconds from 0.001 to 600"
        )),
    }
}

fn parse_page(text: &str) -> std::result::Result<u64, String> {
    match parse_size(text)? {
        bytes @ (PAGE_4K | PAGE_2M) => Ok(bytes),
        _ => Err(format!("'{text}' is not a page size; write 2M or 4K")),
    }
}

/// Runs the measurement and prints it.
///
/// # Errors
/// What [`measure`] gives.
pub fn command(args: &RawArgs) -> Result<()> {
    let report = measure(&RawOptions {
        path: args.path.clone(),
        size_bytes: args.size,
        span: Duration::from_secs_f64(args.seconds),
        reader: args.reader,
        page_bytes: args.page,
    })?;
    let text = if args.json {
        format!("{}\n", to_json(&report))
    } else {
        to_table(&report)
    };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::from_io(&error, "write to standard output"))
        }
        _ => Ok(()),
    }
}

/// The object of `--json`.
#[must_use]
pub fn to_json(report: &RawReport) -> Value {
    let point = |p: &Point| {
        json!({
            "request_bytes": p.request_bytes,
            "depth": p.depth,
            "gb_per_second": p.gb_per_second,
            "cpu_seconds_per_gb": p.cpu_seconds_per_gb,
            "bytes_read": p.bytes,
        })
    };
    json!({
        "path": report.path.to_string_lossy(),
        "gb_per_second": report.best.gb_per_second,
        "cpu_seconds_per_gb": report.best.cpu_seconds_per_gb,
        "request_bytes": report.best.request_bytes,
        "depth": report.best.depth,
        "reader": report.reader.name(),
        "direct_io": report.direct_io,
        "fallbacks": report.fallbacks,
        "filesystem": report.filesystem,
        "page_bytes": report.page_bytes,
        "huge_page_share": report.huge_page_share,
        "file_bytes": report.file_bytes,
        "temporary_file": report.temporary,
        "points": report.points.iter().map(point).collect::<Vec<_>>(),
        "plain_pread": report.plain.iter().map(point).collect::<Vec<_>>(),
    })
}

fn to_table(report: &RawReport) -> String {
    let mut text = format!(
        "{} ({}, {}{}), {}, {} pages\n",
        report.path.display(),
        report.filesystem,
        HumanBytes(report.file_bytes),
        if report.temporary { ", temporary" } else { "" },
        report.reader,
        HumanBytes(report.page_bytes),
    );
    for fallback in &report.fallbacks {
        text += &format!("note: {fallback}\n");
    }
    text += "\nGB/s (CPU s per GB)\n   request";
    for depth in DEPTHS {
        text += &format!("{:>16}", format!("depth {depth}"));
    }
    for request_bytes in REQUEST_BYTES {
        text += &format!("\n{:>10}", HumanBytes(request_bytes).to_string());
        for depth in DEPTHS {
            let found = best_of(&report.points, request_bytes, depth);
            text += &format!("{:>16}", found.map_or_else(|| "-".into(), |p| cell(&p)));
        }
    }
    text += "\n\n";
    for p in &report.plain {
        let request = HumanBytes(p.request_bytes);
        text += &format!("plain pread, one thread, {request}: {}\n", cell(p));
    }
    let best = &report.best;
    text += &format!(
        "\nceiling: {:.2} GB/s at {} x {}, {:.4} CPU s per GB, {}\n",
        best.gb_per_second,
        HumanBytes(best.request_bytes),
        best.depth,
        best.cpu_seconds_per_gb,
        report.direct_io
    );
    text
}

fn best_of(points: &[Point], request_bytes: u64, depth: u32) -> Option<Point> {
    let same = points
        .iter()
        .filter(|p| p.request_bytes == request_bytes && p.depth == depth);
    same.copied()
        .max_by(|a, b| a.gb_per_second.total_cmp(&b.gb_per_second))
}

fn cell(point: &Point) -> String {
    format!(
        "{:.2} ({:.3})",
        point.gb_per_second, point.cpu_seconds_per_gb
    )
}
