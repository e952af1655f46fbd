//! Tests of the topology: a made-up /sys with two nodes, and this machine.

use super::*;
use std::fs::{create_dir_all, write};
use std::os::unix::fs::symlink;

/// A /sys with two nodes, an NVMe drive on node 1 with a partition, a multipath NVMe on node 0, volumes over them, and a virtio disk.
fn two_nodes() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let put = |path: &str, text: &str| {
        let path = root.path().join(path);
        create_dir_all(path.parent().unwrap()).unwrap();
        write(path, text).unwrap();
    };
    let link = |from: &str, to: &str| {
        let from = root.path().join(from);
        create_dir_all(from.parent().unwrap()).unwrap();
        symlink(root.path().join(to), from).unwrap();
    };
    put("devices/system/node/has_memory", "0-1\n");
    put("devices/system/node/node0/cpulist", "0-3,8\n");
    put("devices/system/node/node1/cpulist", "4-7\n");
    put(
        "devices/system/node/node1/meminfo",
        "Node 1 MemTotal: 99 kB\nNode 1 MemFree: 10 kB\nNode 1 Inactive(file): 2 kB\n",
    );
    put("devices/pci0/0000:01/nvme/nvme0/numa_node", "1\n");
    put(
        "devices/pci0/0000:01/nvme/nvme0/nvme0n1/nvme0n1p1/partition",
        "1\n",
    );
    link(
        "dev/block/259:1",
        "devices/pci0/0000:01/nvme/nvme0/nvme0n1/nvme0n1p1",
    );
    put("devices/pci0/0000:02/nvme/nvme1/numa_node", "0\n");
    put(
        "devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1/size",
        "9\n",
    );
    link(
        "devices/virtual/nvme-subsystem/nvme-subsys1/nvme1",
        "devices/pci0/0000:02/nvme/nvme1",
    );
    link(
        "dev/block/259:2",
        "devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1",
    );
    put("devices/pci0/0000:03/numa_node", "-1\n");
    put("devices/pci0/0000:03/virtio1/block/vda/size", "9\n");
    link("dev/block/254:0", "devices/pci0/0000:03/virtio1/block/vda");
    put("devices/virtual/block/dm-0/size", "9\n");
    link(
        "devices/virtual/block/dm-0/slaves/nvme0n1p1",
        "devices/pci0/0000:01/nvme/nvme0/nvme0n1/nvme0n1p1",
    );
    link("dev/block/253:0", "devices/virtual/block/dm-0");
    put("devices/virtual/block/md0/size", "9\n");
    link(
        "devices/virtual/block/md0/slaves/dm-0",
        "devices/virtual/block/dm-0",
    );
    link(
        "devices/virtual/block/md0/slaves/nvme1n1",
        "devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1",
    );
    link("dev/block/9:0", "devices/virtual/block/md0");
    root
}

#[test]
fn nodes_of_a_two_socket_machine() {
    let root = two_nodes();
    let nodes = sysfs_nodes(root.path());
    assert_eq!(nodes.len(), 2);
    assert_eq!(
        nodes[0],
        Node {
            index: 0,
            cpus: vec![0, 1, 2, 3, 8]
        }
    );
    assert_eq!(
        nodes[1],
        Node {
            index: 1,
            cpus: vec![4, 5, 6, 7]
        }
    );
    assert!(sysfs_nodes(Path::new("/nonexistent")).is_empty());
}

#[test]
fn drives_know_their_node() {
    let root = two_nodes();
    let node = |major, minor| node_of_device(root.path(), major, minor);
    assert_eq!(node(259, 1), Some(1), "a partition, from its controller");
    assert_eq!(
        node(259, 2),
        Some(0),
        "a multipath drive, from its controllers"
    );
    assert_eq!(node(254, 0), None, "-1 is unknown");
    assert_eq!(node(253, 0), Some(1), "a volume, from its parts");
    assert_eq!(node(9, 0), None, "parts on two nodes");
    assert_eq!(node(0, 44), None, "no block device");
}

#[test]
fn a_full_node_is_not_bound_to() {
    let root = two_nodes();
    let mut topology = Topology::detect().unwrap();
    topology.nodes = sysfs_nodes(root.path());
    topology.sys = root.path().to_owned();
    // SAFETY: refused before the range is looked at.
    let bind = |node, need| unsafe { topology.bind_memory(node, 0x10000, 4096, need) };
    let error = bind(1, 13 << 10).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoMemory);
    assert!(
        error
            .to_string()
            .contains("12.0 KiB free, 13.0 KiB are needed"),
        "{error}"
    );
    assert_eq!(bind(7, 1).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn lists_of_the_kernel() {
    assert_eq!(parse_list("0-2,5\n", 8), Some(vec![0, 1, 2, 5]));
    assert_eq!(parse_list("\n", 8), Some(vec![]));
    for bad in ["0-9", "3-1", "x", "0-99999999999", "-1"] {
        assert_eq!(parse_list(bad, 8), None, "{bad}");
    }
}

/// The calls themselves, on whatever this machine has: its own first node always exists.
#[test]
fn this_machine_binds_and_pins() {
    let topology = Topology::detect().unwrap();
    assert!(topology.node_count() >= 1);
    let Some(node) = topology.nodes().first().cloned() else {
        return eprintln!("SKIPPED this_machine_binds_and_pins: the kernel knows no NUMA node");
    };
    assert!(!topology.cpus_of(node.index).is_empty());
    assert!(topology.cpus_of(u32::MAX).is_empty());
    let len = 1 << 20;
    let base = super::super::host::reserve(len as u64).unwrap();
    // SAFETY: our own reservation, with no other user.
    unsafe {
        super::super::host::protect(base, len, super::super::host::Protection::ReadWrite).unwrap();
        match topology.bind_range(node.index, base, len) {
            Ok(()) => {}
            // Containers often forbid mbind; then the pool says so instead of binding.
            Err(error) => eprintln!("SKIPPED binding: {error}"),
        }
        super::super::host::populate(base, len).unwrap();
        super::super::host::unmap(base, len).unwrap();
    }
    let cpus = node.cpus.clone();
    std::thread::spawn(move || {
        let topology = Topology::detect().unwrap();
        topology.pin_to(&cpus).unwrap();
        topology.pin_thread(node.index).unwrap();
        assert_eq!(
            topology.pin_thread(u32::MAX).unwrap_err().kind(),
            ErrorKind::NotFound
        );
    })
    .join()
    .unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    if let Some(node) = topology.node_of_file(&file).unwrap() {
        assert!(topology.nodes().iter().any(|have| have.index == node));
    }
}
