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
                // What is only true of the one: its name, and that it is compressed.
                let own = ["path", "file", "files", "shards", "model"];
                !own.contains(&key.as_str())
                    && !["compressed", "prediction_missing"].contains(&key.as_str())
            });
            serde_json::Value::Object(answer.clone())
        };
        assert_eq!(ask(&path), ask(&original()), "{arguments}");
    }
}

/// Fewer bytes are read, and they have to be decoded: the speed of the original would be a wrong prediction.
#[test]
fn a_plan_counts_what_is_read_and_predicts_no_speed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = compressed(directory.path());
    let ask = |model: &Path, words: &str| {
        let mut command = flea();
        command.arg("plan").arg(model);
        let words = format!("--drive-gbps 2 --compute-seconds 0.1 --json {words}");
        json(command.args(words.split_whitespace()))
    };
    let (packed, plain) = (ask(&path, "--memory 50%"), ask(&original(), "--memory 50%"));
    assert!(number(&plain["prediction"], "tokens_per_second") > 0.0);
    assert!(plain["compressed"].is_null() && plain["prediction_missing"].is_null());
    assert!(packed["prediction"].is_null(), "{packed}");
    let why = packed["prediction_missing"].as_str().expect("a reason");
    assert!(
        why.contains("decoded") && why.contains("flea bench stream"),
        "{why}"
    );
    // bf16 weights take two thirds of their bytes, and a little more in tiles.
    let streamed = number(&packed, "streamed_bytes_per_pass");
    let stored = number(&packed["compressed"], "stored_bytes_per_pass");
    assert!(
        (0.5..0.85).contains(&(stored / streamed)),
        "{stored} of {streamed}"
    );
    let seconds = number(&packed["compressed"], "read_seconds");
    assert!((seconds - stored / 2e9).abs() < 1e-9, "{packed}");
    let resident = ask(&path, "--memory 300%");
    assert_eq!(
        number(&resident["compressed"], "stored_bytes_per_pass"),
        0.0
    );
    // In three tiers, and judged for a device, as well.
    let tiers = ask(&path, "--memory 60% --vram 60% --link-gbps 10");
    assert!(tiers["vram"]["seconds_per_pass"].is_null(), "{tiers}");
    let why = tiers["prediction_missing"].as_str().expect("a reason");
    assert!(why.contains("decoded"), "{why}");
    let plain = ask(&original(), "--memory 60% --vram 60% --link-gbps 10");
    assert!(number(&plain["vram"], "seconds_per_pass") > 0.0);
    let analyzed = |model: &Path| {
        let mut command = flea();
        command.arg("analyze").arg(model);
        let said = output(command.args(["--memory", "50%", "--drive-gbps", "2", "--json"]));
        // The exit code is the verdict: streamed.
        assert_eq!(said.status.code(), Some(11), "{}", text(&said));
        serde_json::from_slice::<serde_json::Value>(&said.stdout).expect("JSON")
    };
    assert!(analyzed(&path)["devices"][0]["tokens_per_second"].is_null());
    assert!(number(&analyzed(&original())["devices"][0], "tokens_per_second") > 0.0);
    let mut command = flea();
    command.arg("plan").arg(&path).args(["--memory", "50%"]);
    let said = text(&output(&mut command));
    assert!(
        said.contains("are read for that") && said.contains("none: a compressed"),
        "{said}"
    );
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
