//! Tests of both backings: bytes, order, page sizes, guards, and that all memory comes back.

use super::*;
use crate::plan::LayerPlan;
use crate::units::{MIB, align_up};
use std::os::fd::AsRawFd;

/// A model of one shard: every layer is `layer_pages` long, its run is the last `runs[i]` pages of it, the rest is resident.
pub(super) fn plan_of(
    page_bytes: u64,
    layer_pages: u64,
    runs: &[u64],
    slots_count: u32,
) -> (Arc<Windows>, Plan) {
    let mut plan = Plan {
        page_bytes,
        slots_count,
        slot_pages: runs.iter().copied().max().unwrap_or(0),
        layers: Vec::new(),
        resident: Vec::new(),
        resident_bytes: 0,
        ring_bytes: 0,
        streamed_bytes_per_pass: 0,
        weight_budget_bytes: 0,
        smallest_budget_bytes: 0,
        always_resident_bytes: 0,
        experts: None,
    };
    for (index, &run_pages) in runs.iter().enumerate() {
        let first_page = index as u64 * layer_pages;
        let run = |first_page, page_count| PageRun {
            shard_index: 0,
            first_page,
            page_count,
        };
        let kept = layer_pages - run_pages;
        if kept > 0 {
            plan.resident.push(run(first_page, kept));
        }
        plan.layers.push(LayerPlan {
            transient: (run_pages > 0).then(|| run(first_page + kept, run_pages)),
            transient_bytes: run_pages * page_bytes,
            resident_bytes: kept * page_bytes,
            slot_index: (run_pages > 0).then_some(index as u32 % slots_count.max(1)),
        });
    }
    // The file ends inside the last page.
    let file_bytes = runs.len() as u64 * layer_pages * page_bytes - 5;
    (Arc::new(Windows::reserve(&[file_bytes]).unwrap()), plan)
}

pub(super) fn pool_of(windows: &Arc<Windows>, plan: &Plan, backing: Backing) -> Pool {
    Pool::new(Arc::clone(windows), plan, backing, &PoolOptions::default()).unwrap()
}

pub(super) fn run_of(plan: &Plan, layer: usize) -> PageRun {
    plan.layers[layer].transient.unwrap()
}

pub(super) fn window_address(windows: &Windows, plan: &Plan, run: &PageRun) -> *mut u8 {
    windows.address(run.shard_index, run.first_page * plan.page_bytes)
}

/// Asks the kernel to read a byte there: no signal, whatever the protection.
pub(super) fn readable(address: *const u8) -> bool {
    let (reader, writer) = std::io::pipe().unwrap();
    // SAFETY: the kernel checks the address itself and answers EFAULT.
    let done = unsafe { libc::write(writer.as_raw_fd(), address.cast(), 1) };
    drop(reader);
    done == 1
}

/// Asks the kernel to write a zero byte there.
pub(super) fn writable(address: *mut u8) -> bool {
    let zero = std::fs::File::open("/dev/zero").unwrap();
    // SAFETY: the kernel checks the address itself and answers EFAULT; callers pass bytes of a pool under test.
    unsafe { libc::read(zero.as_raw_fd(), address.cast(), 1) == 1 }
}

/// Bytes in memory, mappings, and mappings that children of fork would get, in some address ranges.
pub(super) fn mapped(ranges: &[(usize, usize)]) -> (u64, usize, usize) {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut bytes, mut count, mut forked) = (false, 0, 0, 0);
    for line in text.lines() {
        // Rss does not count hugetlb pages.
        let memory = ["Rss:", "Private_Hugetlb:", "Shared_Hugetlb:"];
        let value = memory.iter().find_map(|name| line.strip_prefix(name));
        if let Some(value) = value.filter(|_| inside) {
            bytes += crate::mem::limits::kilobytes(value).unwrap();
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            forked += usize::from(!flags.split(' ').any(|flag| flag == "dc"));
        } else if let Some(((start, end), _)) = crate::mem::limits::mapping_header(line) {
            inside = ranges
                .iter()
                .any(|&(base, len)| start < base + len && base < end);
            count += usize::from(inside);
        }
    }
    (bytes, count, forked)
}

pub(super) fn pool_bytes(pool: &Pool) -> u64 {
    pool.probe().inner.pool_bytes
}

