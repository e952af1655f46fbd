//! GPUDirect Storage: bytes of files from the drive into VRAM by cuFile, without host memory in between.
//!
//! It is asked for (`reader = gds`), never taken by itself, and believed only after a child process has tried it: cuFile has been
//! seen to spin for ever where there is no driver, and to close descriptors. Its compatibility mode, which copies through
//! host memory slower than flea does, is not GDS and is told. What it reads is compared with the host's own reads first, in
//! the child and then here. The library is looked for at run time, under its only real name, and its numbers are taken as
//! numbers: the bindings know neither. Invariants: offsets, lengths and targets are multiples of 4 KiB; memory read into stays
//! until the call is over. Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`, past host memory.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::mem::transmute;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::ShardFile;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::cuda::{Context, DeviceArea, Stream};
use crate::units::{MIB, PAGE_4K};

/// How long the child may take: opening the driver takes a second or two on a large machine.
pub const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// Compared at each of three places of a file.
const SAMPLE_BYTES: u64 = MIB;
/// CU_FILE_ALLOW_COMPAT_MODE, among the control flags and among the parameters.
const ALLOW_COMPAT: u32 = 1;
/// CU_FILE_NVME_P2P_SUPPORTED: peer to peer by the kernel, without nvidia-fs.
const NVME_P2P: u32 = 11;
/// CU_FILE_HANDLE_TYPE_OPAQUE_FD.
const HANDLE_IS_FD: c_int = 1;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Status {
    error: c_int,
    cuda_error: c_int,
}

// The library reads it.
#[allow(dead_code)]
#[repr(C)]
struct Description {
    kind: c_int,
    /// A union of a descriptor and a pointer.
    fd: u64,
    operations: *const c_void,
}

/// As far as it is looked at; newer libraries may write more.
#[allow(dead_code)]
#[repr(C)]
#[derive(Clone, Copy)]
struct Properties {
    major: c_uint,
    minor: c_uint,
    poll_bytes: usize,
    direct_bytes: usize,
    status_flags: c_uint,
    control_flags: c_uint,
    rest: [u64; 32],
}

type Handle = *mut c_void;
/// What dlsym gives.
type Symbol = *mut c_void;

type OpenDriver = unsafe extern "C" fn() -> Status;
type GetProperties = unsafe extern "C" fn(*mut Properties) -> Status;
type RegisterFile = unsafe extern "C" fn(*mut Handle, *mut Description) -> Status;
type DeregisterFile = unsafe extern "C" fn(Handle);
type RegisterMemory = unsafe extern "C" fn(*const c_void, usize, c_int) -> Status;
type DeregisterMemory = unsafe extern "C" fn(*const c_void) -> Status;
type Read = unsafe extern "C" fn(Handle, *mut c_void, usize, i64, i64) -> isize;
type SetBool = unsafe extern "C" fn(c_int, bool) -> Status;

/// Functions of libcufile.
#[derive(Debug)]
struct Library {
    open: OpenDriver,
    properties: GetProperties,
    register_file: RegisterFile,
    deregister_file: DeregisterFile,
    register_memory: RegisterMemory,
    deregister_memory: DeregisterMemory,
    read: Read,
    /// Since CUDA 12.8.
    set_bool: Option<SetBool>,
}

fn unsupported(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, what.to_string())
}

