//! The hot path of both readers allocates nothing: a counting allocator watches a few thousand requests.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flea::io::rows::{RowOptions, RowReader, RowTable};
use flea::io::{AlignedMemory, Reader, ReaderKind, ReaderOptions, Request, ShardFile};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const REQUEST_BYTES: u64 = 64 << 10;

/// `rounds` times the whole file of 4 MiB, as many requests in flight as fit.
fn stream(
    reader: &mut Reader,
    memory: &AlignedMemory,
    rounds: u64,
    out: &mut Vec<flea::io::Completion>,
) {
    let mut next = 0;
    let last = rounds * (4 << 20) / REQUEST_BYTES;
    while next < last || reader.in_flight() > 0 {
        while next < last && reader.free() > 0 {
            let offset_bytes = next * REQUEST_BYTES % (4 << 20);
            // SAFETY: the place mirrors the offset, so two requests for one place read the same bytes; the memory
            // outlives the loop, which ends with nothing in flight.
            unsafe {
                let target = memory.as_ptr().add(offset_bytes as usize);
                reader
                    .submit(Request {
                        key: next,
                        shard_index: 0,
                        offset_bytes,
                        len_bytes: REQUEST_BYTES,
                        target,
                    })
                    .unwrap();
            }
            next += 1;
        }
        reader.wait(None, out).unwrap();
        assert!(out.drain(..).all(|completion| completion.result.is_ok()));
    }
}

/// One test, because the counter counts for the whole process.
#[test]
fn requests_allocate_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shard");
    std::fs::write(&path, vec![3; 4 << 20]).unwrap();
    for kind in [ReaderKind::IoUring, ReaderKind::Pread] {
        let files: Arc<[ShardFile]> = Arc::new([ShardFile::open(&path).unwrap()]);
        let options = ReaderOptions {
            kind,
            ..ReaderOptions::default()
        };
        let mut reader = Reader::new(files, &options).unwrap();
        let memory = AlignedMemory::new(4 << 20, 2 << 20).unwrap();
        let mut out = Vec::with_capacity(64);
        stream(&mut reader, &memory, 1, &mut out);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        stream(&mut reader, &memory, 40, &mut out);
        let during = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(during, 0, "{kind}: allocations in 2560 requests");
        assert_eq!(memory.bytes()[..4 << 20], vec![3; 4 << 20]);
    }
    rows_allocate_nothing(&path);
}

/// Rows as well, once a call of the same size has been made: hits, misses, evictions.
fn rows_allocate_nothing(path: &std::path::Path) {
    for policy in flea::plan::PolicyKind::ALL {
        let files: Arc<[ShardFile]> = Arc::new([ShardFile::open(path).unwrap()]);
        let table = RowTable {
            shard_index: 0,
            offset_bytes: 100,
            row_bytes: 5000,
            rows_count: 800,
        };
        let options = RowOptions {
            budget_bytes: 3 << 20,
            depth: 16,
            read_bytes: 16 << 10,
            policy,
            ..RowOptions::default()
        };
        let mut rows = RowReader::new(files, table, &options).unwrap();
        let mut out = vec![0; 64 * 5000];
        let mut ids = [0; 64];
        let mut call = |number: u32| {
            for (id, place) in ids.iter_mut().zip(0..) {
                *id = (number * 64 + place) * 331 % 800;
            }
            rows.read(&ids, &mut out).unwrap();
        };
        (0..20).for_each(&mut call);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        (20..60).for_each(&mut call);
        let during = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(during, 0, "{policy}: allocations in 40 calls");
        assert!(
            rows.counters().page_hits > 0 && rows.counters().reads > 1000,
            "{policy}"
        );
        assert_eq!(out, vec![3; 64 * 5000]);
    }
}
