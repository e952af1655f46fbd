//! `tq-ec`: rotate, round to uniform steps, entropy-code the steps of all vectors of a frame in one stream.
//!
//! For KV on disk: no vector can be read without those before it. The step is set so that a rotated coordinate takes
//! `rate` bits. Body: lowest scale code u16, dropped bits u8, width u8; scales as differences of `width` bits (0: the
//! vector is zero); the stream. A scale keeps as many bits as its error may weigh against the quantiser's.

use super::bits::{Reader, Writer};
use super::math::Density;
use super::rans::Model;
use super::rotate::Hadamard;
use super::scalar::Spare;
use super::scale;
use super::vector::{dot, length};
use crate::error::{Error, ErrorKind, Result};

const HEAD_BYTES: usize = 4;
/// The squared error of a scale may be this share of the quantiser's.
const SCALE_SHARE: f64 = 1.0 / 500.0;

/// The codec for one rate and length.
#[derive(Debug, Clone)]
pub struct Entropy {
    rotation: Hadamard,
    model: Model,
    dim: usize,
    dropped: u32,
}

impl Entropy {
    /// With `rate` bits from 1 to 8 per value.
    #[must_use]
    pub fn new(rate: f64, dim: usize) -> Self {
        let model = Model::new(&Density::sphere(dim), rate);
        // A scale code is at most 2^-10 of the scale; uniform errors have a twelfth of the square of their width.
        let allowed = (model.step * model.step * SCALE_SHARE).sqrt();
        let mut dropped = 0;
        while dropped < 6 && f64::from(2u32 << dropped) / 1024.0 <= allowed {
            dropped += 1;
        }
        Self {
            rotation: Hadamard::new(dim),
            model,
            dim,
            dropped,
        }
    }

    /// Rotates a vector and gives a symbol per value and the scale's code without its dropped bits, 0 for a vector that
    /// is zero; `None` where it cannot be held.
    fn quantise(&self, x: &mut [f32], symbols: &mut Vec<u16>, spare: &mut Spare) -> Option<u32> {
        let norm = length(x)?;
        let deviation = norm / (self.dim as f32).sqrt();
        self.rotation.forward(x, &mut spare.values);
        let per_step = if norm > 0.0 {
            (1.0 / self.model.step) as f32 / deviation
        } else {
            0.0
        };
        let (centre, last) = (self.model.centre as i32, self.model.values.len() as i32 - 1);
        let first = symbols.len();
        for (value, level) in x.iter().zip(&mut spare.values) {
            let symbol = (value * per_step).round() as i32 + centre;
            if !(0..=last).contains(&symbol) {
                symbols.truncate(first);
                return None;
            }
            *level = self.model.values[symbol as usize];
            symbols.push(symbol as u16);
        }
        let energy = dot(&spare.values, &spare.values);
        let fit = if energy > 0.0 {
            dot(x, &spare.values) / energy
        } else {
            0.0
        };
        let code = scale::encode(fit)
            .map(|code| (u32::from(code) + (1 << self.dropped >> 1)) >> self.dropped);
        // Rounding up may leave the range of codes.
        let code = code.filter(|code| code << self.dropped <= 0xffff);
        if code.is_none() {
            symbols.truncate(first);
        }
        code
    }

    /// Encodes vectors: `next` gives each in turn (and what it gives may be overwritten), `refuse` is told the index of
    /// those that cannot be held.
    pub fn encode(
        &self,
        count: usize,
        mut next: impl FnMut(usize, &mut [f32]),
        mut refuse: impl FnMut(usize),
        out: &mut Vec<u8>,
    ) {
        let (mut x, mut spare) = (vec![0.0; self.dim], Spare::new(self.dim));
        let mut symbols = Vec::with_capacity(count * self.dim);
        let mut codes = Vec::with_capacity(count);
        for index in 0..count {
            next(index, &mut x);
            codes.push(
                self.quantise(&mut x, &mut symbols, &mut spare)
                    .unwrap_or_else(|| {
                        refuse(index);
                        symbols.resize(symbols.len() + self.dim, self.model.centre as u16);
                        0
                    }),
            );
        }
        let used = codes.iter().copied().filter(|code| *code > 0);
        let lowest = used.clone().min().unwrap_or(0);
        let widest = used.max().map_or(0, |highest| highest - lowest + 1);
        let width = 32 - widest.leading_zeros();
        out.extend((lowest as u16).to_le_bytes());
        out.extend([self.dropped as u8, width as u8]);
        let from = out.len();
        out.resize(from + (count * width as usize).div_ceil(8), 0);
        let mut writer = Writer::new(&mut out[from..]);
        for code in codes {
            writer.put(if code == 0 { 0 } else { code - lowest + 1 }, width);
        }
        writer.finish();
        out.extend(self.model.encode(&symbols));
    }

    /// The most vectors that a body of so many bytes can stand for: what a hostile head may claim.
    #[must_use]
    pub fn count_max(&self, body_bytes: usize) -> usize {
        (body_bytes as f64 * 8.0 / (self.model.least_bits() * self.dim as f64)) as usize
    }

    /// Decodes a body into `out`, whose length says how many vectors there are.
    ///
    /// # Errors
    /// `Format`: the body is not what [`Self::encode`] writes.
    pub fn decode(&self, body: &[u8], out: &mut [f32]) -> Result<()> {
        let count = out.len() / self.dim;
        let wrong = || {
            Error::new(
                ErrorKind::Format,
                "KV frame: the scales of its vectors are cut short or impossible",
            )
        };
        let head: [u8; HEAD_BYTES] = body
            .get(..HEAD_BYTES)
            .and_then(|head| head.try_into().ok())
            .ok_or_else(wrong)?;
        let lowest = u32::from(u16::from_le_bytes([head[0], head[1]]));
        let width = u32::from(head[3]);
        if u32::from(head[2]) != self.dropped || width > 17 {
            return Err(wrong());
        }
        let scale_bytes = (count * width as usize).div_ceil(8);
        let packed = body
            .get(HEAD_BYTES..HEAD_BYTES + scale_bytes)
            .ok_or_else(wrong)?;
        let mut symbols = vec![0; out.len()];
        self.model
            .decode(&body[HEAD_BYTES + scale_bytes..], &mut symbols)?;
        let mut reader = Reader::new(packed);
        let mut spare = Spare::new(self.dim);
        for (vector, symbols) in out
            .chunks_exact_mut(self.dim)
            .zip(symbols.chunks_exact(self.dim))
        {
            let code = match reader.take(width) {
                0 => 0,
                difference => (lowest + difference - 1) << self.dropped,
            };
            let scale = scale::decode(u16::try_from(code).map_err(|_| wrong())?);
            for (value, symbol) in vector.iter_mut().zip(symbols) {
                *value = self.model.values[*symbol as usize] * scale;
            }
            self.rotation.inverse(vector, &mut spare.values);
        }
        Ok(())
    }
}
