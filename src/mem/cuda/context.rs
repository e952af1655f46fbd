//! The GPUs: which there are, and the context that one of them is used in.
//!
//! The context is the device's primary one, which every library in the process shares: what ggml allocates and what flea
//! allocates see each other. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beneath the pool of a GPU.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute};

use super::driver::{check, dotted, driver};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::gpu::Gpu;

/// A GPU in use. Its calls may be made on any thread.
#[derive(Debug)]
pub struct Context {
    index: u32,
    device: CUdevice,
    raw: CUcontext,
    name: String,
}

// SAFETY: the driver is thread-safe; a context may be current on several threads, and each call here makes it so first.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Every GPU of this machine that the driver shows.
///
/// # Errors
/// `Unsupported` without a driver or with one that is too old, `NotFound` without a GPU; what the driver says.
pub fn gpus() -> Result<Vec<Gpu>> {
    (0..count()?).map(describe).collect()
}

/// Whether the driver's library can be loaded.
#[must_use]
pub fn driver_is_there() -> bool {
    super::driver::is_there()
}

fn count() -> Result<u32> {
    driver()?;
    let mut count = 0;
    // SAFETY: the driver is initialised; the call writes one int.
    let code = unsafe { sys::cuDeviceGetCount(&raw mut count) };
    check(code, "count GPUs")?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn describe(index: u32) -> Result<Gpu> {
    let context = Context::open(index)?;
    let (free_bytes, total_bytes) = context.memory()?;
    let attribute = |which| attribute(context.device, which);
    Ok(Gpu {
        index,
        name: context.name.clone(),
        free_bytes,
        total_bytes,
        driver: dotted(driver()?.version),
        capability: (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        maps_memory: maps_memory(context.device)?,
    })
}

/// Whether a GPU can map memory at addresses of one's choice and hand it to another process: every one since 2016 does,
/// but for some that are passed through to virtual machines.
fn maps_memory(device: CUdevice) -> Result<bool> {
    let maps = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
    let shares =
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
    Ok(attribute(device, maps)? != 0 && attribute(device, shares)? != 0)
}

fn attribute(device: CUdevice, which: CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: a device of the driver; the call writes one int.
    let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
    check(code, format_args!("ask GPU {device} for {which:?}"))?;
    Ok(value)
}

impl Context {
    /// Takes a GPU into use.
    ///
    /// # Errors
    /// `NotFound` for a GPU that is not there, `Unsupported` without a driver or for a GPU that cannot map memory; what
    /// the driver says.
    pub fn new(index: u32) -> Result<Arc<Self>> {
        let context = Self::open(index)?;
        if !maps_memory(context.device)? {
            let text = format!(
                "GPU {index} ({}) cannot map memory at chosen addresses (cuMemMap): leave the weights in host memory",
                context.name
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        Ok(Arc::new(context))
    }

    fn open(index: u32) -> Result<Self> {
        let count = count()?;
        if index >= count {
            let context = format!(
                "GPU {index} does not exist: {count} are there, counted from 0, as CUDA_VISIBLE_DEVICES shows them"
            );
            return Err(Error::new(ErrorKind::NotFound, context));
        }
        let (mut device, mut raw) = (0, std::ptr::null_mut());
        // SAFETY: the driver is initialised; the call writes one device.
        let code = unsafe { sys::cuDeviceGet(&raw mut device, index.cast_signed()) };
        check(code, format_args!("find GPU {index}"))?;
        // SAFETY: a device of the driver; the call writes one context, released in drop.
        let code = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) };
        check(code, format_args!("open GPU {index}"))?;
        let mut context = Self {
            index,
            device,
            raw,
            name: String::new(),
        };
        context.name = context.ask_name()?;
        Ok(context)
    }

    fn ask_name(&self) -> Result<String> {
        let mut text = [0u8; 128];
        // SAFETY: a device of the driver; the call writes at most the length given, with a zero at the end.
        let code = unsafe { sys::cuDeviceGetName(text.as_mut_ptr().cast(), 128, self.device) };
        check(code, format_args!("ask for the name of GPU {}", self.index))?;
        let name = CStr::from_bytes_until_nul(&text).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    /// Its number.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// What its maker calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// VRAM that is free, and all of it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; the call writes two sizes.
        let code = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        check(code, format_args!("ask GPU {} for its memory", self.index))?;
        Ok((free as u64, total as u64))
    }

    /// Makes it the calling thread's context.
    pub(crate) fn enter(&self) -> Result<()> {
        // SAFETY: a context that this value holds open.
        let code = unsafe { sys::cuCtxSetCurrent(self.raw) };
        check(code, format_args!("use GPU {}", self.index))
    }

    /// The driver's number for it.
    pub(super) const fn device(&self) -> CUdevice {
        self.device
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in new, released once; streams and memory hold the context alive.
        let code = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        if let Err(error) = check(code, format_args!("close GPU {}", self.index)) {
            log::debug!("{error}");
        }
    }
}
