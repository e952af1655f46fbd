//! The CUDA driver: whether it can be loaded and used at all, and what its errors mean.
//!
//! The bindings panic where the library or one of its functions is missing, so everything that is called is looked for
//! first, once. Invariant: nobody calls the driver who has not been given a [`Driver`]. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: beneath the pool of a GPU.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, ErrorKind, Result};

/// CUDA 11.4 (driver 470) is the oldest with everything that is called here, and the oldest the bindings know.
const VERSION_NEEDED: i32 = 11_040;

/// Every function that is called.
const FUNCTIONS: [&str; 42] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuGetErrorName",
    "cuMemGetAllocationGranularity",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
];

/// The driver, loaded and initialised.
#[derive(Debug)]
pub(super) struct Driver {
    /// `13000` is CUDA 13.0.
    pub(super) version: i32,
}

/// The driver of this process.
///
/// # Errors
/// `Unsupported` where there is none or it is too old, `NotFound` where there is no GPU; what cuInit says.
pub(super) fn driver() -> Result<&'static Driver> {
    // Only what was found is kept: a driver may be installed, or a GPU come back, while a program runs.
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    let found = load()?;
    Ok(DRIVER.get_or_init(|| found))
}

/// Whether the library can be loaded.
pub(super) fn is_there() -> bool {
    // SAFETY: loads the system's libcuda.so.1, whose initialisers are NVIDIA's and have no precondition.
    unsafe { sys::is_culib_present() }
}

fn load() -> Result<Driver> {
    if !is_there() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "no CUDA driver: libcuda.so.1 cannot be loaded; install NVIDIA's driver (`nvidia-smi` must work), in a container \
             start it with the GPU passed through, or leave the weights in host memory",
        ));
    }
    let missing = FUNCTIONS.iter().find(|name| !has(name));
    let version = match missing {
        Some(&"cuDriverGetVersion") => 0,
        _ => version()?,
    };
    if version < VERSION_NEEDED || missing.is_some() {
        let lack = missing.map_or_else(String::new, |name| format!(", it lacks {name}"));
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the CUDA driver is too old: CUDA {}{lack}; CUDA {} is needed, which is NVIDIA's driver 470 or later",
                dotted(version),
                dotted(VERSION_NEEDED)
            ),
        ));
    }
    // SAFETY: the function is there; it has no other precondition.
    check(unsafe { sys::cuInit(0) }, "initialise the CUDA driver")?;
    Ok(Driver { version })
}

fn has(name: &str) -> bool {
    let name = format!("{name}\0");
    // SAFETY: the library is there; its symbol is only looked up and not used as what it is not.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok()
}

fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the function is there and writes one int.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    check(code, "ask the CUDA driver for its version")?;
    Ok(version)
}

/// `13.0` of 13000.
pub(super) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// What a call of the driver gave, as a result; `what` is what was tried.
pub(super) fn check(code: CUresult, what: impl fmt::Display) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (kind, remedy) = meaning(code);
    Err(Error::new(
        kind,
        format!("{what}: {} ({}){remedy}", name(code), code as u32),
    ))
}

fn name(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the function is there, and writes a pointer to a text that lives as long as the program, or null.
    let got = unsafe { sys::cuGetErrorName(code, &raw mut text) };
    if got != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("{code:?}");
    }
    // SAFETY: a text of the driver, as said above.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

const LOST: &str = "; the GPU is lost to this process: see `dmesg | grep -i xid` and `nvidia-smi`, reset or replace it, and meanwhile leave \
                    the weights in host memory";

fn meaning(code: CUresult) -> (ErrorKind, &'static str) {
    match code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => (
            ErrorKind::NoMemory,
            "; see `nvidia-smi` for who holds VRAM, or give less",
        ),
        CUresult::CUDA_ERROR_NO_DEVICE => (
            ErrorKind::NotFound,
            "; no GPU is visible: see `nvidia-smi` and CUDA_VISIBLE_DEVICES, or leave the weights in host memory",
        ),
        CUresult::CUDA_ERROR_NOT_PERMITTED => (
            ErrorKind::Permission,
            "; this process may not use that memory: the same user and, in containers, the same device files are needed",
        ),
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => (
            ErrorKind::Unsupported,
            "; the parts of NVIDIA's driver are of different versions or not started: reboot after an update, and on machines \
             with NVSwitch start nvidia-fabricmanager",
        ),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => (
            ErrorKind::Unsupported,
            "; flea's kernels need compute capability 8.0 or later, which is NVIDIA's Ampere generation",
        ),
        CUresult::CUDA_ERROR_INVALID_IMAGE
        | CUresult::CUDA_ERROR_INVALID_PTX
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => (
            ErrorKind::Unsupported,
            "; the driver does not take the kernels that this program carries: a newer driver may",
        ),
        CUresult::CUDA_ERROR_NOT_FOUND => (
            ErrorKind::Internal,
            "; it is not in the kernels that this program carries: it was built wrong, build or install it again",
        ),
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
        | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_UNKNOWN => (ErrorKind::Io, LOST),
        _ => (ErrorKind::Io, ""),
    }
}
