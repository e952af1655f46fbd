//! fio beside every figure: the best line of any shape, and the best line whose memory is as large as streaming needs.
//!
//! A few MiB that are read into again and again stay in a processor's cache and look up to 25 % faster than any program
//! that keeps what it reads. So there are two lines, and every ratio says which one it uses.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::settings::Setting;
use super::stat::Series;
use super::{child, file_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, KIB, MIB, PAGE_2M, align_down};

/// Memory that a processor's cache does not hold: what "same footprint" means.
pub const FOOTPRINT_BYTES: u64 = 128 * MIB;
/// More than any line takes to start and end.
const GRACE: Duration = Duration::from_secs(60);
/// Lines begin at different places of the file, so that none finds what the one before has left in some cache.
const STRIDE_PERCENT: u64 = 37;
/// Bytes that a line has room for in each second, before it comes to the end of the file.
const ROOM_RATE: f64 = 3e9;
/// Tries of each shape, before one is chosen.
const TRIES: u32 = 3;

/// Length of a request and how many are in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// fio's `bs`.
    pub request_bytes: u64,
    /// fio's `iodepth`.
    pub depth: u32,
}

impl Shape {
    /// `depth` requests of `request_bytes`.
    #[must_use]
    pub const fn new(request_bytes: u64, depth: u32) -> Self {
        Self {
            request_bytes,
            depth,
        }
    }

    /// The memory fio reads into with this shape.
    #[must_use]
    pub const fn footprint_bytes(self) -> u64 {
        self.request_bytes * self.depth as u64
    }

    /// `1.0 MiB x 8`.
    #[must_use]
    pub fn label(self) -> String {
        format!("{} x {}", HumanBytes(self.request_bytes), self.depth)
    }
}

/// Every shape that may turn out to be the best.
pub const SHAPES: [Shape; 10] = [
    Shape::new(512 * KIB, 4),
    Shape::new(512 * KIB, 8),
    Shape::new(512 * KIB, 16),
    Shape::new(MIB, 4),
    Shape::new(MIB, 8),
    Shape::new(MIB, 16),
    Shape::new(2 * MIB, 8),
    Shape::new(4 * MIB, 8),
    Shape::new(4 * MIB, 16),
    Shape::new(8 * MIB, 8),
];

/// Those with a footprint that no processor's cache holds.
pub const LARGE_SHAPES: [Shape; 4] = [
    Shape::new(512 * KIB, 256),
    Shape::new(MIB, 128),
    Shape::new(4 * MIB, 32),
    Shape::new(16 * MIB, 8),
];

/// What one line of fio says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// 10^9 bytes per second.
    pub gb_per_second: f64,
    /// Its processor time for 10^9 bytes.
    pub cpu_seconds_per_gb: f64,
}

/// The two lines that everything is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// The best of all.
    pub best: Shape,
    /// The best of those with a large footprint.
    pub large: Shape,
}

/// fio on one file.
#[derive(Debug)]
pub struct Fio {
    seconds: f64,
    huge_pages: bool,
    turn: u64,
    /// Put back when the measuring is over.
    _setting: Option<Setting>,
}

impl Fio {
    /// Ready to read for `seconds` a line. Asks the kernel for the huge pages fio needs; where it may not have
    /// them the reason is the second value, and fio reads into 4 KiB pages.
    #[must_use]
    pub fn new(seconds: f64) -> (Self, Option<String>) {
        let wanted = FOOTPRINT_BYTES / PAGE_2M + 8;
        let (setting, refusal) = match Setting::huge_pages(wanted) {
            Ok(setting) => (setting, None),
            Err(error) => (None, Some(format!("fio reads into 4 KiB pages: {error}"))),
        };
        let fio = Self {
            seconds,
            huge_pages: refusal.is_none(),
            turn: 0,
            _setting: setting,
        };
        (fio, refusal)
    }

    /// One line, of as much of a file as there is time for, each from another place on.
    ///
    /// # Errors
    /// `NotFound` without fio, `Io` when it fails or answers nonsense, `Canceled`.
    pub fn line(&mut self, path: &Path, shape: Shape, stop: &AtomicBool) -> Result<Line> {
        self.turn += 1;
        let mut command = self.command("read", path, shape);
        // At the end of the file fio begins again where it began: what it has just read, for a drive or a host that keeps some.
        let room_bytes = file_bytes(path)?.saturating_sub((self.seconds * ROOM_RATE) as u64);
        let begin = room_bytes / 100 * (self.turn * STRIDE_PERCENT % 100);
        command.arg(format!("--offset={}", align_down(begin, PAGE_2M)));
        self.run(&mut command, shape, stop)
    }

