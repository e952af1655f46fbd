//! Writes GGUF version 3, little-endian: metadata, tensor infos, and the data section tensor by tensor.
//!
//! The counterpart of `model::gguf`. [`write_header`] alone makes the header of a file that exists only in parts (a
//! split model seen as one); [`Writer`] streams a whole file and holds nothing of the data. Invariant: a tensor's data
//! begins at the offset its info names, and has exactly the length that was announced, or the writer fails.

use std::io::Write;

use crate::error::{Error, ErrorKind, Result};
use crate::units::align_up;

/// The alignment of the data section where `general.alignment` is not set.
pub const ALIGNMENT_BYTES: u64 = 32;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// ggml's limit: a name field holds 64 bytes with its terminator.
const NAME_BYTES_MAX: usize = 63;
/// ggml's limit.
const DIMS_MAX: usize = 4;

/// A metadata value. Only the types that models use in practice are here.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An 8-bit count.
    U8(u8),
    /// A 16-bit count (`split.no`, `split.count`).
    U16(u16),
    /// A 32-bit count: most hyperparameters.
    U32(u32),
    /// A signed 32-bit number (`split.tensors.count`).
    I32(i32),
    /// A 64-bit count.
    U64(u64),
    /// A real number.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// Text, UTF-8.
    Text(String),
    /// A list of texts: the vocabulary, BPE merges.
    Texts(Vec<String>),
    /// A list of signed numbers: token types.
    I32s(Vec<i32>),
    /// A list of reals: token scores.
    F32s(Vec<f32>),
}

impl Value {
    /// The number of the type in the file.
    const fn number(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::U16(_) => 2,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Texts(_) | Self::I32s(_) | Self::F32s(_) => 9,
            Self::U64(_) => 10,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(value) => out.push(*value),
            Self::U16(value) => out.extend(value.to_le_bytes()),
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::I32(value) => out.extend(value.to_le_bytes()),
            Self::U64(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Bool(value) => out.push(u8::from(*value)),
            Self::Text(value) => text(out, value),
            Self::Texts(values) => {
                array_head(out, 8, values.len());
                values.iter().for_each(|value| text(out, value));
            }
            Self::I32s(values) => {
                array_head(out, 5, values.len());
                values
                    .iter()
                    .for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::F32s(values) => {
                array_head(out, 6, values.len());
                values
                    .iter()
                    .for_each(|value| out.extend(value.to_le_bytes()));
            }
        }
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn array_head(out: &mut Vec<u8>, element: u32, count: usize) {
    out.extend(element.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
}

/// The key/value region of a header, encoded as it is filled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    bytes: Vec<u8>,
    count: u64,
}

impl Metadata {
    /// No keys.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A region as it stands in an existing file: `count` keys in these bytes.
    #[must_use]
    pub const fn from_raw(bytes: Vec<u8>, count: u64) -> Self {
        Self { bytes, count }
    }

    /// Adds a key. Keys must be different: readers refuse a file that says something twice.
    pub fn set(&mut self, key: impl AsRef<str>, value: &Value) -> &mut Self {
        text(&mut self.bytes, key.as_ref());
        self.bytes.extend(value.number().to_le_bytes());
        value.encode(&mut self.bytes);
        self.count += 1;
        self
    }
}

/// What the header says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// `blk.3.ffn_up.weight`.
    pub name: String,
    /// ggml order: elements of a row first; one to four dimensions.
    pub shape: Vec<u64>,
    /// The type's number in ggml.
    pub ggml_type: u32,
    /// From the start of the data section; a multiple of the alignment.
    pub offset_bytes: u64,
}

/// A complete header, padded so that the data section begins at its end.
///
/// # Errors
/// `Invalid`: a name or shape ggml cannot hold, an offset off the alignment, an alignment that is no power of two.
pub fn write_header(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    alignment_bytes: u64,
) -> Result<Vec<u8>> {
    if !alignment_bytes.is_power_of_two() {
        return Err(invalid(format!(
            "an alignment of {alignment_bytes} bytes is not a power of two"
        )));
    }
    let mut out = Vec::with_capacity(metadata.bytes.len() + 96 * tensors.len() + 64);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(metadata.count.to_le_bytes());
    out.extend(&metadata.bytes);
    for tensor in tensors {
        check(tensor, alignment_bytes)?;
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for elements in &tensor.shape {
            out.extend(elements.to_le_bytes());
        }
        out.extend(tensor.ggml_type.to_le_bytes());
        out.extend(tensor.offset_bytes.to_le_bytes());
    }
    let padded = align_up(out.len() as u64, alignment_bytes)
        .ok_or_else(|| invalid("the header is too long".to_owned()))?;
    out.resize(padded as usize, 0);
    Ok(out)
}

fn check(tensor: &TensorInfo, alignment_bytes: u64) -> Result<()> {
    let TensorInfo { name, shape, .. } = tensor;
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(invalid(format!(
            "tensor name '{name}' has {} bytes; ggml takes 1 to {NAME_BYTES_MAX}",
            name.len()
        )));
    }
    if shape.is_empty() || shape.len() > DIMS_MAX || shape.contains(&0) {
        return Err(invalid(format!(
            "tensor {name} has the shape {shape:?}; ggml takes one to {DIMS_MAX} dimensions, none of them 0"
        )));
    }
    if !tensor.offset_bytes.is_multiple_of(alignment_bytes) {
        return Err(invalid(format!(
            "tensor {name} at offset {} is not aligned to {alignment_bytes} bytes",
            tensor.offset_bytes
        )));
    }
    Ok(())
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::Invalid, context)
}

