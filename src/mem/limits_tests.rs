//! Tests of the limits: parsers on samples of real machines, and a real cgroup where one can be made.

use super::*;
use crate::units::GIB;
use std::process::Command;

const V1_OWN: &str = "9:name=systemd:/\n4:memory:/process_api/d6ce\n3:cpuset:/\n0::/\n";
const V1_MOUNTS: &str = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
const V2_OWN: &str = "0::/user.slice/user-1000.slice/session-2.scope\n";
const V2_MOUNTS: &str = "\
25 30 0:23 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
";
/// Docker on v1 without a cgroup namespace: the mount begins at the container's own group.
const DOCKER_MOUNTS: &str = "\
1 2 0:30 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory
";

fn paths(own: &str, mounts: &str, version: Version) -> Vec<String> {
    cgroup_directories(own, mounts, version)
        .into_iter()
        .map(|path| path.display().to_string())
        .collect()
}

#[test]
fn the_chain_of_cgroups_runs_up_to_the_mount() {
    assert_eq!(
        paths(V1_OWN, V1_MOUNTS, Version::V1),
        [
            "/sys/fs/cgroup/memory/process_api/d6ce",
            "/sys/fs/cgroup/memory/process_api",
            "/sys/fs/cgroup/memory"
        ]
    );
    assert_eq!(
        paths(V1_OWN, V1_MOUNTS, Version::V2),
        ["/sys/fs/cgroup/unified"]
    );
    assert_eq!(
        paths(V2_OWN, V2_MOUNTS, Version::V2),
        [
            "/sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope",
            "/sys/fs/cgroup/user.slice/user-1000.slice",
            "/sys/fs/cgroup/user.slice",
            "/sys/fs/cgroup"
        ]
    );
    assert!(paths(V2_OWN, V2_MOUNTS, Version::V1).is_empty());
}

#[test]
fn containers_see_their_own_part() {
    let root = ["/sys/fs/cgroup/memory"];
    assert_eq!(
        paths("4:memory:/docker/abc\n", DOCKER_MOUNTS, Version::V1),
        root
    );
    assert_eq!(
        paths("4:memory:/docker/abc/in\n", DOCKER_MOUNTS, Version::V1),
        ["/sys/fs/cgroup/memory/in", "/sys/fs/cgroup/memory"]
    );
    // A name that only begins alike is not below; a path out of the namespace is not followed.
    assert_eq!(
        paths("4:memory:/docker/abcd\n", DOCKER_MOUNTS, Version::V1),
        root
    );
    assert_eq!(
        paths("0::/../../x\n", V2_MOUNTS, Version::V2),
        ["/sys/fs/cgroup"]
    );
}

#[test]
fn mount_points_are_unescaped() {
    assert_eq!(unescape(r"/a\040b\134c\"), r"/a b\c\");
    assert_eq!(unescape(r"\9zz"), r"\9zz");
}

#[test]
fn limits_of_both_versions() {
    assert_eq!(limit_of("9223372036854771712\n"), None, "v1 unlimited");
    assert_eq!(limit_of("max\n"), None, "v2 unlimited");
    assert_eq!(limit_of("1073741824\n"), Some(GIB));
    assert_eq!(limit_of("nonsense"), None);
    assert_eq!(free_below_limit(1000, 900, 300), 400);
    assert_eq!(free_below_limit(1000, 5000, 0), 0);
    assert_eq!(free_below_limit(1000, 200, 300), 1000);
}

#[test]
fn reclaimable_counts_the_whole_tree_once() {
    let v1 = "cache 9826304\ninactive_file 24576\nactive_file 802816\nshmem 8998912\n\
              total_inactive_file 1379135488\ntotal_active_file 632086528\n";
    assert_eq!(reclaimable(v1), 1_379_135_488 + 632_086_528);
    let v2 = "anon 1\nfile 9\ninactive_file 4096\nactive_file 8192\n";
    assert_eq!(reclaimable(v2), 12_288);
    assert_eq!(reclaimable(""), 0);
}

#[test]
fn a_v2_directory_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    let free = || free_under(directory.path(), Version::V2);
    assert_eq!(free(), None, "no controller, no limit");
    write("memory.max", "max\n");
    write("memory.high", "max\n");
    write("memory.current", "300\n");
    write("memory.stat", "inactive_file 100\nactive_file 50\n");
    assert_eq!(free(), None);
    write("memory.max", "1000\n");
    assert_eq!(free(), Some(850));
    write("memory.high", "700\n");
    assert_eq!(free(), Some(550), "above memory.high the kernel throttles");
}

#[test]
fn status_and_meminfo() {
    let text = "VmHWM:\t    1804 kB\nVmRSS:\t 9 kB\nRssAnon:\t     112 kB\nRssFile:\t    1692 kB\nRssShmem:\t       4 kB\n\
                HugetlbPages:\t    2048 kB\n";
    assert_eq!(
        Status::parse(text),
        Status {
            anonymous_bytes: 112 << 10,
            shared_bytes: 4 << 10,
            file_bytes: 1692 << 10,
            huge_bytes: 2 << 20,
            peak_bytes: 1804 << 10
        }
    );
    assert_eq!(
        meminfo_bytes("MemAvailable:  23431 kB\n", "MemAvailable"),
        Some(23431 << 10)
    );
    assert_eq!(meminfo_bytes("MemAvailable: x kB\n", "MemAvailable"), None);
    assert_eq!(meminfo_bytes("MemAvailableX: 1 kB\n", "MemAvailable"), None);
}

#[test]
fn huge_pages_of_one_file_count_once() {
    let smaps = "\
7f0000000000-7f0000800000 rw-s 00000000 00:0f 1234                       /memfd:flea-pool (deleted)
Rss:                   0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    8192 kB
7f0001000000-7f0001400000 r--s 00200000 00:0f 1234                       /memfd:flea-pool (deleted)
Shared_Hugetlb:     4096 kB
Private_Hugetlb:       0 kB
7f0002000000-7f0002200000 rw-p 00000000 00:0f 0
Private_Hugetlb:    2048 kB
7f0003000000-7f0003200000 rw-s 00000000 00:0f 77                         /memfd:other (deleted)
Shared_Hugetlb:     2048 kB
";
    assert_eq!(unique_huge_bytes(smaps), (8192 + 2048 + 2048) << 10);
}

#[test]
fn the_margin_is_the_larger_of_both() {
    assert_eq!(less_margin(GIB), GIB - MARGIN_MIN_BYTES);
    assert_eq!(less_margin(100 * GIB), 97 * GIB);
    assert_eq!(less_margin(MIB), 0);
}

#[test]
fn this_machine_answers() {
    let free = free_memory().unwrap();
    assert!(free.bytes > 64 * MIB, "{free:?}");
    assert!(available_memory_bytes().unwrap() < free.bytes + GIB);
    let error = check_free(u64::MAX, "a pool").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("too many"), "{error}");
    check_free(MIB, "a pool").unwrap();
}

