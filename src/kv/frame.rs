//! The bytes that a coder writes: a head that says what they are, a body, and the vectors that were kept verbatim.
//!
//! Layout, little-endian: `FKV1`, codec u8, 0 u8, dim u16, rate u16 (1/256 bit), 0 u16, count u32, verbatim count u32,
//! calibration u32, checksum u32 (of all bytes but itself); body; per verbatim vector its index u32 and dim x f32.
//! Invariant: [`open`] returns a body and verbatim vectors whose lengths and indices agree with the head, or an error.

use super::spec::{COUNT_MAX, Codec, Rate, Spec};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"FKV1";
/// Bytes of the head.
pub const HEAD_BYTES: usize = 28;
const CHECKSUM_AT: usize = 24;

/// A frame taken apart.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Codec, rate and length of the vectors.
    pub spec: Spec,
    /// How many vectors.
    pub count: usize,
    /// Which calibration; 0 for none.
    pub calibration: u32,
    /// What the codec wrote.
    pub body: &'a [u8],
    verbatim: &'a [u8],
}

/// Vectors that no codec can hold: with a NaN, an infinity, or beyond the range of a scale.
#[derive(Debug, Default)]
pub struct Verbatim {
    bytes: Vec<u8>,
    count: u32,
}

impl Verbatim {
    /// Keeps the vector at `index` as it is.
    pub fn keep(&mut self, index: usize, vector: &[f32]) {
        self.bytes.extend((index as u32).to_le_bytes());
        self.bytes
            .extend(vector.iter().flat_map(|value| value.to_le_bytes()));
        self.count += 1;
    }
}

/// A frame without its body: [`seal`] completes it.
#[must_use]
pub fn begin(spec: &Spec, count: usize, calibration: u32) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    head.extend(MAGIC);
    head.extend([spec.codec as u8, 0]);
    head.extend((spec.dim as u16).to_le_bytes());
    head.extend(spec.rate.0.to_le_bytes());
    head.extend([0; 2]);
    head.extend((count as u32).to_le_bytes());
    head.extend([0; 4]);
    head.extend(calibration.to_le_bytes());
    head.extend([0; 4]);
    head
}

/// Appends the verbatim vectors and writes the checksum.
#[must_use]
pub fn seal(mut frame: Vec<u8>, verbatim: &Verbatim) -> Vec<u8> {
    frame.extend(&verbatim.bytes);
    frame[16..20].copy_from_slice(&verbatim.count.to_le_bytes());
    let sum = checksum(&frame);
    frame[CHECKSUM_AT..HEAD_BYTES].copy_from_slice(&sum.to_le_bytes());
    frame
}

/// Writes the checksum that the bytes ought to have. For tests and fuzzing, which want to get past it.
pub fn reseal(frame: &mut [u8]) {
    if frame.len() >= HEAD_BYTES {
        let sum = checksum(frame);
        frame[CHECKSUM_AT..HEAD_BYTES].copy_from_slice(&sum.to_le_bytes());
    }
}

/// The checksum of a frame; its own place is left out.
fn checksum(frame: &[u8]) -> u32 {
    let mut sum = Sum::default();
    let mut head = [0; 32];
    head[..CHECKSUM_AT].copy_from_slice(&frame[..CHECKSUM_AT]);
    head[CHECKSUM_AT..].copy_from_slice(&(frame.len() as u64).to_le_bytes());
    sum.add_group(&head);
    sum.add(&frame[HEAD_BYTES..]);
    sum.finish()
}

/// FNV-1a over words of 8 bytes in four lanes, folded to 32 bits.
#[derive(Debug)]
pub struct Sum([u64; 4]);

impl Default for Sum {
    fn default() -> Self {
        Self([0xcbf2_9ce4_8422_2325, 1, 2, 3])
    }
}

