//! Everything flea would like to find on a machine, looked at one by one: what was found, whether it will do, and what
//! would mend it. A fallback that flea takes silently is a defect; here it is said before anything is run.
//!
//! Invariants: nothing is changed and nothing of the machine is written to but a scratch file without a name; a look that
//! fails is a finding and not an end. Place: beside the pipeline; it asks the rooms that the pipeline is made of.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::io::profile::{self, Device, Found};
use crate::io::{AlignedMemory, Reader, ReaderKind, ReaderOptions, ShardFile};
use crate::mem::gpu::{self, Gpu};
use crate::mem::{Topology, limits};
use crate::units::{GIB, HumanBytes, MIB, PAGE_2M};

/// Linux that flea needs at all: mremap with MREMAP_DONTUNMAP.
const KERNEL_NEEDED: (u32, u32) = (5, 7);
/// Linux with everything flea uses: MADV_POPULATE_WRITE (5.14), io_uring with single issuers (6.0).
const KERNEL_WISHED: (u32, u32) = (6, 0);
/// Less memory than this leaves little for any model.
const MEMORY_WISHED_BYTES: u64 = 2 * GIB;
/// Read from the scratch file.
const SCRATCH_BYTES: usize = MIB as usize;

/// What a finding means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Pass,
    /// flea runs, but slower or with a fallback.
    Warn,
    /// flea does not run.
    Fail,
}

impl Verdict {
    /// As it is printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// One precondition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// Whether it will do.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What would mend it; `None` when nothing needs mending.
    pub remedy: Option<String>,
}

impl Finding {
    fn pass(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Pass,
            found: found.into(),
            remedy: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Warn,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Fail,
            ..Self::warn(name, found, remedy)
        }
    }
}

/// Looks at everything that matters for models at `path`: a model file, or a directory of models.
#[must_use]
pub fn examine(path: &Path) -> Vec<Finding> {
    let mut findings = vec![
        kernel(),
        processor(),
        memory(),
        address_space(),
        overcommit(),
    ];
    findings.push(huge_pages());
    findings.push(reserved_pages());
    findings.push(locked_memory());
    findings.push(nodes());
    match Stand::new(path) {
        Ok(stand) => {
            findings.push(direct_io(&stand.file));
            findings.push(ring(stand));
            findings.push(drive_profile(path));
        }
        Err(error) => findings.push(Finding::fail(
            "path",
            error.to_string(),
            "name a model or a directory that can be read",
        )),
    }
    findings.push(gpu(Path::new("/")));
    findings.push(gpu_direct_storage(Path::new("/")));
    findings
}

fn kernel() -> Finding {
    let text = read("/proc/sys/kernel/osrelease");
    judge_kernel(text.trim())
}

fn judge_kernel(release: &str) -> Finding {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("Linux {release}");
    if version < KERNEL_NEEDED {
        Finding::fail("kernel", found, "Linux 5.7 or later is needed")
    } else if version < KERNEL_WISHED {
        let remedy =
            "Linux 6.0 or later fills memory ahead of the drive and has the faster io_uring";
        Finding::warn("kernel", found, remedy)
    } else {
        Finding::pass("kernel", found)
    }
}

fn processor() -> Finding {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let found = format!("{count} threads, {}", features().join(" "));
    if count > 1 {
        Finding::pass("processor", found)
    } else {
        let remedy = "with one core, reading and computing take turns";
        Finding::warn("processor", found, remedy)
    }
}

/// The vector instructions that llama.cpp's kernels make the most of.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    let known = [
        ("AVX2", std::is_x86_feature_detected!("avx2")),
        ("AVX-512", std::is_x86_feature_detected!("avx512f")),
        ("VNNI", std::is_x86_feature_detected!("avx512vnni")),
    ];
    known
        .into_iter()
        .filter_map(|(name, has)| has.then_some(name))
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}

