//! The profile of a drive: what `flea probe` measured, kept in a cache, looked up by everybody who reads from that drive.
//!
//! It answers two questions: how to read (request length and depth for a page size) and how fast that is. Invariants: a
//! profile is used only for the drive it was measured on (device number, model, serial, size and filesystem all agree: a
//! number alone follows the order in which drives are found) and only when every number in it could be true; anything else
//! is the built-in defaults, and says so. A profile is written whole
//! or not at all. Place: beside `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::filesystem::Filesystem;
use super::{DEPTH_MOST, ShardFile};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{MIB, PAGE_4K};

/// Of the format below. Another number is another format: the profile is measured again.
pub const VERSION: u32 = 1;
/// A directory to keep profiles in instead of the user's cache; [`NO_PROFILES`] turns them off.
pub const VARIABLE: &str = "FLEA_PROFILE";
/// The value of [`VARIABLE`] that stands for no directory at all.
pub const NO_PROFILES: &str = "none";
/// Longest request believed.
const REQUEST_BYTES_MAX: u32 = (64 * MIB) as u32;
/// Fastest drive and memory believed, GB/s: ten times what a machine of today has.
const RATE_MAX: f64 = 100_000.0;
/// Random reads from this length on are as experts are read.
const EXPERT_BYTES: u32 = MIB as u32;
/// What the kernel counts a drive's size in, whatever its own sectors are.
const SECTOR_BYTES: u64 = 512;
/// Longest file that is taken for a profile.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What was measured on one drive of one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// [`VERSION`].
    pub version: u32,
    /// When, as people write it (UTC).
    pub measured: String,
    /// Which drive.
    pub device: Device,
    /// Which reader measured.
    pub reader: String,
    /// Whether the page cache was out of it.
    pub direct_io: String,
    /// The best way to read sequentially, per page size.
    pub sequential: Vec<Rate>,
    /// Requests all over the file.
    pub random: Vec<Rate>,
    /// The rate over a longer time.
    pub sustained: Option<Sustained>,
    /// The machine's memory.
    pub memory: Option<Memory>,
    /// Into the memory of each GPU; empty without one, and in a build without CUDA.
    #[serde(default)]
    pub links: Vec<Link>,
    /// How fast weights of a type are computed with, from memory, by all cores; empty in a build without llama.cpp.
    #[serde(default)]
    pub compute: Vec<Compute>,
    /// What one operation costs beside its bytes, seconds; 0 where it was not measured.
    #[serde(default)]
    pub node_seconds: f64,
}

/// Which drive: all of it must agree for a profile to count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The kernel's number.
    pub major: u32,
    /// The kernel's number.
    pub minor: u32,
    /// Its model, where the drive says it.
    pub model: Option<String>,
    /// Its serial number, where the drive says it and we may read it.
    pub serial: Option<String>,
    /// The filesystem on it.
    pub filesystem: String,
    /// How long the whole drive is, where it is a drive.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// What tells that filesystem from others, where it says that: `f_fsid`, in hexadecimal.
    #[serde(default)]
    pub filesystem_id: Option<String>,
}

/// A way to read, and how fast it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Page size of the memory that was read into.
    pub page_bytes: u64,
    /// Length of a request.
    pub request_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
    /// 10^9 bytes per second: the median of the rounds.
    pub gb_per_second: f64,
    /// (largest - smallest) / median of the middle rounds.
    pub spread: f64,
    /// CPU seconds per 10^9 bytes.
    pub cpu_seconds_per_gb: f64,
}

/// The rate over a longer time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sustained {
    /// How long.
    pub seconds: f64,
    /// GB/s in the first tenth.
    pub first_gb_per_second: f64,
    /// GB/s in the last tenth.
    pub last_gb_per_second: f64,
    /// GB/s in the slowest second.
    pub slowest_gb_per_second: f64,
}

/// Memory bandwidth, 10^9 bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Cores that were used for "all".
    pub cores: u32,
    /// Reading, one core.
    pub read_one_gb_per_second: f64,
    /// Reading, all cores.
    pub read_all_gb_per_second: f64,
    /// Copying, one core; bytes copied, not bytes moved twice.
    pub copy_one_gb_per_second: f64,
    /// Copying, all cores.
    pub copy_all_gb_per_second: f64,
}

