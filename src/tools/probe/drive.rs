//! The drive: the best way to read it sequentially per page size, random reads, and the rate over a longer time.
//!
//! Request length and depth are climbed until the rate falls: a faster drive than any of today is still found. The best
//! points are measured again in interleaved rounds, because one lucky point should not become everybody's default.
//! Place: part of the tool `probe`; it uses `file` and `reader`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::super::raw::{Point, RawOptions, Stand, open_target};
use super::{check_stop, median, spread};
use crate::error::{Error, ErrorKind, Result};
use crate::io::bulk::Order;
use crate::io::profile::{Device, Rate, Sustained};
use crate::io::{DirectIo, ReaderKind, ShardFile, default_depth, default_request_bytes};
use crate::units::{HumanBytes, KIB, MIB, PAGE_2M, PAGE_4K};

/// A file below this says more about the drive's own cache than about the drive.
pub const FILE_BYTES_MIN: u64 = 64 * MIB;
/// Where the climb begins and ends.
const REQUEST_BYTES: std::ops::RangeInclusive<u64> = 128 * KIB..=32 * MIB;
const DEPTH_MAX: u32 = 128;
/// In flight at most: more only makes an urgent layer wait (64 MiB are 27 ms at 2.4 GB/s).
const IN_FLIGHT_BYTES_MAX: u64 = 64 * MIB;
/// A point this far below the best of its row is past the top.
const FALLING: f64 = 0.97;
/// So many falling points, or rows, end the climb: one alone may be noise.
const FALLS_MAX: u32 = 2;
/// What is in flight keeps the drive busy for so long: the thread that reads may get its processor late where all compute.
/// A 7 GB model at 50 %, two threads computing on two cores: with 1 MiB x 2 in flight (1 ms) the drive stood still for 5 %
/// of the time, in gaps of 1 to 5 ms.
const COVER_SECONDS: f64 = 0.008;
/// Points measured again, beside the built-in default.
const FINALISTS: usize = 3;
/// Rounds of the finalists.
const ROUNDS: usize = 5;
/// Sets of rounds until one agrees with itself.
const ATTEMPTS: usize = 3;
/// The built-in default stays unless another way is faster by this.
const WORTH_A_CHANGE: f64 = 1.05;
/// Of ways that are equally fast but for this, the one with least in flight is taken.
const EQUAL: f64 = 0.97;
/// Random reads: small ones as for rows of a table, 1 MiB as for experts; with few and with many in flight.
const RANDOM: [(u64, u32); 4] = [(4 * KIB, 1), (4 * KIB, 32), (MIB, 1), (MIB, 8)];
/// The rate over a longer time is taken in this many steps at least.
const STEPS_MIN: u32 = 10;

/// What to measure.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// A file (only read), or a directory (a temporary file is written there).
    pub path: PathBuf,
    /// Length of the temporary file.
    pub size_bytes: u64,
    /// Time per point.
    pub span: Duration,
    /// Time of the sustained read.
    pub sustain: Duration,
    /// Which reader.
    pub reader: ReaderKind,
    /// Rounds that lie further apart are no measurement, 0 to 1.
    pub spread_max: f64,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Probed {
    /// The drive.
    pub device: Device,
    /// Length of the file that was read.
    pub file_bytes: u64,
    /// Whether it was written for the purpose.
    pub temporary: bool,
    /// Which reader it was.
    pub reader: ReaderKind,
    /// Whether the page cache was out of it.
    pub direct_io: String,
    /// What was less than asked for.
    pub fallbacks: Vec<String>,
    /// Points that the climb measured.
    pub points_count: usize,
    /// The best way to read, per page size.
    pub sequential: Vec<Rate>,
    /// Requests all over the file.
    pub random: Vec<Rate>,
    /// The rate over a longer time.
    pub sustained: Sustained,
}

