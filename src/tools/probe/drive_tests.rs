//! Tests of the drive's measurement: what is chosen, what is refused, and that nothing is left behind.

use super::*;

fn options(path: &Path) -> ProbeOptions {
    ProbeOptions {
        path: path.to_path_buf(),
        size_bytes: FILE_BYTES_MIN,
        span: Duration::from_millis(2),
        sustain: Duration::from_millis(20),
        reader: ReaderKind::Auto,
        // Tests share the machine with anything: whether rounds agree is a test of its own.
        spread_max: 1e9,
    }
}

fn probe(options: &ProbeOptions) -> Result<Probed> {
    measure(options, &AtomicBool::new(false), &mut |_| {})
}

fn rate(request_bytes: u64, depth: u32, gb_per_second: f64) -> Rate {
    Rate {
        page_bytes: PAGE_2M,
        request_bytes: request_bytes as u32,
        depth,
        gb_per_second,
        spread: 0.0,
        cpu_seconds_per_gb: 0.0,
    }
}

#[test]
fn the_default_stays_unless_another_way_is_clearly_faster() {
    let default = rate(4 * MIB, 8, 2.0);
    assert_eq!(choose(&[default]), default);
    assert_eq!(choose(&[default, rate(MIB, 8, 2.09)]), default);
    let faster = rate(8 * MIB, 8, 2.5);
    assert_eq!(choose(&[default, faster]), faster);
    // Within 3 % of the fastest, and less in flight.
    let lighter = rate(MIB, 16, 2.45);
    assert_eq!(choose(&[default, faster, lighter]), lighter);
    let slower = rate(MIB, 2, 2.2);
    assert_eq!(choose(&[default, faster, slower]), faster);
}

#[test]
fn too_little_in_flight_is_not_considered() {
    let point = |request_bytes, depth| Point {
        request_bytes,
        depth,
        bytes: 2_000_000_000,
        gb_per_second: 2.0,
        cpu_seconds_per_gb: 0.01,
    };
    assert!(!covers(&point(MIB, 2)) && !covers(&point(MIB, 8)));
    assert!(covers(&point(MIB, 16)) && covers(&point(4 * MIB, 8)));
}

#[test]
fn a_directory_is_measured_and_left_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let mut told = Vec::new();
    let probed = measure(
        &options(directory.path()),
        &AtomicBool::new(false),
        &mut |text| told.push(text.to_owned()),
    )
    .unwrap();
    assert!(probed.temporary && probed.file_bytes == FILE_BYTES_MIN);
    let pages: Vec<u64> = probed.sequential.iter().map(|r| r.page_bytes).collect();
    assert_eq!(pages, [PAGE_4K, PAGE_2M]);
    for rate in probed.sequential.iter().chain(&probed.random) {
        assert!(rate.gb_per_second > 0.0 && rate.depth > 0, "{rate:?}");
        let in_flight = u64::from(rate.request_bytes) * u64::from(rate.depth);
        assert!(in_flight <= IN_FLIGHT_BYTES_MAX, "{rate:?}");
    }
    assert_eq!(probed.random.len(), RANDOM.len());
    // Two rows of two points are the least a climb can take before it sees a fall.
    assert!(probed.points_count >= 2 * 2 * 2, "{}", probed.points_count);
    let sustained = probed.sustained;
    assert!(sustained.seconds >= 0.02 && sustained.slowest_gb_per_second > 0.0);
    assert!(sustained.slowest_gb_per_second <= sustained.first_gb_per_second);
    assert!(told.iter().any(|text| text.contains("sustained")));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn rounds_that_do_not_agree_are_no_measurement() {
    let directory = tempfile::tempdir().unwrap();
    let options = ProbeOptions {
        // No two rounds of a drive take the same nanoseconds.
        spread_max: 0.0,
        ..options(directory.path())
    };
    let error = probe(&options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.context().contains("noisy"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn memory_is_no_drive() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        println!("SKIP: /dev/shm cannot be written");
        return;
    };
    let error = probe(&options(directory.path())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.context().contains("memory and no drive"), "{error}");
}

#[test]
fn small_files_holes_and_full_disks_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("small");
    std::fs::write(&small, [1; 5000]).unwrap();
    let error = probe(&options(&small)).unwrap_err();
    assert!(error.context().contains("too few"), "{error}");
    let holes = directory.path().join("holes");
    let file = std::fs::File::create(&holes).unwrap();
    file.set_len(FILE_BYTES_MIN).unwrap();
    let error = probe(&options(&holes)).unwrap_err();
    assert!(error.context().contains("holes"), "{error}");
    let full = ProbeOptions {
        size_bytes: 1 << 60,
        ..options(directory.path())
    };
    let error = probe(&full).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let error = probe(&options(&directory.path().join("missing"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_stop_is_obeyed() {
    let directory = tempfile::tempdir().unwrap();
    let error = measure(
        &options(directory.path()),
        &AtomicBool::new(true),
        &mut |_| {},
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Canceled);
}
