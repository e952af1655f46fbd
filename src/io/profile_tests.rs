//! Tests of the profile: what is written is found again, for the same drive only, and nothing impossible is believed.

use super::*;
use crate::units::PAGE_2M;

fn device() -> Device {
    Device {
        major: 259,
        minor: 3,
        model: Some("Fast SSD/9".to_owned()),
        serial: None,
        filesystem: "ext4".to_owned(),
        size_bytes: Some(1 << 40),
        filesystem_id: Some("c0ffee".to_owned()),
    }
}

fn profile() -> Profile {
    Profile {
        version: VERSION,
        measured: "2026-01-02T03:04:05Z".to_owned(),
        device: device(),
        reader: "io_uring".to_owned(),
        direct_io: "direct".to_owned(),
        sequential: vec![Rate {
            page_bytes: PAGE_2M,
            request_bytes: 1 << 20,
            depth: 4,
            gb_per_second: 2.5,
            spread: 0.02,
            cpu_seconds_per_gb: 0.01,
        }],
        random: Vec::new(),
        sustained: Some(Sustained {
            seconds: 60.0,
            first_gb_per_second: 2.5,
            last_gb_per_second: 2.0,
            slowest_gb_per_second: 1.5,
        }),
        memory: None,
        links: Vec::new(),
        compute: Vec::new(),
        node_seconds: 0.0,
    }
}

fn damage(change: impl FnOnce(&mut Profile)) -> String {
    let directory = tempfile::tempdir().unwrap();
    let mut profile = profile();
    change(&mut profile);
    // Under the name of the drive that is asked for, whatever the profile says.
    let text = serde_json::to_string(&profile).unwrap();
    fs::write(directory.path().join(device().file_name()), text).unwrap();
    match find_in(directory.path(), &device()) {
        Found::Damaged(reason) => reason,
        found => panic!("{found:?}"),
    }
}

#[test]
fn a_profile_is_found_again_and_leaves_no_other_file() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("not/there/yet");
    assert_eq!(find_in(&cache, &device()), Found::Nothing);
    for _ in 0..2 {
        let path = profile().save_in(&cache).unwrap();
        assert_eq!(
            path.file_name().unwrap().to_str().unwrap(),
            "drive-259-3-ext4-Fast-SSD-9.json"
        );
    }
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
    let found = find_in(&cache, &device());
    assert_eq!(found.profile(), Some(&profile()));
    assert_eq!(found.to_string(), "measured 2026-01-02T03:04:05Z");
    let other = Device {
        minor: 4,
        ..device()
    };
    assert_eq!(find_in(&cache, &other), Found::Nothing);
}

#[test]
fn nothing_impossible_is_believed() {
    assert!(damage(|p| p.version = 2).contains("version 2"));
    assert!(damage(|p| p.device.serial = Some("B".to_owned())).contains("another drive"));
    for change in [
        (|p: &mut Profile| p.sequential[0].request_bytes = 0) as fn(&mut Profile),
        |p| p.sequential[0].request_bytes = 4097,
        |p| p.sequential[0].request_bytes = 128 << 20,
        |p| p.sequential[0].depth = 0,
        |p| p.sequential[0].depth = 100_000,
        |p| p.sequential[0].gb_per_second = -1.0,
        |p| p.sequential[0].gb_per_second = 1e9,
        |p| p.node_seconds = -1.0,
    ] {
        assert!(damage(change).contains("impossible"));
    }
    assert!(damage(|p| p.sustained.as_mut().unwrap().first_gb_per_second = 0.0).contains('0'));
}

#[test]
fn half_a_file_is_damaged_and_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = profile().save_in(directory.path()).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    let Found::Damaged(reason) = find_in(directory.path(), &device()) else {
        panic!("half a profile was believed");
    };
    assert!(
        reason.contains("flea probe") && reason.contains("drive-259"),
        "{reason}"
    );
    fs::write(&path, vec![b' '; FILE_BYTES_MAX as usize + 1]).unwrap();
    assert!(matches!(
        find_in(directory.path(), &device()),
        Found::Damaged(_)
    ));
}

#[test]
fn a_place_that_cannot_be_written_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(profile().save_in(&file).is_err());
}

#[test]
fn what_a_drive_loses_when_it_gets_warm_counts() {
    let rate = profile().stream_gb_per_second(PAGE_2M).unwrap();
    assert!((rate - 2.0).abs() < 1e-9, "{rate}");
    assert_eq!(profile().stream_gb_per_second(PAGE_4K), None);
    let mut faster = profile();
    faster.sustained.as_mut().unwrap().last_gb_per_second = 5.0;
    assert!((faster.stream_gb_per_second(PAGE_2M).unwrap() - 2.5).abs() < 1e-9);
}

/// As measured on a virtual disk: 4 KiB alone in 30 us, of which 2 are its bytes.
#[test]
fn experts_are_read_at_the_rate_of_long_random_reads() {
    assert_eq!(profile().expert_gb_per_second(), None);
    assert_eq!(profile().read_latency_seconds(), None);
    let rate = |request_bytes: u64, depth, gb_per_second| Rate {
        request_bytes: request_bytes as u32,
        depth,
        gb_per_second,
        ..profile().sequential[0]
    };
    let mut measured = profile();
    measured.random = vec![
        rate(PAGE_4K, 1, 0.1365),
        rate(PAGE_4K, 32, 0.33),
        rate(MIB, 1, 1.6),
        rate(MIB, 8, 2.5),
    ];
    // Less what the drive loses when it gets warm: 2.0 of 2.5.
    let experts = measured.expert_gb_per_second().unwrap();
    assert!((experts - 2.0).abs() < 1e-9, "{experts}");
    let latency = measured.read_latency_seconds().unwrap();
    assert!((latency - 27.96e-6).abs() < 0.05e-6, "{latency}");
    // A drive whose short reads are as fast as its long ones has none, not a negative one.
    measured.random[0].gb_per_second = 9.0;
    assert_eq!(measured.read_latency_seconds(), Some(0.0));
}

