//! Compressed models into VRAM, on the fake GPU: coded over the link, unpacked by the kernel, every byte that of the original; damage
//! is told with tensor and tile, and never computed with.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::os::unix::fs::FileExt;

use common::{compressed, json, number, output, text, tiled_model as original};
use fake_cuda::stream_on_gpu_0 as stream;
use flea::engine::read_catalog;
use flea::io::ShardFile;
use flea::io::packed::{self, Coding};
use flea::model::coded::HEAD_BYTES;

#[test]
fn every_weight_arrives_and_fewer_bytes_travel() {
    let directory = tempfile::tempdir().expect("a directory");
    let packed = compressed(directory.path());
    let (catalog, _) = read_catalog(&original()).expect("a model");
    let whole = catalog.layer_bytes() as f64;
    for (vram, memory, what) in [
        ("64MiB", "40%", "all three tiers"),
        ("64MiB", "120%", "no drive"),
        ("200MiB", "60%", "all in VRAM"),
    ] {
        let arguments = format!("--vram {vram} --memory {memory} --passes 3 --verify");
        let answer = json(&mut stream(&packed, &arguments, &[]));
        assert_eq!(number(&answer, "verified_bytes"), whole, "{what}: {answer}");
        assert_eq!(answer["packed"], true);
        let (link, weights) = (
            number(&answer, "link_bytes_per_pass"),
            number(&answer, "link_weights_bytes_per_pass"),
        );
        let in_vram = number(&answer["tiers"], "vram_bytes");
        assert_eq!(in_vram + weights, whole, "{what}");
        let (memory, drive) = (
            number(&answer["tiers"], "memory_bytes"),
            number(&answer["tiers"], "drive_bytes"),
        );
        assert_eq!(memory + drive, link, "{what}: {answer}");
        // Three passes, all of it unpacked, and at most a ring ahead.
        let unpacked = number(&answer, "unpacked_bytes");
        let coded_part = 0.95;
        assert!(
            unpacked >= coded_part * (in_vram + 3.0 * weights),
            "{answer}"
        );
        assert!(unpacked <= in_vram + 4.0 * weights, "{answer}");
        let streamed = number(&answer, "h2d_bytes");
        assert!(streamed < 0.72 * (in_vram + 4.0 * weights), "{answer}");
        let last = &answer["passes"][2];
        match what {
            "all in VRAM" => assert!(weights == 0.0 && link == 0.0, "{answer}"),
            _ => {
                assert!(link < 0.72 * weights, "{what}: {answer}");
                assert!(number(last, "h2d_bytes") < 0.8 * weights, "{answer}");
            }
        }
        // What stays in VRAM may be counted as read in any pass.
        match what {
            "all three tiers" => assert!(number(last, "bytes_read") > 0.0, "{answer}"),
            "no drive" => assert_eq!(number(last, "bytes_read"), 0.0, "{answer}"),
            _ => assert!(number(&answer, "bytes_read") < 0.75 * whole, "{answer}"),
        }
    }
}

/// The order of copies and kernels between streams is the fake GPU's choice: other choices, the same weights.
#[test]
fn no_order_gives_other_weights() {
    let directory = tempfile::tempdir().expect("a directory");
    let packed = compressed(directory.path());
    let (catalog, _) = read_catalog(&original()).expect("a model");
    for (seed, delay, read) in [("2", "0", "0"), ("3", "1000", "0"), ("4", "0", "4000")] {
        let state = [
            ("FAKE_CUDA_SEED", seed),
            ("FAKE_CUDA_DELAY_US", delay),
            ("FAKE_CUDA_READ_US", read),
        ];
        let arguments = "--vram 60MiB --memory 40% --passes 1 --verify --reader pread";
        let answer = json(&mut stream(&packed, arguments, &state));
        assert_eq!(answer["verified_bytes"], catalog.layer_bytes(), "{state:?}");
    }
}

#[test]
fn damage_is_told_by_tensor_and_tile() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = compressed(directory.path());
    let parts = packed::open(&ShardFile::open(&path).expect("a file"))
        .expect("a compressed model")
        .parts;
    let name = "blk.5.ffn_down.weight";
    let part = parts
        .iter()
        .find(|part| part.tensor.as_deref() == Some(name))
        .expect("a tensor");
    assert_eq!(part.coding, Coding::Tiles);
    // Words of its first tile: behind 32 states and 8192 rests.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("the file");
    let at = part.at_bytes + HEAD_BYTES as u64 + 128 + 8192 + 40;
    file.write_all_at(&[0x5a; 16], at).expect("damaged");
    for vram in ["64MiB", "200MiB"] {
        let arguments = format!("--vram {vram} --memory 60% --passes 1");
        let said = output(&mut stream(&path, &arguments, &[]));
        assert_eq!(said.status.code(), Some(5), "{}", text(&said));
        for expected in [name, "tile 0 at offset 544", "is damaged", "model.fleapack"] {
            assert!(text(&said).contains(expected), "{}", text(&said));
        }
    }
    // A table that does not add up is told before anything is streamed.
    file.write_all_at(&[0xff; 16], part.at_bytes + 40)
        .expect("damaged");
    let said = output(&mut stream(&path, "--vram 64MiB --memory 60%", &[]));
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
    assert!(
        text(&said).contains(name) && text(&said).contains("4096"),
        "{}",
        text(&said)
    );
}

#[test]
fn what_cannot_be_is_refused_clearly() {
    let directory = tempfile::tempdir().expect("a directory");
    let packed = compressed(directory.path());
    for (state, code, part) in [
        (("FAKE_CUDA_IMAGE", "refuse"), 1, "compute capability 8.0"),
        (
            ("FAKE_CUDA_KERNEL", "flea_unpack"),
            1,
            "find the kernel flea_unpack",
        ),
        (("FAKE_CUDA_LOST_AFTER", "30"), 1, "GPU is lost"),
    ] {
        let said = output(&mut stream(&packed, "--vram 64MiB --memory 60%", &[state]));
        assert_eq!(said.status.code(), Some(code), "{}", text(&said));
        assert!(text(&said).contains(part), "{}", text(&said));
    }
    // What unpacks works in VRAM and is part of what is given.
    let said = output(&mut stream(&packed, "--vram 36MiB --memory 60%", &[]));
    assert_eq!(said.status.code(), Some(4), "{}", text(&said));
}
