//! The drive's ceiling: the best O_DIRECT sequential read over request length and depth, through flea's own reader.
//!
//! Every rate that flea prints is worth what it is beside this one. A plain pread loop of one thread is measured too,
//! as a cross-check that the reader itself is not what limits. Invariants: a file is only read; a directory gets a file
//! without a name, so that nothing is left behind whatever happens; every point is bounded in time.
//! Place: a tool beside the pipeline; it uses `file` and `reader`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};

use super::synth::file::check_space;
use crate::error::{Error, Result};
use crate::io::bulk::{Cursor, sweep};
use crate::io::{AlignedMemory, ReaderKind, ReaderOptions, ShardFile};
use crate::units::{KIB, MIB, PAGE_2M, PAGE_4K, align_down};

/// Request lengths of the sweep.
pub const REQUEST_BYTES: [u64; 6] = [256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB];
/// Depths of the sweep.
pub const DEPTHS: [u32; 5] = [1, 2, 4, 8, 16];
/// Request lengths of the plain pread loop.
const PLAIN_REQUEST_BYTES: [u64; 2] = [MIB, 4 * MIB];
/// The best points are measured again this often: one lucky point should not be the ceiling.
const FINALISTS: usize = 3;
/// Every point walks through all of this memory, as streaming does: requests that keep landing in the same few MiB find
/// them in a processor cache (of the host, in a virtual machine) and look up to 15 % faster than a drive can stream.
const MEMORY_BYTES: u64 = 128 * MIB;
const _: () = assert!(
    MEMORY_BYTES >= DEPTHS[DEPTHS.len() - 1] as u64 * REQUEST_BYTES[REQUEST_BYTES.len() - 1],
    "the largest point fits the memory"
);
/// Written at once while filling the temporary file.
const WRITE_BYTES: usize = 8 << 20;

/// What to measure.
#[derive(Debug, Clone)]
pub struct RawOptions {
    /// A file (only read), or a directory (a temporary file is written there).
    pub path: PathBuf,
    /// Length of the temporary file.
    pub size_bytes: u64,
    /// Time per point.
    pub span: Duration,
    /// Which reader.
    pub reader: ReaderKind,
    /// Page size of the memory that is read into.
    pub page_bytes: u64,
}

/// One measured point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Length of a request.
    pub request_bytes: u64,
    /// Requests in flight; 0 = the plain pread loop.
    pub depth: u32,
    /// Bytes read.
    pub bytes: u64,
    /// 10^9 bytes per second.
    pub gb_per_second: f64,
    /// CPU seconds of this process, kernel time included, per 10^9 bytes.
    pub cpu_seconds_per_gb: f64,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct RawReport {
    /// What was given.
    pub path: PathBuf,
    /// Length of the file that was read.
    pub file_bytes: u64,
    /// Whether that file was written for the purpose.
    pub temporary: bool,
    /// The filesystem's name.
    pub filesystem: &'static str,
    /// Which reader it was.
    pub reader: ReaderKind,
    /// Whether the page cache was out of it.
    pub direct_io: String,
    /// Everything that was less than asked for.
    pub fallbacks: Vec<String>,
    /// Page size asked for.
    pub page_bytes: u64,
    /// Which part of the memory was on 2 MiB pages.
    pub huge_page_share: f64,
    /// The best point: the ceiling.
    pub best: Point,
    /// All points, in the order they were measured; the last few are the finalists again.
    pub points: Vec<Point>,
    /// The plain pread loop of one thread.
    pub plain: Vec<Point>,
}

/// Measures the drive under `options.path`.
///
/// # Errors
/// What opening, writing or reading the file gives; `NoMemory` for its 128 MiB of memory.
pub fn measure(options: &RawOptions) -> Result<RawReport> {
    let (file, scratch) = open_target(&options.path, options.size_bytes)?;
    let mut stand = Stand::new(file, options)?;
    let mut points = Vec::new();
    for request_bytes in REQUEST_BYTES {
        for depth in DEPTHS {
            points.push(stand.point(request_bytes, depth)?);
        }
    }
    let mut ranked = points.clone();
    ranked.sort_by(|a, b| b.gb_per_second.total_cmp(&a.gb_per_second));
    for finalist in &ranked[..FINALISTS] {
        points.push(stand.point(finalist.request_bytes, finalist.depth)?);
    }
    let plain = PLAIN_REQUEST_BYTES
        .iter()
        .map(|&request_bytes| stand.plain_point(request_bytes))
        .collect::<Result<Vec<_>>>()?;
    Ok(stand.report(options, scratch.is_some(), points, plain))
}

