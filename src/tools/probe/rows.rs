//! The mmap question answered: what rows of a table cost when the table is not in memory, by mmap and by flea's row
//! reader, on the same rows.
//!
//! Embeddings of hundreds of MB are said to need no memory because mmap brings in what is used. Whether that is fast
//! depends on how cold is made: MADV_DONTNEED on a fresh mapping drops nothing from the page cache and measures memory.
//! Here every round begins with posix_fadvise(DONTNEED) on a file that nobody maps, mincore has to agree that no page
//! is left, and a round in which mmap brings rows without a byte from the drive is an error. A round ends before
//! read-ahead has brought in much of the table, because what follows would be warm again.
//!
//! Invariants: a file that was given is only read; a directory gets a nameless file; both ways read the same rows, and
//! what they read is compared. Place: a tool beside the pipeline; it uses `file` and the row reader.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use super::check_stop;
use crate::engine::read_catalog;
use crate::error::{Error, ErrorKind, Result};
use crate::io::cached::{cached_bytes, make_cold};
use crate::io::mapped::Mapped;
use crate::io::rows::{RowCounters, RowOptions, RowReader, RowTable};
use crate::io::{ReaderKind, ShardFile};
use crate::mem::limits::{forget_resident_peak, resident_peak_bytes};
use crate::tools::raw::open_target;
use crate::tools::suite::machine::queue_of;
use crate::tools::synth::blocks::Random;

/// Tokens of a prompt that are looked up in one call.
const PREFILL_TOKENS: u32 = 512;
/// Tokens of a long prompt of any words.
const PROMPT_TOKENS: u32 = 4096;
/// Sequences that are decoded at a time where that is the case.
pub const BATCH_TOKENS: u32 = 64;
/// A cold round ends when this share of the table has been brought in.
const ROUND_SHARE: u64 = 8;

/// What to measure on.
#[derive(Debug, Clone)]
pub struct RowsOptions {
    /// A file, only read, or a directory for a temporary table.
    pub path: PathBuf,
    /// Length of the temporary table.
    pub synth_bytes: u64,
    /// Length of a row where the file does not say.
    pub row_bytes: u64,
    /// Layers of the table: a row has a slice for each.
    pub slices: u32,
    /// Time for each case.
    pub span: Duration,
    /// What the row reader may hold.
    pub rows: RowOptions,
    /// Where the choice of rows comes from.
    pub seed: u64,
}

/// Which rows, and how many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Rows one behind the other, a prompt of 512 at once.
    Prefill,
    /// 4096 rows anywhere at once: a long prompt of any words. What the drive gives at the reader's depth.
    Prompt,
    /// One row anywhere: a token of one sequence.
    Decode,
    /// 64 rows anywhere: a token of each of 64 sequences.
    DecodeBatch,
    /// Slices anywhere, as many as layers, each from a row of its own and not at its start.
    Scatter,
}

impl Access {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Prefill,
        Self::Prompt,
        Self::Decode,
        Self::DecodeBatch,
        Self::Scatter,
    ];

    /// The name in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Prompt => "prompt",
            Self::Decode => "decode",
            Self::DecodeBatch => "decode_batch",
            Self::Scatter => "scatter",
        }
    }

    const fn tokens(self) -> u32 {
        match self {
            Self::Prefill => PREFILL_TOKENS,
            Self::Prompt => PROMPT_TOKENS,
            Self::Decode | Self::Scatter => 1,
            Self::DecodeBatch => BATCH_TOKENS,
        }
    }
}

/// Who brings the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A mapping as it is.
    Mmap,
    /// A mapping with MADV_RANDOM.
    MmapRandom,
    /// flea's row reader.
    Flea,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Mmap, Self::MmapRandom, Self::Flea];

    /// The name in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mmap => "mmap",
            Self::MmapRandom => "mmap_random",
            Self::Flea => "flea",
        }
    }
}

/// One measured case.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Which rows.
    pub access: Access,
    /// By whom.
    pub way: Way,
    /// Tokens whose rows arrived.
    pub tokens: u64,
    /// Time for them: the calls alone.
    pub seconds: f64,
    /// Bytes of rows, without what was read around them.
    pub row_bytes: u64,
    /// Bytes the drive was asked for, as the kernel counts.
    pub drive_bytes: u64,
    /// Time of a call, half of the calls took no longer.
    pub p50_ns: u64,
    /// Time of a call that one of a hundred exceeds.
    pub p99_ns: u64,
    /// Faults that had to wait for the drive. Not all are counted: one fault can bring in all that a round reads, and
    /// the kernel has been seen to count none then.
    pub major_faults: u64,
    /// Rounds, each begun with nothing of the table in the page cache.
    pub cold_rounds: u64,
    /// The most pages the process had mapped beyond what it had before the case, file pages as well.
    pub resident_bytes: u64,
    /// What the page cache held of the table when it was at its fullest.
    pub page_cache_bytes: u64,
    /// What the row reader counted.
    pub counters: Option<RowCounters>,
}

