//! What a lease costs: acquire and release of a layer that is ready, in nanoseconds, allocations and system calls.
//!
//! `cargo bench --no-default-features --features cli --bench ready [-- --json]`. Fails when anything is allocated or the
//! kernel is called: the counts are the promise, the time is a figure of this machine. Allocations are counted by the
//! allocator; system calls by a seccomp filter on the measuring thread, which turns each into a signal that is counted.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flea::engine::Model;
use flea::tools::suite::{lease, models};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static SYSTEM_CALLS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PAIRS: u32 = 2_000_000;
const ROUNDS: usize = 7;

/// What the reporter tells once the counting is over.
struct Figures {
    nanoseconds: Vec<f64>,
    allocations: u64,
    json: bool,
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("lease.safetensors");
    models::write_safetensors(&path, 14, &AtomicBool::new(false)).expect("a model to lease");
    let model = lease::open_resident(&path).expect("a model in memory");
    // It stays open, and this program ends without unwinding.
    drop(directory);

    lease::walk(&model, PAIRS / 10).expect("a warm walk");
    let mut nanoseconds: Vec<f64> = (0..ROUNDS).map(|_| timed(&model)).collect();
    nanoseconds.sort_by(f64::total_cmp);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    lease::walk(&model, PAIRS).expect("a counted walk");
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    let figures = Figures {
        nanoseconds,
        allocations,
        json,
    };
    // A thread whose system calls are trapped can neither print nor end: another one does both.
    std::thread::spawn(move || report_when_done(&figures));
    count_system_calls(&model);
}

fn timed(model: &Model) -> f64 {
    let began = Instant::now();
    lease::walk(black_box(model), PAIRS).expect("a timed walk");
    began.elapsed().as_secs_f64() * 1e9 / f64::from(PAIRS)
}

/// 0 until the walk is over; then 1, or 2 when it failed.
static DONE: AtomicU64 = AtomicU64::new(0);
/// What one deliberate call adds to the count.
static PROOF: AtomicU64 = AtomicU64::new(0);

fn count_system_calls(model: &Model) -> ! {
    trap_system_calls();
    let walked = lease::walk(model, PAIRS);
    let counted = SYSTEM_CALLS.load(Ordering::SeqCst);
    // SAFETY: getppid takes nothing and touches nothing; here it does not even reach the kernel's code for it.
    unsafe { libc::syscall(libc::SYS_getppid) };
    PROOF.store(
        SYSTEM_CALLS.load(Ordering::SeqCst) - counted,
        Ordering::SeqCst,
    );
    SYSTEM_CALLS.store(counted, Ordering::SeqCst);
    DONE.store(1 + u64::from(walked.is_err()), Ordering::SeqCst);
    loop {
        std::hint::spin_loop();
    }
}

fn report_when_done(figures: &Figures) {
    while DONE.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    if DONE.load(Ordering::SeqCst) == 2 || PROOF.load(Ordering::SeqCst) != 1 {
        eprintln!("error: the walk failed, or system calls are not counted here");
        std::process::exit(1);
    }
    let calls = SYSTEM_CALLS.load(Ordering::SeqCst);
    let (sorted, allocations) = (&figures.nanoseconds, figures.allocations);
    let (median, least, most) = (sorted[ROUNDS / 2], sorted[0], sorted[ROUNDS - 1]);
    if figures.json {
        println!(
            r#"{{"ns":{median:.1},"ns_min":{least:.1},"ns_max":{most:.1},"allocations":{allocations},"system_calls":{calls}}}"#
        );
    } else {
        println!("acquire + release of a ready layer: {median:.0} ns ({least:.0}..{most:.0})");
        println!("in {PAIRS} of them: {allocations} allocations, {calls} system calls");
    }
    std::process::exit(i32::from(allocations + calls > 0));
}

/// Counts the signal that a trapped call becomes.
extern "C" fn count(_signal: libc::c_int) {
    SYSTEM_CALLS.fetch_add(1, Ordering::SeqCst);
}

/// From here on every system call of this thread becomes SIGSYS instead; only the return from its handler is let through.
fn trap_system_calls() {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let is_return = libc::sock_filter {
        jf: 1,
        ..statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_rt_sigreturn as u32,
        )
    };
    let mut filter = [
        // The number of the call is the first word of what the filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        is_return,
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_TRAP),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the handler only counts; sigaction and the filter are whole and outlive their calls, which copy them.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
        assert_eq!(
            libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()),
            0
        );
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program
            ),
            0
        );
    }
}