/// Writes `slot` and the page's number into each page of a slot's run, or checks that they are there.
fn stamp(target: *mut u8, plan: &Plan, slot: u32, pages: std::ops::Range<u64>, check: bool) {
    for page in pages {
        for end in [0, plan.page_bytes - 8] {
            let value = u64::from(slot) << 32 | (page + 1);
            // SAFETY: aligned, inside the run that `target` begins.
            unsafe {
                let word = target
                    .add((page * plan.page_bytes + end) as usize)
                    .cast::<u64>();
                if check {
                    assert_eq!(word.read(), value, "slot {slot} page {page}");
                } else {
                    word.write(value);
                }
            }
        }
    }
}

/// Three slots serve forty places of differing length, two hundred moves in all. Every page of a slot keeps its number on every move.
/// `behind`: they get their memory meanwhile.
fn moves(page_bytes: u64, slot_pages: u64, behind: bool) {
    let runs: Vec<u64> = (0..40)
        .map(|layer| slot_pages - [0, 1, 0, 3, 1][layer % 5])
        .collect();
    let (windows, plan) = plan_of(page_bytes, slot_pages + 1, &runs, 3);
    let options = PoolOptions {
        fill_behind: behind,
        ..PoolOptions::default()
    };
    let mut pool = Pool::new(Arc::clone(&windows), &plan, Backing::Private, &options).unwrap();
    let probe = pool.probe();
    assert_eq!(
        pool_bytes(&pool),
        (runs.iter().map(|run| slot_pages + 1 - run).sum::<u64>() + 3 * slot_pages) * page_bytes
    );
    if !behind {
        assert_eq!(mapped(&probe.inner.ranges).0, pool_bytes(&pool));
    }
    let mut stamped = [0_u64; 3];
    let mut served = [None; 3];
    for step in 0..200 {
        let slot = (step % 3) as u32;
        // A stride that is coprime to 40: neighbours in time are not neighbours in the file.
        let layer = step * 7 % 40;
        let run = run_of(&plan, layer);
        let target = pool.aim(slot, &run).unwrap();
        assert_eq!(target, window_address(&windows, &plan, &run));
        assert!(
            writable(last_byte(target, &run, &plan)),
            "the reader must be able to write"
        );
        let known = &mut stamped[slot as usize];
        // The byte just written by `writable` was the last of the run: stamp that page anew.
        stamp(
            target,
            &plan,
            slot,
            0..(*known).min(run.page_count - 1),
            true,
        );
        stamp(target, &plan, slot, 0..run.page_count, false);
        *known = (*known).max(run.page_count);
        pool.publish(slot).unwrap();
        assert!(
            readable(target) && !writable(target),
            "published is read-only"
        );
        // The first places of slots that are still to be used are writable from the beginning.
        if let Some(old) = served[slot as usize].replace(target) {
            assert!(old == target || !readable(old), "an old place must be gone");
        }
    }
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while mapped(&probe.inner.ranges).0 < pool_bytes(&pool) && patience > std::time::Instant::now()
    {
        pool.check_filled().unwrap();
    }
    let (bytes, mappings, forked) = mapped(&probe.inner.ranges);
    assert_eq!(
        bytes,
        pool_bytes(&pool),
        "moves neither make nor lose memory"
    );
    assert!(mappings <= 40 * 2 + 3 * 6 + 8, "{mappings} mappings");
    assert_eq!(forked, 0, "children of fork must not share the pool");
    let report = pool.page_report().unwrap();
    println!("moves of {page_bytes}: {mappings} mappings, {report:?}");
    if page_bytes == PAGE_2M && report.fallbacks.is_empty() {
        assert!(report.huge_page_share > 0.95, "{report:?}");
    }
    assert!(page_bytes == PAGE_2M || report.fallbacks.is_empty());
}

/// The last byte of a run.
fn last_byte(target: *mut u8, run: &PageRun, plan: &Plan) -> *mut u8 {
    target.wrapping_add((run.page_count * plan.page_bytes - 1) as usize)
}

#[test]
fn slots_move_on_huge_pages() {
    moves(PAGE_2M, 6, false);
}

#[test]
fn slots_move_on_small_pages() {
    moves(PAGE_4K, 50, false);
}

#[test]
fn slots_move_while_they_get_their_memory() {
    moves(PAGE_4K, 16, true);
    moves(PAGE_2M, 4, true);
}