impl Library {
    /// The library of this process, with its driver open.
    fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let library = Self::load()?;
        library.start()?;
        Ok(LIBRARY.get_or_init(|| library))
    }

    fn load() -> Result<Self> {
        let names = [c"libcufile.so.0", c"libcufile.so"];
        let open = |name: &&CStr| {
            // SAFETY: NVIDIA's library, whose initialisers have no precondition; it stays loaded.
            let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
            (!handle.is_null()).then_some(handle)
        };
        let handle = names.iter().find_map(open).ok_or_else(|| {
            unsupported("libcufile.so.0 cannot be loaded; it comes with the CUDA toolkit (package libcufile) or nvidia-fs")
        })?;
        let find = |name: &CStr| {
            // SAFETY: a library that is loaded; the symbol is only looked up.
            let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        let need = |name: &CStr| {
            find(name).ok_or_else(|| unsupported(format_args!("libcufile lacks {name:?}")))
        };
        // SAFETY: the functions have these signatures in every version of cufile.h; what dlsym gives is a function's address.
        unsafe {
            Ok(Self {
                open: transmute::<Symbol, OpenDriver>(need(c"cuFileDriverOpen")?),
                properties: transmute::<Symbol, GetProperties>(need(c"cuFileDriverGetProperties")?),
                register_file: transmute::<Symbol, RegisterFile>(need(c"cuFileHandleRegister")?),
                deregister_file: transmute::<Symbol, DeregisterFile>(need(
                    c"cuFileHandleDeregister",
                )?),
                register_memory: transmute::<Symbol, RegisterMemory>(need(c"cuFileBufRegister")?),
                deregister_memory: transmute::<Symbol, DeregisterMemory>(need(
                    c"cuFileBufDeregister",
                )?),
                read: transmute::<Symbol, Read>(need(c"cuFileRead")?),
                set_bool: find(c"cuFileSetParameterBool")
                    .map(|symbol| transmute::<Symbol, SetBool>(symbol)),
            })
        }
    }

    /// Opens the driver, with compatibility mode forbidden where that can be said.
    fn start(&self) -> Result<()> {
        if let Some(set_bool) = self.set_bool {
            // SAFETY: the function is there; a parameter that every version with it has.
            let _ = unsafe { set_bool(ALLOW_COMPAT as c_int, false) };
        }
        // SAFETY: the function is there, and CUDA is initialised (the caller has a context).
        check(unsafe { (self.open)() }, "open cuFile's driver")?;
        let mut found = Properties {
            major: 0,
            minor: 0,
            poll_bytes: 0,
            direct_bytes: 0,
            status_flags: 0,
            control_flags: 0,
            rest: [0; 32],
        };
        // SAFETY: room for more than any version writes.
        let code = unsafe { (self.properties)(&raw mut found) };
        check(code, "ask cuFile's driver what it can")?;
        let is_real = found.major > 0 || found.status_flags & (1 << NVME_P2P) != 0;
        if !is_real || found.status_flags == 0 {
            return Err(unsupported(
                "cuFile is in compatibility mode, which copies through host memory: that is not GDS; it needs nvidia-fs, or peer to \
                 peer (use_pci_p2pdma in cufile.json), and a data-centre GPU",
            ));
        }
        if found.control_flags & (1 << ALLOW_COMPAT) != 0 {
            return Err(unsupported(
                "cuFile may fall into compatibility mode file by file and does not tell: set allow_compat_mode to false in cufile.json",
            ));
        }
        Ok(())
    }
}

fn check(status: Status, what: &str) -> Result<()> {
    if status.error == 0 {
        return Ok(());
    }
    Err(unsupported(format_args!(
        "{what}: cuFile's error {} (CUDA's: {})",
        status.error, status.cuda_error
    )))
}

/// Files that are read into VRAM.
#[derive(Debug)]
pub struct Gds {
    library: &'static Library,
    handles: Vec<Handle>,
    files: Arc<[ShardFile]>,
    context: Arc<Context>,
}

// SAFETY: cuFile's calls may be made from any thread; each makes the context current first.
unsafe impl Send for Gds {}
// SAFETY: as above.
unsafe impl Sync for Gds {}

/// VRAM that cuFile reads into.
#[derive(Debug)]
pub struct GdsTarget {
    library: &'static Library,
    area: DeviceArea,
    is_registered: bool,
}

impl Gds {
    /// Files read into VRAM, after a child process has tried the first, and bytes of all have been compared.
    ///
    /// # Errors
    /// Why it is not to be used: `Unsupported`, `Timeout`, `Checksum`.
    pub fn trusted(context: &Arc<Context>, files: &Arc<[ShardFile]>) -> Result<Self> {
        let first = files.first().ok_or_else(|| unsupported("no files"))?;
        probe(first.path(), context.index(), PROBE_LIMIT)?;
        let gds = Self::new(context, files)?;
        gds.compare()?;
        Ok(gds)
    }

