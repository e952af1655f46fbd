//! How a model is read: the reader's options with every default filled in.
//!
//! What the user says counts; then what was measured of the drive (`flea probe`), then the built-in defaults. Place: the
//! seam between `plan` and `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use crate::io::profile::{self, Device, Found};
use crate::io::{ReaderOptions, ShardFile, default_request_bytes};

/// What is known about the drive of a shard.
pub fn profile_of(file: &ShardFile) -> Found {
    profile::find(&Device::of_shard(file))
}

/// `asked` with its zeros filled in, for pages of `page_bytes` on the drive of `file`.
pub fn reader_options(asked: &ReaderOptions, page_bytes: u64, file: &ShardFile) -> ReaderOptions {
    let mut reader = asked.clone();
    reader.page_bytes = page_bytes;
    if reader.request_bytes == 0 && reader.depth == 0 {
        let found = profile_of(file);
        if let Found::Damaged(reason) = &found {
            log::warn!("the drive's profile is not used: {reason}");
        }
        if let Some(rate) = found.profile().and_then(|p| p.sequential(page_bytes)) {
            (reader.request_bytes, reader.depth) = (rate.request_bytes, rate.depth);
        }
    }
    if reader.request_bytes == 0 {
        reader.request_bytes = default_request_bytes(page_bytes);
    }
    reader
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{MIB, PAGE_2M};

    #[test]
    fn what_is_asked_for_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shard");
        std::fs::write(&path, [1; 4096]).unwrap();
        let file = ShardFile::open(&path).unwrap();
        let asked = ReaderOptions {
            request_bytes: (2 * MIB) as u32,
            ..ReaderOptions::default()
        };
        let reader = reader_options(&asked, PAGE_2M, &file);
        assert_eq!((reader.request_bytes, reader.depth), ((2 * MIB) as u32, 0));
        assert_eq!(reader.page_bytes, PAGE_2M);
        let filled = reader_options(&ReaderOptions::default(), PAGE_2M, &file);
        assert!(filled.request_bytes > 0);
    }
}
