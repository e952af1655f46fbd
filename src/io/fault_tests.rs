//! What a failing, lying or hanging drive does to both readers (feature `faults`).
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use super::fault::Faults;
use super::tests::{BOTH, Fixture, assert_reads_exactly, fixture, options, read_ranges, shards};
use super::*;

fn faulty(kind: ReaderKind, fixture: &Fixture, faults: &str, deadline_ms: u64) -> Reader {
    let options = ReaderOptions {
        deadline_ns: deadline_ms * 1_000_000,
        ..options(kind)
    };
    let faults = Faults::parse(faults).unwrap();
    Reader::with_faults(shards(&[&fixture.path]), &options, faults).unwrap()
}

const WHOLE: [(u64, u64); 4] = [
    (0, 1 << 20),
    (1 << 20, 1 << 20),
    (2 << 20, 1 << 20),
    (3 << 20, 1 << 20),
];

#[test]
fn short_reads_are_continued_and_errors_retried() {
    let fixture = fixture((4 << 20) - 123);
    for kind in BOTH {
        for faults in ["short_every=1", "short_every=2,eio_every=3", "eio_every=2"] {
            let mut reader = faulty(kind, &fixture, faults, 30_000);
            assert_reads_exactly(&mut reader, &fixture.bytes, &WHOLE);
            let counters = reader.counters();
            assert!(
                counters.shorts + counters.retries >= 2,
                "{kind} {faults}: the fault did not fire: {counters:?}"
            );
        }
    }
}

#[test]
fn a_drive_that_always_fails_fails_the_request_after_its_retries() {
    let fixture = fixture(1 << 20);
    for kind in BOTH {
        let mut reader = faulty(kind, &fixture, "eio_every=1", 30_000);
        let start = Instant::now();
        let (_, done) = read_ranges(&mut reader, &[(0, 1 << 20)]);
        let error = done[0].1.result.clone().unwrap_err();
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::Io, Some(libc::EIO))
        );
        assert!(done[0].1.returned);
        assert!(
            start.elapsed() >= Duration::from_millis(2 + 8 + 32 + 128),
            "backoff"
        );
        assert_eq!(reader.counters().retries, 5, "{kind}");
    }
}

#[test]
fn a_flipped_byte_is_exactly_one_wrong_byte() {
    let fixture = fixture(1 << 20);
    for kind in BOTH {
        let mut reader = faulty(kind, &fixture, "flip=0:70001,flip=1:5", 30_000);
        let (memory, _) = read_ranges(&mut reader, &[(65536, 65536)]);
        let differing: Vec<usize> = (0..65536)
            .filter(|&i| memory.bytes()[i] != fixture.bytes[65536 + i])
            .collect();
        assert_eq!(differing, [70001 - 65536], "{kind}");
    }
}

#[test]
fn a_delayed_completion_is_late_but_right() {
    let fixture = fixture(4 << 20);
    for kind in BOTH {
        let mut reader = faulty(kind, &fixture, "delay_ms=60", 30_000);
        let start = Instant::now();
        assert_reads_exactly(&mut reader, &fixture.bytes, &WHOLE);
        assert!(start.elapsed() >= Duration::from_millis(60), "{kind}");
    }
}

