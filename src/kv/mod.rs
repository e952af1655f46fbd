//! Codecs for keys and values of the attention: vectors of one head in, bytes out, and back.
//!
//! A [`Coder`] is made for a codec, a rate and a vector length ([`Spec`]) and writes frames that say what they are
//! ([`frame`]). Every figure counts the stored bytes: heads, scales, checksums and vectors kept verbatim. Pure: no
//! files, no clocks, no state between calls; the same input gives the same bytes.
//!
//! Invariants: a vector with a NaN, an infinity or a length outside of about 1e-9 to 4e9 is kept verbatim in f32 and comes
//! back bit for bit, and no other vector notices; bytes that are no frame are an error, never a panic.
//! Place in the house: beside `file -> catalog`; hosts and tools use it, the stream of weights does not.
//!
//! ```
//! use flea::kv::{Coder, Spec, Values};
//! # fn main() -> flea::Result<()> {
//! let keys: Vec<f32> = (0..128 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let coder = Coder::new(Spec::parse("tq:4", 128)?)?;
//! let frame = coder.encode(Values::F32(&keys))?;
//! let back = coder.decode(&frame)?;
//! assert_eq!(back.len(), keys.len());
//! assert!(frame.len() * 3 < keys.len() * 2, "a third of the bytes of f16");
//! # Ok(())
//! # }
//! ```

mod bits;
mod blocks;
pub mod calibration;
mod dh013;
mod eigen;
mod entropy;
pub mod frame;
mod lloyd;
mod lookup;
pub mod math;
pub mod quality;
mod rans;
mod rotate;
mod scalar;
mod scale;
pub mod spec;
mod spectral;
pub mod synth;
mod tcq;
#[cfg(test)]
mod tcq_train;
mod vector;

use half::{bf16, f16};

pub use calibration::Calibration;
pub use spec::{Choice, Codec, Rate, Spec};

use crate::error::{Error, ErrorKind, Result};
use blocks::Blocks;
use dh013::Dh013;
use entropy::Entropy;
use frame::{Frame, Verbatim};
use rotate::{Hadamard, Rotors};
use scalar::{Rotation, Scalar, Spare};
use spec::COUNT_MAX;
use spectral::Spectral;
use tcq::{Search, Tcq};