impl Case {
    /// Tokens per second.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }

    /// 10^6 bytes of rows per second.
    #[must_use]
    pub fn mb_per_second(&self) -> f64 {
        self.row_bytes as f64 / 1e6 / self.seconds.max(1e-9)
    }
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct RowsReport {
    /// The file with the table; for a temporary one the directory.
    pub path: PathBuf,
    /// Whether it was written for the purpose.
    pub temporary: bool,
    /// The tensor, where the file is a model.
    pub tensor: Option<String>,
    /// The table.
    pub table: RowTable,
    /// Slices of a row.
    pub slices: u32,
    /// The filesystem's name.
    pub filesystem: &'static str,
    /// What the kernel reads ahead of a mapping on this drive, in KiB.
    pub read_ahead_kib: Option<u64>,
    /// How the row reader's bytes travel.
    pub direct_io: String,
    /// Which reader it was.
    pub reader: ReaderKind,
    /// Everything that was less than asked for.
    pub fallbacks: Vec<String>,
    /// What the row reader may hold, and holds.
    pub budget_bytes: u64,
    /// See `budget_bytes`.
    pub memory_bytes: u64,
    /// Pages of its cache.
    pub cache_pages: u32,
    /// Every case: each access by each way.
    pub cases: Vec<Case>,
}

impl RowsReport {
    /// The case of an access and a way.
    #[must_use]
    pub fn case(&self, access: Access, way: Way) -> Option<&Case> {
        self.cases
            .iter()
            .find(|c| c.access == access && c.way == way)
    }

    /// How many times as many tokens per second flea has as mmap; `None` where one of them is missing.
    #[must_use]
    pub fn ratio(&self, access: Access, way: Way) -> Option<f64> {
        let mmap = self.case(access, way)?.tokens_per_second();
        Some(self.case(access, Way::Flea)?.tokens_per_second() / mmap.max(1e-9))
    }
}

/// The table, and everything that keeps its file alive.
struct Ground {
    files: Arc<[ShardFile]>,
    path: PathBuf,
    table: RowTable,
    slices: u32,
    tensor: Option<String>,
    temporary: bool,
    _scratch: Option<std::fs::File>,
}

/// Measures every access by every way; `tell` hears what is being done.
///
/// # Errors
/// `Busy` when the table cannot be made cold, `Unsupported` when nothing came from the drive, `Checksum` when
/// the two ways read different bytes, `Canceled`, and what opening and reading give.
pub fn measure(
    options: &RowsOptions,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
) -> Result<RowsReport> {
    tell("preparing the table");
    let ground = Ground::open(options)?;
    compare(&ground, options)?;
    let probe = RowReader::new(Arc::clone(&ground.files), ground.table, &options.rows)?;
    let file = &ground.files[ground.table.shard_index as usize];
    let mut report = RowsReport {
        path: options.path.clone(),
        temporary: ground.temporary,
        tensor: ground.tensor.clone(),
        table: ground.table,
        slices: ground.slices,
        filesystem: file.filesystem(),
        read_ahead_kib: read_ahead_kib(&options.path),
        direct_io: file.direct().to_string(),
        reader: probe.reader_kind(),
        fallbacks: probe.fallbacks(),
        budget_bytes: options.rows.budget_bytes,
        memory_bytes: probe.memory_bytes(),
        cache_pages: probe.cache_pages(),
        cases: Vec::new(),
    };
    drop(probe);
    for access in Access::ALL {
        for way in Way::ALL {
            check_stop(stop)?;
            tell(&format!("{} by {}", access.name(), way.name()));
            report.cases.push(run(&ground, options, access, way, stop)?);
        }
    }
    Ok(report)
}

fn read_ahead_kib(path: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(queue_of(path)?.join("read_ahead_kb")).ok()?;
    text.trim().parse().ok()
}

impl Ground {
    fn open(options: &RowsOptions) -> Result<Self> {
        let is_model = options.path.extension().is_some_and(|e| e == "gguf");
        if is_model {
            return Self::open_model(options);
        }
        let (file, scratch) = open_target(&options.path, options.synth_bytes)?;
        let rows = file.len_bytes() / options.row_bytes.max(1);
        Ok(Self {
            path: file.path().to_path_buf(),
            table: RowTable {
                shard_index: 0,
                offset_bytes: 0,
                row_bytes: options.row_bytes,
                rows_count: u32::try_from(rows).unwrap_or(u32::MAX),
            },
            files: Arc::new([file]),
            slices: options.slices,
            tensor: None,
            temporary: scratch.is_some(),
            _scratch: scratch,
        })
    }

