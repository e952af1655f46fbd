//! Synthetic models as the rest of the house sees them: the catalog reads what synth writes, and the stream of
//! `flea bench stream` delivers it, byte for byte.

#![cfg(feature = "cli")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use flea::ErrorKind;
use flea::engine::{BudgetSpec, Model, OpenOptions, read_catalog};
use flea::proto::Opened;
use flea::proto::opened::Endpoint;
use flea::tools::bench_stream::{measure, verify};
use flea::tools::synth::shape::{Arch, Quant, Shape, Wish};
use flea::tools::synth::{Report, Spec, generate};
use flea::units::PAGE_4K;

fn small(arch: Arch, quant: Quant) -> Spec {
    let wish = Wish {
        layers: Some(8),
        embd: Some(256),
        ffn: Some(512),
        vocab: Some(1024),
        ..Wish::default()
    };
    Spec {
        shape: Shape::choose(arch, quant, &wish).expect("a shape"),
        seed: 1,
        router_skew: 0.0,
        split_bytes: None,
        force: false,
    }
}

fn write(spec: &Spec, directory: &Path) -> Report {
    let stop = AtomicBool::new(false);
    generate(spec, &directory.join("m.gguf"), &stop, |_, _| {}).expect("a model")
}

#[test]
fn the_catalog_reads_every_architecture_and_type() {
    for arch in Arch::ALL {
        for quant in Quant::ALL {
            let directory = tempfile::tempdir().expect("a directory");
            let spec = small(arch, quant);
            let report = write(&spec, directory.path());
            let (catalog, _) = read_catalog(&report.files[0]).expect("a catalog");
            assert_eq!(catalog.architecture, arch.gguf_name());
            assert_eq!(
                catalog.model_bytes,
                spec.shape.tensor_bytes(),
                "{arch} {quant}"
            );
            assert_eq!(catalog.tensors.len(), report.tensors_count);
            assert_eq!(catalog.tied_embeddings, spec.shape.tied, "{arch}");
            assert!(catalog.layers.len() > 8, "8 blocks and a head");
        }
    }
}

#[test]
fn a_split_model_has_the_same_tensors() {
    let whole = tempfile::tempdir().expect("a directory");
    let split = tempfile::tempdir().expect("a directory");
    let spec = small(Arch::Llama, Quant::Q4KM);
    let one = write(&spec, whole.path());
    let many = write(
        &Spec {
            split_bytes: Some(1 << 20),
            ..spec
        },
        split.path(),
    );
    assert!(many.files.len() > 2);
    let (one, _) = read_catalog(&one.files[0]).expect("a catalog");
    let (many, files) = read_catalog(&many.files[1]).expect("a catalog from any shard");
    assert_eq!(files.len(), many.shards.len());
    let names = |catalog: &flea::model::Catalog| -> Vec<(String, [u64; 4])> {
        let tensors = catalog.tensors.iter();
        tensors.map(|t| (t.name.clone(), t.shape)).collect()
    };
    assert_eq!(names(&one), names(&many));
}

/// Streams with the smallest pool that plans, so that nearly everything is transient.
fn open(path: &Path) -> Opened {
    let (catalog, _) = read_catalog(path).expect("a catalog");
    let options = flea::plan::PlanOptions {
        slots_count: 3,
        page_bytes: PAGE_4K,
    };
    let pool_bytes = flea::plan::smallest_budget_bytes(&catalog, &options).expect("a plan");
    let options = OpenOptions {
        budget: BudgetSpec::Pool(pool_bytes),
        page_bytes: Some(PAGE_4K),
        ..OpenOptions::default()
    };
    Opened::open(path, &Endpoint::Local, options).expect("an open model")
}

fn local(model: &Opened) -> &Model {
    match model {
        Opened::Local(model) => model,
        _ => panic!("it was opened in this process"),
    }
}

fn model() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let report = write(&small(Arch::Qwen2, Quant::Q8_0), directory.path());
    let path = report.files[0].clone();
    (directory, path)
}

#[test]
fn every_pass_streams_what_the_plan_says() {
    let (_directory, path) = model();
    let model = open(&path);
    let outcome = measure(&model, 3, &AtomicBool::new(false)).expect("three passes");
    let plan = local(&model).plan().expect("a plan");
    let layers = model.catalog().layers.len() as u64;
    assert!(plan.resident_bytes > 0 && plan.resident_bytes < model.catalog().model_bytes);
    assert_eq!(outcome.stats.acquires, 3 * layers);
    assert_eq!(outcome.passes.len(), 3);
    let loads = u64::from(plan.transient_layers_count());
    let ahead = u64::from(plan.slots_count);
    let most = 3 * loads + ahead;
    assert!(
        (3 * loads..=most).contains(&outcome.stats.loads),
        "{} loads",
        outcome.stats.loads
    );
    assert!(outcome.bytes_read >= 3 * plan.streamed_bytes_per_pass);
}

#[test]
fn verify_compares_everything_and_sees_one_wrong_byte() {
    let (_directory, path) = model();
    let streamed = open(&path);
    let planned: u64 = streamed
        .catalog()
        .layers
        .iter()
        .map(|layer| layer.bytes)
        .sum();
    let stop = AtomicBool::new(false);
    assert_eq!(verify(&streamed, &stop), Ok(planned));

    // A resident byte is in memory already: what changes in the file now differs from it.
    let offset_bytes = resident_byte(local(&streamed));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset_bytes).expect("read");
    file.write_all_at(&[byte[0] ^ 1], offset_bytes)
        .expect("write");
    let error = verify(&streamed, &stop).expect_err("a wrong byte");
    assert!(
        matches!(error.kind(), ErrorKind::Checksum | ErrorKind::Changed),
        "{error}"
    );
}

/// The file offset of a weight that stays in memory.
fn resident_byte(model: &Model) -> u64 {
    let resident = &model.plan().expect("a plan").resident;
    let mut uses = model.catalog().layers.iter().flat_map(|layer| &layer.uses);
    uses.find_map(|used| {
        let (begin, end) = (used.extent.offset_bytes, used.extent.end_bytes());
        resident.iter().find_map(|run| {
            let run_begin = run.first_page * PAGE_4K;
            let run_end = run_begin + run.page_count * PAGE_4K;
            let first = begin.max(run_begin);
            (first < end.min(run_end)).then_some(first)
        })
    })
    .expect("a resident weight")
}

#[test]
fn a_stop_ends_the_measurement() {
    let (_directory, path) = model();
    let model = open(&path);
    let error = measure(&model, 1, &AtomicBool::new(true)).expect_err("a stop");
    assert_eq!(error.kind(), ErrorKind::Canceled);
}
