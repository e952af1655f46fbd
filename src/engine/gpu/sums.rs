//! Counters of several GPUs as those of one.
//!
//! What counts is added up. What is a time with something under way is the longest of them, because they run beside one another;
//! what is a state is told as good as it is everywhere. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: beside the leases of several GPUs.

use super::GpuStats;
use crate::engine::stats::Stats;
use crate::io::mirror::CopyStats;

/// Adds one GPU's counters.
pub(super) fn add(sum: &mut GpuStats, gpu: GpuStats) {
    for (sum, more) in [
        (&mut sum.acquires, gpu.acquires),
        (&mut sum.releases, gpu.releases),
        (&mut sum.loads, gpu.loads),
        (&mut sum.stalls, gpu.stalls),
        (&mut sum.stall_ns, gpu.stall_ns),
        (&mut sum.h2d_bytes, gpu.h2d_bytes),
        (&mut sum.h2d_pinned_bytes, gpu.h2d_pinned_bytes),
        (&mut sum.h2d_resident_bytes, gpu.h2d_resident_bytes),
        (&mut sum.copies, gpu.copies),
        (&mut sum.unpacked_bytes, gpu.unpacked_bytes),
        (&mut sum.pinned_bytes, gpu.pinned_bytes),
        (&mut sum.bytes_read, gpu.bytes_read),
        (&mut sum.direct_bytes, gpu.direct_bytes),
    ] {
        *sum += more;
    }
    if sum.not_pinned.is_none() {
        sum.not_pinned = gpu.not_pinned;
    }
    add_host(&mut sum.host, gpu.host);
}

/// Adds the counters of one model below.
fn add_host(sum: &mut Stats, one: Stats) {
    for (sum, more) in [
        (&mut sum.acquires, one.acquires),
        (&mut sum.releases, one.releases),
        (&mut sum.loads, one.loads),
        (&mut sum.bytes_read, one.bytes_read),
        (&mut sum.reads, one.reads),
        (&mut sum.retries, one.retries),
        (&mut sum.stalls, one.stalls),
        (&mut sum.stall_ns, one.stall_ns),
        (&mut sum.mispredicts, one.mispredicts),
    ] {
        *sum += more;
    }
    for (sum, more) in sum.stall_counts.iter_mut().zip(one.stall_counts) {
        *sum += more;
    }
    sum.read_ns = sum.read_ns.max(one.read_ns);
    let slots = &mut sum.slots;
    slots.free += one.slots.free;
    slots.used += one.slots.used;
    slots.quarantined += one.slots.quarantined;
    if one.load_latency.p99_ns > sum.load_latency.p99_ns {
        sum.load_latency = one.load_latency;
    }
    for fallback in one.fallbacks {
        if !sum.fallbacks.contains(&fallback) {
            sum.fallbacks.push(fallback);
        }
    }
    add_mirrors(&mut sum.mirrors, one.mirrors);
    // Of a GPU that holds all its layers there is no pool to speak of.
    if one.page_bytes == 0 {
        return;
    }
    let (before, more) = (sum.resident_bytes as f64, one.resident_bytes as f64);
    if sum.page_bytes == 0 {
        sum.reader = one.reader;
        sum.backing = one.backing;
        sum.page_bytes = one.page_bytes;
        sum.direct_io = one.direct_io;
        sum.huge_page_share = one.huge_page_share;
    } else {
        sum.direct_io &= one.direct_io;
        let weighed = sum.huge_page_share * before + one.huge_page_share * more;
        sum.huge_page_share = match before + more > 0.0 {
            true => weighed / (before + more),
            false => sum.huge_page_share.min(one.huge_page_share),
        };
    }
    sum.resident_bytes += one.resident_bytes;
}

fn add_mirrors(sum: &mut Vec<CopyStats>, more: Vec<CopyStats>) {
    for copy in more {
        match sum.iter_mut().find(|one| one.directory == copy.directory) {
            Some(one) => {
                one.bytes_read += copy.bytes_read;
                one.is_dropped |= copy.is_dropped;
            }
            None => sum.push(copy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_added_and_what_is_a_state_is_as_good_as_everywhere() {
        let one = |bytes: u64, direct_io: bool, share: f64| GpuStats {
            h2d_bytes: bytes,
            host: Stats {
                bytes_read: bytes,
                read_ns: bytes * 10,
                page_bytes: 4096,
                resident_bytes: bytes,
                direct_io,
                huge_page_share: share,
                ..Stats::default()
            },
            ..GpuStats::default()
        };
        let mut sum = GpuStats::default();
        add(&mut sum, GpuStats::default());
        add(&mut sum, one(100, true, 1.0));
        add(&mut sum, one(300, false, 0.0));
        add(&mut sum, GpuStats::default());
        assert_eq!((sum.h2d_bytes, sum.host.bytes_read), (400, 400));
        assert_eq!((sum.host.read_ns, sum.host.page_bytes), (3000, 4096));
        assert!(!sum.host.direct_io && sum.host.huge_page_share == 0.25);
    }
}