/// Measures the drive under `options.path`; `tell` hears what is being done.
///
/// # Errors
/// `Unsupported` for what is no drive of this machine (memory, network) or cannot be read past the page cache; `Invalid`
/// for a file that is too small or has holes; `Busy` when the rounds do not agree; `Canceled`; and what opening, writing
/// and reading the file gives.
pub fn measure(
    options: &ProbeOptions,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
) -> Result<Probed> {
    let device = Device::of_path(&options.path)?;
    check_filesystem(options, &device)?;
    tell("preparing");
    let (file, scratch) = open_target(&options.path, options.size_bytes)?;
    check_file(options, &file, scratch.as_ref())?;
    let files: Arc<[ShardFile]> = Arc::new([file]);
    let mut probed = Probed {
        device,
        file_bytes: files[0].len_bytes(),
        temporary: scratch.is_some(),
        reader: options.reader,
        direct_io: files[0].direct().to_string(),
        fallbacks: Vec::new(),
        points_count: 0,
        sequential: Vec::new(),
        random: Vec::new(),
        sustained: Sustained {
            seconds: 0.0,
            first_gb_per_second: 0.0,
            last_gb_per_second: 0.0,
            slowest_gb_per_second: 0.0,
        },
    };
    for page_bytes in [PAGE_4K, PAGE_2M] {
        let mut bench = Bench::new(&files, options, page_bytes, stop)?;
        tell(&format!(
            "sequential reads into {} pages",
            HumanBytes(page_bytes)
        ));
        let points = bench.climb()?;
        probed.points_count += points.len();
        let best = bench.settle(&points, options.spread_max)?;
        probed.sequential.push(best);
        probed.reader = bench.stand.reader;
        if page_bytes == PAGE_2M {
            probed.fallbacks = bench.stand.fallbacks();
            tell("random reads");
            probed.random = bench.random()?;
            tell(&format!("sustained read, {} s", options.sustain.as_secs()));
            probed.sustained = bench.sustain(&best, options.sustain)?;
        }
    }
    Ok(probed)
}

/// The drive's rate at this moment, read the way that `way` says: GB/s, the median of three spans. For a drive that drifts.
///
/// # Errors
/// What opening and reading the file gives.
pub fn rate_now(path: &Path, way: (u64, u32, u64), span: Duration) -> Result<f64> {
    let (request_bytes, depth, page_bytes) = way;
    let raw = RawOptions {
        path: path.to_path_buf(),
        size_bytes: 0,
        span,
        reader: ReaderKind::Auto,
        page_bytes,
    };
    let (file, _scratch) = open_target(path, FILE_BYTES_MIN)?;
    let mut stand = Stand::over(Arc::new([file]), &raw)?;
    let points = (0..3)
        .map(|_| stand.point(request_bytes, depth))
        .collect::<Result<Vec<_>>>()?;
    let rates: Vec<f64> = points.iter().map(|point| point.gb_per_second).collect();
    Ok(median(&rates))
}

fn check_filesystem(options: &ProbeOptions, device: &Device) -> Result<()> {
    let what = match device.filesystem.as_str() {
        "tmpfs" | "ramfs" | "hugetlbfs" => "which is memory and no drive",
        "nfs" | "smb" | "cifs" => "which is another machine's drive behind a network",
        "fuse" => "where a program answers and no drive can be told from its caches",
        "procfs" | "sysfs" => "which the kernel makes up",
        _ => return Ok(()),
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{} lies on {}, {what}; give a path on a drive of this machine",
            options.path.display(),
            device.filesystem
        ),
    ))
}

