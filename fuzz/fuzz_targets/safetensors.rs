//! Any bytes as a safetensors header, an index and a config.
#![no_main]

use flea::model::{catalog, safetensors};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz.safetensors");
    for len_bytes in [bytes.len() as u64, 1 << 40] {
        if let Ok(header) = safetensors::parse_shard(path, len_bytes, &mut &bytes[..]) {
            assert!(
                header
                    .tensors
                    .iter()
                    .all(|tensor| tensor.end_bytes() <= len_bytes)
            );
            let _ = catalog::from_safetensors(vec![header], None, None);
        }
    }
    let _ = safetensors::parse_index(path, bytes);
    let _ = safetensors::parse_config(path, bytes);
});
