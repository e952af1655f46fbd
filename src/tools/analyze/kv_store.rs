//! How keys, values and weights are stored, and what that weighs: stored bytes, scales included.
//!
//! Types of ggml by their blocks, codecs of [`crate::kv`] by the bytes they really write, and a bare number of bits where
//! somebody wants to compare with a table that counts no scales.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::kv::spec::{DIM_MAX, DIM_MIN};
use crate::kv::synth::Distribution;
use crate::kv::{Choice, Codec, Coder, Spec, Values};
use crate::model::DType;

/// Fewest and most bits that a value can be asked to take.
pub const BITS_MIN: f64 = 1.0;
/// See [`BITS_MIN`].
pub const BITS_MAX: f64 = 32.0;
/// The types of llama.cpp's cache.
const CACHE_TYPES: [DType; 9] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q5_1,
    DType::Q5_0,
    DType::Q4_1,
    DType::Q4_0,
    DType::IQ4_NL,
];
/// Vectors that entropy coding is measured on: enough that a frame's head is a thousandth.
const SAMPLE_COUNT: usize = 512;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvStore {
    /// So many bits for each, and nothing else.
    Bits(f64),
    /// A type of llama.cpp's cache.
    Type(DType),
    /// A codec of flea's.
    Coded(Choice),
}

impl Default for KvStore {
    fn default() -> Self {
        Self::Type(DType::F16)
    }
}

impl fmt::Display for KvStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bits(bits) => write!(f, "{bits}"),
            Self::Type(dtype) => f.write_str(dtype.name()),
            Self::Coded(choice) => choice.fmt(f),
        }
    }
}

impl FromStr for KvStore {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '.')) {
            return bits(text).map(Self::Bits);
        }
        let known = |dtype: &&DType| dtype.name().eq_ignore_ascii_case(text);
        if let Some(dtype) = CACHE_TYPES.iter().find(known) {
            return Ok(Self::Type(*dtype));
        }
        let choice = text.parse().map(Self::Coded);
        choice.map_err(|error: Error| {
            let types = CACHE_TYPES.map(|dtype| dtype.name()).join(", ");
            format!(
                "{error}; types of llama.cpp's cache are {types}, and a number is that many bits"
            )
        })
    }
}

/// Parser of the bits a weight takes: a number, or a type of ggml with its scales (`q4_K` is 4.5).
///
/// # Errors
/// A sentence for the user.
pub fn weight_bits(text: &str) -> std::result::Result<f64, String> {
    match DType::from_name(text.trim()) {
        Some(dtype) => Ok((dtype.block_bytes() * 8) as f64 / dtype.block_elements() as f64),
        None => bits(text),
    }
}

fn bits(text: &str) -> std::result::Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(bits) if (BITS_MIN..=BITS_MAX).contains(&bits) => Ok(bits),
        Ok(_) => Err(format!(
            "'{text}' bits are out of range; {BITS_MIN} to {BITS_MAX} are possible"
        )),
        Err(_) => Err(format!(
            "'{text}' is not a number of bits, nor the name of a type"
        )),
    }
}

impl KvStore {
    /// Bytes of one vector of `dim` values. Of entropy coding, the mean over Gaussian vectors: the codec is made for them,
    /// as it rotates what it codes.
    ///
    /// # Errors
    /// `Invalid`: a length that the type or codec cannot store.
    pub fn vector_bytes(&self, dim: u64) -> Result<f64> {
        match self {
            Self::Bits(bits) => Ok(dim as f64 * bits / 8.0),
            Self::Type(dtype) => dtype.row_bytes(dim).map(|bytes| bytes as f64).ok_or_else(|| {
                Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "{dtype} stores {} values at a time, the heads of this model have {dim}; choose another KV type",
                        dtype.block_elements(),
                        dtype = dtype.name()
                    ),
                )
            }),
            Self::Coded(choice) => coded_bytes(*choice, dim),
        }
    }
}

fn coded_bytes(choice: Choice, dim: u64) -> Result<f64> {
    let dim = usize::try_from(dim).unwrap_or(usize::MAX);
    let spec = Spec::new(choice.codec, choice.rate, dim)?;
    let coder = match choice.codec {
        // Its calibration gives directions bits where they are needed; the sum is that of `tq`, which it falls back to.
        Codec::Spectral => Coder::new(Spec::new(Codec::Tq, choice.rate, dim)?)?,
        _ => Coder::new(spec)?,
    };
    if let Some(bytes) = coder.record_bytes() {
        return Ok(bytes as f64);
    }
    debug_assert!((DIM_MIN..=DIM_MAX).contains(&dim));
    let sample = Distribution::Gaussian.sample(SAMPLE_COUNT, dim, 0);
    let frame = coder.encode(Values::F32(&sample))?;
    Ok(frame.len() as f64 / SAMPLE_COUNT as f64)
}
