//! Tests of what must not happen: a read without a lease, reuse of memory that the kernel still holds, a pool that grows where
//! there is no room, memory left behind. Some need a process of their own: they start this test binary again.

use super::tests::{
    mapped, plan_of, pool_bytes, pool_of, readable, run_of, window_address, writable,
};
use super::*;
use crate::units::MIB;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

#[test]
fn a_quarantined_slot_is_out_for_ever() {
    let (windows, plan) = plan_of(PAGE_4K, 2, &[2, 2, 2], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Private);
    let target = pool.aim(0, &run_of(&plan, 0)).unwrap();
    pool.quarantine(0);
    assert!(
        readable(target),
        "a host may hold a lease on the part that had arrived"
    );
    assert!(
        writable(target),
        "a thread that decodes a compressed layer may yet write"
    );
    assert_eq!(pool.publish(0).unwrap_err().kind(), ErrorKind::Invalid);
    for (slot, layer) in [(0, 1), (1, 0)] {
        let error = pool.aim(slot, &run_of(&plan, layer)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(
            error.to_string().contains("slot 0 is quarantined"),
            "{error}"
        );
    }
    pool.aim(1, &run_of(&plan, 1)).unwrap();
    pool.quarantine(9);
    drop(pool);
    drop(windows);
    let place = [(target as usize, 2 * 4096)];
    assert_eq!(
        mapped(&place).0,
        2 * 4096,
        "memory the kernel may write to stays ours"
    );
}

#[test]
fn a_quarantined_shared_pool_stays_mapped() {
    let (windows, plan) = plan_of(PAGE_4K, 2, &[2, 2], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Shared);
    let target = pool.aim(1, &run_of(&plan, 1)).unwrap();
    pool.quarantine(1);
    assert_eq!(
        pool.aim(1, &run_of(&plan, 1)).unwrap_err().kind(),
        ErrorKind::Io
    );
    assert_eq!(pool.publish(1).unwrap_err().kind(), ErrorKind::Invalid);
    pool.aim(0, &run_of(&plan, 0)).unwrap();
    drop(pool);
    assert!(writable(target));
}

#[test]
fn quarantined_resident_pages_stay() {
    let (windows, plan) = plan_of(PAGE_4K, 2, &[1, 1], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Private);
    let target = pool.resident_target(&plan.resident[0]);
    pool.quarantine_resident();
    drop(pool);
    drop(windows);
    assert!(writable(target));
}

#[test]
fn a_pool_that_does_not_fit_is_refused_before_it_grows() {
    for backing in [Backing::Private, Backing::Shared] {
        let pages = (1_u64 << 40) / PAGE_2M;
        let (windows, plan) = plan_of(PAGE_2M, pages, &[1, 1, 1], 3);
        let error = Pool::new(
            Arc::clone(&windows),
            &plan,
            backing,
            &PoolOptions::default(),
        )
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains("are free"), "{error}");
        let base = windows.base(0) as usize;
        assert_eq!(mapped(&[(base, (3 * pages * PAGE_2M) as usize)]).0, 0);
    }
}