#[test]
fn slots_lie_ready_for_the_first_pass_and_make_way_for_another() {
    let (windows, plan) = plan_of(PAGE_2M, 2, &[1, 1, 1, 1], 2);
    let options = PoolOptions {
        fill_behind: true,
        ..PoolOptions::default()
    };
    let mut pool = Pool::new(Arc::clone(&windows), &plan, Backing::Private, &options).unwrap();
    let place = |layer: usize| window_address(&windows, &plan, &run_of(&plan, layer));
    let ready = |layer: usize| writable(place(layer));
    // Before anything was read into them they show zeros, all the way; the others fault.
    for layer in [0, 1] {
        assert!(readable(place(layer)));
        // SAFETY: a place of one page that the kernel could read just now.
        let bytes = unsafe { std::slice::from_raw_parts(place(layer), PAGE_2M as usize) };
        assert!(bytes.iter().all(|byte| *byte == 0), "layer {layer}");
    }
    assert_eq!([2, 3].map(|layer| readable(place(layer))), [false, false]);
    assert_eq!([0, 1, 2, 3].map(ready), [true, true, false, false]);
    // The other slot, the other layer, and one that nothing was laid out for: each is where it was aimed, and only there.
    pool.aim(1, &run_of(&plan, 0)).unwrap();
    assert_eq!([0, 1, 2, 3].map(ready), [true, false, false, false]);
    pool.aim(0, &run_of(&plan, 3)).unwrap();
    assert_eq!([0, 1, 2, 3].map(ready), [true, false, false, true]);
    pool.publish(1).unwrap();
    let clash = pool.aim(0, &run_of(&plan, 0)).unwrap_err();
    assert_eq!(clash.kind(), ErrorKind::Invalid);
}

/// Huge pages are what private pools are for: where the machine gives them at all, they must come.
#[test]
fn huge_pages_come_where_the_machine_has_them() {
    let setting =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let (windows, plan) = plan_of(PAGE_2M, 8, &[4, 4, 4], 3);
    let pool = pool_of(&windows, &plan, Backing::Private);
    let report = pool.page_report().unwrap();
    if setting.contains("[never]") || setting.is_empty() {
        assert!(
            report.fallbacks[0].to_string().contains("switched off"),
            "{report:?}"
        );
        return;
    }
    assert_eq!(report.page_bytes, PAGE_2M, "{report:?}");
    assert!(report.huge_page_share > 0.95, "{report:?}");
}

#[test]
fn a_run_may_come_again_grow_and_shrink_in_place() {
    let (windows, plan) = plan_of(PAGE_4K, 8, &[8, 8], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Private);
    let mut run = run_of(&plan, 0);
    let target = pool.aim(0, &run).unwrap();
    stamp(target, &plan, 0, 0..8, false);
    pool.publish(0).unwrap();
    assert_eq!(
        pool.aim(0, &run).unwrap(),
        target,
        "a retry of the same read"
    );
    assert!(writable(target.wrapping_add(9)));
    for (first_page, page_count) in [(0, 5), (2, 6), (0, 8), (1, 3)] {
        run.first_page = first_page;
        run.page_count = page_count;
        let target = pool.aim(0, &run).unwrap();
        stamp(target, &plan, 0, 1..page_count, true);
        for page in 0..8 {
            let inside = (first_page..first_page + page_count).contains(&page);
            assert_eq!(
                readable(windows.address(0, page * PAGE_4K)),
                inside,
                "page {page}"
            );
        }
    }
}