    /// The per-layer embeddings of a model, or its token embeddings where it has none.
    fn open_model(options: &RowsOptions) -> Result<Self> {
        let (catalog, files) = read_catalog(&options.path)?;
        let find = |name: &str| catalog.tensors.iter().find(|t| t.name == name);
        let tensor = find("per_layer_token_embd.weight").or_else(|| find("token_embd.weight"));
        let Some(tensor) = tensor else {
            let context = format!("{}: no table of embeddings in it", options.path.display());
            return Err(Error::new(ErrorKind::NotFound, context));
        };
        let rows = tensor.row_count().max(1);
        let blocks = catalog.layers.len().saturating_sub(1).max(1) as u32;
        let shard_index = tensor.extent.shard_index;
        Ok(Self {
            path: files[shard_index as usize].path().to_path_buf(),
            table: RowTable {
                shard_index,
                offset_bytes: tensor.extent.offset_bytes,
                row_bytes: tensor.extent.len_bytes / rows,
                rows_count: u32::try_from(rows).unwrap_or(u32::MAX),
            },
            slices: if tensor.name.starts_with("per_layer") {
                blocks
            } else {
                1
            },
            tensor: Some(tensor.name.clone()),
            temporary: false,
            files: files.into(),
            _scratch: None,
        })
    }

    /// The table as an access sees it: its rows, or its slices.
    fn table_for(&self, access: Access) -> RowTable {
        let slices = u64::from(self.slices.max(1)).min(self.table.row_bytes);
        if access != Access::Scatter {
            return self.table;
        }
        let row_bytes = self.table.row_bytes / slices;
        let count = u64::from(self.table.rows_count) * self.table.row_bytes / row_bytes;
        RowTable {
            row_bytes,
            rows_count: u32::try_from(count).unwrap_or(u32::MAX),
            ..self.table
        }
    }
}

/// The choice of rows: the same for every way.
struct Ids {
    random: Random,
    next: u32,
    rows_count: u32,
    each: u32,
    sequential: bool,
}

impl Ids {
    fn new(ground: &Ground, access: Access, seed: u64) -> Self {
        let each = match access {
            Access::Scatter => ground.slices.max(1),
            _ => access.tokens(),
        };
        Self {
            random: Random::new(&[seed, each.into()]),
            next: 0,
            rows_count: ground.table_for(access).rows_count,
            each,
            sequential: access == Access::Prefill,
        }
    }

    fn fill(&mut self, ids: &mut Vec<u32>) {
        ids.clear();
        for _ in 0..self.each {
            let any = self.random.below(self.rows_count.into()) as u32; // below 2^32
            let id = if self.sequential { self.next } else { any };
            ids.push(id);
            self.next = (self.next + 1) % self.rows_count;
        }
    }
}

/// Who brings the rows, ready to do so.
enum Source {
    Mapped(Mapped),
    Rows(Box<RowReader>),
}

impl Source {
    fn open(ground: &Ground, options: &RowsOptions, table: RowTable, way: Way) -> Result<Self> {
        Ok(match way {
            Way::Flea => {
                let files = Arc::clone(&ground.files);
                Self::Rows(Box::new(RowReader::new(files, table, &options.rows)?))
            }
            _ => Self::Mapped(Mapped::open(&ground.path, way == Way::MmapRandom)?),
        })
    }

    fn bring(&mut self, table: RowTable, ids: &[u32], out: &mut [u8]) -> Result<()> {
        match self {
            Self::Rows(reader) => reader.read(ids, out),
            Self::Mapped(mapped) => {
                let rows = out.chunks_exact_mut(table.row_bytes as usize);
                for (id, row) in ids.iter().zip(rows) {
                    mapped.copy(table.offset_bytes + u64::from(*id) * table.row_bytes, row)?;
                }
                Ok(())
            }
        }
    }
}

/// Both ways have to bring the same bytes before their speed means anything.
fn compare(ground: &Ground, options: &RowsOptions) -> Result<()> {
    for access in [Access::DecodeBatch, Access::Scatter] {
        let table = ground.table_for(access);
        let mut ids = Vec::new();
        Ids::new(ground, access, options.seed).fill(&mut ids);
        let mut both = [Way::Mmap, Way::Flea].map(|way| {
            let mut out = vec![0; ids.len() * table.row_bytes as usize];
            Source::open(ground, options, table, way)
                .and_then(|mut source| source.bring(table, &ids, &mut out))
                .map(|()| out)
        });
        let [mapped, read] = &mut both;
        let take = |out: &mut Result<Vec<u8>>| std::mem::replace(out, Ok(Vec::new()));
        if take(mapped)? != take(read)? {
            let context = format!("{}: mmap and the row reader differ", ground.path.display());
            return Err(Error::new(ErrorKind::Checksum, context));
        }
    }
    Ok(())
}

/// What the kernel says of this process.
#[derive(Clone, Copy)]
struct Usage {
    drive_bytes: u64,
    major_faults: u64,
}

impl Usage {
    fn now() -> Result<Self> {
        let io = read_text("/proc/self/io")?;
        let bytes = io
            .lines()
            .find_map(|line| line.strip_prefix("read_bytes: "));
        let faults = getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.major_page_faults());
        Ok(Self {
            drive_bytes: bytes.and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            major_faults: u64::try_from(faults).unwrap_or(0),
        })
    }
}

