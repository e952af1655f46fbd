//! Any bytes as a KV frame and as a calibration, for the codec that their head names.
#![no_main]

use flea::kv::{Calibration, Coder, frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = Calibration::from_bytes(bytes);
    let mut bytes = bytes.to_vec();
    frame::reseal(&mut bytes);
    let Ok(opened) = frame::open(&bytes) else { return };
    if let Ok(coder) = Coder::new(opened.spec) {
        if let Ok(values) = coder.decode(&bytes) {
            assert_eq!(values.len(), opened.count * opened.spec.dim);
        }
    }
});