#[test]
fn held_memory_follows_what_is_touched() {
    let look = || {
        let before = process_memory_bytes().unwrap();
        // Kept from an optimiser that sees nobody reading it.
        let block = std::hint::black_box(vec![1_u8; 96 * MIB as usize]);
        let during = process_memory_bytes().unwrap();
        drop(block);
        assert!(peak_memory_bytes().unwrap() >= during);
        during >= before + 64 * MIB
    };
    // Other tests of this process give pools back meanwhile: one look that they do not disturb is enough.
    assert!((0..50).any(|_| look()));
}

/// A cgroup of our own that goes away again.
pub(in crate::mem) struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("cgroup {} stays: {error}", self.0.display());
        }
    }
}

fn make_cgroup(name: &str) -> std::result::Result<(Cgroup, &'static str), String> {
    let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let mounts =
        std::fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let mut reason = "no memory cgroup mounted".to_owned();
    for (version, limit) in [
        (Version::V1, "memory.limit_in_bytes"),
        (Version::V2, "memory.max"),
    ] {
        let Some(parent) = cgroup_directories(&own, &mounts, version)
            .into_iter()
            .next()
        else {
            continue;
        };
        let path = parent.join(format!("flea-{name}-{}", std::process::id()));
        if let Err(error) = std::fs::create_dir(&path) {
            reason = format!("{}: {error}", path.display());
            continue;
        }
        let group = Cgroup(path);
        if group.0.join(limit).exists() {
            return Ok((group, limit));
        }
        reason = format!("{} has no {limit}", group.0.display());
    }
    Err(reason)
}

/// Runs one test of this binary again, in a memory cgroup of `limit_bytes`, and returns the path of the cgroup and what it printed. `None`, with the
/// reason on stderr, where no cgroup can be made.
pub(in crate::mem) fn in_cgroup(test: &str, limit_bytes: u64) -> Option<(String, String)> {
    let (group, limit) = match make_cgroup(test.rsplit(':').next().unwrap()) {
        Ok(made) => made,
        Err(reason) => {
            eprintln!("SKIPPED {test}: cannot make a memory cgroup: {reason}");
            return None;
        }
    };
    let path = group.0.display().to_string();
    std::fs::write(group.0.join(limit), limit_bytes.to_string()).unwrap();
    let output = Command::new("/bin/sh")
        .arg("-c")
        .arg(format!(
            "echo $$ > {path}/cgroup.procs && exec \"$0\" --exact {test} --nocapture"
        ))
        .arg(std::env::current_exe().unwrap())
        .env("FLEA_TEST_IN_CGROUP", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{} {text}", output.status);
    Some((path, text))
}

/// In the child of [`a_real_cgroup_limits_us`]: says what is free.
#[test]
fn inside_a_cgroup() {
    if std::env::var_os("FLEA_TEST_IN_CGROUP").is_none() {
        return;
    }
    let free = free_memory().unwrap();
    println!("FREE={} SET_BY={}", free.bytes, free.set_by);
}

#[test]
fn a_real_cgroup_limits_us() {
    let limit_bytes = 300 * MIB;
    let Some((path, text)) = in_cgroup("mem::limits::tests::inside_a_cgroup", limit_bytes) else {
        return;
    };
    let value = |key: &str| {
        let at = text.find(key).unwrap_or_else(|| panic!("{key} in {text}")) + key.len();
        text[at..].split_whitespace().next().unwrap().to_owned()
    };
    let free: u64 = value("FREE=").parse().unwrap();
    assert!(
        free <= limit_bytes && free > limit_bytes - 64 * MIB,
        "{free}"
    );
    assert_eq!(value("SET_BY="), path);
}