/// The link from pinned memory into a GPU's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// What its maker calls the GPU.
    pub gpu: String,
    /// Its number.
    pub gpu_index: u32,
    /// 10^9 bytes per second.
    pub gb_per_second: f64,
}

/// How fast weights of one type are multiplied with one token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compute {
    /// The type's name: `q4_K`.
    pub dtype: String,
    /// Threads.
    pub threads: u32,
    /// 10^9 bytes of weights per second.
    pub gb_per_second: f64,
}

impl Profile {
    /// The way to read into pages of this size.
    #[must_use]
    pub fn sequential(&self, page_bytes: u64) -> Option<&Rate> {
        self.sequential
            .iter()
            .find(|rate| rate.page_bytes == page_bytes)
    }

    /// What to expect of the drive when it streams for long: the best sequential rate, less what it loses when it gets
    /// warm.
    #[must_use]
    pub fn stream_gb_per_second(&self, page_bytes: u64) -> Option<f64> {
        let rate = self.sequential(page_bytes)?.gb_per_second;
        let lasting = self.sustained.map_or(1.0, |sustained| sustained.lasting());
        Some(rate * lasting)
    }

    /// What to expect of the drive for experts, read from all over it: its rate with several reads of a MiB in flight,
    /// less what it loses when it gets warm.
    #[must_use]
    pub fn expert_gb_per_second(&self) -> Option<f64> {
        let long = self.random.iter();
        let long = long.filter(|rate| rate.request_bytes >= EXPERT_BYTES);
        let rate = long.max_by_key(|rate| rate.depth)?.gb_per_second;
        let lasting = self.sustained.map_or(1.0, |sustained| sustained.lasting());
        Some(rate * lasting)
    }

    /// What one read takes beside its bytes, seconds: what a short one alone takes, less its bytes at the rate of long ones.
    #[must_use]
    pub fn read_latency_seconds(&self) -> Option<f64> {
        let alone = self.random.iter().filter(|rate| rate.depth == 1);
        let short = alone.min_by_key(|rate| rate.request_bytes)?;
        let bytes = f64::from(short.request_bytes);
        let of_bytes = bytes / (self.expert_gb_per_second()? * 1e9);
        Some((bytes / (short.gb_per_second * 1e9) - of_bytes).max(0.0))
    }

    /// Into the memory of a GPU.
    #[must_use]
    pub fn link_gb_per_second(&self, gpu_index: u32) -> Option<f64> {
        let link = self.links.iter().find(|link| link.gpu_index == gpu_index)?;
        Some(link.gb_per_second)
    }