fn check_file(
    options: &ProbeOptions,
    file: &ShardFile,
    scratch: Option<&std::fs::File>,
) -> Result<()> {
    let shown = options.path.display();
    if let DirectIo::Buffered { reason } = file.direct() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{shown} can only be read through the page cache ({reason}); a figure would be the cache's and not the drive's"
            ),
        ));
    }
    if file.len_bytes() < FILE_BYTES_MIN {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{shown}: {} are too few to measure a drive with; give a file of {} or more, or a directory",
                HumanBytes(file.len_bytes()),
                HumanBytes(FILE_BYTES_MIN)
            ),
        ));
    }
    if scratch.is_none() {
        let metadata = std::fs::metadata(&options.path)
            .map_err(|error| Error::from_io(&error, format_args!("look at {shown}")))?;
        // Some filesystems keep small parts elsewhere: a tenth may be missing.
        if metadata.blocks().saturating_mul(512) < metadata.len() / 10 * 9 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{shown} has holes or is compressed: reading it would not use the drive; give another file, or a directory"
                ),
            ));
        }
    }
    Ok(())
}

/// One page size on the drive.
struct Bench<'a> {
    stand: Stand,
    page_bytes: u64,
    stop: &'a AtomicBool,
}

impl<'a> Bench<'a> {
    fn new(
        files: &Arc<[ShardFile]>,
        options: &ProbeOptions,
        page_bytes: u64,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        let raw = RawOptions {
            path: options.path.clone(),
            size_bytes: options.size_bytes,
            span: options.span,
            reader: options.reader,
            page_bytes,
        };
        Ok(Self {
            stand: Stand::over(Arc::clone(files), &raw)?,
            page_bytes,
            stop,
        })
    }

    fn point(&mut self, request_bytes: u64, depth: u32) -> Result<Point> {
        check_stop(self.stop)?;
        self.stand.point(request_bytes, depth)
    }

    /// Longer requests, and more of them in flight, until the rate falls.
    fn climb(&mut self) -> Result<Vec<Point>> {
        let mut points = Vec::new();
        let mut best = 0.0f64;
        let mut falling_rows = 0;
        let mut request_bytes = *REQUEST_BYTES.start();
        while request_bytes <= *REQUEST_BYTES.end() && falling_rows < FALLS_MAX {
            let row = self.climb_row(request_bytes, &mut points)?;
            falling_rows = if row < best * FALLING {
                falling_rows + 1
            } else {
                0
            };
            best = best.max(row);
            request_bytes *= 2;
        }
        Ok(points)
    }

    /// The best rate of one request length.
    fn climb_row(&mut self, request_bytes: u64, points: &mut Vec<Point>) -> Result<f64> {
        let mut best = 0.0f64;
        let mut falls = 0;
        let mut depth = 1;
        while depth <= DEPTH_MAX
            && u64::from(depth) * request_bytes <= IN_FLIGHT_BYTES_MAX
            && falls < FALLS_MAX
        {
            let point = self.point(request_bytes, depth)?;
            falls = if point.gb_per_second < best * FALLING {
                falls + 1
            } else {
                0
            };
            best = best.max(point.gb_per_second);
            points.push(point);
            depth *= 2;
        }
        Ok(best)
    }

    /// The best points and the built-in default again, in interleaved rounds.
    fn settle(&mut self, points: &[Point], spread_max: f64) -> Result<Rate> {
        let request_bytes = default_request_bytes(self.page_bytes);
        let built_in = (u64::from(request_bytes), default_depth(request_bytes));
        let mut ranked: Vec<&Point> = points.iter().filter(|point| covers(point)).collect();
        ranked.sort_by(|a, b| b.gb_per_second.total_cmp(&a.gb_per_second));
        let mut ways = vec![built_in];
        for point in ranked {
            let way = (point.request_bytes, point.depth);
            if ways.len() <= FINALISTS && !ways.contains(&way) {
                ways.push(way);
            }
        }
        let mut chosen = None;
        for _ in 0..ATTEMPTS {
            let rate = self.rounds(&ways)?;
            if rate.spread <= spread_max {
                return Ok(rate);
            }
            chosen = Some(rate);
        }
        let spread_percent = chosen.map_or(0.0, |rate| rate.spread * 100.0);
        Err(Error::new(
            ErrorKind::Busy,
            format!(
                "noisy: equal reads of the same file lie {spread_percent:.0} % apart, {ATTEMPTS} times over (allowed: {:.0} %); \
                 something else uses the drive or the processor; no figure is given and none is kept",
                spread_max * 100.0
            ),
        ))
    }

