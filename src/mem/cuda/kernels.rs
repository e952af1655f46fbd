//! The kernels for weights in VRAM: checksums, quantised types to 16 bits, compressed weights. kernels/*.cu are their sources.
//!
//! Loaded from the fatbin that this program carries, once per GPU; nothing is compiled here but, on a GPU newer than its machine
//! code, the PTX, by the driver. Work goes into a stream as copies do. Invariant: a kernel is given [`Span`]s, so that lengths
//! and alignment are checked before it starts and none is pointed at host memory. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: between the reader's last copy and the lease.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUmodule};

use super::area::Span;
use super::context::Context;
use super::driver::check;
use super::stream::Stream;
use crate::error::{Error, ErrorKind, Result};
use crate::model::coded::{HEAD_BYTES, Places};
use crate::model::tiles::{TILE_BYTES, TILE_ELEMENTS, tile_count};
use crate::units::MIB;

/// Threads of a CUDA block, in all kernels.
const THREADS: u32 = 256;
/// What a block sums at a time: 8 spans of 32 KiB.
const SUM_BLOCK_BYTES: u64 = 256 << 10;
/// What a block unpacks at a time.
const BLOCK_TILES: u64 = 8;
/// More blocks than these take turns: every GPU is full with fewer.
const BLOCKS_MAX: u64 = 1 << 16;
/// What the kernels ask of the memory they are given.
const ALIGN_BYTES: u64 = 16;
/// What [`Kernels::unpack`] leaves in its word where no tile is damaged.
pub const NO_DAMAGE: u32 = u32::MAX;

/// Aligned as the driver's own images are.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);
static FATBIN: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../kernels/flea.fatbin"));

/// Types that can be turned into 16-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantised {
    /// 4 bits, one scale per 32.
    Q4_0,
    /// 8 bits, one scale per 32.
    Q8_0,
    /// 4 bits in super-blocks of 256.
    Q4K,
    /// 6 bits in super-blocks of 256.
    Q6K,
    /// 4-bit floats, one exponent per 32.
    Mxfp4,
}

/// To which 16-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Narrow {
    /// IEEE half.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
}

impl Quantised {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Q4_0, Self::Q8_0, Self::Q4K, Self::Q6K, Self::Mxfp4];

    /// As ggml calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// Bytes of one of the type's blocks.
    #[must_use]
    pub const fn block_bytes(self) -> u64 {
        match self {
            Self::Q4_0 => 18,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q6K => 210,
            Self::Mxfp4 => 17,
        }
    }

    /// Weights of one of the type's blocks.
    #[must_use]
    pub const fn block_elements(self) -> u64 {
        match self {
            Self::Q4_0 | Self::Q8_0 | Self::Mxfp4 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// The kernel, and its threads per block of the type.
    const fn kernel(self, to: Narrow) -> (&'static CStr, u64) {
        use Narrow::{BF16, F16};
        match (self, to) {
            (Self::Q4_0, F16) => (c"flea_dequantise_q4_0_f16", 2),
            (Self::Q4_0, BF16) => (c"flea_dequantise_q4_0_bf16", 2),
            (Self::Q8_0, F16) => (c"flea_dequantise_q8_0_f16", 4),
            (Self::Q8_0, BF16) => (c"flea_dequantise_q8_0_bf16", 4),
            (Self::Q4K, F16) => (c"flea_dequantise_q4_k_f16", 16),
            (Self::Q4K, BF16) => (c"flea_dequantise_q4_k_bf16", 16),
            (Self::Q6K, F16) => (c"flea_dequantise_q6_k_f16", 8),
            (Self::Q6K, BF16) => (c"flea_dequantise_q6_k_bf16", 8),
            (Self::Mxfp4, F16) => (c"flea_dequantise_mxfp4_f16", 2),
            (Self::Mxfp4, BF16) => (c"flea_dequantise_mxfp4_bf16", 2),
        }
    }
}

/// A coded tensor in VRAM (`model::coded`), or one made of some of its tiles.
#[derive(Debug, Clone, Copy)]
pub struct Coded {
    /// All of its bytes.
    pub bytes: Span,
    /// Its weights.
    pub elements: u64,
}

/// The kernels, loaded on one GPU.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<Context>,
    module: CUmodule,
}

