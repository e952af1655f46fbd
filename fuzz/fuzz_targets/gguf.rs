//! Any bytes as a GGUF header, in a file that is as long as they are and in one that claims to be huge.
#![no_main]

use flea::model::{catalog, gguf};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    for len_bytes in [bytes.len() as u64, 1 << 40] {
        if let Ok(header) = gguf::parse_shard(Path::new("fuzz.gguf"), len_bytes, &mut &bytes[..]) {
            assert!(
                header
                    .tensors
                    .iter()
                    .all(|tensor| tensor.end_bytes() <= len_bytes)
            );
            let _ = catalog::from_gguf(vec![header]);
        }
    }
});