    fn rounds(&mut self, ways: &[(u64, u32)]) -> Result<Rate> {
        let mut rounds: Vec<Vec<Point>> = vec![Vec::new(); ways.len()];
        for _ in 0..ROUNDS {
            for (way, points) in ways.iter().zip(&mut rounds) {
                points.push(self.point(way.0, way.1)?);
            }
        }
        let rates: Vec<Rate> = rounds.iter().map(|points| self.rate(points)).collect();
        Ok(choose(&rates))
    }

    fn rate(&self, points: &[Point]) -> Rate {
        let rates: Vec<f64> = points.iter().map(|point| point.gb_per_second).collect();
        let cpu: Vec<f64> = points.iter().map(|p| p.cpu_seconds_per_gb).collect();
        let first = points.first();
        Rate {
            page_bytes: self.page_bytes,
            request_bytes: first.map_or(0, |p| p.request_bytes as u32), // at most 32 MiB
            depth: first.map_or(0, |p| p.depth),
            gb_per_second: median(&rates),
            spread: spread(&rates),
            cpu_seconds_per_gb: median(&cpu),
        }
    }

    fn random(&mut self) -> Result<Vec<Rate>> {
        let before = self.stand.cursor.order;
        self.stand.cursor.order = Order::Random(0x9E37_79B9_7F4A_7C15);
        let mut rates = Vec::new();
        for (request_bytes, depth) in RANDOM {
            let points = (0..3)
                .map(|_| self.point(request_bytes, depth))
                .collect::<Result<Vec<_>>>()?;
            rates.push(self.rate(&points));
        }
        self.stand.cursor.order = before;
        Ok(rates)
    }

    /// Reads the best way for as long as asked, and looks every second.
    fn sustain(&mut self, best: &Rate, sustain: Duration) -> Result<Sustained> {
        let span = self.stand.span;
        self.stand.span = (sustain / STEPS_MIN).min(Duration::from_secs(1));
        let began = Instant::now();
        let mut steps = Vec::new();
        while steps.len() < STEPS_MIN as usize || began.elapsed() < sustain {
            let point = self.point(u64::from(best.request_bytes), best.depth)?;
            steps.push(point.gb_per_second);
        }
        self.stand.span = span;
        let tenth = steps.len().div_ceil(10);
        Ok(Sustained {
            seconds: began.elapsed().as_secs_f64(),
            first_gb_per_second: median(&steps[..tenth]),
            last_gb_per_second: median(&steps[steps.len() - tenth..]),
            slowest_gb_per_second: steps.iter().copied().fold(f64::INFINITY, f64::min),
        })
    }
}

/// Whether what is in flight outlasts a late thread.
fn covers(point: &Point) -> bool {
    let in_flight_bytes = point.request_bytes * u64::from(point.depth);
    in_flight_bytes as f64 >= point.gb_per_second * 1e9 * COVER_SECONDS
}

/// The way to read from now on. The first is the built-in default: it stays unless another is clearly faster; of those
/// that are, the one with least in flight, because an urgent layer waits for what is.
fn choose(rates: &[Rate]) -> Rate {
    let built_in = rates[0];
    let most = rates
        .iter()
        .map(|rate| rate.gb_per_second)
        .fold(0.0, f64::max);
    if most < built_in.gb_per_second * WORTH_A_CHANGE {
        return built_in;
    }
    let in_flight = |rate: &Rate| u64::from(rate.request_bytes) * u64::from(rate.depth);
    let fast = rates
        .iter()
        .filter(|rate| rate.gb_per_second >= most * EQUAL);
    fast.copied().min_by_key(in_flight).unwrap_or(built_in)
}

#[cfg(test)]
#[path = "drive_tests.rs"]
mod tests;
