//! The row reader against the file's own bytes, and its counters against arithmetic.

use std::collections::BTreeSet;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::plan::PolicyKind;

const FILE_BYTES: usize = 3 << 20;

struct Given {
    _directory: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
    files: Arc<[ShardFile]>,
}

impl Given {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("table");
        // No two pages alike, and not a whole number of pages.
        let bytes: Vec<u8> = (0..FILE_BYTES as u64 + 77)
            .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8)
            .collect();
        std::fs::write(&path, &bytes).unwrap();
        let files: Arc<[ShardFile]> = Arc::new([ShardFile::open(&path).unwrap()]);
        Self {
            _directory: directory,
            path,
            bytes,
            files,
        }
    }

    fn reader(&self, table: RowTable, options: &RowOptions) -> RowReader {
        RowReader::new(Arc::clone(&self.files), table, options).unwrap()
    }

    fn expected(&self, table: RowTable, ids: &[u32]) -> Vec<u8> {
        let row = |id: &u32| {
            let begin = table.offset_bytes + u64::from(*id) * table.row_bytes;
            self.bytes[begin as usize..][..table.row_bytes as usize].to_vec()
        };
        ids.iter().flat_map(row).collect()
    }

    fn check(&self, reader: &mut RowReader, ids: &[u32]) {
        let table = reader.table();
        let mut out = vec![0; ids.len() * table.row_bytes as usize];
        reader.read(ids, &mut out).unwrap();
        assert!(
            out == self.expected(table, ids),
            "rows {ids:?} of {table:?}"
        );
    }
}

fn table(offset_bytes: u64, row_bytes: u64) -> RowTable {
    RowTable {
        shard_index: 0,
        offset_bytes,
        row_bytes,
        rows_count: ((FILE_BYTES as u64 + 77 - offset_bytes) / row_bytes) as u32,
    }
}

