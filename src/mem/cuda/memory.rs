//! VRAM and the addresses it is seen at: two things, so that one slot can be seen at the places of many layers.
//!
//! Invariants: memory outlives every place it is mapped at; a range gives its addresses back only when nothing is mapped in
//! it. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beneath the pool of a GPU.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType,
    CUmemGenericAllocationHandle, CUmemLocation, CUmemLocationType,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::context::Context;
use super::driver::check;
use crate::error::{Error, ErrorKind, Result};
use crate::units::HumanBytes;

/// How memory is handed to other processes.
const HANDLE_TYPE: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// VRAM without an address.
#[derive(Debug)]
pub struct Vram {
    raw: CUmemGenericAllocationHandle,
    len_bytes: u64,
    context: Arc<Context>,
}

/// Who may do what with memory at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing is written through this place.
    Read,
    /// Copies and kernels may write.
    ReadWrite,
}

fn location(context: &Context) -> CUmemLocation {
    CUmemLocation {
        type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: context.device(),
    }
}

fn properties(context: &Context) -> CUmemAllocationProp {
    // SAFETY: a C struct of integers, pointers and an enum whose zero is one of its values.
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = HANDLE_TYPE;
    properties.location = location(context);
    properties
}

/// What memory of a GPU comes in multiples of.
///
/// # Errors
/// What the driver says.
pub fn granularity_bytes(context: &Context) -> Result<u64> {
    let properties = properties(context);
    let least = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    let mut bytes = 0;
    // SAFETY: the properties live over the call, which writes one size.
    let code =
        unsafe { sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const properties, least) };
    check(code, "ask a GPU for the granularity of its memory")?;
    Ok(bytes as u64)
}

impl Vram {
    /// Takes memory: a multiple of [`granularity_bytes`].
    ///
    /// # Errors
    /// `NoMemory` when the GPU has not that much left; what the driver says.
    pub fn new(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        let properties = properties(context);
        let mut raw = 0;
        // SAFETY: the properties live over the call, which writes one handle, released in drop.
        let code =
            unsafe { sys::cuMemCreate(&raw mut raw, len_bytes as usize, &raw const properties, 0) };
        check(
            code,
            format_args!(
                "take {} of VRAM on GPU {}",
                HumanBytes(len_bytes),
                context.index()
            ),
        )?;
        Ok(Self {
            raw,
            len_bytes,
            context: Arc::clone(context),
        })
    }

    /// Memory that another process has handed out as a descriptor.
    ///
    /// # Errors
    /// What the driver says: `Permission` where this process may not have it.
    pub fn import(context: &Arc<Context>, fd: BorrowedFd<'_>, len_bytes: u64) -> Result<Self> {
        context.enter()?;
        let mut raw = 0;
        let os_handle = fd.as_raw_fd() as usize as *mut std::ffi::c_void;
        // SAFETY: for this type of handle the pointer is the descriptor itself, open for the call; one handle is written.
        let code =
            unsafe { sys::cuMemImportFromShareableHandle(&raw mut raw, os_handle, HANDLE_TYPE) };
        check(
            code,
            format_args!(
                "import {} of VRAM from fd {}",
                HumanBytes(len_bytes),
                fd.as_raw_fd()
            ),
        )?;
        Ok(Self {
            raw,
            len_bytes,
            context: Arc::clone(context),
        })
    }

    /// A descriptor by which another process can have it, too.
    ///
    /// # Errors
    /// What the driver says.
    pub fn export(&self) -> Result<OwnedFd> {
        let mut fd: std::ffi::c_int = -1;
        // SAFETY: for this type of handle the call writes one int, a new descriptor.
        let code = unsafe {
            sys::cuMemExportToShareableHandle((&raw mut fd).cast(), self.raw, HANDLE_TYPE, 0)
        };
        check(
            code,
            format_args!("export {} of VRAM", HumanBytes(self.len_bytes)),
        )?;
        if fd < 0 {
            let context = "the CUDA driver exported VRAM as no descriptor";
            return Err(Error::new(ErrorKind::Io, context));
        }
        // SAFETY: a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // A driver does not promise it: programs that this process starts must not have the weights by accident.
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|errno| Error::os(errno as i32, "keep exported VRAM from children"))?;
        Ok(fd)
    }

    /// Its length.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