impl Sum {
    /// Adds bytes and, up to the next multiple of 32, zeros: to be called once.
    pub fn add(&mut self, bytes: &[u8]) {
        let mut groups = bytes.chunks_exact(32);
        groups.by_ref().for_each(|group| self.add_group(group));
        // Also where nothing is left over: so it has been since the format was made.
        let mut padded = [0; 32];
        padded[..groups.remainder().len()].copy_from_slice(groups.remainder());
        self.add_group(&padded);
    }

    fn add_group(&mut self, group: &[u8]) {
        for (lane, word) in self.0.iter_mut().zip(group.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            let mixed = (*lane ^ word).wrapping_mul(0x100_0000_01b3);
            // Without this the highest bits of a word would never reach the lower half.
            *lane = mixed ^ (mixed >> 29);
        }
    }

    /// The sum of what was added.
    #[must_use]
    pub fn finish(&self) -> u32 {
        let hash = self.0.into_iter().fold(0u64, |hash, lane| {
            (hash ^ lane)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(27)
        });
        (hash ^ (hash >> 32)) as u32
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Takes a frame apart.
///
/// # Errors
/// `Format`: not a frame, or its head says something that cannot be. `Truncated`: shorter than its head says.
/// `Checksum`: bytes changed.
pub fn open(bytes: &[u8]) -> Result<Frame<'_>> {
    let wrong = |what: String| Error::new(ErrorKind::Format, format!("KV frame: {what}"));
    if bytes.len() < HEAD_BYTES {
        return Err(Error::new(
            ErrorKind::Truncated,
            format!(
                "KV frame: {} bytes, its head alone has {HEAD_BYTES}",
                bytes.len()
            ),
        ));
    }
    if bytes[..4] != MAGIC {
        return Err(wrong(format!(
            "begins with {:02x?}, not with FKV1",
            &bytes[..4]
        )));
    }
    let codec = Codec::from_number(bytes[4])
        .ok_or_else(|| wrong(format!("codec number {} is unknown", bytes[4])))?;
    let spec = Spec::new(codec, Rate(half(bytes, 8)), usize::from(half(bytes, 6)))
        .map_err(|error| wrong(error.context().to_owned()))?;
    let (count, verbatim) = (word(bytes, 12) as usize, word(bytes, 16) as usize);
    if count > COUNT_MAX || verbatim > count || bytes[5] != 0 || half(bytes, 10) != 0 {
        return Err(wrong(format!(
            "{count} vectors, {verbatim} of them verbatim"
        )));
    }
    let verbatim_bytes = verbatim * (4 + 4 * spec.dim);
    let body_bytes = (bytes.len() - HEAD_BYTES)
        .checked_sub(verbatim_bytes)
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Truncated,
                format!(
                    "KV frame: {} bytes, its verbatim vectors alone have {verbatim_bytes}",
                    bytes.len()
                ),
            )
        })?;
    let (said, is) = (word(bytes, CHECKSUM_AT), checksum(bytes));
    if said != is {
        return Err(Error::new(
            ErrorKind::Checksum,
            format!(
                "KV frame of {} bytes: checksum {is:08x}, written was {said:08x}; it was cut or changed",
                bytes.len()
            ),
        ));
    }
    let (body, verbatim) = bytes[HEAD_BYTES..].split_at(body_bytes);
    let frame = Frame {
        spec,
        count,
        calibration: word(bytes, 20),
        body,
        verbatim,
    };
    if let Some((index, _)) = frame.verbatim().find(|(index, _)| *index >= count) {
        return Err(wrong(format!("verbatim vector {index} of {count}")));
    }
    Ok(frame)
}

impl Frame<'_> {
    /// The vectors that were kept verbatim, with their indices.
    pub fn verbatim(&self) -> impl Iterator<Item = (usize, impl Iterator<Item = f32> + '_)> + '_ {
        self.verbatim
            .chunks_exact(4 + 4 * self.spec.dim)
            .map(|entry| {
                let values = entry[4..]
                    .chunks_exact(4)
                    .map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]]));
                (word(entry, 0) as usize, values)
            })
    }
}