fn memory() -> Finding {
    match limits::free_memory() {
        Err(error) => Finding::fail("memory", error.to_string(), "mount /proc"),
        Ok(free) => {
            let found = format!("{} free, set by {}", HumanBytes(free.bytes), free.set_by);
            if free.bytes >= MEMORY_WISHED_BYTES {
                Finding::pass("memory", found)
            } else {
                let remedy = "end what holds memory, or raise the limit of the control group";
                Finding::warn("memory", found, remedy)
            }
        }
    }
}

/// Windows reserve as much address space as the model is long.
fn address_space() -> Finding {
    let name = "address space";
    match getrlimit(Resource::RLIMIT_AS) {
        Ok((limit, _)) if limit == nix::libc::RLIM_INFINITY => Finding::pass(name, "no limit"),
        Ok((limit, _)) => Finding::fail(
            name,
            format!("limited to {}", HumanBytes(limit)),
            "a window is as long as the model, though little of it is memory: ulimit -v unlimited",
        ),
        Err(errno) => Finding::warn(name, errno.to_string(), "ulimit -v unlimited"),
    }
}

fn overcommit() -> Finding {
    let mode = read("/proc/sys/vm/overcommit_memory");
    if mode.trim() == "2" {
        return Finding::fail(
            "overcommit",
            "vm.overcommit_memory is 2: reservations without memory are refused",
            "sysctl -w vm.overcommit_memory=0",
        );
    }
    Finding::pass("overcommit", format!("mode {}", mode.trim()))
}

fn huge_pages() -> Finding {
    let name = "huge pages";
    let share = AlignedMemory::new(4 * PAGE_2M, PAGE_2M)
        .ok()
        .and_then(|memory| memory.huge_page_share())
        .unwrap_or(0.0);
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let found = format!(
        "{:.0} % of a test were 2 MiB pages (transparent: {})",
        share * 100.0,
        setting.trim()
    );
    if share >= 0.99 {
        return Finding::pass(name, found);
    }
    let remedy = "reads into 4 KiB pages take several times the processor time and can halve the rate: \
                  echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; after that, free memory may be too scattered";
    Finding::warn(name, found, remedy)
}

/// Only pools that several programs share take these.
fn reserved_pages() -> Finding {
    let text = read("/proc/meminfo");
    let count = |key: &str| -> u64 {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
            .unwrap_or(0)
    };
    let (free, total) = (count("HugePages_Free:"), count("HugePages_Total:"));
    let found = format!("{free} of {total} reserved pages of 2 MiB are free");
    if free > 0 {
        return Finding::pass("shared pools", found);
    }
    let remedy = "only flead needs them: sysctl -w vm.nr_hugepages=N, N x 2 MiB being its pool; else it takes a tmpfs with huge=always, or small pages";
    Finding::warn("shared pools", found, remedy)
}

fn locked_memory() -> Finding {
    let name = "locked memory";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((limit, _)) if limit == nix::libc::RLIM_INFINITY => Finding::pass(name, "no limit"),
        Ok((limit, _)) if nix::unistd::geteuid().is_root() => Finding::pass(
            name,
            format!("{} for others, root has no limit", HumanBytes(limit)),
        ),
        Ok((limit, _)) => Finding::warn(
            name,
            format!("limited to {}", HumanBytes(limit)),
            "flead registers its pool only with LimitMEMLOCK=infinity; it reads without otherwise, as `flea run` does",
        ),
        Err(errno) => Finding::warn(name, errno.to_string(), "ulimit -l unlimited"),
    }
}

fn nodes() -> Finding {
    match Topology::detect() {
        Ok(topology) => {
            let plural = if topology.node_count() == 1 { "" } else { "s" };
            Finding::pass("NUMA", format!("{} node{plural}", topology.node_count()))
        }
        Err(error) => Finding::warn(
            "NUMA",
            error.to_string(),
            "memory is taken from any node, and the reader is not pinned",
        ),
    }
}

/// A file on the drive that is looked at.
struct Stand {
    file: ShardFile,
    /// Keeps a file without a name alive.
    _scratch: Option<File>,
}