/// Offsets of tensors of these lengths, one behind the other, and the length of the whole data section (padded, as
/// every tensor is).
///
/// # Errors
/// `Invalid` when the sum passes 2^64.
pub fn place(
    lens_bytes: impl IntoIterator<Item = u64>,
    alignment_bytes: u64,
) -> Result<(Vec<u64>, u64)> {
    let mut end = 0_u64;
    let mut offsets = Vec::new();
    for len_bytes in lens_bytes {
        offsets.push(end);
        end = end
            .checked_add(len_bytes)
            .and_then(|sum| align_up(sum, alignment_bytes))
            .ok_or_else(|| invalid("the tensors together pass 2^64 bytes".to_owned()))?;
    }
    Ok((offsets, end))
}

/// Streams one file: the header first, then each tensor's bytes in order.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    /// Name, length and padding of each tensor, in file order.
    expected: Vec<(String, u64, u64)>,
    next: usize,
    written_bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header for tensors `(info, length)`; the infos' offsets are set here.
    ///
    /// # Errors
    /// As [`write_header`]; or the output cannot be written.
    pub fn new(
        mut out: W,
        metadata: &Metadata,
        tensors: Vec<(TensorInfo, u64)>,
        alignment_bytes: u64,
    ) -> Result<Self> {
        let (offsets, end_bytes) = place(tensors.iter().map(|(_, len)| *len), alignment_bytes)?;
        let mut infos = Vec::with_capacity(tensors.len());
        let mut expected = Vec::with_capacity(tensors.len());
        for (index, (mut info, len_bytes)) in tensors.into_iter().enumerate() {
            let next_bytes = offsets.get(index + 1).copied().unwrap_or(end_bytes);
            info.offset_bytes = offsets[index];
            let padding_bytes = next_bytes - offsets[index] - len_bytes;
            expected.push((info.name.clone(), len_bytes, padding_bytes));
            infos.push(info);
        }
        let header = write_header(metadata, &infos, alignment_bytes)?;
        put(&mut out, &header)?;
        Ok(Self {
            out,
            expected,
            next: 0,
            written_bytes: 0,
        })
    }

    /// Appends bytes of the tensor whose turn it is; its last byte brings on the padding and the next tensor.
    ///
    /// # Errors
    /// `Invalid` when the bytes run past the tensor's end; or the output cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some((name, len_bytes, padding_bytes)) = self.expected.get(self.next) else {
            return Err(invalid("data behind the last tensor".to_owned()));
        };
        let end = self.written_bytes + bytes.len() as u64;
        if end > *len_bytes {
            return Err(invalid(format!(
                "tensor {name} was announced with {len_bytes} bytes and given {end}"
            )));
        }
        put(&mut self.out, bytes)?;
        self.written_bytes = end;
        if end == *len_bytes {
            put(&mut self.out, &vec![0; *padding_bytes as usize])?;
            self.next += 1;
            self.written_bytes = 0;
        }
        Ok(())
    }

    /// The output, once every tensor is complete.
    ///
    /// # Errors
    /// `Invalid` when a tensor lacks bytes.
    pub fn finish(self) -> Result<W> {
        match self.expected.get(self.next) {
            None => Ok(self.out),
            Some((name, len_bytes, _)) => Err(invalid(format!(
                "tensor {name} has {} of its {len_bytes} bytes",
                self.written_bytes
            ))),
        }
    }
}

