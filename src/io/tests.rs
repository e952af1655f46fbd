//! Both readers against real files: every byte, every way a file can go wrong under them, every way they can end.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::units::align_up;

pub(super) const BOTH: [ReaderKind; 2] = [ReaderKind::IoUring, ReaderKind::Pread];

/// Bytes that differ everywhere and depend on the offset.
fn pattern(len_bytes: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(len_bytes + 8);
    while bytes.len() < len_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len_bytes);
    bytes
}

pub(super) struct Fixture {
    _directory: tempfile::TempDir,
    pub(super) path: PathBuf,
    pub(super) bytes: Vec<u8>,
}

fn fixture_in(parent: &Path, len_bytes: usize) -> Fixture {
    let directory = tempfile::tempdir_in(parent).unwrap();
    let path = directory.path().join("shard");
    let bytes = pattern(len_bytes);
    let mut file = File::create(&path).unwrap();
    file.write_all(&bytes).unwrap();
    file.sync_all().unwrap();
    Fixture {
        _directory: directory,
        path,
        bytes,
    }
}

pub(super) fn fixture(len_bytes: usize) -> Fixture {
    fixture_in(&std::env::temp_dir(), len_bytes)
}

pub(super) fn shards(paths: &[&Path]) -> Arc<[ShardFile]> {
    paths
        .iter()
        .map(|path| ShardFile::open(path).unwrap())
        .collect()
}

pub(super) fn options(kind: ReaderKind) -> ReaderOptions {
    ReaderOptions {
        kind,
        ..ReaderOptions::default()
    }
}

pub(super) fn reader_of(kind: ReaderKind, path: &Path) -> Reader {
    Reader::new(shards(&[path]), &options(kind)).unwrap()
}

/// Reads `ranges` of shard 0 one behind the other into memory filled with 0xA5, and returns it with the completions.
pub(super) fn read_ranges(
    reader: &mut Reader,
    ranges: &[(u64, u64)],
) -> (AlignedMemory, Vec<(u64, Completion)>) {
    let total = ranges.iter().map(|range| range.1).sum();
    let mut memory = AlignedMemory::new(total, PAGE_4K).unwrap();
    memory.bytes_mut().fill(0xA5);
    let mut done = Vec::new();
    let mut out = Vec::new();
    let mut place = 0;
    let mut places = Vec::new();
    for (key, &(offset_bytes, len_bytes)) in ranges.iter().enumerate() {
        while reader.free() == 0 {
            reader.wait(None, &mut out).unwrap();
        }
        // SAFETY: each range has its own part of the memory, which outlives the reading below.
        unsafe {
            reader
                .submit(Request {
                    key: key as u64,
                    shard_index: 0,
                    offset_bytes,
                    len_bytes,
                    target: memory.as_ptr().add(place as usize),
                })
                .unwrap();
        }
        places.push(place);
        place += len_bytes;
    }
    while reader.in_flight() > 0 {
        reader.wait(None, &mut out).unwrap();
    }
    done.extend(out.drain(..).map(|c| (places[c.key as usize], c)));
    done.sort_by_key(|(_, completion)| completion.key);
    (memory, done)
}

/// What a range must look like: the file's bytes, then zeros.
fn expected(bytes: &[u8], offset_bytes: u64, len_bytes: u64) -> Vec<u8> {
    let start = (offset_bytes as usize).min(bytes.len());
    let end = ((offset_bytes + len_bytes) as usize).min(bytes.len());
    let mut want = bytes[start..end].to_vec();
    want.resize(len_bytes as usize, 0);
    want
}

pub(super) fn assert_reads_exactly(reader: &mut Reader, bytes: &[u8], ranges: &[(u64, u64)]) {
    let (memory, done) = read_ranges(reader, ranges);
    assert_eq!(done.len(), ranges.len(), "one completion per request");
    for (place, completion) in done {
        let (offset, len) = ranges[completion.key as usize];
        assert_eq!(completion.result, Ok(()), "{offset}+{len}");
        assert!(completion.returned);
        let got = &memory.bytes()[place as usize..(place + len) as usize];
        assert!(
            got == expected(bytes, offset, len),
            "bytes of {offset}+{len} differ"
        );
    }
}