    /// One line of requests all over a file.
    ///
    /// # Errors
    /// Those of [`Fio::line`].
    pub fn random_line(&self, path: &Path, shape: Shape, stop: &AtomicBool) -> Result<Line> {
        self.run(&mut self.command("randread", path, shape), shape, stop)
    }

    fn command(&self, order: &str, path: &Path, shape: Shape) -> Command {
        let mut command = Command::new("fio");
        command
            .args([
                "--name=line",
                "--readonly",
                "--direct=1",
                "--ioengine=io_uring",
            ])
            .args(["--time_based", "--output-format=json"])
            .arg(format!("--rw={order}"))
            .arg(format!("--filename={}", path.display()))
            .arg(format!("--bs={}", shape.request_bytes))
            .arg(format!("--iodepth={}", shape.depth))
            .arg(format!("--runtime={}ms", (self.seconds * 1e3).round()));
        // More than what was asked of the kernel cannot be had of them.
        if self.huge_pages && shape.footprint_bytes() <= FOOTPRINT_BYTES {
            command.arg("--iomem=mmaphuge");
        }
        command
    }

    fn run(&self, command: &mut Command, shape: Shape, stop: &AtomicBool) -> Result<Line> {
        let limit = GRACE + Duration::from_secs_f64(self.seconds);
        let done = child::run(command, limit, stop).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                "fio is not installed, and nothing can be compared without it; try: apt-get install fio",
            ),
            _ => error,
        })?;
        if !done.status.success() {
            let context = format!("fio {}: {}", shape.label(), done.last_words());
            return Err(Error::new(ErrorKind::Io, context));
        }
        parse(&done.stdout).ok_or_else(|| {
            Error::new(
                ErrorKind::Io,
                format!("fio {} said nothing that can be read", shape.label()),
            )
        })
    }

    /// Tries every shape a few times in turn, for a part of a line's time each, and gives the two with the best medians.
    ///
    /// # Errors
    /// Those of [`Fio::line`].
    pub fn choose(&mut self, path: &Path, stop: &AtomicBool) -> Result<Chosen> {
        let shapes: Vec<Shape> = SHAPES.into_iter().chain(LARGE_SHAPES).collect();
        let mut rates = vec![Series::default(); shapes.len()];
        let seconds = self.seconds;
        self.seconds = seconds / f64::from(TRIES);
        for _ in 0..TRIES {
            for (shape, rates) in shapes.iter().zip(&mut rates) {
                rates.add(self.line(path, *shape, stop)?.gb_per_second);
            }
        }
        self.seconds = seconds;
        let best_of = |range: std::ops::Range<usize>| {
            let medians = range.map(|at| (shapes[at], rates[at].median().unwrap_or(0.0)));
            medians
                .max_by(|a, b| a.1.total_cmp(&b.1))
                .unwrap_or((SHAPES[0], 0.0))
        };
        let large = best_of(SHAPES.len()..shapes.len());
        let mut best = best_of(0..SHAPES.len());
        if large.1 > best.1 {
            best = large;
        }
        Ok(Chosen {
            best: best.0,
            large: large.0,
        })
    }
}

fn parse(text: &str) -> Option<Line> {
    // fio puts its warnings in front of the object.
    let answer: serde_json::Value = serde_json::from_str(&text[text.find('{')?..]).ok()?;
    let job = &answer["jobs"][0];
    let bytes = job["read"]["io_bytes"].as_f64()?;
    let seconds = job["read"]["runtime"].as_f64()? / 1e3;
    let busy_share = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0;
    (bytes > 0.0 && seconds > 0.0).then(|| Line {
        gb_per_second: bytes / 1e9 / seconds,
        cpu_seconds_per_gb: busy_share * seconds / (bytes / 1e9),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_fio_is_read() {
        let text = r#"fio: a warning
            {"jobs": [{"read": {"io_bytes": 3000000000, "runtime": 1500}, "usr_cpu": 2.0, "sys_cpu": 8.0}]}"#;
        let line = parse(text).unwrap();
        assert!((line.gb_per_second - 2.0).abs() < 1e-9);
        assert!((line.cpu_seconds_per_gb - 0.05).abs() < 1e-9);
        for nonsense in ["", "fio: no such file", "{\"jobs\": []}"] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn large_shapes_leave_the_processor_cache() {
        assert!(
            LARGE_SHAPES
                .iter()
                .all(|shape| shape.footprint_bytes() >= FOOTPRINT_BYTES)
        );
        assert!(
            SHAPES
                .iter()
                .all(|shape| shape.footprint_bytes() < FOOTPRINT_BYTES)
        );
    }
}