impl Drop for Vram {
    fn drop(&mut self) {
        // SAFETY: made or imported once, released once; the driver keeps the memory while it is mapped.
        let code = unsafe { sys::cuMemRelease(self.raw) };
        if let Err(error) = check(code, "release VRAM") {
            log::debug!("GPU {}: {error}", self.context.index());
        }
    }
}

/// Addresses of a GPU, and what is mapped there.
#[derive(Debug)]
pub struct AddressRange {
    base: u64,
    len_bytes: u64,
    mapped: Vec<(u64, u64)>,
    context: Arc<Context>,
}

impl AddressRange {
    /// Reserves addresses: a multiple of [`granularity_bytes`].
    ///
    /// # Errors
    /// What the driver says.
    pub fn reserve(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        context.enter()?;
        let mut base = 0;
        // SAFETY: the call writes one address, freed in drop.
        let code = unsafe { sys::cuMemAddressReserve(&raw mut base, len_bytes as usize, 0, 0, 0) };
        check(
            code,
            format_args!("reserve {} of GPU addresses", HumanBytes(len_bytes)),
        )?;
        Ok(Self {
            base,
            len_bytes,
            mapped: Vec::new(),
            context: Arc::clone(context),
        })
    }

    /// The first address.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// How many there are.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Shows the first `len_bytes` of memory at an offset. The same memory may be shown at several.
    ///
    /// # Errors
    /// `Invalid` for what does not fit; what the driver says.
    pub fn map(
        &mut self,
        offset_bytes: u64,
        memory: &Vram,
        len_bytes: u64,
        access: Access,
    ) -> Result<()> {
        let end = offset_bytes.checked_add(len_bytes);
        if end.is_none_or(|end| end > self.len_bytes) || len_bytes > memory.len_bytes {
            let context = format!(
                "{len_bytes} bytes at {offset_bytes} of VRAM of {} bytes in a range of {}",
                memory.len_bytes, self.len_bytes
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let (at, len) = (self.base + offset_bytes, len_bytes as usize);
        // SAFETY: addresses that this value reserved; the driver refuses those with memory.
        let code = unsafe { sys::cuMemMap(at, len, 0, memory.raw, 0) };
        check(code, format_args!("map {} of VRAM", HumanBytes(len_bytes)))?;
        self.mapped.push((offset_bytes, len_bytes));
        let access = CUmemAccessDesc {
            location: location(&self.context),
            flags: match access {
                Access::Read => CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ,
                Access::ReadWrite => CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            },
        };
        // SAFETY: the mapping made just now; the description lives over the call.
        let code = unsafe { sys::cuMemSetAccess(at, len, &raw const access, 1) };
        check(
            code,
            format_args!(
                "open {} of VRAM to GPU {}",
                HumanBytes(len_bytes),
                self.context.index()
            ),
        )
    }
}

impl Drop for AddressRange {
    fn drop(&mut self) {
        let unmapped = self.context.enter().and_then(|()| {
            for (offset_bytes, len_bytes) in self.mapped.drain(..) {
                // SAFETY: a mapping of this value; whoever computes with it has given its lease back (the pool's part).
                let code = unsafe { sys::cuMemUnmap(self.base + offset_bytes, len_bytes as usize) };
                check(code, "unmap VRAM")?;
            }
            // SAFETY: reserved once, freed once, nothing is mapped any more.
            let code = unsafe { sys::cuMemAddressFree(self.base, self.len_bytes as usize) };
            check(code, "free GPU addresses")
        });
        if let Err(error) = unmapped {
            log::debug!("GPU {}: {error}", self.context.index());
        }
    }
}