/// Values of vectors, one vector after the other, in the type the host has them in.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// Singles.
    F32(&'a [f32]),
    /// IEEE halves.
    F16(&'a [f16]),
    /// The upper halves of singles.
    Bf16(&'a [bf16]),
}

impl Values<'_> {
    /// How many values.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Vector number `index` as singles.
    fn vector(&self, index: usize, out: &mut [f32]) {
        let at = index * out.len();
        match self {
            Self::F32(values) => out.copy_from_slice(&values[at..at + out.len()]),
            Self::F16(values) => {
                for (out, value) in out.iter_mut().zip(&values[at..]) {
                    *out = value.to_f32();
                }
            }
            Self::Bf16(values) => {
                for (out, value) in out.iter_mut().zip(&values[at..]) {
                    *out = value.to_f32();
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Body {
    Blocks(Blocks),
    Scalar(Box<Scalar>),
    Entropy(Box<Entropy>),
    Trellis(Box<Tcq>),
    Spectral(Box<Spectral>),
    Dh013(Box<Dh013>),
}

/// Why a coder is another than was asked for. Never silent: hosts show it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fallback {
    /// Bits per value that the calibration would have gained; too few.
    pub gain_bits: f64,
}

/// Encodes and decodes vectors of one length with one codec. Any number of threads may use it at a time.
#[derive(Debug, Clone)]
pub struct Coder {
    spec: Spec,
    body: Body,
    calibration: u32,
    fallback: Option<Fallback>,
}

impl Coder {
    /// A coder for every codec but `spectral`.
    ///
    /// # Errors
    /// `Invalid`: `spectral` without its calibration.
    pub fn new(spec: Spec) -> Result<Self> {
        let (bits, dim) = (spec.rate.whole(), spec.dim);
        let body = match spec.codec {
            Codec::Q8_0 => Body::Blocks(Blocks::Q8_0),
            Codec::Q4_0 => Body::Blocks(Blocks::Q4_0),
            Codec::Tq => Body::Scalar(Box::new(Scalar::new(
                Rotation::Hadamard(Hadamard::new(dim)),
                bits,
                dim,
            ))),
            Codec::Rotor => Body::Scalar(Box::new(Scalar::new(
                Rotation::Rotors(Rotors::new(dim)),
                bits,
                dim,
            ))),
            Codec::TqEc => Body::Entropy(Box::new(Entropy::new(spec.rate.as_f64(), dim))),
            Codec::Tcq => Body::Trellis(Box::new(Tcq::new(bits, dim))),
            Codec::Dh013 => Body::Dh013(Box::new(Dh013::new(bits, dim))),
            Codec::Spectral => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "spectral needs a calibration: make one from vectors that will not be coded with it",
                ));
            }
        };
        Ok(Self {
            spec,
            body,
            calibration: 0,
            fallback: None,
        })
    }

    /// A `spectral` coder for exactly this calibration: what a decoder needs.
    ///
    /// # Errors
    /// `Invalid`: another length, or another codec.
    pub fn with_calibration(spec: Spec, calibration: &Calibration) -> Result<Self> {
        if spec.codec != Codec::Spectral || calibration.dim != spec.dim {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{spec}: the calibration is for spectral and vectors of {} values",
                    calibration.dim
                ),
            ));
        }
        Ok(Self {
            spec,
            body: Body::Spectral(Box::new(Spectral::new(calibration, spec.rate.whole()))),
            calibration: calibration.id(),
            fallback: None,
        })
    }

    /// Calibrates `spectral` on a sample of vectors. The basis is made from three quarters of it; where it does not save
    /// [`calibration::GAIN_MIN_BITS`] against `tq` on the rest, the coder is a `tq` of the same rate and
    /// [`Self::fallback`] says so.
    ///
    /// # Errors
    /// `Invalid`: too few vectors, or lengths that do not fit.
    pub fn calibrated(spec: Spec, sample: &[f32]) -> Result<(Self, Option<Calibration>)> {
        let vectors = sample.len() / spec.dim.max(1);
        let (fit, check) = sample.split_at(vectors * 3 / 4 * spec.dim);
        let calibration = Calibration::fit(fit, spec.dim)?;
        let coder = Self::with_calibration(spec, &calibration)?;
        let mut plain = Self::new(Spec::new(Codec::Tq, spec.rate, spec.dim)?)?;
        let finite: Vec<f32> = check
            .chunks_exact(spec.dim)
            .filter(|vector| vector.iter().all(|value| value.is_finite()))
            .flatten()
            .copied()
            .collect();
        let error = |coder: &Self| -> Result<f64> {
            let back = coder.decode(&coder.encode(Values::F32(&finite))?)?;
            Ok(quality::compare(&finite, &back, spec.dim).mse)
        };
        let (with, without) = (error(&coder)?, error(&plain)?);
        let gain_bits = if with > 0.0 && without > 0.0 {
            0.5 * (without / with).log2()
        } else {
            0.0
        };
        if gain_bits >= calibration::GAIN_MIN_BITS {
            return Ok((coder, Some(calibration)));
        }
        plain.fallback = Some(Fallback { gain_bits });
        Ok((plain, None))
    }

    /// What it writes: after a fallback another codec than was asked for.
    #[must_use]
    pub const fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Set where the codec is not the one that was asked for.
    #[must_use]
    pub const fn fallback(&self) -> Option<Fallback> {
        self.fallback
    }

    /// Bits that `spectral` gives to each direction.
    #[must_use]
    pub fn widths(&self) -> Option<&[u8]> {
        match &self.body {
            Body::Spectral(spectral) => Some(spectral.widths()),
            _ => None,
        }
    }

    /// Bytes of a vector, where each has the same: all but `tq-ec`.
    #[must_use]
    pub fn record_bytes(&self) -> Option<usize> {
        match &self.body {
            Body::Blocks(blocks) => Some(blocks.record_bytes(self.spec.dim)),
            Body::Scalar(scalar) => Some(scalar.record_bytes()),
            Body::Trellis(tcq) => Some(tcq.record_bytes()),
            Body::Spectral(spectral) => Some(spectral.record_bytes()),
            Body::Dh013(dh013) => Some(dh013.record_bytes()),
            Body::Entropy(_) => None,
        }
    }

    /// The most bytes that a frame of `count` vectors can have, whatever is in them.
    #[must_use]
    pub fn bound_bytes(&self, count: usize) -> usize {
        let verbatim = 4 + 4 * self.spec.dim;
        // An entropy-coded value takes at most 16 bits, a scale 3 bytes.
        let record = self.record_bytes().unwrap_or(2 * self.spec.dim + 3);
        frame::HEAD_BYTES + 64 + count * (record + verbatim)
    }

    fn spare_len(&self) -> usize {
        match &self.body {
            Body::Dh013(dh013) => dh013.padded(),
            _ => self.spec.dim,
        }
    }

    /// Encodes vectors to a frame.
    ///
    /// # Errors
    /// `Invalid`: not a whole number of vectors, or more than 2^24.
    pub fn encode(&self, values: Values<'_>) -> Result<Vec<u8>> {
        let dim = self.spec.dim;
        let count = values.len() / dim;
        if !values.len().is_multiple_of(dim) || count > COUNT_MAX {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{} values are not a number of vectors of {dim} up to {COUNT_MAX}",
                    values.len()
                ),
            ));
        }
        let mut out = frame::begin(&self.spec, count, self.calibration);
        let mut verbatim = Verbatim::default();
        if let Body::Entropy(entropy) = &self.body {
            let mut original = vec![0.0; dim];
            let refuse = |index| {
                values.vector(index, &mut original);
                verbatim.keep(index, &original);
            };
            entropy.encode(count, |index, x| values.vector(index, x), refuse, &mut out);
        } else {
            self.encode_records(values, count, &mut out, &mut verbatim);
        }
        Ok(frame::seal(out, &verbatim))
    }

    fn encode_records(
        &self,
        values: Values<'_>,
        count: usize,
        out: &mut Vec<u8>,
        verbatim: &mut Verbatim,
    ) {
        let record_bytes = self.record_bytes().unwrap_or(0);
        let from = out.len();
        out.resize(from + count * record_bytes, 0);
        let mut x = vec![0.0; self.spec.dim];
        let mut spare = Spare::new(self.spare_len());
        let mut search = matches!(self.body, Body::Trellis(_)).then(|| Search::new(self.spec.dim));
        for (index, record) in out[from..].chunks_exact_mut(record_bytes).enumerate() {
            values.vector(index, &mut x);
            let held = match (&self.body, &mut search) {
                (Body::Blocks(blocks), _) => blocks.encode(&x, record),
                (Body::Scalar(scalar), _) => scalar.encode(&mut x, record, &mut spare),
                (Body::Spectral(spectral), _) => spectral.encode(&mut x, record, &mut spare),
                (Body::Dh013(dh013), _) => dh013.encode(&x, record, &mut spare),
                (Body::Trellis(tcq), Some(search)) => {
                    tcq.encode(&mut x, record, &mut spare, search)
                }
                (Body::Trellis(_) | Body::Entropy(_), _) => false,
            };
            if !held {
                record.fill(0);
                values.vector(index, &mut x);
                verbatim.keep(index, &x);
            }
        }
    }

    /// Decodes a frame of this coder's codec, rate, length and calibration.
    ///
    /// # Errors
    /// `Invalid`: another coder's frame. `Format`, `Truncated`, `Checksum`: no frame, or a damaged one.
    pub fn decode(&self, bytes: &[u8]) -> Result<Vec<f32>> {
        let frame = self.open(bytes)?;
        let mut out = vec![0.0; frame.count * self.spec.dim];
        self.decode_frame(&frame, &mut out)?;
        Ok(out)
    }

    /// As [`Self::decode`], to memory of exactly the right length.
    ///
    /// # Errors
    /// As `decode`; `Invalid` for another length.
    pub fn decode_into(&self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        let frame = self.open(bytes)?;
        if out.len() != frame.count * self.spec.dim {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the frame holds {} values, there is room for {}",
                    frame.count * self.spec.dim,
                    out.len()
                ),
            ));
        }
        self.decode_frame(&frame, out)
    }

    fn open<'a>(&self, bytes: &'a [u8]) -> Result<Frame<'a>> {
        let frame = frame::open(bytes)?;
        if frame.spec != self.spec || frame.calibration != self.calibration {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the frame is {} (calibration {:08x}), the coder {} ({:08x})",
                    frame.spec, frame.calibration, self.spec, self.calibration
                ),
            ));
        }
        // Before memory is asked for: the body must be long enough for the vectors that the head claims.
        let fits = match (&self.body, self.record_bytes()) {
            (Body::Entropy(entropy), _) => frame.count <= entropy.count_max(frame.body.len()),
            (_, record) => Some(frame.body.len()) == record.map(|record| frame.count * record),
        };
        if !fits {
            return Err(Error::new(
                ErrorKind::Truncated,
                format!(
                    "KV frame: {} bytes cannot be the {} vectors its head claims",
                    frame.body.len(),
                    frame.count
                ),
            ));
        }
        Ok(frame)
    }

    fn decode_frame(&self, frame: &Frame<'_>, out: &mut [f32]) -> Result<()> {
        let mut spare = Spare::new(self.spare_len());
        if let Body::Entropy(entropy) = &self.body {
            entropy.decode(frame.body, out)?;
        } else {
            let record_bytes = self.record_bytes().unwrap_or(1);
            for (record, vector) in frame
                .body
                .chunks_exact(record_bytes)
                .zip(out.chunks_exact_mut(self.spec.dim))
            {
                match &self.body {
                    Body::Blocks(blocks) => blocks.decode(record, vector),
                    Body::Scalar(scalar) => scalar.decode(record, vector, &mut spare),
                    Body::Trellis(tcq) => tcq.decode(record, vector, &mut spare),
                    Body::Spectral(spectral) => spectral.decode(record, vector, &mut spare),
                    Body::Dh013(dh013) => dh013.decode(record, vector, &mut spare),
                    Body::Entropy(_) => {}
                }
            }
        }
        for (index, values) in frame.verbatim() {
            for (value, kept) in out[index * self.spec.dim..].iter_mut().zip(values) {
                *value = kept;
            }
        }
        Ok(())
    }
}