/// Every 4 KiB of the file once, in pieces of changing length and out of order, the last reaching past the end; then
/// one range that lies past the end altogether.
fn scattered_ranges(len_bytes: u64) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut offset = 0;
    let mut step = 7_u64;
    while offset < len_bytes {
        let len = (step % 97 + 1) * PAGE_4K;
        ranges.push((offset, len));
        offset += len;
        step = step.wrapping_mul(31).wrapping_add(11);
    }
    ranges.push((
        align_up(len_bytes, PAGE_4K).unwrap() + PAGE_4K * 3,
        PAGE_4K * 5,
    ));
    let middle = ranges.len() / 2;
    ranges.rotate_left(middle);
    ranges
}

#[test]
fn both_readers_read_every_byte_and_zero_the_tail() {
    for len_bytes in [1, 4095, 4096, 4097, (3 << 20) + 3880] {
        let fixture = fixture(len_bytes);
        for kind in BOTH {
            let mut reader = reader_of(kind, &fixture.path);
            assert_eq!(reader.kind(), kind);
            let ranges = scattered_ranges(len_bytes as u64);
            assert_reads_exactly(&mut reader, &fixture.bytes, &ranges);
            let counters = reader.counters();
            assert_eq!(counters.bytes, len_bytes as u64, "{kind}: {counters:?}");
            assert_eq!(counters.retries + counters.timeouts, 0);
            assert!(counters.busy_ns > 0);
        }
    }
}

#[test]
fn several_shards_and_plain_descriptors() {
    let (first, second) = (fixture(10_000), fixture_in(Path::new("/var/tmp"), 50_000));
    for kind in BOTH {
        let files = shards(&[&first.path, &second.path]);
        let mut reader = Reader::new(files, &options(kind)).unwrap();
        let memory = AlignedMemory::new(1 << 20, PAGE_4K).unwrap();
        for (key, shard_index) in [(0_u64, 1), (1, 0)] {
            // SAFETY: two different parts of memory that lives until both are done.
            unsafe {
                let request = Request {
                    key,
                    shard_index,
                    offset_bytes: 4096,
                    len_bytes: 65536,
                    target: memory.as_ptr().add(key as usize * 65536),
                };
                reader.submit(request).unwrap();
            }
        }
        let mut out = Vec::new();
        while reader.in_flight() > 0 {
            reader.wait(None, &mut out).unwrap();
        }
        assert!(out.iter().all(|c| c.result.is_ok()));
        assert!(memory.bytes()[..65536] == expected(&second.bytes, 4096, 65536));
        assert!(memory.bytes()[65536..131_072] == expected(&first.bytes, 4096, 65536));
    }
}

#[test]
fn a_file_truncated_while_reading_is_truncated() {
    for kind in BOTH {
        let fixture = fixture(1 << 20);
        let mut reader = reader_of(kind, &fixture.path);
        let file = OpenOptions::new().write(true).open(&fixture.path).unwrap();
        for keep in [(600 << 10) + 100, 512 << 10, 0] {
            file.set_len(keep).unwrap();
            let (_, done) = read_ranges(&mut reader, &[(512 << 10, 256 << 10)]);
            let error = done[0].1.result.clone().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Truncated, "{kind}: {error}");
            assert!(error.to_string().contains("shard"), "{error}");
            assert!(done[0].1.returned);
        }
    }
}

#[test]
fn a_deleted_file_is_read_to_its_end() {
    for kind in BOTH {
        let fixture = fixture(300_000);
        let files = shards(&[&fixture.path]);
        let mut reader = Reader::new(Arc::clone(&files), &options(kind)).unwrap();
        fs::remove_file(&fixture.path).unwrap();
        assert_reads_exactly(&mut reader, &fixture.bytes, &[(0, 303_104)]);
        files[0].check_unchanged().unwrap();
    }
}