/// The file to read: `path` itself, or, in a directory, a nameless one, whose handle keeps it alive.
pub(super) fn open_target(path: &Path, size_bytes: u64) -> Result<(ShardFile, Option<File>)> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::from_io(&error, format_args!("open {}", path.display())))?;
    if !metadata.is_dir() {
        return Ok((ShardFile::open(path)?, None));
    }
    let scratch = write_scratch(path, size_bytes)?;
    let nameless = format!("/proc/self/fd/{}", scratch.as_raw_fd());
    Ok((ShardFile::open(Path::new(&nameless))?, Some(scratch)))
}

/// What the points share.
pub(super) struct Stand {
    files: Arc<[ShardFile]>,
    /// Time per point.
    pub(super) span: Duration,
    /// Which reader it became.
    pub(super) reader: ReaderKind,
    fallback: Option<String>,
    asked: ReaderKind,
    page_bytes: u64,
    /// Away only while a sweep has it.
    memory: Option<AlignedMemory>,
    huge_page_share: f64,
    /// Where and in which order to go on.
    pub(super) cursor: Cursor,
}

impl Stand {
    fn new(file: ShardFile, options: &RawOptions) -> Result<Self> {
        Self::over(Arc::new([file]), options)
    }

    /// A stand over a file that another stand reads as well.
    pub(super) fn over(files: Arc<[ShardFile]>, options: &RawOptions) -> Result<Self> {
        let memory = AlignedMemory::new(MEMORY_BYTES, options.page_bytes)?;
        let probe_options = ReaderOptions {
            kind: options.reader,
            ..ReaderOptions::default()
        };
        let probe = crate::io::Reader::new(Arc::clone(&files), &probe_options)?;
        Ok(Self {
            files,
            span: options.span,
            reader: probe.kind(),
            fallback: probe.fallback(),
            asked: options.reader,
            page_bytes: options.page_bytes,
            huge_page_share: memory.huge_page_share().unwrap_or(0.0),
            memory: Some(memory),
            cursor: Cursor::default(),
        })
    }

    /// Reads for the span.
    pub(super) fn point(&mut self, request_bytes: u64, depth: u32) -> Result<Point> {
        let options = ReaderOptions {
            kind: self.asked,
            request_bytes: request_bytes as u32, // one of REQUEST_BYTES
            depth,
            page_bytes: self.page_bytes,
            ..ReaderOptions::default()
        };
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => AlignedMemory::new(MEMORY_BYTES, self.page_bytes)?,
        };
        let cpu = cpu_seconds();
        let (swept, memory) = sweep(&self.files, &options, memory, &mut self.cursor, self.span)?;
        self.memory = Some(memory);
        let used = cpu_seconds() - cpu;
        Ok(Point::new(
            request_bytes,
            depth,
            swept.bytes,
            swept.wall,
            used,
        ))
    }

    /// One thread, one pread at a time: what anybody would write.
    fn plain_point(&mut self, request_bytes: u64) -> Result<Point> {
        let file = &self.files[0];
        let mut memory = match self.memory.take() {
            Some(memory) => memory,
            None => AlignedMemory::new(MEMORY_BYTES, self.page_bytes)?,
        };
        let cpu = cpu_seconds();
        let start = Instant::now();
        let mut bytes = 0;
        let mut offset_bytes = align_down(self.cursor.offset_bytes, PAGE_4K);
        let mut places = memory.bytes_mut().chunks_exact_mut(request_bytes as usize);
        while start.elapsed() < self.span {
            if offset_bytes >= file.len_bytes() {
                offset_bytes = 0;
            }
            let Some(place) = places.next() else {
                places = memory.bytes_mut().chunks_exact_mut(request_bytes as usize);
                continue;
            };
            bytes += file.read_aligned_at(offset_bytes, place)? as u64;
            offset_bytes += request_bytes;
        }
        self.memory = Some(memory);
        self.cursor.offset_bytes = offset_bytes;
        Ok(Point::new(
            request_bytes,
            0,
            bytes,
            start.elapsed(),
            cpu_seconds() - cpu,
        ))
    }

    /// Everything that is less than asked for.
    pub(super) fn fallbacks(&self) -> Vec<String> {
        let mut fallbacks: Vec<String> = self.fallback.iter().cloned().collect();
        fallbacks.extend(self.files[0].direct().fallback().map(str::to_owned));
        if self.page_bytes >= PAGE_2M && self.huge_page_share < 0.99 {
            fallbacks.push(format!(
                "{:.0} % of the memory is on 2 MiB pages; see /sys/kernel/mm/transparent_hugepage/enabled",
                self.huge_page_share * 100.0
            ));
        }
        fallbacks
    }

    fn report(
        self,
        options: &RawOptions,
        temporary: bool,
        points: Vec<Point>,
        plain: Vec<Point>,
    ) -> RawReport {
        let file = &self.files[0];
        let fallbacks = self.fallbacks();
        let best = points
            .iter()
            .copied()
            .max_by(|a, b| a.gb_per_second.total_cmp(&b.gb_per_second));
        RawReport {
            path: options.path.clone(),
            file_bytes: file.len_bytes(),
            temporary,
            filesystem: file.filesystem(),
            reader: self.reader,
            direct_io: file.direct().to_string(),
            fallbacks,
            page_bytes: self.page_bytes,
            huge_page_share: self.huge_page_share,
            best: best.unwrap_or(Point::new(0, 0, 0, Duration::ZERO, 0.0)),
            points,
            plain,
        }
    }
}

