//! The file that llama.cpp is shown: for a single GGUF the file itself, for a split one a *virtual single file*, because
//! llama.cpp's loader takes splits only by path. Its header has a preamble of its own, the first shard's key/value region
//! as it stands (split.* keys are ignored by that loader) and all shards' tensor infos at new offsets; behind it every
//! tensor's bytes stay where they are, reached through a table of parts. Invariant: parts are sorted and disjoint, what
//! lies between them is padding. Pure arithmetic: no byte of a weight passes through here.
//! Stands beside the last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use crate::error::{Error, ErrorKind, Result};
use crate::model::TensorInfo;
use crate::model::gguf::ShardHeader;
use crate::units::{Extent, align_up};

/// Where a byte of the virtual file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'a> {
    /// Bytes made here.
    Made(&'a [u8]),
    /// A shard.
    Shard(Extent),
    /// Padding: this many zeros.
    Zeros(u64),
}

#[derive(Debug)]
enum Content {
    Made(Vec<u8>),
    Shard(Extent),
}

#[derive(Debug)]
struct Part {
    start_bytes: u64,
    content: Content,
}

/// What llama.cpp is shown as one file.
#[derive(Debug, Default)]
pub struct VirtualFile {
    parts: Vec<Part>,
    len_bytes: u64,
}

impl VirtualFile {
    /// A single file, as it is.
    #[must_use]
    pub fn plain(len_bytes: u64) -> Self {
        let mut file = Self::default();
        file.push(Content::Shard(Extent {
            shard_index: 0,
            offset_bytes: 0,
            len_bytes,
        }));
        file
    }

    /// The shards of one model, in order, as one file.
    ///
    /// # Errors
    /// `Format` where the sizes do not add up or a tensor has a type ggml does not know.
    pub fn joined(shards: &[ShardHeader]) -> Result<Self> {
        let first = shards
            .first()
            .ok_or_else(|| Error::new(ErrorKind::Format, "a split model without shards"))?;
        let tensors = || {
            shards.iter().enumerate().flat_map(|(index, shard)| {
                shard.tensors.iter().map(move |info| (index as u32, info))
            })
        };
        let mut infos = Vec::new();
        let mut offsets = Vec::new();
        let mut next_bytes = 0_u64;
        for (_, info) in tensors() {
            write_info(&mut infos, info, next_bytes)?;
            offsets.push(next_bytes);
            next_bytes = next_bytes
                .checked_add(info.len_bytes)
                .and_then(|end| align_up(end, first.alignment_bytes))
                .ok_or_else(too_large)?;
        }
        let mut file = Self::default();
        file.push(Content::Made(preamble(first, offsets.len() as u64)));
        file.push(Content::Shard(Extent {
            shard_index: 0,
            offset_bytes: first.metadata_range.start,
            len_bytes: first.metadata_range.end - first.metadata_range.start,
        }));
        file.push(Content::Made(infos));
        let data_bytes = align_up(file.len_bytes, first.alignment_bytes).ok_or_else(too_large)?;
        for ((shard_index, info), offset_bytes) in tensors().zip(offsets) {
            file.len_bytes = data_bytes.checked_add(offset_bytes).ok_or_else(too_large)?;
            file.push(Content::Shard(Extent {
                shard_index,
                offset_bytes: info.offset_bytes,
                len_bytes: info.len_bytes,
            }));
        }
        file.len_bytes = data_bytes.checked_add(next_bytes).ok_or_else(too_large)?;
        Ok(file)
    }

    /// Puts a part at the end.
    fn push(&mut self, content: Content) {
        let part = Part {
            start_bytes: self.len_bytes,
            content,
        };
        self.len_bytes = self.len_bytes.saturating_add(part.len_bytes());
        if part.len_bytes() > 0 {
            self.parts.push(part);
        }
    }