#[test]
fn wrong_aims_are_refused_and_harm_nothing() {
    let (windows, plan) = plan_of(PAGE_4K, 4, &[2, 2, 2], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Private);
    let kind = |result: Result<*mut u8>| result.unwrap_err().kind();
    let run = |first_page, page_count| PageRun {
        shard_index: 0,
        first_page,
        page_count,
    };
    assert_eq!(pool.publish(0).unwrap_err().kind(), ErrorKind::Invalid);
    for bad in [
        run(0, 2),
        run(1, 2),
        run(3, 2),
        run(2, 0),
        run(2, 3),
        run(1 << 50, 1),
        run(u64::MAX, 2),
        run(2, u64::MAX),
    ] {
        assert_eq!(kind(pool.aim(0, &bad)), ErrorKind::Invalid, "{bad:?}");
    }
    assert_eq!(
        kind(pool.aim(
            0,
            &PageRun {
                shard_index: 1,
                ..run(2, 2)
            }
        )),
        ErrorKind::Invalid
    );
    assert_eq!(kind(pool.aim(2, &run(2, 2))), ErrorKind::Invalid);
    let target = pool.aim(0, &run(2, 2)).unwrap();
    stamp(target, &plan, 0, 0..2, false);
    assert_eq!(
        kind(pool.aim(1, &run(2, 2))),
        ErrorKind::Invalid,
        "slot 0 is there"
    );
    assert_eq!(
        kind(pool.aim(1, &run(3, 1))),
        ErrorKind::Invalid,
        "slot 0 is there"
    );
    stamp(target, &plan, 0, 0..2, true);
    pool.aim(0, &run(6, 2)).unwrap();
    pool.aim(1, &run(2, 2)).unwrap();
    for not_resident in [run(2, 1), run(0, 3), run(1 << 50, 1)] {
        let error = pool.publish_resident(&not_resident).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    pool.publish_resident(&run(1, 1)).unwrap();
    assert!(pool.resident_target(&run(2, 1)).is_null());
    assert!(pool.resident_target(&run(0, 3)).is_null());
    assert_eq!(
        pool.resident_target(&run(1, 1)),
        windows.address(0, PAGE_4K)
    );
}

#[test]
fn resident_pages_are_written_then_only_read() {
    for backing in [Backing::Private, Backing::Shared] {
        let (windows, plan) = plan_of(PAGE_4K, 4, &[1, 1], 2);
        let mut pool = pool_of(&windows, &plan, backing);
        assert_eq!(pool.backing(), backing);
        for (index, run) in plan.resident.iter().enumerate() {
            let target = pool.resident_target(run);
            let bytes = (run.page_count * plan.page_bytes) as usize;
            // SAFETY: the run's own writable bytes.
            unsafe { std::ptr::write_bytes(target, index as u8 + 1, bytes) };
        }
        for run in &plan.resident {
            pool.publish_resident(run).unwrap();
        }
        for (index, run) in plan.resident.iter().enumerate() {
            let window = window_address(&windows, &plan, run);
            assert!(readable(window) && !writable(window), "{backing:?}");
            // SAFETY: published and readable.
            let bytes = unsafe { std::slice::from_raw_parts(window, 3 * 4096) };
            assert!(
                bytes.iter().all(|&byte| byte == index as u8 + 1),
                "{backing:?}"
            );
        }
    }
}

#[test]
fn shared_slots_alias_one_memory() {
    for page_bytes in [PAGE_4K, PAGE_2M] {
        let (windows, plan) = plan_of(page_bytes, 3, &[2, 2, 2, 1], 2);
        let mut pool = pool_of(&windows, &plan, Backing::Shared);
        assert_eq!(pool.slots_count(), 2);
        let target = pool.aim(0, &run_of(&plan, 0)).unwrap();
        stamp(target, &plan, 7, 0..2, false);
        pool.publish(0).unwrap();
        for layer in [0, 2] {
            let window = window_address(&windows, &plan, &run_of(&plan, layer));
            assert_ne!(window, target);
            stamp(window, &plan, 7, 0..2, true);
            assert!(!writable(window), "a window is never written through");
        }
        let other = pool.aim(1, &run_of(&plan, 3)).unwrap();
        assert_eq!(other as usize, target as usize + 2 * page_bytes as usize);
        let error = pool.aim(1, &run_of(&plan, 0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        // Another slot serves it all the same for whoever maps the file; a slot or a run that is not in the plan does not.
        let away = pool.aim_away(1, &run_of(&plan, 0)).unwrap();
        assert_eq!(away, other);
        for (slot, run) in [(2, run_of(&plan, 0)), (0, plan.resident[0])] {
            let error = pool.aim_away(slot, &run).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        let probe = pool.probe();
        let (bytes, _, forked) = mapped(&probe.inner.ranges);
        assert_eq!(bytes, pool_bytes(&pool));
        assert_eq!(forked, 0);
        let report = pool.page_report().unwrap();
        println!("shared pool of {page_bytes}: {report:?}");
        let small = report.page_bytes < page_bytes;
        assert_eq!(
            small,
            !report.fallbacks.is_empty(),
            "told if and only if it is so: {report:?}"
        );
        let window = windows.base(0) as usize;
        let span = align_up(12 * page_bytes, PAGE_2M).unwrap() as usize;
        assert_eq!(mapped(&[(window, span)]).2, 0);
        drop(pool);
        assert_eq!(
            mapped(&[(window, span)]).0,
            0,
            "a dropped pool holds nothing"
        );
    }
}

#[test]
fn clients_get_a_sealed_read_only_file() {
    let (windows, plan) = plan_of(PAGE_4K, 3, &[2, 2], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Shared);
    let run = run_of(&plan, 1);
    let target = pool.aim(1, &run).unwrap();
    stamp(target, &plan, 1, 0..2, false);
    let fd = pool.read_only_fd().unwrap();
    let offset = pool.file_offset_bytes(&run).unwrap();
    assert_eq!(
        offset,
        (2 + 2) * PAGE_4K,
        "behind two resident pages and slot 0"
    );
    assert_eq!(pool.file_offset_bytes(&plan.resident[1]), Some(PAGE_4K));
    assert_eq!(pool.ring_offset_bytes(), 2 * PAGE_4K);
    assert_eq!(
        pool.file_offset_bytes(&PageRun {
            page_count: 1,
            ..run
        }),
        None
    );
    // SAFETY: a mapping of its own, of a sealed file, checked before it is used.
    unsafe {
        let map = |protection| {
            libc::mmap(
                std::ptr::null_mut(),
                8192,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        assert_eq!(map(libc::PROT_READ | libc::PROT_WRITE), libc::MAP_FAILED);
        let seen = map(libc::PROT_READ);
        assert_ne!(seen, libc::MAP_FAILED);
        stamp(seen.cast(), &plan, 1, 0..2, true);
        assert_ne!(
            libc::mprotect(seen, 8192, libc::PROT_READ | libc::PROT_WRITE),
            0
        );
        libc::munmap(seen, 8192);
        assert_ne!(libc::ftruncate(fd.as_raw_fd(), 0), 0);
    }
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    if let Ok(file) = std::fs::OpenOptions::new().write(true).open(&link) {
        // Root opens anything; the seal holds all the same.
        assert_eq!(
            file.set_len(0).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
    }
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&link).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o400);
    let (windows, plan) = plan_of(PAGE_4K, 3, &[2, 2], 2);
    let pool = pool_of(&windows, &plan, Backing::Private);
    assert_eq!(
        pool.read_only_fd().unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    assert_eq!(pool.file_offset_bytes(&plan.resident[0]), None);
}

#[test]
fn a_model_that_fits_has_no_slots() {
    for backing in [Backing::Private, Backing::Shared] {
        let (windows, mut plan) = plan_of(PAGE_4K, 4, &[0, 0], 3);
        plan.resident = vec![PageRun {
            shard_index: 0,
            first_page: 0,
            page_count: 8,
        }];
        let mut pool = pool_of(&windows, &plan, backing);
        assert_eq!((pool.slots_count(), pool_bytes(&pool)), (0, 8 * PAGE_4K));
        assert!(pool.aim(0, &plan.resident[0]).is_err());
        pool.publish_resident(&plan.resident[0]).unwrap();
    }
}

/// The room's figures, on demand: `cargo test --release ... -- --ignored --nocapture what_a_move_costs`.
#[test]
#[ignore = "a measurement, not a test"]
fn what_a_move_costs() {
    for (page_bytes, pages) in [(PAGE_2M, 32), (PAGE_4K, 4096)] {
        let runs: Vec<u64> = (0..40).map(|layer| pages - layer % 2).collect();
        let (windows, plan) = plan_of(page_bytes, pages, &runs, 3);
        let begun = std::time::Instant::now();
        let mut pool = pool_of(&windows, &plan, Backing::Private);
        let filled = begun.elapsed();
        let begun = std::time::Instant::now();
        for step in 0..1000 {
            pool.aim(step as u32 % 3, &run_of(&plan, step % 40))
                .unwrap();
            pool.publish(step as u32 % 3).unwrap();
        }
        let each = begun.elapsed() / 1000;
        let begun = std::time::Instant::now();
        let report = pool.page_report().unwrap();
        println!(
            "{} MiB in {filled:?} to fill; {each:?} a move of {} MiB with publish; {report:?} in {:?}",
            pool_bytes(&pool) / MIB,
            pages * page_bytes / MIB,
            begun.elapsed()
        );
    }
}