    /// Whether every number could be true.
    fn check(&self) -> std::result::Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "it has version {}, this flea writes {VERSION}",
                self.version
            ));
        }
        let rates = self.sequential.iter().chain(&self.random);
        for rate in rates {
            let request = u64::from(rate.request_bytes);
            let sane = request >= PAGE_4K
                && request.is_multiple_of(PAGE_4K)
                && rate.request_bytes <= REQUEST_BYTES_MAX
                && (1..=DEPTH_MOST).contains(&rate.depth)
                && is_rate(rate.gb_per_second);
            if !sane {
                return Err(format!("it holds an impossible rate: {rate:?}"));
            }
        }
        let memory = self.memory.iter().flat_map(|memory| {
            [
                memory.read_one_gb_per_second,
                memory.read_all_gb_per_second,
                memory.copy_one_gb_per_second,
                memory.copy_all_gb_per_second,
            ]
        });
        let compute = self.compute.iter().map(|compute| compute.gb_per_second);
        let links = self.links.iter().map(|link| link.gb_per_second);
        let sustained = self
            .sustained
            .iter()
            .flat_map(|sustained| [sustained.first_gb_per_second, sustained.last_gb_per_second]);
        if !(0.0..1.0).contains(&self.node_seconds) {
            return Err(format!(
                "it holds an impossible time: {}",
                self.node_seconds
            ));
        }
        match memory
            .chain(compute)
            .chain(links)
            .chain(sustained)
            .find(|&rate| !is_rate(rate))
        {
            Some(rate) => Err(format!("it holds an impossible rate: {rate}")),
            None => Ok(()),
        }
    }

    /// Reads the profile in a file: one that `flea probe` kept, wherever it lies now.
    ///
    /// # Errors
    /// What reading the file gives; `Invalid` for what is no profile, or holds numbers that cannot be.
    pub fn load(path: &Path) -> Result<Self> {
        let invalid =
            |what: String| Error::new(ErrorKind::Invalid, format!("{}: {what}", path.display()));
        let failed =
            |error: std::io::Error| Error::from_io(&error, format_args!("read {}", path.display()));
        let metadata = fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
            return Err(invalid("it is no profile".to_owned()));
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        let profile: Self = serde_json::from_str(&text)
            .map_err(|error| invalid(format!("it is no profile of `flea probe`: {error}")))?;
        profile.check().map_err(invalid)?;
        Ok(profile)
    }

    /// Writes the profile where [`find`] looks for it, replacing an older one.
    ///
    /// # Errors
    /// `Invalid` when there is no place for profiles; what creating and writing the file gives.
    pub fn save(&self) -> Result<PathBuf> {
        let directory = directory().ok_or_else(no_directory)?;
        self.save_in(&directory)
    }

    fn save_in(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join(self.device.file_name());
        let failed = |error: std::io::Error| {
            Error::from_io(&error, format_args!("write {}", path.display()))
        };
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::new(ErrorKind::Internal, format!("encode JSON: {error}")))?;
        fs::create_dir_all(directory).map_err(failed)?;
        let temporary = path.with_extension(format!("json.{}", std::process::id()));
        let written =
            write_whole(&temporary, text.as_bytes()).and_then(|()| fs::rename(&temporary, &path));
        if let Err(error) = written {
            // The half file is nobody's; that it cannot be removed either is the smaller trouble.
            let _ = fs::remove_file(&temporary);
            return Err(failed(error));
        }
        Ok(path)
    }
}

impl Sustained {
    /// What is left of the first rate at the end; at most 1.
    #[must_use]
    pub fn lasting(&self) -> f64 {
        (self.last_gb_per_second / self.first_gb_per_second).clamp(0.0, 1.0)
    }
}

fn is_rate(rate: f64) -> bool {
    rate > 0.0 && rate < RATE_MAX
}

fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn no_directory() -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!(
            "no place to keep a profile in: {VARIABLE} is '{NO_PROFILES}', or neither {VARIABLE}, XDG_CACHE_HOME nor HOME is set"
        ),
    )
}

/// Where profiles are kept; `None` where there is no such place.
#[must_use]
pub fn directory() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    directory_of(
        variable(VARIABLE),
        variable("XDG_CACHE_HOME"),
        variable("HOME"),
    )
}

fn directory_of(
    named: Option<OsString>,
    cache: Option<OsString>,
    home: Option<OsString>,
) -> Option<PathBuf> {
    match named {
        Some(named) if named == NO_PROFILES => None,
        Some(named) => Some(PathBuf::from(named)),
        None => {
            let cache = cache.map(PathBuf::from);
            let cache = cache.filter(|path| path.is_absolute());
            let cache = cache.or_else(|| Some(PathBuf::from(home?).join(".cache")));
            Some(cache?.join("flea"))
        }
    }
}

impl Device {
    /// The drive that a file or directory lies on.
    ///
    /// # Errors
    /// The file cannot be opened or looked at.
    pub fn of_path(path: &Path) -> Result<Self> {
        let failed =
            |error: std::io::Error| Error::from_io(&error, format_args!("open {}", path.display()));
        let file = File::open(path).map_err(failed)?;
        let device = file.metadata().map_err(failed)?.dev();
        let numbers = (libc::major(device), libc::minor(device));
        let Filesystem { name, id, .. } = Filesystem::of(&file);
        Ok(Self::of_numbers(numbers, (name, id), Path::new("/")))
    }

    /// The drive that a shard lies on.
    #[must_use]
    pub fn of_shard(file: &ShardFile) -> Self {
        let device = file.identity().device;
        let numbers = (libc::major(device), libc::minor(device));
        let filesystem = (file.filesystem(), file.filesystem_id());
        Self::of_numbers(numbers, filesystem, Path::new("/"))
    }

