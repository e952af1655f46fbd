//! Packs a GGUF model: one file, tensors in the order of their use, each on a page of its own.
//!
//! The result is a GGUF like any other: the same tensors, the same keys in the same order but `general.alignment` (4096)
//! and, where parts are joined, without `split.*`. Tensors a host keeps come first, then each layer as one run from its
//! first use to its last. Layers are aligned to 4 KiB and not to 2 MiB: llama.cpp takes a file only when every tensor
//! begins where the one before ends (padded to the alignment), and only when it knows every tensor, so a gap could be
//! neither left out nor named; an alignment of 2 MiB for all would add half of that per tensor (5 % of a 13B model), all
//! of it read again for every token. Invariant: the output is there completely or not at all.
//! Place: a tool beside the pipeline; it uses `file` and `catalog`.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::gguf_write::{Metadata, TensorInfo, Writer, place, write_header};
use super::synth::file::{OutputFile, check_space, check_target};
use crate::engine::read_catalog;
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::model::{Catalog, Format, gguf};
use crate::units::{MIB, PAGE_4K};

/// Copied at a time.
const STEP_BYTES: u64 = 8 * MIB;
/// The key that says where tensors may begin.
const ALIGNMENT_KEY: &str = "general.alignment";
/// What only the parts of a split model say.
const SPLIT_KEYS: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];
/// GGUF's number of a 32-bit count.
const TYPE_U32: u32 = 4;

/// What to pack.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// The model; of a split one, any part.
    pub model: PathBuf,
    /// The file to write.
    pub output: PathBuf,
    /// Replace what is there.
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Its length.
    pub bytes: u64,
    /// Lengths of the input together.
    pub input_bytes: u64,
    /// Files of the input.
    pub files_count: usize,
    /// Tensors.
    pub tensors_count: usize,
    /// Tensors that stand elsewhere than before, counted in places.
    pub moved_count: usize,
    /// Layers.
    pub layers_count: usize,
    /// How long it took.
    pub seconds: f64,
}

/// Packs `options.model` into `options.output`; `tell` hears done and total bytes.
///
/// # Errors
/// What is wrong with the model; `Unsupported` for safetensors; `Invalid` for an output that exists or is the input;
/// `Refused` when the disk has no room; `Canceled`.
pub fn pack(
    options: &PackOptions,
    stop: &AtomicBool,
    mut tell: impl FnMut(u64, u64),
) -> Result<Packed> {
    let began = Instant::now();
    let (catalog, files) = read_catalog(&options.model)?;
    if !matches!(catalog.format, Format::Gguf(_)) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: only GGUF models can be packed",
                options.model.display()
            ),
        ));
    }
    check_target(&options.output, options.force)?;
    check_not_input(&options.output, &files)?;
    let order = order_of_use(&catalog);
    let metadata = metadata(&files[0], files.len() > 1)?;
    let announced = order
        .iter()
        .map(|&index| announce(&catalog, index))
        .collect::<Result<Vec<_>>>()?;
    let bytes = total_bytes(&metadata, &announced)?;
    check_space(&options.output, bytes)?;
    let output = OutputFile::create(&options.output, bytes, options.force)?;
    let mut writer = Writer::new(output, &metadata, announced, PAGE_4K)?;
    let mut done_bytes = 0;
    let mut piece = vec![0; STEP_BYTES as usize];
    for &index in &order {
        let extent = catalog.tensors[index].extent;
        let file = &files[extent.shard_index as usize];
        let mut offset_bytes = extent.offset_bytes;
        while offset_bytes < extent.end_bytes() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(
                    ErrorKind::Canceled,
                    format!("interrupted; {} is not written", options.output.display()),
                ));
            }
            let len = (extent.end_bytes() - offset_bytes).min(STEP_BYTES) as usize;
            file.read_exact_at(offset_bytes, &mut piece[..len])?;
            writer.write(&piece[..len])?;
            offset_bytes += len as u64;
            done_bytes += len as u64;
            tell(done_bytes, catalog.model_bytes);
        }
    }
    for file in &files {
        file.check_unchanged()?;
    }
    let mut output = writer.finish()?;
    output.sync()?;
    output.commit()?;
    let moved = order
        .iter()
        .enumerate()
        .filter(|(place, index)| place != *index);
    Ok(Packed {
        bytes,
        input_bytes: files.iter().map(ShardFile::len_bytes).sum(),
        files_count: files.len(),
        tensors_count: order.len(),
        moved_count: moved.count(),
        layers_count: catalog.layers.len(),
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Refuses an output that is one of the files it is made of.
pub(super) fn check_not_input(output: &Path, files: &[ShardFile]) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let Ok(there) = std::fs::metadata(output) else {
        return Ok(());
    };
    let same = |file: &&ShardFile| {
        let identity = file.identity();
        (identity.device, identity.inode) == (there.dev(), there.ino())
    };
    match files.iter().find(same) {
        Some(file) => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{} is the model itself ({}); choose another name",
                output.display(),
                file.path().display()
            ),
        )),
        None => Ok(()),
    }
}