#[test]
fn a_tmpfs_file_works_and_says_that_it_is_one() {
    if nix::sys::statfs::statfs("/dev/shm").map(|s| s.filesystem_type())
        != Ok(nix::sys::statfs::TMPFS_MAGIC)
    {
        println!("skipped: /dev/shm is no tmpfs");
        return;
    }
    let fixture = fixture_in(Path::new("/dev/shm"), 100_001);
    let file = ShardFile::open(&fixture.path).unwrap();
    let DirectIo::Buffered { reason } = file.direct() else {
        panic!("{:?}", file.direct());
    };
    assert!(reason.contains("tmpfs"), "{reason}");
    for kind in BOTH {
        let mut reader = reader_of(kind, &fixture.path);
        assert_reads_exactly(&mut reader, &fixture.bytes, &scattered_ranges(100_001));
    }
}

#[test]
fn a_wake_ends_the_wait_also_when_it_came_first() {
    let fixture = fixture(10);
    for kind in BOTH {
        let mut reader = reader_of(kind, &fixture.path);
        let waker = reader.waker();
        let mut out = Vec::new();
        for _ in 0..3 {
            waker.wake();
            waker.clone().wake();
            reader.wait(None, &mut out).unwrap();
            let other = waker.clone();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                other.wake();
            });
            let start = Instant::now();
            reader
                .wait(Some(Duration::from_secs(20)), &mut out)
                .unwrap();
            assert!(start.elapsed() < Duration::from_secs(10), "{kind}");
            thread.join().unwrap();
        }
        assert!(out.is_empty());
        let start = Instant::now();
        reader
            .wait(Some(Duration::from_millis(30)), &mut out)
            .unwrap();
        assert!(
            start.elapsed() >= Duration::from_millis(29),
            "no stale wake"
        );
        reader.wait(Some(Duration::ZERO), &mut out).unwrap();
    }
}