    /// The length llama.cpp sees.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Where the bytes from `offset_bytes` come from, as far as one source reaches and `len_bytes` asks; `None` at the end.
    #[must_use]
    pub fn source(&self, offset_bytes: u64, len_bytes: u64) -> Option<Source<'_>> {
        let len_bytes = len_bytes.min(self.len_bytes.checked_sub(offset_bytes)?);
        if len_bytes == 0 {
            return None;
        }
        let next = self
            .parts
            .partition_point(|part| part.start_bytes <= offset_bytes);
        if let Some(part) = next.checked_sub(1).map(|index| &self.parts[index]) {
            let inside = offset_bytes - part.start_bytes;
            if inside < part.len_bytes() {
                return Some(part.source(inside, len_bytes.min(part.len_bytes() - inside)));
            }
        }
        let gap_end_bytes = self
            .parts
            .get(next)
            .map_or(self.len_bytes, |part| part.start_bytes);
        Some(Source::Zeros(len_bytes.min(gap_end_bytes - offset_bytes)))
    }
}

impl Part {
    const fn len_bytes(&self) -> u64 {
        match &self.content {
            Content::Made(bytes) => bytes.len() as u64,
            Content::Shard(extent) => extent.len_bytes,
        }
    }

    fn source(&self, inside: u64, len_bytes: u64) -> Source<'_> {
        match &self.content {
            Content::Made(bytes) => {
                Source::Made(&bytes[inside as usize..(inside + len_bytes) as usize])
            }
            Content::Shard(extent) => Source::Shard(Extent {
                shard_index: extent.shard_index,
                offset_bytes: extent.offset_bytes + inside,
                len_bytes,
            }),
        }
    }
}

fn preamble(first: &ShardHeader, tensor_count: u64) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend_from_slice(&first.version.to_le_bytes());
    bytes.extend_from_slice(&tensor_count.to_le_bytes());
    bytes.extend_from_slice(&first.key_count.to_le_bytes());
    bytes
}

fn write_info(bytes: &mut Vec<u8>, info: &TensorInfo, offset_bytes: u64) -> Result<()> {
    let number = info.dtype.ggml_number().ok_or_else(|| {
        Error::new(
            ErrorKind::Format,
            format!(
                "tensor {} has the type {}, which ggml does not know",
                info.name,
                info.dtype.name()
            ),
        )
    })?;
    bytes.extend_from_slice(&(info.name.len() as u64).to_le_bytes());
    bytes.extend_from_slice(info.name.as_bytes());
    bytes.extend_from_slice(&info.dims.to_le_bytes());
    for elements in &info.shape[..info.dims.min(4) as usize] {
        bytes.extend_from_slice(&elements.to_le_bytes());
    }
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&offset_bytes.to_le_bytes());
    Ok(())
}

fn too_large() -> Error {
    Error::new(
        ErrorKind::Format,
        "the shards together are larger than a file can be",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset_bytes: u64, len_bytes: u64) -> Extent {
        Extent {
            shard_index: 0,
            offset_bytes,
            len_bytes,
        }
    }

    #[test]
    fn a_single_file_is_shown_as_it_is() {
        let file = VirtualFile::plain(100);
        assert_eq!(file.source(40, 1000), Some(Source::Shard(extent(40, 60))));
        assert_eq!(file.source(100, 1), None);
        assert_eq!(file.source(101, 1), None);
    }

    #[test]
    fn parts_are_found_and_gaps_are_zeros() {
        let mut file = VirtualFile::default();
        file.push(Content::Made(b"head".to_vec()));
        file.len_bytes = 32;
        file.push(Content::Shard(extent(1000, 8)));
        file.len_bytes = 64;
        assert_eq!(file.source(1, 2), Some(Source::Made(b"ea")));
        assert_eq!(file.source(4, 100), Some(Source::Zeros(28)));
        assert_eq!(file.source(34, 100), Some(Source::Shard(extent(1002, 6))));
        assert_eq!(file.source(40, 100), Some(Source::Zeros(24)));
    }
}
