//! Opening shards and what reading them leaves behind: refusals, the page cache, files that change.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::tests::{BOTH, Fixture, assert_reads_exactly, fixture, options, reader_of};
use super::*;

#[test]
fn what_is_not_a_model_file_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let fifo = at("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    File::create(at("empty")).unwrap();
    std::os::unix::fs::symlink(at("loop"), at("loop")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let start = Instant::now();
    for (path, kind, word) in [
        (fifo, ErrorKind::Format, "FIFO"),
        (
            directory.path().to_path_buf(),
            ErrorKind::Format,
            "directory",
        ),
        (at("empty"), ErrorKind::Format, "empty"),
        (at("missing"), ErrorKind::NotFound, "missing"),
        (at("loop"), ErrorKind::Io, "loop"),
        (at("socket"), ErrorKind::Format, "socket"),
        ("/dev/zero".into(), ErrorKind::Format, "device"),
        ("/proc/self/status".into(), ErrorKind::Format, "empty"),
    ] {
        let error = ShardFile::open(&path).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
    assert!(start.elapsed() < Duration::from_secs(2));
}

/// As an ordinary user; root reads everything, so a root test drops its rights on one thread.
#[test]
fn a_file_without_permission_says_so() {
    let fixture = fixture(10);
    fs::set_permissions(&fixture.path, fs::Permissions::from_mode(0o000)).unwrap();
    let path = fixture.path.clone();
    let error = std::thread::spawn(move || {
        // SAFETY: setfsuid changes what this thread may open and touches no memory; as a user it changes nothing.
        unsafe { libc::setfsuid(65534) };
        ShardFile::open(&path).unwrap_err()
    })
    .join()
    .unwrap();
    assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
}

/// How many bytes of a file the page cache holds.
fn cached_bytes(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let mut pages = vec![0_u8; len.div_ceil(4096)];
    // SAFETY: a fresh read-only mapping of the file, asked about and unmapped here; mincore writes one byte per page.
    unsafe {
        use std::os::fd::AsRawFd;
        let map = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(map, libc::MAP_FAILED);
        assert_eq!(libc::mincore(map, len, pages.as_mut_ptr()), 0);
        libc::munmap(map, len);
    }
    pages.iter().map(|page| u64::from(page & 1) * 4096).sum()
}

/// On disk: on tmpfs the page cache is the file.
fn disk_fixture(len_bytes: usize) -> Option<Fixture> {
    let fixture = fixture(len_bytes);
    let file = ShardFile::open(&fixture.path).unwrap();
    if !file.direct().is_direct() {
        println!("skipped: {} is {}", fixture.path.display(), file.direct());
        return None;
    }
    let all = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(File::open(&fixture.path).unwrap(), 0, 0, all).unwrap();
    assert_eq!(cached_bytes(&fixture.path), 0);
    Some(fixture)
}

#[test]
fn buffered_reading_leaves_nothing_in_the_page_cache() {
    let Some(fixture) = disk_fixture((9 << 20) + 77) else {
        return;
    };
    for kind in BOTH {
        let file = ShardFile::open_buffered(&fixture.path).unwrap();
        assert!(matches!(file.direct(), DirectIo::Buffered { .. }));
        let mut reader = Reader::new(Arc::new([file]), &options(kind)).unwrap();
        let ranges: Vec<_> = (0..10).map(|i| (i << 20, 1 << 20)).collect();
        assert_reads_exactly(&mut reader, &fixture.bytes, &ranges);
        let left = cached_bytes(&fixture.path);
        assert!(left <= 64 << 10, "{kind}: {left} bytes left");
    }
}

#[test]
fn direct_reading_never_fills_the_page_cache() {
    let Some(fixture) = disk_fixture(4 << 20) else {
        return;
    };
    for kind in BOTH {
        let mut reader = reader_of(kind, &fixture.path);
        assert_reads_exactly(&mut reader, &fixture.bytes, &[(0, 4 << 20)]);
        assert_eq!(cached_bytes(&fixture.path), 0, "{kind}");
    }
}

#[test]
fn headers_and_odd_ranges_are_exact_and_read_little_ahead() {
    let Some(fixture) = disk_fixture(5_000_001) else {
        return;
    };
    let file = ShardFile::open(&fixture.path).unwrap();
    let before = read_bytes_of_this_thread();
    let mut head = vec![0; 1000];
    file.header_reader().read_exact(&mut head).unwrap();
    assert!(head == fixture.bytes[..1000]);
    if let (Some(before), Some(after)) = (before, read_bytes_of_this_thread()) {
        assert!(after - before <= 512 << 10, "{} bytes read", after - before);
    }
    let mut whole = Vec::new();
    file.header_reader().read_to_end(&mut whole).unwrap();
    assert!(whole == fixture.bytes);
    let mut odd = vec![0; 2_500_003];
    file.read_exact_at(1_234_567, &mut odd).unwrap();
    assert!(odd == fixture.bytes[1_234_567..1_234_567 + 2_500_003]);
    assert_eq!(cached_bytes(&fixture.path), 0);
    let error = file.read_exact_at(4_999_999, &mut [0; 3]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated);
}

fn read_bytes_of_this_thread() -> Option<u64> {
    let io = fs::read_to_string("/proc/thread-self/io").ok()?;
    let line = io.lines().find_map(|l| l.strip_prefix("read_bytes: "))?;
    line.parse().ok()
}

#[test]
fn a_written_file_is_changed_and_a_shorter_one_truncated() {
    let fixture = fixture(20_000);
    let file = ShardFile::open(&fixture.path).unwrap();
    file.check_unchanged().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let writer = OpenOptions::new().write(true).open(&fixture.path).unwrap();
    writer.write_all_at(b"x", 5).unwrap();
    assert_eq!(
        file.check_unchanged().unwrap_err().kind(),
        ErrorKind::Changed
    );
    writer.set_len(10_000).unwrap();
    assert_eq!(
        file.check_unchanged().unwrap_err().kind(),
        ErrorKind::Truncated
    );
}