    /// Files read into VRAM, whatever comes of it: only a process that may hang or die should do this without a probe.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn new(context: &Arc<Context>, files: &Arc<[ShardFile]>) -> Result<Self> {
        context.enter()?;
        let mut gds = Self {
            library: Library::get()?,
            handles: Vec::with_capacity(files.len()),
            files: Arc::clone(files),
            context: Arc::clone(context),
        };
        for file in files.iter() {
            if let Some(reason) = file.direct().fallback() {
                let path = file.path().display();
                return Err(unsupported(format_args!(
                    "{path} has no O_DIRECT: {reason}"
                )));
            }
            let mut description = Description {
                kind: HANDLE_IS_FD,
                fd: file.weights_fd() as u64,
                operations: std::ptr::null(),
            };
            let mut handle = std::ptr::null_mut();
            // SAFETY: both live over the call; the descriptor is open as long as `files` lives, which goes after the handle.
            let code =
                unsafe { (gds.library.register_file)(&raw mut handle, &raw mut description) };
            check(code, &format!("give cuFile {}", file.path().display()))?;
            gds.handles.push(handle);
        }
        Ok(gds)
    }

    /// VRAM to read into.
    ///
    /// # Errors
    /// `NoMemory`; what the driver says.
    pub fn target(&self, len_bytes: u64) -> Result<GdsTarget> {
        let area = DeviceArea::new(&self.context, len_bytes.next_multiple_of(PAGE_4K))?;
        let span = area.span();
        // SAFETY: VRAM that this value holds until it is deregistered.
        let code = unsafe {
            let at = span.at() as *const c_void;
            (self.library.register_memory)(at, span.len_bytes() as usize, 0)
        };
        // Without it cuFile reads through memory of its own on the GPU, which is right all the same.
        let is_registered = check(code, "register VRAM")
            .inspect_err(|error| log::info!("{error}"))
            .is_ok();
        Ok(GdsTarget {
            library: self.library,
            area,
            is_registered,
        })
    }

    /// Reads bytes of a file to the beginning of a target; what lies behind the end of the file is left as it is. Gives how
    /// many were read.
    ///
    /// # Errors
    /// `Invalid` for what is not aligned to 4 KiB or has no room; `Io`, with path and offset.
    pub fn read(
        &self,
        shard_index: u32,
        offset_bytes: u64,
        len_bytes: u64,
        target: &GdsTarget,
    ) -> Result<u64> {
        let shard = shard_index as usize;
        let is_aligned = offset_bytes.is_multiple_of(PAGE_4K) && len_bytes.is_multiple_of(PAGE_4K);
        let span = target.area.span();
        let Some((file, handle)) = self.files.get(shard).zip(self.handles.get(shard)) else {
            let context = format!("there is no shard {shard_index}");
            return Err(Error::new(ErrorKind::Invalid, context));
        };
        if !is_aligned || len_bytes > span.len_bytes() || offset_bytes > i64::MAX as u64 {
            let context = format!("{len_bytes} bytes at {offset_bytes} cannot be read by cuFile");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        file.check_unchanged()?;
        self.context.enter()?;
        let wanted = self.readable(shard_index, offset_bytes, len_bytes);
        let mut done = 0;
        while done < wanted {
            // SAFETY: the handle of an open file; the target has room for all of it and outlives the call.
            let got = unsafe {
                (self.library.read)(
                    *handle,
                    span.at() as *mut c_void,
                    (len_bytes - done) as usize,
                    (offset_bytes + done) as i64,
                    done as i64,
                )
            };
            let at = offset_bytes + done;
            match got {
                1.. => done += got as u64,
                0 => return Err(self.short(file, at)),
                _ => return Err(self.failed(file, at, got)),
            }
            if done < wanted && !done.is_multiple_of(PAGE_4K) {
                return Err(self.short(file, offset_bytes + done));
            }
        }
        Ok(wanted)
    }

    /// Of so many bytes of a file, those before its end.
    #[must_use]
    pub fn readable(&self, shard_index: u32, offset_bytes: u64, len_bytes: u64) -> u64 {
        let file = self.files.get(shard_index as usize);
        let behind = file.map_or(0, |file| file.len_bytes().saturating_sub(offset_bytes));
        len_bytes.min(behind)
    }

    fn short(&self, file: &ShardFile, at: u64) -> Error {
        let context = format!(
            "{}: cuFile read no further than offset {at} of {}",
            file.path().display(),
            file.len_bytes()
        );
        Error::new(ErrorKind::Truncated, context)
    }

    fn failed(&self, file: &ShardFile, at: u64, got: isize) -> Error {
        let what = format!("{}: cuFile at offset {at}", file.path().display());
        match got {
            -1 => Error::from_io(&std::io::Error::last_os_error(), what),
            code => Error::new(ErrorKind::Io, format!("{what}: cuFile's error {}", -code)),
        }
    }

    /// Holds what cuFile reads against what the host reads, at three places of every file.
    ///
    /// # Errors
    /// `Checksum` for other bytes; what reading gives.
    pub fn compare(&self) -> Result<()> {
        let target = self.target(SAMPLE_BYTES)?;
        let stream = Stream::new(&self.context)?;
        for (index, file) in self.files.iter().enumerate() {
            let last = file.len_bytes().saturating_sub(SAMPLE_BYTES) / PAGE_4K * PAGE_4K;
            for offset in [0, last / 2 / PAGE_4K * PAGE_4K, last] {
                let len = self.read(index as u32, offset, SAMPLE_BYTES, &target)?;
                let found = target.area.span().first(len)?.read(&stream)?;
                let mut expected = vec![0; len as usize];
                file.read_exact_at(offset, &mut expected)?;
                if let Some(byte) = expected.iter().zip(&found).position(|(a, b)| a != b) {
                    let context = format!(
                        "{}: cuFile reads other bytes than the host, from offset {} on",
                        file.path().display(),
                        offset + byte as u64
                    );
                    return Err(Error::new(ErrorKind::Checksum, context));
                }
            }
        }
        Ok(())
    }
}

