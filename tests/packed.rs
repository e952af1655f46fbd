//! Compressed models where there is no GPU: read as the original, decoded by the threads that read, every byte compared.
#![cfg(feature = "cli")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{compressed, flea, json, number, output, text, tiled_model as original};
use flea::engine::{BudgetSpec, Model, OpenOptions};
use flea::io::ShardFile;
use flea::io::packed;
use flea::mem::Backing;
use flea::model::coded::HEAD_BYTES;

#[test]
fn it_streams_into_host_memory_as_the_original() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = compressed(directory.path());
    for arguments in [
        "--memory 40% --passes 2 --verify",
        "--memory 45% --passes 1 --verify --backing shared",
        "--memory 60% --passes 1 --verify --page-bytes 4KiB --reader pread",
    ] {
        let stream = |model: &Path| {
            let mut command = flea();
            command.args(["bench", "stream", "--json"]).arg(model);
            json(command.args(arguments.split(' ')))
        };
        let (packed, plain) = (stream(&path), stream(&original()));
        for same in [
            "verified_bytes",
            "streamed_bytes_per_pass",
            "resident_bytes",
            "acquires",
        ] {
            assert_eq!(packed[same], plain[same], "{arguments}: {same}");
        }
        assert!(number(&packed, "streamed_bytes_per_pass") > 0.0);
        assert_eq!(packed["reader"], "pread");
        // That io_uring is not its reader is said, where it would have been.
        let said = packed["fallbacks"].as_array().expect("fallbacks");
        let is_said = said.iter().any(|kind| kind == "pread");
        assert!(is_said || arguments.contains("pread"), "{packed}");
    }
    let mut command = flea();
    command.args(["bench", "stream"]).arg(&path);
    let said = output(command.args(["--memory", "40%", "--reader", "io_uring"]));
    assert!(!said.status.success());
    assert!(text(&said).contains("is compressed"), "{}", text(&said));
}

/// `--verify` decodes twice; this looks into the file that was compressed.
#[test]
fn what_a_lease_shows_is_the_original() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = compressed(directory.path());
    let original = original();
    let original_bytes = std::fs::metadata(&original).expect("a model").len();
    for backing in [Backing::Private, Backing::Shared] {
        let options = OpenOptions {
            budget: BudgetSpec::Pool(original_bytes / 2),
            backing,
            ..OpenOptions::default()
        };
        let model = Model::open(&path, options).expect("a compressed model");
        for layer in (0..model.catalog().layers.len() as u32).cycle().take(20) {
            model.acquire(layer, None, None).expect("a lease");
            let held = &model.catalog().layers[layer as usize];
            common::check_layer(held, &original, |shard, offset| {
                model.address(shard, offset)
            });
            model.release(layer).expect("released");
        }
        assert!(model.stats().bytes_read > original_bytes / 2);
    }
}

#[test]
fn what_is_planned_and_shown_is_the_original() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = compressed(directory.path());
    for arguments in ["inspect --json", "plan --memory 50% --json"] {
        let ask = |model: &Path| {
            let mut command = flea();
            let mut answer = json(command.args(arguments.split(' ')).arg(model));
            let answer = answer.as_object_mut().expect("an object");
            answer.retain(|key, _| {
                !["path", "file", "files", "shards", "model"].contains(&key.as_str())
            });
            serde_json::Value::Object(answer.clone())
        };
        assert_eq!(ask(&path), ask(&original()), "{arguments}");
    }
}

#[test]
fn damage_fails_the_lease_with_tensor_and_tile() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = compressed(directory.path());
    let name = "blk.5.ffn_down.weight";
    let parts = packed::open(&ShardFile::open(&path).expect("a file"))
        .expect("a model")
        .parts;
    let part = parts
        .iter()
        .find(|part| part.tensor.as_deref() == Some(name))
        .expect("a tensor");
    let file = std::fs::File::options()
        .write(true)
        .open(&path)
        .expect("the file");
    let at = part.at_bytes + HEAD_BYTES as u64 + 128 + 8192 + 40;
    file.write_all_at(&[0x5a; 16], at).expect("damaged");
    let mut command = flea();
    command.args(["bench", "stream"]).arg(&path);
    let said = output(command.args(["--memory", "40%", "--passes", "1"]));
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
    for expected in [name, "tile 0 at offset 544", "is damaged", "model.fleapack"] {
        assert!(text(&said).contains(expected), "{}", text(&said));
    }
}
