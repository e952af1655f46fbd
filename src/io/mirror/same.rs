//! What a copy of a model is: files of the same names, lengths and, as far as is looked, bytes.
//!
//! Invariant: what is no copy is refused before a byte of it is used. Nobody waits for every byte to be compared: head, tail
//! and pages all over are.
//! Place: part of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::units::{PAGE_4K, align_down};

/// Most copies beside the model itself.
pub const MIRRORS_MAX: usize = 15;
/// Pages of each shard that are held against the first copy's.
const SAMPLES: u64 = 64;
/// Of the head of each shard this much is compared to the byte; a header is inside it, or sampled with the rest.
const HEAD_BYTES: u64 = 1 << 20;

/// Opens the copies of `files` in each of `directories`: the files of the model, then those of each copy.
///
/// # Errors
/// `Invalid` for a copy that is not one (another length, other bytes, the very same file) or too many of them; what
/// opening and reading the files gives.
pub fn open(mut files: Vec<ShardFile>, directories: &[PathBuf]) -> Result<Vec<ShardFile>> {
    if directories.len() > MIRRORS_MAX {
        return Err(invalid(format!(
            "{} mirrors are too many; {MIRRORS_MAX} are the most",
            directories.len()
        )));
    }
    if !directories.is_empty() && files.iter().any(|file| file.coded().is_some()) {
        let context = "a compressed model is read from one place; leave out --mirror, or flea pack --decompress it";
        return Err(Error::new(ErrorKind::Unsupported, context));
    }
    let shards_count = files.len();
    for directory in directories {
        for shard in 0..shards_count {
            let name = files[shard]
                .path()
                .file_name()
                .ok_or_else(|| invalid(format!("{} has no name", files[shard].path().display())))?;
            let copy = ShardFile::open(&directory.join(name))?;
            let same = |other: &ShardFile| {
                let (a, b) = (other.identity(), copy.identity());
                (a.device, a.inode) == (b.device, b.inode)
            };
            if let Some(other) = files.iter().find(|other| same(other)) {
                return Err(invalid(format!(
                    "mirror {} is the same file as {}",
                    copy.path().display(),
                    other.path().display()
                )));
            }
            check_same(&files[shard], &copy)?;
            files.push(copy);
        }
    }
    Ok(files)
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::Invalid, context)
}

/// Length, head, tail and pages all over must agree.
fn check_same(original: &ShardFile, copy: &ShardFile) -> Result<()> {
    let len_bytes = original.len_bytes();
    if copy.len_bytes() != len_bytes {
        return Err(invalid(format!(
            "mirror {} has {} bytes, but {} has {len_bytes}; copy it anew",
            copy.path().display(),
            copy.len_bytes(),
            original.path().display()
        )));
    }
    let head_bytes = HEAD_BYTES.min(len_bytes);
    check_range(original, copy, 0, head_bytes)?;
    let last = align_down(len_bytes.saturating_sub(1), PAGE_4K);
    // A prime step visits pages of every kind; the same ones each time, so that a bad copy is bad every time.
    let pages_count = len_bytes.div_ceil(PAGE_4K);
    let step = (pages_count / SAMPLES).max(1);
    let samples = (0..SAMPLES).map(|sample| (sample * step + sample * 7919 % step) % pages_count);
    for offset_bytes in samples.map(|page| page * PAGE_4K).chain([last]) {
        let part = PAGE_4K.min(len_bytes - offset_bytes);
        check_range(original, copy, offset_bytes, part)?;
    }
    Ok(())
}

fn check_range(original: &ShardFile, copy: &ShardFile, offset: u64, len: u64) -> Result<()> {
    let mut expected = vec![0; len as usize];
    let mut found = vec![0; len as usize];
    original.read_exact_at(offset, &mut expected)?;
    copy.read_exact_at(offset, &mut found)?;
    match expected.iter().zip(&found).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(byte) => Err(invalid(format!(
            "mirror {} differs from {} at offset {}; copy it anew",
            copy.path().display(),
            original.path().display(),
            offset + byte as u64
        ))),
    }
}