    /// `filesystem`: its name, and its number where it has one.
    fn of_numbers(numbers: (u32, u32), filesystem: (&str, Option<u64>), root: &Path) -> Self {
        // btrfs and overlayfs invent a number; the mount table names the drive below.
        let (major, minor) = match numbers {
            (0, minor) => mounted_on(root, minor).unwrap_or(numbers),
            numbers => numbers,
        };
        let block = root.join(format!("sys/dev/block/{major}:{minor}"));
        let mut block = block.canonicalize().unwrap_or(block);
        if block.join("partition").exists() {
            block.pop();
        }
        let text = |names: &[&str]| {
            let texts = names
                .iter()
                .filter_map(|name| fs::read_to_string(block.join(name)).ok());
            let mut texts = texts.map(|text| text.trim().to_owned());
            texts.find(|text| !text.is_empty())
        };
        Self {
            major,
            minor,
            model: text(&["device/model", "dm/name", "md/uuid", "loop/backing_file"]),
            serial: text(&["device/serial", "serial", "dm/uuid", "wwid"]),
            filesystem: filesystem.0.to_owned(),
            size_bytes: text(&["size"])
                .and_then(|sectors| sectors.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)),
            filesystem_id: filesystem.1.map(|id| format!("{id:x}")),
        }
    }

    /// Whether it is known by its number and names alone, as in profiles of the first form.
    const fn is_vague(&self) -> bool {
        self.size_bytes.is_none() && self.filesystem_id.is_none()
    }

    /// One file per drive, with a name that a person can place.
    fn file_name(&self) -> String {
        let mut name = format!("drive-{}-{}-{}", self.major, self.minor, self.filesystem);
        for part in [&self.model, &self.serial].into_iter().flatten() {
            name = name + "-" + part;
        }
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        };
        let mut name: String = name.chars().map(plain).take(200).collect();
        name.push_str(".json");
        name
    }
}

/// The block device that anonymous device 0:`minor` is mounted from.
fn mounted_on(root: &Path, minor: u32) -> Option<(u32, u32)> {
    let table = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    let number = format!("0:{minor}");
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(number.as_str()))?;
    let source = line.split(" - ").nth(1)?.split(' ').nth(1)?;
    let device = fs::metadata(source.starts_with("/dev/").then_some(source)?)
        .ok()?
        .rdev();
    (device != 0).then(|| (libc::major(device), libc::minor(device)))
}

/// What is known about a drive.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// It was measured.
    Measured(Box<Profile>),
    /// It was not, or profiles are off.
    Nothing,
    /// There is a profile, but not one to trust; why.
    Damaged(String),
}

impl Found {
    /// The profile, if there is one to trust.
    #[must_use]
    pub fn profile(&self) -> Option<&Profile> {
        match self {
            Self::Measured(profile) => Some(profile),
            Self::Nothing | Self::Damaged(_) => None,
        }
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Measured(profile) => write!(f, "measured {}", profile.measured),
            Self::Nothing => f.write_str("none, built-in defaults"),
            Self::Damaged(reason) => write!(f, "not used, built-in defaults: {reason}"),
        }
    }
}

/// Looks up the profile of a drive.
#[must_use]
pub fn find(device: &Device) -> Found {
    directory().map_or(Found::Nothing, |directory| find_in(&directory, device))
}

fn find_in(directory: &Path, device: &Device) -> Found {
    let path = directory.join(device.file_name());
    let damaged = |reason: String| {
        Found::Damaged(format!(
            "{}: {reason}; run `flea probe` again",
            path.display()
        ))
    };
    match fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Found::Nothing,
        Err(error) => return damaged(error.to_string()),
        Ok(metadata) if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX => {
            return damaged("it is no profile".to_owned());
        }
        Ok(_) => {}
    }
    let read = fs::read_to_string(&path).map_err(|error| error.to_string());
    let parsed = read
        .and_then(|text| serde_json::from_str::<Profile>(&text).map_err(|error| error.to_string()));
    match parsed.and_then(|profile| profile.check().map(|()| profile)) {
        Err(reason) => damaged(reason),
        Ok(profile) if profile.device == *device => Found::Measured(Box::new(profile)),
        Ok(profile) if profile.device.is_vague() => {
            damaged("it is of an older form, which does not say how large its drive is".to_owned())
        }
        Ok(_) => damaged("it was measured on another drive".to_owned()),
    }
}

#[cfg(test)]
#[path = "profile_tests.rs"]
mod tests;
