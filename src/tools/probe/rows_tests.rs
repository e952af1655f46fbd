//! What the probe of rows says is checked by the kernel's counters and flea's own, never by time.

use super::*;
use crate::units::MIB;

fn options(path: &Path) -> RowsOptions {
    RowsOptions {
        path: path.to_path_buf(),
        synth_bytes: 24 * MIB + 123,
        row_bytes: 5040,
        slices: 35,
        span: Duration::from_millis(20),
        rows: RowOptions {
            budget_bytes: 16 * MIB,
            ..RowOptions::default()
        },
        seed: 1,
    }
}

fn measured(options: &RowsOptions) -> RowsReport {
    measure(options, &AtomicBool::new(false), &mut |_| {}).unwrap()
}

#[test]
fn every_case_is_cold_and_counted() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let report = measured(&options(directory.path()));
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        0,
        "the table is removed"
    );
    assert!(report.temporary && report.tensor.is_none());
    assert_eq!(report.cases.len(), Access::ALL.len() * Way::ALL.len());
    for case in &report.cases {
        let name = format!("{} by {}", case.access.name(), case.way.name());
        assert!(
            case.tokens > 0 && case.cold_rounds > 0 && case.p50_ns <= case.p99_ns,
            "{name}"
        );
        assert!(case.drive_bytes > 0, "{name}: nothing came from the drive");
        match &case.counters {
            None => assert_ne!(case.way, Way::Flea, "{name}"),
            Some(counters) => {
                assert_eq!(case.way, Way::Flea);
                assert_eq!(
                    case.page_cache_bytes, 0,
                    "{name}: O_DIRECT leaves the page cache alone"
                );
                let each = if case.access == Access::Scatter {
                    35
                } else {
                    1
                };
                assert_eq!(counters.rows, case.tokens * each, "{name}");
                // The kernel counts for the whole process, where other tests read as well.
                assert!(counters.bytes <= case.drive_bytes, "{name}");
            }
        }
    }
    assert!(report.ratio(Access::Decode, Way::Mmap).unwrap() > 0.0);
}

#[test]
fn slices_are_no_row_starts() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let ground = Ground::open(&options(directory.path())).unwrap();
    let table = ground.table_for(Access::Scatter);
    assert_eq!(table.row_bytes, 5040 / 35);
    assert_eq!(table.rows_count, ground.table.rows_count * 35);
    let mut ids = Vec::new();
    Ids::new(&ground, Access::Scatter, 1).fill(&mut ids);
    assert_eq!(ids.len(), 35);
    assert!(ids.iter().filter(|id| **id % 35 != 0).count() > 25);
}

#[test]
fn a_file_is_only_read_and_what_is_in_memory_is_no_measurement() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = directory.path().join("table");
    let bytes = vec![9; 8 << 20];
    std::fs::write(&path, &bytes).unwrap();
    let report = measured(&options(&path));
    assert!(!report.temporary);
    assert!(std::fs::read(&path).unwrap() == bytes);
    // Somebody else's mapping keeps it warm.
    let warm = Mapped::open(&path, false).unwrap();
    warm.copy(0, &mut [0; 1 << 20]).unwrap();
    let error = measure(&options(&path), &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
}

#[test]
fn the_table_of_a_model_is_found() {
    use crate::tools::synth::shape::{Arch, Quant, Shape, Wish};
    use crate::tools::synth::{Spec, generate};
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let wish = Wish {
        layers: Some(6),
        embd: Some(256),
        ffn: Some(256),
        vocab: Some(1024),
        ..Wish::default()
    };
    let spec = Spec {
        shape: Shape::choose(Arch::Gemma3n, Quant::Q8_0, &wish).unwrap(),
        seed: 1,
        router_skew: 0.0,
        split_bytes: None,
        force: false,
    };
    let path = directory.path().join("m.gguf");
    generate(&spec, &path, &AtomicBool::new(false), |_, _| {}).unwrap();
    let ground = Ground::open(&options(&path)).unwrap();
    assert_eq!(
        ground.tensor.as_deref(),
        Some("per_layer_token_embd.weight")
    );
    assert_eq!((ground.table.rows_count, ground.slices), (1024, 6));
    assert_eq!(ground.table.row_bytes, 6 * 256 / 32 * 34);
}