#[test]
fn the_cache_is_where_the_user_wants_it() {
    let of = |named: &str, cache: &str, home: &str| {
        let value = |text: &str| (!text.is_empty()).then(|| OsString::from(text));
        directory_of(value(named), value(cache), value(home))
    };
    assert_eq!(of("/p", "/c", "/h"), Some(PathBuf::from("/p")));
    assert_eq!(of("none", "/c", "/h"), None);
    assert_eq!(of("", "/c", "/h"), Some(PathBuf::from("/c/flea")));
    // The XDG rules: a relative path is no path.
    assert_eq!(of("", "c", "/h"), Some(PathBuf::from("/h/.cache/flea")));
    assert_eq!(of("", "", ""), None);
}

#[test]
fn a_partition_takes_its_names_from_the_drive() {
    let root = tempfile::tempdir().unwrap();
    let drive = root.path().join("sys/devices/nvme0/nvme0n1");
    fs::create_dir_all(drive.join("device")).unwrap();
    fs::create_dir_all(drive.join("nvme0n1p2")).unwrap();
    fs::write(drive.join("nvme0n1p2/partition"), "2\n").unwrap();
    fs::write(drive.join("device/model"), "Big One   \n").unwrap();
    fs::write(drive.join("device/serial"), "S123\n").unwrap();
    fs::write(drive.join("size"), "2000000\n").unwrap();
    fs::write(drive.join("nvme0n1p2/size"), "7\n").unwrap();
    let numbers = root.path().join("sys/dev/block");
    fs::create_dir_all(&numbers).unwrap();
    std::os::unix::fs::symlink(drive.join("nvme0n1p2"), numbers.join("259:2")).unwrap();
    let device = Device::of_numbers((259, 2), ("xfs", Some(0xabc)), root.path());
    assert_eq!(device.model.as_deref(), Some("Big One"));
    assert_eq!(device.serial.as_deref(), Some("S123"));
    assert_eq!(device.file_name(), "drive-259-2-xfs-Big-One-S123.json");
    // Of the drive, not of the partition.
    assert_eq!(device.size_bytes, Some(1_024_000_000));
    assert_eq!(device.filesystem_id.as_deref(), Some("abc"));
}

/// Disks of virtual machines have neither model nor serial, and their numbers follow the order in which they are found.
#[test]
fn another_drive_under_the_same_number_is_told_apart() {
    let of = |size_bytes, filesystem_id: Option<&str>| Device {
        model: None,
        size_bytes,
        filesystem_id: filesystem_id.map(str::to_owned),
        ..device()
    };
    let directory = tempfile::tempdir().unwrap();
    let measured = Profile {
        device: of(Some(1 << 40), Some("a")),
        ..profile()
    };
    measured.save_in(directory.path()).unwrap();
    let found = |device: &Device| find_in(directory.path(), device);
    assert!(found(&measured.device).profile().is_some());
    for other in [
        of(Some(1 << 41), Some("a")),
        of(Some(1 << 40), Some("b")),
        of(None, None),
    ] {
        let Found::Damaged(reason) = found(&other) else {
            panic!("the rates of another drive were believed: {other:?}");
        };
        assert!(reason.contains("another drive"), "{reason}");
    }
}

/// What was kept before drives were told apart by size is no error: it says what to do.
#[test]
fn a_profile_of_the_first_form_is_measured_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut text = serde_json::to_value(profile()).unwrap();
    let old = text["device"].as_object_mut().unwrap();
    old.remove("size_bytes").unwrap();
    old.remove("filesystem_id").unwrap();
    let path = directory.path().join(device().file_name());
    fs::write(&path, text.to_string()).unwrap();
    let found = find_in(directory.path(), &device());
    assert_eq!(found.profile(), None);
    let told = found.to_string();
    assert!(
        told.contains("of an older form") && told.contains("run `flea probe`"),
        "{told}"
    );
    // One that is named is as good as it was: its owner says which drive it is of.
    assert_eq!(Profile::load(&path).unwrap().device.size_bytes, None);
    // A drive of which nothing more is known today has no newer form.
    let vague = Device {
        size_bytes: None,
        filesystem_id: None,
        ..device()
    };
    assert!(find_in(directory.path(), &vague).profile().is_some());
}

#[test]
fn the_drive_below_this_directory_has_a_number() {
    let directory = tempfile::tempdir().unwrap();
    let device = Device::of_path(directory.path()).unwrap();
    assert!(!device.filesystem.is_empty());
    // The same by way of a file on it, which is how a reader asks.
    let shard = directory.path().join("shard");
    fs::write(&shard, [1; 4096]).unwrap();
    let of_shard = Device::of_shard(&ShardFile::open(&shard).unwrap());
    assert_eq!(of_shard, device);
    assert!(Device::of_path(&directory.path().join("missing")).is_err());
}