impl Point {
    fn new(request_bytes: u64, depth: u32, bytes: u64, wall: Duration, cpu_seconds: f64) -> Self {
        let gb = bytes as f64 / 1e9;
        Self {
            request_bytes,
            depth,
            bytes,
            gb_per_second: gb / wall.as_secs_f64().max(1e-9),
            cpu_seconds_per_gb: cpu_seconds / gb.max(1e-9),
        }
    }
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        [usage.user_time(), usage.system_time()]
            .iter()
            .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
            .sum()
    })
}

/// A file of random bytes without a name: it is gone when its handle is, also after a kill.
fn write_scratch(directory: &Path, size_bytes: u64) -> Result<File> {
    check_space(&directory.join("."), size_bytes)?;
    let path = directory.join(format!(".flea-raw-{}", std::process::id()));
    let failed = |error: &std::io::Error, what: &str| {
        Error::from_io(error, format_args!("{what} {}", path.display()))
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|error| failed(&error, "create the temporary file"))?;
    std::fs::remove_file(&path).map_err(|error| failed(&error, "take the name of"))?;
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut bytes = vec![0; WRITE_BYTES];
    let mut left = size_bytes.max(1);
    while left > 0 {
        fill_random(&mut bytes, &mut state);
        let count = left.min(WRITE_BYTES as u64);
        file.write_all(&bytes[..count as usize])
            .map_err(|error| failed(&error, "write the temporary file"))?;
        left -= count;
    }
    file.sync_all()
        .map_err(|error| failed(&error, "sync the temporary file"))?;
    // O_DIRECT does not look there, and the memory is better used otherwise.
    if let Err(errno) = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED) {
        log::debug!("posix_fadvise on the temporary file: {errno}");
    }
    Ok(file)
}

/// Bytes that no drive or filesystem can compress (xorshift64).
fn fill_random(bytes: &mut [u8], state: &mut u64) {
    for word in bytes.as_chunks_mut::<8>().0 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *word = state.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn options(path: &Path) -> RawOptions {
        RawOptions {
            path: path.to_path_buf(),
            size_bytes: 20 * MIB + 5,
            span: Duration::from_millis(5),
            reader: ReaderKind::Auto,
            page_bytes: PAGE_2M,
        }
    }

    #[test]
    fn a_directory_is_measured_and_left_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let report = measure(&options(directory.path())).unwrap();
        assert!(report.temporary);
        assert_eq!(report.file_bytes, 20 * MIB + 5);
        let sweep = REQUEST_BYTES.len() * DEPTHS.len();
        assert_eq!(report.points.len(), sweep + FINALISTS);
        assert!(
            report
                .points
                .iter()
                .chain(&report.plain)
                .all(|p| p.bytes > 0)
        );
        let most = report
            .points
            .iter()
            .map(|p| p.gb_per_second)
            .fold(0.0, f64::max);
        assert!(report.best.gb_per_second == most && most > 0.0);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_is_only_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        std::fs::write(&path, vec![7; 5 << 20]).unwrap();
        let report = measure(&options(&path)).unwrap();
        assert!(!report.temporary);
        assert!(std::fs::read(&path).unwrap() == vec![7; 5 << 20]);
        let missing = measure(&options(&directory.path().join("missing"))).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
}