fn read_text(path: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| Error::from_io(&error, path))
}

fn run(
    ground: &Ground,
    options: &RowsOptions,
    access: Access,
    way: Way,
    stop: &AtomicBool,
) -> Result<Case> {
    let table = ground.table_for(access);
    let mut choice = Ids::new(ground, access, options.seed);
    let mut ids = Vec::with_capacity(choice.each as usize);
    // Not zeros: what is not in memory yet would count as the case's.
    let mut out = vec![1; choice.each as usize * table.row_bytes as usize];
    let mut times: Vec<u64> = Vec::new();
    forget_resident_peak()?;
    let resident_before = resident_peak_bytes()?;
    let mut case = Case::new(access, way);
    let round_bytes = u64::from(table.rows_count) * table.row_bytes / ROUND_SHARE;
    let span_ns = options.span.as_nanos() as u64;
    let mut spent_ns = 0;
    while spent_ns < span_ns {
        make_cold(&ground.path)?;
        case.cold_rounds += 1;
        let mut source = Source::open(ground, options, table, way)?;
        let before = Usage::now()?;
        while spent_ns < span_ns {
            check_stop(stop)?;
            choice.fill(&mut ids);
            let start = Instant::now();
            source.bring(table, &ids, &mut out)?;
            let took = start.elapsed().as_nanos() as u64;
            times.push(took);
            spent_ns += took;
            case.tokens += u64::from(access.tokens());
            let brought = Usage::now()?.drive_bytes - before.drive_bytes;
            // What O_DIRECT reads leaves nothing that could make the next row warm.
            if way != Way::Flea && brought >= round_bytes {
                break;
            }
        }
        case.end_round(&source, before, &ground.path)?;
    }
    case.seconds = spent_ns as f64 / 1e9;
    case.row_bytes = times.len() as u64 * out.len() as u64;
    case.resident_bytes = resident_peak_bytes()?.saturating_sub(resident_before);
    times.sort_unstable();
    let at = |share: f64| times[((times.len() as f64 * share) as usize).min(times.len() - 1)];
    (case.p50_ns, case.p99_ns) = (at(0.5), at(0.99));
    Ok(case)
}

impl Case {
    const fn new(access: Access, way: Way) -> Self {
        Self {
            access,
            way,
            tokens: 0,
            seconds: 0.0,
            row_bytes: 0,
            drive_bytes: 0,
            p50_ns: 0,
            p99_ns: 0,
            major_faults: 0,
            cold_rounds: 0,
            resident_bytes: 0,
            page_cache_bytes: 0,
            counters: None,
        }
    }

    fn end_round(&mut self, source: &Source, before: Usage, path: &Path) -> Result<()> {
        let now = Usage::now()?;
        let brought = now.drive_bytes - before.drive_bytes;
        self.require_cold(brought)?;
        self.drive_bytes += brought;
        self.major_faults += now.major_faults - before.major_faults;
        self.page_cache_bytes = self.page_cache_bytes.max(cached_bytes(path)?);
        if let Source::Rows(reader) = source {
            self.counters = Some(reader.counters());
        }
        Ok(())
    }

    /// Rows that arrived without a byte from the drive were in memory, whatever mincore said before the round.
    fn require_cold(&self, brought_bytes: u64) -> Result<()> {
        if brought_bytes > 0 {
            return Ok(());
        }
        let context = format!(
            "{} by {}: no bytes from the drive in round {}: the rows came from memory, so there is no cold figure here \
             (is it a drive of this machine?)",
            self.access.name(),
            self.way.name(),
            self.cold_rounds
        );
        Err(Error::new(ErrorKind::Unsupported, context))
    }
}

#[cfg(test)]
#[path = "rows_tests.rs"]
mod tests;
