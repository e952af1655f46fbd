//! Streams a model without computing: acquires and releases every layer in order, pass after pass, and measures.
//!
//! This is the ceiling of every host: what plan, reader and pool can do when the compute costs nothing. Nothing is
//! warmed up; the first pass pays for the resident part. [`verify`] then holds every planned byte against the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::engine::Stats;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{ShardFile, packed};
use crate::mem::limits;
use crate::proto::Opened;
use crate::units::{Extent, MIB};

/// How long one acquire waits before it looks whether it should stop.
const PATIENCE: Duration = Duration::from_secs(1);
/// What [`verify`] compares at a time.
const STEP_BYTES: u64 = MIB;

/// One walk over all layers.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// From the first acquire to the last release.
    pub seconds: f64,
    /// What the drive delivered meanwhile.
    pub bytes_read: u64,
    /// User and system time of the whole process meanwhile.
    pub cpu_seconds: f64,
    /// Time meanwhile with at least one request in flight.
    pub read_seconds: f64,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Each pass.
    pub passes: Vec<Pass>,
    /// All of them together.
    pub seconds: f64,
    /// User and system time of the whole process meanwhile.
    pub cpu_seconds: f64,
    /// What the drive delivered meanwhile.
    pub bytes_read: u64,
    /// What the kernel says this process fetched from drives meanwhile (`read_bytes` of /proc/self/io): the check on
    /// `bytes_read` for O_DIRECT. `None` where the kernel does not count.
    pub kernel_read_bytes: Option<u64>,
    /// Time meanwhile with at least one request in flight.
    pub read_seconds: f64,
    /// The model's counters at the end.
    pub stats: Stats,
    /// The most memory the process held.
    pub peak_memory_bytes: u64,
}

impl Outcome {
    /// Bytes read over time.
    #[must_use]
    pub fn gb_per_second(&self) -> f64 {
        self.bytes_read as f64 / 1e9 / self.seconds.max(1e-9)
    }

    /// Processor time for each GB read; 0 when nothing was.
    #[must_use]
    pub fn cpu_seconds_per_gb(&self) -> f64 {
        match self.bytes_read {
            0 => 0.0,
            bytes => self.cpu_seconds / (bytes as f64 / 1e9),
        }
    }
}

/// Walks `passes_count` times over all layers of an open model.
///
/// # Errors
/// What an acquire gives; `Canceled` when `stop` is raised.
pub fn measure(model: &Opened, passes_count: u32, stop: &AtomicBool) -> Result<Outcome> {
    let cpu_before = cpu_seconds()?;
    let before = model.stats();
    let kernel_before = kernel_read_bytes();
    let began = Instant::now();
    let mut passes = Vec::with_capacity(passes_count as usize);
    for _ in 0..passes_count {
        passes.push(walk(model, stop)?);
    }
    let seconds = began.elapsed().as_secs_f64();
    let cpu_seconds = cpu_seconds()? - cpu_before;
    let stats = model.stats();
    Ok(Outcome {
        passes,
        seconds,
        cpu_seconds,
        bytes_read: stats.bytes_read - before.bytes_read,
        read_seconds: (stats.read_ns - before.read_ns) as f64 / 1e9,
        kernel_read_bytes: kernel_read_bytes()
            .zip(kernel_before)
            .map(|(now, before)| now - before),
        stats,
        peak_memory_bytes: limits::peak_memory_bytes()?,
    })
}

fn walk(model: &Opened, stop: &AtomicBool) -> Result<Pass> {
    let (before, cpu_before) = (model.stats(), cpu_seconds()?);
    let began = Instant::now();
    for layer in 0..model.catalog().layers.len() as u32 {
        acquire(model, layer, stop)?;
        model.release(layer)?;
    }
    let (seconds, stats) = (began.elapsed().as_secs_f64(), model.stats());
    Ok(Pass {
        seconds,
        bytes_read: stats.bytes_read - before.bytes_read,
        cpu_seconds: cpu_seconds()? - cpu_before,
        read_seconds: (stats.read_ns - before.read_ns) as f64 / 1e9,
    })
}