#[test]
fn bad_requests_are_refused_and_a_full_reader_is_busy() {
    let fixture = fixture(1 << 20);
    for kind in BOTH {
        let mut reader = Reader::new(
            shards(&[&fixture.path]),
            &ReaderOptions {
                depth: 2,
                ..options(kind)
            },
        )
        .unwrap();
        let memory = AlignedMemory::new(1 << 20, PAGE_4K).unwrap();
        let good = Request {
            key: 0,
            shard_index: 0,
            offset_bytes: 0,
            len_bytes: 4096,
            target: memory.as_ptr(),
        };
        for bad in [
            Request {
                shard_index: 1,
                ..good
            },
            Request {
                offset_bytes: 512,
                ..good
            },
            Request {
                len_bytes: 0,
                ..good
            },
            Request {
                len_bytes: 100,
                ..good
            },
            Request {
                len_bytes: 2 << 30,
                ..good
            },
            Request {
                target: memory.as_ptr().wrapping_add(1),
                ..good
            },
            Request {
                target: std::ptr::null_mut(),
                ..good
            },
        ] {
            // SAFETY: refused before anything is read.
            let error = unsafe { reader.submit(bad) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
        }
        assert_eq!(reader.free(), 2);
        for key in 0..2 {
            // SAFETY: the memory outlives the waits below; both requests write the same bytes to it.
            unsafe { reader.submit(Request { key, ..good }) }.unwrap();
        }
        assert_eq!((reader.free(), reader.in_flight()), (0, 2));
        // SAFETY: refused before anything is read.
        let error = unsafe { reader.submit(good) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let mut out = Vec::new();
        while out.len() < 2 {
            reader.wait(None, &mut out).unwrap();
        }
        assert_eq!((reader.free(), reader.in_flight()), (2, 0));
    }
    for bad in [
        ReaderOptions {
            depth: 257,
            ..options(ReaderKind::Auto)
        },
        ReaderOptions {
            request_bytes: 1000,
            ..options(ReaderKind::Auto)
        },
    ] {
        let error = Reader::new(shards(&[&fixture.path]), &bad).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

#[test]
fn a_reader_made_on_one_thread_works_on_another() {
    let fixture = fixture(100_000);
    for kind in BOTH {
        let mut reader = reader_of(kind, &fixture.path);
        let bytes = fixture.bytes.clone();
        let reader = std::thread::spawn(move || {
            assert_reads_exactly(&mut reader, &bytes, &scattered_ranges(100_000));
            reader
        })
        .join()
        .unwrap();
        let start = Instant::now();
        drop(reader);
        assert!(start.elapsed() < Duration::from_secs(10), "{kind}");
    }
}

#[test]
fn drain_gives_the_memory_of_everything_in_flight_back() {
    let fixture = fixture(16 << 20);
    for kind in BOTH {
        let mut reader = reader_of(kind, &fixture.path);
        let memory = AlignedMemory::new(16 << 20, PAGE_4K).unwrap();
        for key in 0..8 {
            let place = (key << 21) as usize;
            // SAFETY: eight different parts of the memory, which is freed only after the drain lists none.
            unsafe {
                reader
                    .submit(Request {
                        key,
                        shard_index: 0,
                        offset_bytes: key << 21,
                        len_bytes: 1 << 21,
                        target: memory.as_ptr().add(place),
                    })
                    .unwrap();
            }
        }
        let mut out = Vec::new();
        reader.wait(None, &mut out).unwrap();
        assert_eq!(reader.drain(Duration::from_secs(20)), Vec::<u64>::new());
        assert_eq!(reader.in_flight(), 0);
    }
}

/// Makes io_uring_setup fail with EPERM on the calling thread, as a container's seccomp profile does. No root needed.
fn deny_io_uring() {
    const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    // SAFETY: these build plain structures.
    let mut program = unsafe {
        [
            libc::BPF_STMT((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0),
            libc::BPF_JUMP(
                (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
                libc::SYS_io_uring_setup as u32,
                0,
                1,
            ),
            libc::BPF_STMT((libc::BPF_RET | libc::BPF_K) as u16, DENY),
            libc::BPF_STMT(
                (libc::BPF_RET | libc::BPF_K) as u16,
                libc::SECCOMP_RET_ALLOW,
            ),
        ]
    };
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the filter outlives the call, and binds this thread only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter),
            0
        );
    }
}

#[test]
fn without_io_uring_auto_falls_back_and_says_so() {
    let fixture = fixture(200_000);
    let bytes = fixture.bytes.clone();
    let path = fixture.path.clone();
    std::thread::spawn(move || {
        let before = reader_of(ReaderKind::Auto, &path);
        assert_eq!(
            (before.kind(), before.fallback()),
            (ReaderKind::IoUring, None)
        );
        deny_io_uring();
        let mut reader = reader_of(ReaderKind::Auto, &path);
        assert_eq!(reader.kind(), ReaderKind::Pread);
        let reason = reader.fallback().unwrap();
        assert!(reason.contains("io_uring_disabled"), "{reason}");
        assert_reads_exactly(&mut reader, &bytes, &scattered_ranges(200_000));
        let error = Reader::new(shards(&[&path]), &options(ReaderKind::IoUring)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert_eq!(error.errno(), Some(libc::EPERM));
    })
    .join()
    .unwrap();
}

#[test]
fn a_target_that_cannot_be_written_fails_the_request_and_nothing_else() {
    let fixture = fixture(1 << 20);
    for kind in BOTH {
        let mut reader = reader_of(kind, &fixture.path);
        // SAFETY: a fresh mapping that nobody may write; the kernel answers EFAULT instead of writing.
        let wall = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                1 << 20,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(wall, libc::MAP_FAILED);
        // SAFETY: as above.
        unsafe {
            reader
                .submit(Request {
                    key: 9,
                    shard_index: 0,
                    offset_bytes: 0,
                    len_bytes: 1 << 20,
                    target: wall.cast(),
                })
                .unwrap();
        }
        let mut out = Vec::new();
        reader.wait(None, &mut out).unwrap();
        let error = out[0].result.clone().unwrap_err();
        assert_eq!(error.errno(), Some(libc::EFAULT), "{kind}: {error}");
        assert_reads_exactly(&mut reader, &fixture.bytes, &[(0, 1 << 20)]);
        // SAFETY: the mapping made above; the request is over.
        unsafe { libc::munmap(wall, 1 << 20) };
    }
}