// SAFETY: a module may be used from any thread; each call makes the context current first.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads them.
    ///
    /// # Errors
    /// `Unsupported` for a GPU older than compute capability 8.0; what else the driver says.
    pub fn load(context: &Arc<Context>) -> Result<Self> {
        context.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the context is current; the image is a whole fatbin that lives as long as the program.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, FATBIN.0.as_ptr().cast()) };
        check(
            code,
            format_args!(
                "load flea's kernels on GPU {} ({})",
                context.index(),
                context.name()
            ),
        )?;
        Ok(Self {
            context: Arc::clone(context),
            module,
        })
    }

    /// Adds the CRC32C of each MiB of `bytes` to the words at `sums`, which must be zero before.
    ///
    /// # Errors
    /// `Invalid` for too few words or a span that is not aligned to 16; what the driver says.
    pub fn checksums(&self, stream: &Stream, bytes: Span, sums: Span) -> Result<()> {
        aligned(bytes)?;
        holds(sums, 4 * bytes.len_bytes().div_ceil(MIB))?;
        let parameters = [bytes.at(), bytes.len_bytes(), sums.at()];
        let blocks = bytes.len_bytes().div_ceil(SUM_BLOCK_BYTES);
        self.launch(stream, c"flea_crc32c", blocks, parameters)
    }

    /// Decodes tiles of a coded tensor to `weights`, where the first of them goes. The word at `damaged`, [`NO_DAMAGE`]
    /// before, becomes the first damaged tile.
    ///
    /// # Errors
    /// `Invalid` for tiles that do not exist or have no room; what the driver says.
    pub fn unpack(
        &self,
        stream: &Stream,
        coded: Coded,
        tiles: std::ops::Range<u64>,
        weights: Span,
        damaged: Span,
    ) -> Result<()> {
        let Coded { bytes, elements } = coded;
        aligned(bytes)?;
        aligned(weights)?;
        holds(damaged, 4)?;
        holds(bytes, HEAD_BYTES as u64 + Places::bytes(elements))?;
        if tiles.is_empty() || tiles.end > tile_count(elements) {
            let context = format!("tiles {tiles:?} of {elements} weights do not exist");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let count = tiles.end - tiles.start;
        let left_bytes = 2 * (elements - tiles.start * TILE_ELEMENTS as u64);
        holds(weights, left_bytes.min(count * TILE_BYTES as u64))?;
        let parameters = [
            bytes.at(),
            bytes.len_bytes(),
            elements,
            tiles.start,
            count,
            weights.at(),
            damaged.at(),
        ];
        let blocks = count.div_ceil(BLOCK_TILES);
        self.launch(stream, c"flea_unpack", blocks, parameters)
    }

    /// Turns `from`, whole blocks of a quantised type, into 16-bit floats.
    ///
    /// # Errors
    /// `Invalid` for a part of a block, no room, or a span that is not aligned to 16; what the driver says.
    pub fn dequantise(
        &self,
        stream: &Stream,
        (kind, to): (Quantised, Narrow),
        from: Span,
        weights: Span,
    ) -> Result<()> {
        aligned(from)?;
        aligned(weights)?;
        let count = from.len_bytes() / kind.block_bytes();
        if count * kind.block_bytes() != from.len_bytes() {
            let context = format!(
                "{} bytes are no whole blocks of {}",
                from.len_bytes(),
                kind.name()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        holds(weights, 2 * count * kind.block_elements())?;
        let (name, units) = kind.kernel(to);
        let blocks = (count * units).div_ceil(u64::from(THREADS));
        self.launch(stream, name, blocks, [from.at(), count, weights.at()])
    }

    /// All parameters of all kernels have 8 bytes.
    fn launch<const N: usize>(
        &self,
        stream: &Stream,
        name: &CStr,
        blocks: u64,
        mut parameters: [u64; N],
    ) -> Result<()> {
        self.context.enter()?;
        let mut function: CUfunction = std::ptr::null_mut();
        // SAFETY: a module that this value holds loaded; the call writes one handle.
        let code =
            unsafe { sys::cuModuleGetFunction(&raw mut function, self.module, name.as_ptr()) };
        let label = name.to_string_lossy();
        check(code, format_args!("find the kernel {label}"))?;
        let mut arguments = parameters
            .each_mut()
            .map(|parameter| (&raw mut *parameter).cast::<c_void>());
        let blocks = blocks.clamp(1, BLOCKS_MAX) as u32;
        // SAFETY: a function of the module; as many arguments as it has, of its types, which the call copies. The memory they
        // name is VRAM (spans), checked for length and alignment by the callers.
        let code = unsafe {
            sys::cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.raw(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(code, format_args!("start the kernel {label}"))
    }
}

fn aligned(span: Span) -> Result<()> {
    if span.at().is_multiple_of(ALIGN_BYTES) {
        return Ok(());
    }
    let context = format!("a kernel needs VRAM aligned to 16 and not {:#x}", span.at());
    Err(Error::new(ErrorKind::Invalid, context))
}

fn holds(span: Span, len_bytes: u64) -> Result<()> {
    if span.len_bytes() >= len_bytes {
        return Ok(());
    }
    let context = format!(
        "a kernel needs {len_bytes} bytes of VRAM and not {}",
        span.len_bytes()
    );
    Err(Error::new(ErrorKind::Invalid, context))
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let unloaded = self.context.enter().and_then(|()| {
            // SAFETY: loaded in load, unloaded once; the driver keeps what runs until it has run.
            check(
                unsafe { sys::cuModuleUnload(self.module) },
                "unload the kernels",
            )
        });
        if let Err(error) = unloaded {
            log::debug!("GPU {}: {error}", self.context.index());
        }
    }
}

const _: () = assert!(SUM_BLOCK_BYTES * 4 == MIB);