impl Stand {
    fn new(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Ok(Self {
                file: ShardFile::open(path)?,
                _scratch: None,
            });
        }
        if let Some(model) = model_in(path) {
            return Ok(Self {
                file: ShardFile::open(&model)?,
                _scratch: None,
            });
        }
        let failed = |error: std::io::Error| {
            Error::from_io(
                &error,
                format_args!(
                    "no model in {}, and no scratch file can be written there",
                    path.display()
                ),
            )
        };
        let mut scratch = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_TMPFILE)
            .open(path)
            .map_err(failed)?;
        scratch
            .write_all(&vec![0x5a; SCRATCH_BYTES])
            .map_err(failed)?;
        let nameless = PathBuf::from(format!("/proc/self/fd/{}", scratch.as_raw_fd()));
        Ok(Self {
            file: ShardFile::open(&nameless)?,
            _scratch: Some(scratch),
        })
    }
}

/// Any model in a directory: reading one says more than a scratch file does.
fn model_in(directory: &Path) -> Option<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "gguf" || extension == "safetensors")
        })
        .collect();
    paths.sort();
    paths.into_iter().next()
}

fn direct_io(file: &ShardFile) -> Finding {
    let found = format!("{}, {}", file.filesystem(), file.direct());
    match file.direct().fallback() {
        None => Finding::pass("O_DIRECT", found),
        Some(_) => Finding::warn(
            "O_DIRECT",
            found,
            "reads go through the page cache and cost a copy: keep models on ext4 or xfs",
        ),
    }
}

fn ring(stand: Stand) -> Finding {
    let files: Arc<[ShardFile]> = Arc::new([stand.file]);
    let options = ReaderOptions {
        kind: ReaderKind::IoUring,
        ..ReaderOptions::default()
    };
    match Reader::new(files, &options) {
        Ok(reader) => Finding::pass(
            "io_uring",
            format!(
                "{} of {} in flight",
                reader.free(),
                HumanBytes(u64::from(reader.request_bytes()))
            ),
        ),
        Err(error) => Finding::warn(
            "io_uring",
            error.to_string(),
            "threads with pread do the work instead; sysctl -w kernel.io_uring_disabled=0, or allow io_uring_setup, _enter \
             and _register in the container's seccomp profile",
        ),
    }
}

fn drive_profile(path: &Path) -> Finding {
    let name = "drive profile";
    let remedy = format!("flea probe {}", path.display());
    match Device::of_path(path) {
        Err(error) => Finding::warn(name, error.to_string(), remedy),
        Ok(device) => match profile::find(&device) {
            found @ Found::Measured(_) => Finding::pass(name, found.to_string()),
            found => Finding::warn(name, found.to_string(), remedy),
        },
    }
}

fn gpu(root: &Path) -> Finding {
    let kernel = kernel_driver(root);
    judge_gpu(gpu::gpus(), kernel.as_deref(), gpu::driver_is_there())
}

/// What the kernel's part of NVIDIA's driver says of itself.
fn kernel_driver(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok()?;
    text.lines().next().map(str::to_owned)
}

/// `kernel` is what the kernel's part of the driver says of itself, `library` whether the CUDA driver can be loaded.
fn judge_gpu(found: Result<Vec<Gpu>>, kernel: Option<&str>, library: bool) -> Finding {
    let name = "GPU";
    match found {
        Ok(gpus) => {
            let list: Vec<String> = gpus.iter().map(Gpu::to_string).collect();
            match gpus.iter().find(|gpu| !gpu.maps_memory) {
                None => Finding::pass(name, list.join("; ")),
                Some(gpu) => Finding::warn(
                    name,
                    list.join("; "),
                    format!(
                        "GPU {} cannot map memory at chosen addresses: weights stay in host memory",
                        gpu.index
                    ),
                ),
            }
        }
        // Nobody misses what is not there.
        Err(_) if kernel.is_none() && !library => {
            Finding::pass(name, "no CUDA driver: weights stay in host memory")
        }
        Err(error) => Finding::warn(
            name,
            kernel.unwrap_or("the CUDA driver does not work"),
            error.context(),
        ),
    }
}