#[test]
fn filling_stops_when_asked() {
    for backing in [Backing::Private, Backing::Shared] {
        let (windows, plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        let cancel = Arc::new(AtomicBool::new(true));
        let options = PoolOptions {
            cancel: Some(cancel),
            ..PoolOptions::default()
        };
        let error = Pool::new(Arc::clone(&windows), &plan, backing, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Canceled);
        assert!(
            error.to_string().contains("of 24.0 KiB") || error.to_string().contains("of 32.0 KiB"),
            "{error}"
        );
        assert_eq!(mapped(&[(windows.base(0) as usize, 1 << 15)]).0, 0);
    }
}

#[test]
fn plans_that_cannot_be_are_refused() {
    for backing in [Backing::Private, Backing::Shared] {
        let made = |plan: &Plan, windows: &Arc<Windows>| {
            Pool::new(Arc::clone(windows), plan, backing, &PoolOptions::default())
                .map(|_| ())
                .unwrap_err()
        };
        let (windows, mut plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        plan.page_bytes = 1 << 16;
        assert_eq!(made(&plan, &windows).kind(), ErrorKind::Invalid);
        let (windows, mut plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        plan.resident[1].page_count = 3;
        assert_eq!(made(&plan, &windows).kind(), ErrorKind::Internal);
        let (windows, mut plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        plan.slot_pages = 1;
        assert!(made(&plan, &windows).to_string().contains("slot"));
        let (windows, mut plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        plan.resident[1].first_page = 1 << 40;
        assert_eq!(made(&plan, &windows).kind(), ErrorKind::Invalid);
        let (windows, mut plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        plan.resident.reverse();
        assert_eq!(made(&plan, &windows).kind(), ErrorKind::Internal);
    }
    let (windows, mut plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
    plan.layers[0].slot_index = None;
    let error = Pool::new(windows, &plan, Backing::Shared, &PoolOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
}

#[test]
fn a_child_of_fork_does_not_see_the_pool() {
    for backing in [Backing::Private, Backing::Shared] {
        let (windows, plan) = plan_of(PAGE_4K, 4, &[2, 2], 2);
        let mut pool = pool_of(&windows, &plan, backing);
        let run = run_of(&plan, 0);
        pool.aim(0, &run).unwrap();
        pool.publish(0).unwrap();
        let window = window_address(&windows, &plan, &run);
        assert!(readable(window));
        // SAFETY: the child only reads one byte and leaves by _exit or by signal.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                let byte = window.read_volatile();
                libc::_exit(i32::from(byte));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            status
        };
        assert_eq!(
            std::process::ExitStatus::from_raw(status).signal(),
            Some(libc::SIGSEGV),
            "{backing:?}"
        );
    }
}

/// In the child of [`a_host_without_a_lease_faults`]: makes a pool of its own and breaks one rule.
#[test]
fn break_a_rule() {
    let Some(rule) = std::env::var_os("FLEA_TEST_BREAK") else {
        return;
    };
    let (windows, plan) = plan_of(PAGE_2M, 3, &[2, 2], 2);
    let mut pool = pool_of(&windows, &plan, Backing::Private);
    let run = run_of(&plan, 0);
    pool.aim(0, &run).unwrap();
    pool.publish(0).unwrap();
    let window = window_address(&windows, &plan, &run);
    // SAFETY: published: readable.
    println!("READ {}", unsafe { window.read_volatile() });
    // SAFETY: none; this is what must not get by.
    unsafe {
        match rule.to_str() {
            Some("moved") => {
                pool.aim(0, &run_of(&plan, 1)).unwrap();
                println!("NOT STOPPED {}", window.read_volatile());
            }
            Some("write") => window.write_volatile(1),
            Some("never") => println!(
                "NOT STOPPED {}",
                window_address(&windows, &plan, &run_of(&plan, 1)).read_volatile()
            ),
            Some("drop") => return give_all_back(pool, windows),
            Some("behind") => println!(
                "NOT STOPPED {}",
                windows.base(0).add(6 * PAGE_2M as usize).read_volatile()
            ),
            _ => {}
        }
    }
    println!("ALIVE");
}

/// Alone in its process: a pool and its windows leave nothing behind, in memory or in mappings.
fn give_all_back(pool: Pool, windows: Arc<Windows>) {
    drop((pool, windows));
    let mappings = || {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    };
    let held = || crate::mem::limits::process_memory_bytes().unwrap();
    for (page_bytes, backing) in [
        (PAGE_4K, Backing::Private),
        (PAGE_2M, Backing::Private),
        (PAGE_4K, Backing::Shared),
        (PAGE_2M, Backing::Shared),
    ] {
        let before = (held(), mappings());
        let runs = [4, 3, 4, 2, 4, 3];
        let (windows, plan) = plan_of(page_bytes, 5, &runs, 3);
        let mut pool = pool_of(&windows, &plan, backing);
        for step in 0..18 {
            let layer = step % 6;
            let slot = plan.layers[layer].slot_index.unwrap();
            pool.aim(slot, &run_of(&plan, layer)).unwrap();
            pool.publish(slot).unwrap();
        }
        assert!(
            held() + MIB >= before.0 + pool_bytes(&pool),
            "the pool is charged"
        );
        assert!(held() < before.0 + pool_bytes(&pool) + 2 * MIB, "once");
        drop(pool);
        drop(windows);
        assert!(held() < before.0 + MIB, "{backing:?} keeps memory");
        assert_eq!(mappings(), before.1, "{backing:?} keeps mappings");
    }
    println!("GIVEN BACK");
}

#[test]
fn a_host_without_a_lease_faults() {
    for rule in ["moved", "write", "never", "behind", "none"] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "mem::pool::guard_tests::break_a_rule",
                "--nocapture",
            ])
            .env("FLEA_TEST_BREAK", rule)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("READ 0"), "{rule}: {text}");
        let expected = (rule != "none").then_some(libc::SIGSEGV);
        assert_eq!(output.status.signal(), expected, "{rule}: {text}");
        assert_eq!(text.contains("ALIVE"), rule == "none", "{rule}: {text}");
    }
}

#[test]
fn a_dropped_pool_leaves_nothing() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "mem::pool::guard_tests::break_a_rule",
            "--nocapture",
        ])
        .env("FLEA_TEST_BREAK", "drop")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("GIVEN BACK"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// In the child of [`a_pool_respects_its_cgroup`].
#[test]
fn pools_in_a_cgroup() {
    if std::env::var_os("FLEA_TEST_IN_CGROUP").is_none() {
        return;
    }
    for backing in [Backing::Private, Backing::Shared] {
        let (windows, plan) = plan_of(PAGE_4K, 30 << 8, &[1, 1, 1], 3);
        let pool = pool_of(&windows, &plan, backing);
        assert!(pool_bytes(&pool) > 89 * MIB);
        drop(pool);
        let (windows, plan) = plan_of(PAGE_4K, 60 << 8, &[1, 1, 1], 3);
        let error = Pool::new(windows, &plan, backing, &PoolOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        println!("REFUSED {error}");
    }
}

#[test]
fn a_pool_respects_its_cgroup() {
    let child = "mem::pool::guard_tests::pools_in_a_cgroup";
    let Some((path, text)) = crate::mem::limits::tests::in_cgroup(child, 128 * MIB) else {
        return;
    };
    // The child came back alive: no OOM killer.
    assert_eq!(text.matches("REFUSED").count(), 2, "{text}");
    assert!(text.contains(&format!("set by {path}")), "{text}");
}

/// In the child of [`a_poisoned_slot_shows_a_host_that_computes_too_early`].
#[cfg(feature = "faults")]
#[test]
fn aim_a_poisoned_slot() {
    if std::env::var_os("FLEA_FAULT").is_none_or(|text| text != "delay,poison") {
        return;
    }
    for backing in [Backing::Private, Backing::Shared] {
        let (windows, plan) = plan_of(PAGE_4K, 3, &[2, 2], 2);
        let mut pool = pool_of(&windows, &plan, backing);
        for layer in [0, 1] {
            let run = run_of(&plan, layer);
            pool.aim(layer as u32, &run).unwrap();
            // SAFETY: aimed: readable, if not to be read.
            let bytes =
                unsafe { std::slice::from_raw_parts(window_address(&windows, &plan, &run), 8192) };
            assert!(bytes.iter().all(|&byte| byte == 0xA5), "{backing:?}");
        }
    }
    println!("POISONED");
}

#[cfg(feature = "faults")]
#[test]
fn a_poisoned_slot_shows_a_host_that_computes_too_early() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "mem::pool::guard_tests::aim_a_poisoned_slot",
            "--nocapture",
        ])
        .env("FLEA_FAULT", "delay,poison")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("POISONED"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The engine makes the pool in one thread and uses it in another; every thread looks at the windows.
#[test]
fn pools_and_windows_cross_threads() {
    fn crosses<T: Send + Sync>() {}
    crosses::<Pool>();
    crosses::<Windows>();
    crosses::<PageProbe>();
    crosses::<crate::mem::Topology>();
}
