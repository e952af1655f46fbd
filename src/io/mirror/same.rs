//! What a copy of a model is: files of the same names, lengths and, as far as is looked, bytes.
//!
//! Invariant: what is seen to be no copy is refused before a byte of it is used. It is a sample, because nobody waits for every
//! byte to be compared: head, tail, pages all over, and wherever the copy has a hole, as interrupted ones have.
//! Place: part of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ops::Range;
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::units::{PAGE_4K, align_down};

/// Most copies beside the model itself.
pub const MIRRORS_MAX: usize = 15;
/// At least so many pages of each shard are held against the first copy's,
const SAMPLES_MIN: u64 = 64;
/// and one for each so many bytes: 640 of 40 GiB, which two drives of 0.1 ms have in 0.13 s.
const SAMPLE_EVERY_BYTES: u64 = 64 << 20;
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

/// Length, holes, head, tail and pages all over must agree.
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
    // First of all: pages of a hole that somebody has read pass for data while they are cached.
    check_holes(original, copy)?;
    check_range(original, copy, 0..HEAD_BYTES.min(len_bytes))?;
    let last = align_down(len_bytes.saturating_sub(1), PAGE_4K);
    for offset_bytes in sampled_pages(len_bytes).chain([last]) {
        let end_bytes = len_bytes.min(offset_bytes + PAGE_4K);
        check_range(original, copy, offset_bytes..end_bytes)?;
    }
    Ok(())
}

/// Where the pages begin that are compared. A prime step visits pages of every kind; the same ones each time, so that a bad
/// copy is bad every time.
pub(super) fn sampled_pages(len_bytes: u64) -> impl Iterator<Item = u64> {
    let pages_count = len_bytes.div_ceil(PAGE_4K);
    let samples = (len_bytes / SAMPLE_EVERY_BYTES).max(SAMPLES_MIN);
    let step = (pages_count / samples).max(1);
    (0..samples).map(move |sample| {
        let page = (sample * step + sample * 7919 % step) % pages_count;
        page * PAGE_4K
    })
}

/// A torrent's, aria2's or rsync's file has its whole length from the beginning, and holes (or room without bytes, which
/// passes for a hole) where nothing came yet. They read as zeros: what the model has there decides, so that a sparse copy
/// of a model with zeros is one all the same.
fn check_holes(original: &ShardFile, copy: &ShardFile) -> Result<()> {
    let len_bytes = original.len_bytes();
    let mut at = 0;
    while let Some(hole) = next_hole(copy, at, len_bytes) {
        let mut from = hole.start;
        while let Some(data) = next_data(original, from, hole.end) {
            from = data.end;
            check_range(original, copy, data)?;
        }
        at = hole.end;
    }
    Ok(())
}

/// The first hole of a file at or behind `from_bytes`; none either where the filesystem tells of none.
fn next_hole(file: &ShardFile, from_bytes: u64, len_bytes: u64) -> Option<Range<u64>> {
    let start = seek(file, from_bytes, libc::SEEK_HOLE).filter(|start| *start < len_bytes)?;
    let end = seek(file, start, libc::SEEK_DATA).unwrap_or(len_bytes);
    // A hole that ends where it begins has been filled in between.
    (end > start).then(|| start..end.min(len_bytes))
}

/// The first stretch of a file at or behind `from_bytes`, below `end_bytes`, that is no hole. Where the filesystem does not tell,
/// all of it.
fn next_data(file: &ShardFile, from_bytes: u64, end_bytes: u64) -> Option<Range<u64>> {
    if from_bytes >= end_bytes {
        return None;
    }
    // Answers none behind the last data, and for a filesystem that does not know holes: then SEEK_HOLE has none either.
    let Some(start) = seek(file, from_bytes, libc::SEEK_DATA) else {
        let knows_holes = seek(file, from_bytes, libc::SEEK_HOLE).is_some();
        return (!knows_holes).then_some(from_bytes..end_bytes);
    };
    let end = seek(file, start, libc::SEEK_HOLE).unwrap_or(end_bytes);
    (start < end_bytes && end > start).then(|| start..end.min(end_bytes))
}

/// Where lseek ends up. It moves a position that nobody uses: every read says where.
fn seek(file: &ShardFile, from_bytes: u64, whence: i32) -> Option<u64> {
    let from = libc::off64_t::try_from(from_bytes).ok()?;
    // SAFETY: the descriptor is open as long as `file` is, and lseek touches no memory.
    let at = unsafe { libc::lseek64(file.weights_fd(), from, whence) };
    u64::try_from(at).ok()
}

fn check_range(original: &ShardFile, copy: &ShardFile, range: Range<u64>) -> Result<()> {
    let mut from = range.start;
    while from < range.end {
        let part = (range.end - from).min(HEAD_BYTES);
        check_part(original, copy, from, part)?;
        from += part;
    }
    Ok(())
}

fn check_part(original: &ShardFile, copy: &ShardFile, offset: u64, len: u64) -> Result<()> {
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