fn gpu_direct_storage(root: &Path) -> Finding {
    let found = if root.join("proc/driver/nvidia-fs").exists() {
        "nvidia-fs is loaded"
    } else {
        "no nvidia-fs: reads go through host memory"
    };
    Finding::pass("GPUDirect Storage", found)
}

/// A file of /proc or /sys; empty where it is not there.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_their_numbers() {
        let verdict = |release| judge_kernel(release).verdict;
        assert_eq!(verdict("5.4.0-150-generic"), Verdict::Fail);
        assert_eq!(verdict("5.10.0-21-amd64"), Verdict::Warn);
        assert_eq!(verdict("6.1.0-18-amd64"), Verdict::Pass);
        assert_eq!(verdict("10.0"), Verdict::Pass);
        assert_eq!(verdict("?"), Verdict::Fail);
    }

    #[test]
    fn a_gpu_that_cannot_be_used_is_a_warning_and_none_is_nothing() {
        let refused = || Err(Error::new(crate::error::ErrorKind::Unsupported, "too old"));
        let gpu = Gpu {
            index: 0,
            name: "A".to_owned(),
            total_bytes: GIB,
            free_bytes: MIB,
            driver: "13.0".to_owned(),
            capability: (9, 0),
            maps_memory: true,
        };
        let fine = judge_gpu(Ok(vec![gpu.clone()]), None, true);
        assert_eq!(fine.verdict, Verdict::Pass);
        assert!(fine.found.contains("1.0 MiB free"), "{}", fine.found);
        let rigid = Gpu {
            maps_memory: false,
            ..gpu
        };
        assert_eq!(
            judge_gpu(Ok(vec![rigid]), None, true).verdict,
            Verdict::Warn
        );
        let none = judge_gpu(refused(), None, false);
        assert_eq!(none.verdict, Verdict::Pass);
        assert!(none.found.starts_with("no CUDA driver"));
        let old = judge_gpu(refused(), None, true);
        assert_eq!(
            (old.verdict, old.remedy.as_deref()),
            (Verdict::Warn, Some("too old"))
        );
        assert_eq!(
            judge_gpu(refused(), Some("NVRM 470"), false).found,
            "NVRM 470"
        );
    }

    #[test]
    fn every_finding_that_is_no_pass_says_what_would_mend_it() {
        let directory = tempfile::tempdir().unwrap();
        let findings = examine(directory.path());
        for name in [
            "kernel",
            "memory",
            "huge pages",
            "O_DIRECT",
            "io_uring",
            "GPU",
        ] {
            assert!(
                findings.iter().any(|finding| finding.name == name),
                "{name}"
            );
        }
        for finding in &findings {
            assert_eq!(
                finding.verdict == Verdict::Pass,
                finding.remedy.is_none(),
                "{finding:?}"
            );
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_path_that_is_not_there_is_a_finding() {
        let findings = examine(Path::new("/nowhere/model.gguf"));
        let path = findings.iter().find(|finding| finding.name == "path");
        let path = path.expect("a finding about the path");
        assert_eq!(path.verdict, Verdict::Fail);
        assert!(path.found.contains("/nowhere/model.gguf"), "{}", path.found);
    }

    #[test]
    fn a_driver_is_seen() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(kernel_driver(root.path()), None);
        let driver = root.path().join("proc/driver/nvidia");
        fs::create_dir_all(&driver).unwrap();
        fs::write(driver.join("version"), "NVRM version: 580.1\nGCC\n").unwrap();
        let found = kernel_driver(root.path());
        assert_eq!(found.as_deref(), Some("NVRM version: 580.1"));
        fs::create_dir_all(root.path().join("proc/driver/nvidia-fs")).unwrap();
        assert!(gpu_direct_storage(root.path()).found.contains("loaded"));
    }
}