impl Drop for Gds {
    fn drop(&mut self) {
        for handle in &self.handles {
            // SAFETY: registered once, deregistered once, no read is under way.
            unsafe { (self.library.deregister_file)(*handle) };
        }
    }
}

impl GdsTarget {
    /// The VRAM.
    #[must_use]
    pub const fn area(&self) -> &DeviceArea {
        &self.area
    }
}

impl Drop for GdsTarget {
    fn drop(&mut self) {
        if self.is_registered {
            // SAFETY: registered once, deregistered once, before the memory goes.
            let _ =
                unsafe { (self.library.deregister_memory)(self.area.span().at() as *const c_void) };
        }
    }
}

// ---- the child ---------------------------------------------------------------------------------------------------

/// Has a child process try to read a file into VRAM, within a time limit.
///
/// # Errors
/// `Timeout` when it hangs; else `Unsupported`, with what it said.
pub fn probe(path: &Path, gpu_index: u32, limit: Duration) -> Result<()> {
    let program = program().ok_or_else(|| {
        unsupported("GDS is tried in a child process first, and the program flea, which does that, is not beside this one nor in PATH")
    })?;
    let mut child = Command::new(&program)
        .args(["bench", "gds", "--here", "--gpu", &gpu_index.to_string()])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::from_io(&error, format!("start {}", program.display())))?;
    let began = Instant::now();
    while began.elapsed() < limit {
        match child.try_wait() {
            Ok(Some(ended)) if ended.success() => return Ok(()),
            Ok(Some(_)) => return Err(unsupported(said(&mut child))),
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(Error::from_io(&error, "wait for the probe of GDS")),
        }
    }
    // What hangs in the kernel cannot be ended: it is left behind then.
    let _ = child.kill();
    let until = Instant::now() + Duration::from_secs(1);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(Error::new(
        ErrorKind::Timeout,
        format!("cuFile did not answer within {} s", limit.as_secs()),
    ))
}

/// This program where it is flea, or the flea beside it.
fn program() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    if own.file_name().is_some_and(|name| name == "flea") {
        return Some(own);
    }
    let beside = own.with_file_name("flea");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&paths).map(|folder| folder.join("flea"));
    std::iter::once(beside)
        .chain(in_path)
        .find(|path| path.is_file())
}

/// The last line that a child wrote.
fn said(child: &mut Child) -> String {
    use std::io::Read;
    let mut text = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        let _ = pipe.read_to_string(&mut text);
    }
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    let last = last.unwrap_or("the probe of GDS ended without a word");
    last.trim().trim_start_matches("error: ").to_owned()
}