fn put(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes)
        .map_err(|error| Error::from_io(&error, "write the GGUF file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: name.to_owned(),
            shape: shape.to_vec(),
            ggml_type: 0,
            offset_bytes: 0,
        }
    }

    /// Every byte of a small file, by hand from the specification.
    #[test]
    fn bytes_are_those_of_the_specification() {
        let mut metadata = Metadata::new();
        metadata.set("a", &Value::U32(7));
        metadata.set("b", &Value::Texts(vec!["xy".to_owned()]));
        let header = write_header(&metadata, &[info("t", &[3, 2])], 32).unwrap();
        let mut expected = Vec::new();
        expected.extend(b"GGUF\x03\0\0\0");
        expected.extend(1_u64.to_le_bytes());
        expected.extend(2_u64.to_le_bytes());
        expected.extend(b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x07\0\0\0");
        expected.extend(b"\x01\0\0\0\0\0\0\0b\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0");
        expected.extend(b"\x02\0\0\0\0\0\0\0xy");
        expected.extend(b"\x01\0\0\0\0\0\0\0t\x02\0\0\0");
        expected.extend(3_u64.to_le_bytes());
        expected.extend(2_u64.to_le_bytes());
        expected.extend(b"\0\0\0\0");
        expected.extend(0_u64.to_le_bytes());
        expected.resize(expected.len().next_multiple_of(32), 0);
        assert_eq!(header, expected);
    }

    #[test]
    fn every_tensor_begins_where_its_info_says() {
        let tensors = vec![(info("a", &[5]), 20), (info("b", &[16]), 64)];
        let header_bytes = {
            let (offsets, _) = place([20, 64], 64).unwrap();
            assert_eq!(offsets, [0, 64]);
            let mut infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
            infos[1].offset_bytes = 64;
            write_header(&Metadata::new(), &infos, 64).unwrap().len()
        };
        let mut writer = Writer::new(Vec::new(), &Metadata::new(), tensors, 64).unwrap();
        writer.write(&[1; 12]).unwrap();
        writer.write(&[1; 8]).unwrap();
        writer.write(&[2; 64]).unwrap();
        let file = writer.finish().unwrap();
        assert_eq!(file.len(), header_bytes + 128);
        assert_eq!(file[header_bytes..header_bytes + 20], [1; 20]);
        assert_eq!(file[header_bytes + 20..header_bytes + 64], [0; 44]);
        assert_eq!(file[header_bytes + 64..], [2; 64]);
    }

    #[test]
    fn too_many_and_too_few_bytes_are_errors() {
        let tensors = vec![(info("a", &[1]), 4)];
        let mut writer = Writer::new(Vec::new(), &Metadata::new(), tensors, 32).unwrap();
        assert!(writer.write(&[0; 5]).is_err());
        writer.write(&[0; 3]).unwrap();
        let message = writer.finish().unwrap_err().to_string();
        assert_eq!(message, "tensor a has 3 of its 4 bytes");
    }

    #[test]
    fn what_ggml_cannot_hold_is_refused() {
        for bad in [
            info("", &[1]),
            info(&"n".repeat(64), &[1]),
            info("t", &[]),
            info("t", &[1, 0]),
            info("t", &[1, 1, 1, 1, 1]),
            TensorInfo {
                offset_bytes: 16,
                ..info("t", &[1])
            },
        ] {
            assert!(
                write_header(&Metadata::new(), std::slice::from_ref(&bad), 32).is_err(),
                "{bad:?}"
            );
        }
        assert!(write_header(&Metadata::new(), &[], 48).is_err());
        assert!(place([u64::MAX - 8, 64], 32).is_err());
    }
}