/// The smallest budget: depth times read length, and no cache to speak of.
fn options(depth: u32, read_bytes: u32, budget_bytes: u64) -> RowOptions {
    RowOptions {
        budget_bytes,
        depth,
        read_bytes,
        ..RowOptions::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_are_the_files_bytes_and_counters_add_up(
        offset_bytes in 0..9000_u64,
        row_bytes in 1..20_000_u64,
        depth in 1..9_u32,
        read_pages in 1..5_u32,
        more_mib in 0..5_u64,
        policy in proptest::sample::select(&PolicyKind::ALL[..]),
        uring in any::<bool>(),
        calls in proptest::collection::vec(proptest::collection::vec(0..100_000_u32, 0..60), 1..6),
    ) {
        let given = Given::new();
        let table = table(offset_bytes, row_bytes);
        let options = RowOptions {
            policy,
            reader: if uring { ReaderKind::Auto } else { ReaderKind::Pread },
            ..options(depth, read_pages * 4096, (3 + more_mib) << 20)
        };
        let mut reader = given.reader(table, &options);
        prop_assert!(reader.memory_bytes() <= options.budget_bytes);
        for ids in calls {
            let ids: Vec<u32> = ids.into_iter().map(|id| id % table.rows_count).collect();
            let before = reader.counters();
            given.check(&mut reader, &ids);
            let now = reader.counters();
            prop_assert_eq!(now.rows - before.rows, ids.len() as u64);
            // Every page of the call is read once at most.
            let distinct: BTreeSet<u32> = ids.iter().flat_map(|id| reader.pages_of(*id)).collect();
            prop_assert!(now.bytes - before.bytes <= distinct.len() as u64 * PAGE_4K);
            let used: usize = ids.iter().map(|id| reader.pages_of(*id).count()).sum();
            prop_assert_eq!(now.page_uses - before.page_uses, used as u64);
            prop_assert_eq!(now.page_uses, now.page_hits + now.page_shared + now.bytes / PAGE_4K);
            prop_assert_eq!(reader.reader_counters().reads, now.reads);
        }
    }
}

#[test]
fn neighbours_are_read_together_and_shared_pages_once() {
    let given = Given::new();
    let mut reader = given.reader(table(0, 1024), &options(8, 64 << 10, 8 << 20));
    // 512 rows of a quarter page are 128 pages: 8 reads of 16.
    given.check(&mut reader, &(0..512).collect::<Vec<_>>());
    let counters = reader.counters();
    assert_eq!((counters.reads, counters.bytes), (8, 128 * PAGE_4K));
    assert_eq!(counters.page_shared, 512 - 128);
    // All are cached now.
    given.check(&mut reader, &(0..512).rev().collect::<Vec<_>>());
    assert_eq!(reader.counters().reads, 8);
    assert_eq!(reader.counters().page_hits, 512);
}

#[test]
fn the_same_row_many_times_is_one_read() {
    let given = Given::new();
    // Rows longer than a read, so that a row takes several.
    let mut reader = given.reader(table(100, 10_000), &options(2, 4096, 3 << 20));
    given.check(&mut reader, &[7; 300]);
    assert_eq!(
        reader.counters().bytes,
        reader.pages_of(7).count() as u64 * PAGE_4K
    );
    assert_eq!(reader.counters().rows, 300);
}

#[test]
fn a_call_may_be_larger_than_the_cache_and_the_depth() {
    let given = Given::new();
    let mut reader = given.reader(table(0, 4096), &options(1, 4096, 3 << 20));
    assert!(reader.cache_pages() < 512);
    let ids: Vec<u32> = (0..700).map(|i| i * 331 % 768).collect();
    given.check(&mut reader, &ids);
    given.check(&mut reader, &ids);
    assert_eq!(reader.counters().page_uses, 2 * 700);
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let given = Given::new();
    let files = || Arc::clone(&given.files);
    let refused = |table: RowTable, options: RowOptions| {
        let error = RowReader::new(files(), table, &options).unwrap_err();
        (error.kind(), error.to_string())
    };
    let good = table(0, 4096);
    let (kind, text) = refused(good, options(128, 64 << 10, 4 << 20));
    assert_eq!(kind, ErrorKind::Refused);
    assert!(
        text.contains("8.0 MiB") && text.contains("lower the depth"),
        "{text}"
    );
    for bad in [
        RowTable {
            rows_count: good.rows_count + 1,
            ..good
        },
        RowTable {
            row_bytes: u64::MAX,
            ..good
        },
        RowTable {
            row_bytes: 0,
            ..good
        },
        RowTable {
            shard_index: 1,
            ..good
        },
    ] {
        assert_eq!(
            refused(bad, RowOptions::default()).0,
            ErrorKind::Invalid,
            "{bad:?}"
        );
    }
    for (depth, read_bytes) in [(0, 4096), (257, 4096), (8, 5000), (8, 0), (8, 4 << 20)] {
        let bad = options(depth, read_bytes, 64 << 20);
        assert_eq!(
            refused(good, bad).0,
            ErrorKind::Invalid,
            "{depth} {read_bytes}"
        );
    }
    let mut reader = given.reader(good, &RowOptions::default());
    let beyond = reader
        .read(&[0, good.rows_count], &mut [0; 8192])
        .unwrap_err();
    assert!(
        beyond
            .to_string()
            .contains(&format!("row {}", good.rows_count)),
        "{beyond}"
    );
    assert_eq!(
        reader.read(&[0], &mut [0; 4095]).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    given.check(&mut reader, &[3]);
}

#[test]
fn a_file_that_shrinks_under_the_reader_is_an_error_and_not_zeros() {
    let given = Given::new();
    let mut reader = given.reader(table(0, 4096), &options(4, 4096, 4 << 20));
    given.check(&mut reader, &[1]);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&given.path)
        .unwrap();
    file.set_len(1 << 20).unwrap();
    let error = reader.read(&[2, 700], &mut [0; 8192]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
    let again = reader.read(&[5], &mut [0; 4096]).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Truncated, "{again}");
}

#[test]
fn what_a_failed_call_read_is_not_kept() {
    let given = Given::new();
    let mut reader = given.reader(table(0, 4096), &options(4, 4096, 4 << 20));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&given.path)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 7 * 4096).unwrap();
    // A coarse clock may give two writes the same time.
    let later = std::time::SystemTime::now() + Duration::from_secs(1);
    file.set_modified(later).unwrap();
    for _ in 0..2 {
        let error = reader.read(&[7], &mut [0; 4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    }
    assert_eq!(reader.counters().page_hits, 0);
}

#[cfg(feature = "faults")]
mod copies {
    use super::*;

    /// A reader over three copies, some of whose drives are dead; their paths, and what is known about them.
    fn reader(given: &Given, faults: &str) -> (RowReader, Vec<PathBuf>, Arc<Copies>) {
        let mut paths = vec![given.path.clone()];
        paths.extend(["second", "third"].map(|name| given.path.with_file_name(name)));
        for path in &paths[1..] {
            std::fs::write(path, &given.bytes).unwrap();
        }
        let files = paths.iter().map(|path| ShardFile::open(path).unwrap());
        let files: Arc<[ShardFile]> = files.collect();
        let copies = Arc::new(Copies::new(&files, 1));
        let (table, options) = (table(0, 4096), options(4, 4096, 4 << 20));
        let faults = Faults::parse(faults).unwrap();
        let files = (files, Some(Arc::clone(&copies)));
        let reader = RowReader::with_faults(files, table, &options, faults).unwrap();
        (reader, paths, copies)
    }

    fn dropped(copies: &Copies) -> Vec<bool> {
        let all = copies.stats().into_iter();
        all.map(|copy| copy.is_dropped).collect()
    }

    #[test]
    fn rows_come_from_a_copy_where_the_models_drive_fails() {
        let given = Given::new();
        let (mut reader, _, copies) = reader(&given, "dead=0");
        given.check(&mut reader, &[3, 700, 3]);
        assert_eq!(dropped(&copies), [true, false, false]);
        // It is not tried again: nothing else would make the reader repeat a read.
        let retries = reader.reader_counters().retries;
        assert!(retries > 0);
        given.check(&mut reader, &(0..60).collect::<Vec<_>>());
        assert_eq!(reader.reader_counters().retries, retries);
    }

    #[test]
    fn a_copy_that_was_written_to_is_passed_over_and_the_last_failure_is_told() {
        let given = Given::new();
        let (mut reader, paths, copies) = reader(&given, "dead=0");
        let other: Vec<u8> = given.bytes.iter().map(|byte| !byte).collect();
        std::fs::write(&paths[1], &other).unwrap();
        given.check(&mut reader, &[3, 4, 5]);
        assert_eq!(dropped(&copies), [true, true, false]);
        std::fs::write(&paths[2], &other[..4096]).unwrap();
        let error = reader.read(&[90], &mut [0; 4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
    }

    #[test]
    fn a_copy_that_the_stream_dropped_is_not_asked() {
        let given = Given::new();
        let (mut reader, _, copies) = reader(&given, "dead=0");
        copies.drop_one(0, &Error::new(ErrorKind::Io, "as the stream saw it"));
        given.check(&mut reader, &[3]);
        assert_eq!(reader.reader_counters().retries, 0);
    }

    #[test]
    fn a_model_that_was_written_to_is_an_error_whatever_its_copies_are() {
        let given = Given::new();
        let (mut reader, paths, copies) = reader(&given, "");
        std::fs::write(&paths[0], &given.bytes[..1 << 20]).unwrap();
        for _ in 0..2 {
            let error = reader.read(&[3], &mut [0; 4096]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
        }
        assert_eq!(dropped(&copies), [false; 3]);
    }
}