/// Indices into the catalog's tensors: what no layer uses first (the host keeps it), then layer by layer by first use.
pub(super) fn order_of_use(catalog: &Catalog) -> Vec<usize> {
    let mut taken = vec![false; catalog.tensors.len()];
    let mut order = Vec::with_capacity(taken.len());
    for (index, tensor) in catalog.tensors.iter().enumerate() {
        if tensor.host_kept {
            taken[index] = true;
            order.push(index);
        }
    }
    for layer in &catalog.layers {
        let mut uses: Vec<_> = layer.uses.iter().collect();
        uses.sort_by_key(|used| {
            (
                used.order,
                used.extent.shard_index,
                used.extent.offset_bytes,
            )
        });
        for used in uses {
            let index = used.tensor_index as usize;
            if !std::mem::replace(&mut taken[index], true) {
                order.push(index);
            }
        }
    }
    order.extend((0..taken.len()).filter(|&index| !taken[index]));
    order
}

fn announce(catalog: &Catalog, index: usize) -> Result<(TensorInfo, u64)> {
    let tensor = &catalog.tensors[index];
    let ggml_type = tensor.dtype.ggml_number().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "tensor {}: GGUF has no type {}",
                tensor.name,
                tensor.dtype.name()
            ),
        )
    })?;
    let info = TensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape[..tensor.dims as usize].to_vec(),
        ggml_type,
        offset_bytes: 0,
    };
    Ok((info, tensor.extent.len_bytes))
}

fn total_bytes(metadata: &Metadata, announced: &[(TensorInfo, u64)]) -> Result<u64> {
    let infos: Vec<TensorInfo> = announced.iter().map(|(info, _)| info.clone()).collect();
    let header_bytes = write_header(metadata, &infos, PAGE_4K)?.len() as u64;
    let (_, data_bytes) = place(announced.iter().map(|(_, len)| *len), PAGE_4K)?;
    header_bytes
        .checked_add(data_bytes)
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "the tensors together pass 2^64 bytes"))
}

/// The keys of the first file as they are, but for the alignment and, where files are joined, what parts say.
fn metadata(file: &ShardFile, joined: bool) -> Result<Metadata> {
    let header = gguf::parse_shard_with_raw_metadata(
        file.path(),
        file.len_bytes(),
        &mut file.header_reader(),
    )?;
    let damaged = || {
        Error::new(
            ErrorKind::Format,
            format!("{}: the keys cannot be walked", file.path().display()),
        )
    };
    let raw = &header.raw_metadata;
    let entries = entries(raw, header.key_count).ok_or_else(damaged)?;
    let mut bytes = Vec::with_capacity(raw.len() + 64);
    let mut count = 0;
    let mut is_aligned = false;
    for (key, range) in entries {
        if joined && SPLIT_KEYS.iter().any(|split| key == split.as_bytes()) {
            continue;
        }
        if key == ALIGNMENT_KEY.as_bytes() {
            alignment_entry(&mut bytes);
            is_aligned = true;
        } else {
            bytes.extend(&raw[range]);
        }
        count += 1;
    }
    if !is_aligned {
        alignment_entry(&mut bytes);
        count += 1;
    }
    Ok(Metadata::from_raw(bytes, count))
}

fn alignment_entry(bytes: &mut Vec<u8>) {
    bytes.extend((ALIGNMENT_KEY.len() as u64).to_le_bytes());
    bytes.extend(ALIGNMENT_KEY.as_bytes());
    bytes.extend(TYPE_U32.to_le_bytes());
    bytes.extend((PAGE_4K as u32).to_le_bytes());
}

/// Each key with the range of its whole entry. `None` where the bytes end early: the parser has read them already, so
/// that is a defect and no damaged file.
fn entries(raw: &[u8], key_count: u64) -> Option<Vec<(&[u8], Range<usize>)>> {
    let mut entries = Vec::new();
    let mut at = 0;
    for _ in 0..key_count {
        let begin = at;
        let key = text(raw, &mut at)?;
        let number = u32_at(raw, &mut at)?;
        skip_value(raw, &mut at, number, 0)?;
        entries.push((key, begin..at));
    }
    (at == raw.len()).then_some(entries)
}

/// Arrays in arrays deeper than this are no metadata; the parser refuses them as well.
const DEPTH_MAX: u32 = 8;

fn skip_value(raw: &[u8], at: &mut usize, number: u32, depth: u32) -> Option<()> {
    let len = match number {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        8 => {
            text(raw, at)?;
            return Some(());
        }
        9 if depth < DEPTH_MAX => {
            let element = u32_at(raw, at)?;
            let count = u64_at(raw, at)?;
            for _ in 0..count {
                skip_value(raw, at, element, depth + 1)?;
            }
            return Some(());
        }
        _ => return None,
    };
    take(raw, at, len).map(|_| ())
}

fn text<'a>(raw: &'a [u8], at: &mut usize) -> Option<&'a [u8]> {
    let len = usize::try_from(u64_at(raw, at)?).ok()?;
    take(raw, at, len)
}

fn u32_at(raw: &[u8], at: &mut usize) -> Option<u32> {
    Some(u32::from_le_bytes(take(raw, at, 4)?.try_into().ok()?))
}

fn u64_at(raw: &[u8], at: &mut usize) -> Option<u64> {
    Some(u64::from_le_bytes(take(raw, at, 8)?.try_into().ok()?))
}

fn take<'a>(raw: &'a [u8], at: &mut usize, len: usize) -> Option<&'a [u8]> {
    let end = at.checked_add(len)?;
    let bytes = raw.get(*at..end)?;
    *at = end;
    Some(bytes)
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