/// Waits as long as it takes, but not when asked to stop.
fn acquire(model: &Opened, layer: u32, stop: &AtomicBool) -> Result<()> {
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "interrupted"));
        }
        match model.acquire(layer, None, Some(PATIENCE)) {
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            result => return result,
        }
    }
}

/// `read_bytes` of /proc/self/io: bytes this process made the block layer fetch.
fn kernel_read_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/io").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes:"))?;
    line.trim().parse().ok()
}

fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)
        .map_err(|errno| Error::os(errno as i32, "ask for the processor time used"))?;
    let microseconds =
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(microseconds as f64 / 1e6)
}

/// Walks once more and holds every byte of every layer against a plain buffered read of the file, whose pages it drops
/// behind. Returns the bytes compared.
///
/// # Errors
/// `Checksum` naming the first layer, file and offset that differ; what an acquire or the plain read gives.
pub fn verify(model: &Opened, stop: &AtomicBool) -> Result<u64> {
    // Weights are seen through /proc, as another process would see them: this room has no unsafe code, and a place
    // that is not readable is an error here and no crash.
    let memory = open(Path::new("/proc/self/mem"))?;
    let shards = model.catalog().shards.iter();
    let files = shards
        .map(|shard| Plain::open(&shard.path))
        .collect::<Result<Vec<Plain>>>()?;
    let mut compared_bytes = 0;
    for (index, layer) in model.catalog().layers.iter().enumerate() {
        acquire(model, index as u32, stop)?;
        let result = layer.uses.iter().try_for_each(|used| {
            let file = &files[used.extent.shard_index as usize];
            compare(model, &memory, file, &used.extent, &layer.label)
        });
        model.release(index as u32)?;
        result?;
        compared_bytes += layer.bytes;
    }
    Ok(compared_bytes)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| Error::from_io(&error, format!("open {}", path.display())))
}

/// A file read plainly, or decoded where it is compressed.
enum Plain {
    File(File),
    Decoded(ShardFile),
}

impl Plain {
    fn open(path: &Path) -> Result<Self> {
        match packed::is_packed(&ShardFile::open_buffered(path)?)? {
            true => ShardFile::open_decoded(path).map(Self::Decoded),
            false => open(path).map(Self::File),
        }
    }

    fn read(&self, bytes: &mut [u8], offset_bytes: u64, place: &str) -> Result<()> {
        match self {
            Self::Decoded(file) => file.read_exact_at(offset_bytes, bytes),
            Self::File(file) => file
                .read_exact_at(bytes, offset_bytes)
                .map_err(|error| Error::from_io(&error, format!("plain read of {place}"))),
        }
    }
}

fn compare(
    model: &Opened,
    memory: &File,
    file: &Plain,
    extent: &Extent,
    label: &str,
) -> Result<()> {
    let path = &model.catalog().shards[extent.shard_index as usize].path;
    let mut expected = vec![0; STEP_BYTES as usize];
    let mut found = vec![0; STEP_BYTES as usize];
    let mut offset_bytes = extent.offset_bytes;
    while offset_bytes < extent.end_bytes() {
        let len = (extent.end_bytes() - offset_bytes).min(STEP_BYTES) as usize;
        let (expected, found) = (&mut expected[..len], &mut found[..len]);
        let place = format!("{label}: {} at offset {offset_bytes}", path.display());
        file.read(expected, offset_bytes, &place)?;
        let address = model.address(extent.shard_index, offset_bytes) as u64;
        memory
            .read_exact_at(found, address)
            .map_err(|error| Error::from_io(&error, format!("window of {place}")))?;
        if let Some(byte) = expected.iter().zip(&*found).position(|(a, b)| a != b) {
            return Err(Error::new(
                ErrorKind::Checksum,
                format!(
                    "{label}: {} differs from memory at offset {}",
                    path.display(),
                    offset_bytes + byte as u64
                ),
            ));
        }
        offset_bytes += len as u64;
    }
    if let Plain::File(file) = file {
        drop_cached(file, extent);
    }
    Ok(())
}

fn drop_cached(file: &File, extent: &Extent) {
    let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    let (offset, len) = (extent.offset_bytes as i64, extent.len_bytes as i64);
    if let Err(errno) = posix_fadvise(file, offset, len, advice) {
        log::debug!("drop cached pages: {errno}");
    }
}