#[test]
fn a_request_that_never_comes_back_is_reported_and_the_others_go_on() {
    let fixture = fixture(4 << 20);
    for kind in BOTH {
        let mut reader = faulty(kind, &fixture, "stuck=2", 300);
        let start = Instant::now();
        let (memory, done) = read_ranges(&mut reader, &WHOLE);
        assert!(start.elapsed() >= Duration::from_millis(300));
        let (lost, fine): (Vec<_>, Vec<_>) = done.iter().partition(|(_, c)| !c.returned);
        assert_eq!((lost.len(), fine.len()), (1, 3), "{kind}");
        assert!(fine.iter().all(|(_, c)| c.result.is_ok()));
        let error = lost[0].1.result.clone().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let counters = reader.counters();
        assert_eq!((counters.timeouts, counters.quarantined), (1, 1));
        assert_eq!(
            reader.free(),
            default_depth(default_request_bytes(0x20_0000)) as usize,
            "the depth is whole again"
        );
        assert_reads_exactly(&mut reader, &fixture.bytes, &WHOLE[2..]);
        let stuck = reader.drain(Duration::from_millis(100));
        match kind {
            // The ring knows that the kernel still has it; a thread that is told to stop comes back.
            ReaderKind::IoUring => assert_eq!(stuck, [lost[0].1.key]),
            _ => assert_eq!(stuck, Vec::<u64>::new()),
        }
        let start = Instant::now();
        drop(reader);
        assert!(start.elapsed() < Duration::from_secs(10), "drop is bounded");
        memory.leak();
    }
}

#[test]
fn a_request_that_comes_back_after_its_deadline_frees_its_entry() {
    let fixture = fixture(1 << 20);
    for kind in BOTH {
        let mut reader = faulty(kind, &fixture, "delay_ms=600", 100);
        let (memory, done) = read_ranges(&mut reader, &[(0, 4096)]);
        assert!(!done[0].1.returned, "{kind}");
        assert_eq!(reader.counters().quarantined, 1);
        let mut out = Vec::new();
        reader.wait(Some(Duration::from_secs(1)), &mut out).unwrap();
        assert!(out.is_empty(), "no second completion for a key");
        assert_eq!(reader.counters().quarantined, 0, "{kind}: it is back");
        assert_eq!(reader.drain(Duration::from_secs(5)), Vec::<u64>::new());
        drop(memory);
    }
}

#[test]
fn the_deadline_ends_retries() {
    let fixture = fixture(1 << 20);
    for kind in BOTH {
        let mut reader = faulty(kind, &fixture, "eio_every=1", 20);
        let (_, done) = read_ranges(&mut reader, &[(0, 4096)]);
        assert!(done[0].1.result.is_err());
        assert!(done[0].1.returned, "{kind}: the memory is back");
    }
}

#[test]
fn a_drive_that_hangs_keeps_no_other_waiting() {
    const LEN_BYTES: u64 = 64 << 10;
    let (hung, fine) = (fixture(1 << 20), fixture(1 << 20));
    for kind in BOTH {
        let options = ReaderOptions {
            depth: 16,
            drives_count: 2,
            ..options(kind)
        };
        let faults = Faults::parse("hung=0").unwrap();
        let files = shards(&[&hung.path, &fine.path]);
        let mut reader = Reader::with_faults(files, &options, faults).unwrap();
        let memory = AlignedMemory::new(16 * LEN_BYTES, 4096).unwrap();
        for key in 0..16 {
            let request = Request {
                key,
                shard_index: (key / 8) as u32,
                offset_bytes: key % 8 * LEN_BYTES,
                len_bytes: LEN_BYTES,
                // SAFETY: the memory is sixteen such places long.
                target: unsafe { memory.as_ptr().add((key * LEN_BYTES) as usize) },
            };
            // SAFETY: each read has a place of its own, and the memory is leaked.
            unsafe { reader.submit(request).unwrap() };
        }
        let give_up = Instant::now() + Duration::from_secs(10);
        let (mut out, mut done) = (Vec::new(), Vec::new());
        while done.len() < 8 && Instant::now() < give_up {
            let patience = Some(Duration::from_millis(50));
            reader.wait(patience, &mut out).unwrap();
            done.extend(out.drain(..).map(|c| (c.key, c.result)));
        }
        done.sort_by_key(|(key, _)| *key);
        let expected: Vec<_> = (8..16).map(|key| (key, Ok(()))).collect();
        assert_eq!(done, expected, "{kind}");
        let half = 8 * LEN_BYTES as usize;
        assert!(memory.bytes()[half..][..half] == fine.bytes[..half]);
        drop(reader.drain(Duration::from_secs(1)));
        memory.leak();
    }
}
