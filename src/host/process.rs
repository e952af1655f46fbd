//! What `flea run` tells and asks about its own process: the allocator's settings, the time since exec, and the cores it
//! may use. Stands beside the last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::{env, fs};

/// Freed memory above this size goes back to the system at once, so that the budget is not eaten by malloc's hoard.
const MMAP_THRESHOLD_BYTES: i32 = 128 << 10;
/// Threads share this many arenas: each has its own hoard.
const ARENAS_MAX: i32 = 2;

/// Sets malloc up for a process with a hard memory budget. Call it before threads start.
pub fn tune_allocator() {
    // SAFETY: mallopt has no preconditions but that the parameters exist, which they do in glibc.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES);
    }
}

/// How often an idle OpenMP thread looks for work before it sleeps: tens of microseconds, the length of a barrier between
/// threads that all run. libgomp's default is milliseconds: with one busy neighbour on two cores that made a 1 GiB model
/// 5 to 25 times slower (0.2 tokens/s against 1.1 to 6), because spinners take the core that the last thread needs.
const SPIN_COUNT: &str = "20000";

/// Starts the program once more with `SPIN_COUNT`, which libgomp reads only when it is loaded. A choice that the user
/// made in the environment stands. Returns where nothing needs to change or the exec is refused (then llama.cpp runs with
/// libgomp's default). Call it first: nothing of the process survives.
pub fn restart_with_short_spins() {
    const VARIABLES: [&str; 2] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"];
    if VARIABLES.iter().any(|name| env::var_os(name).is_some()) {
        return;
    }
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    let error = match env::current_exe() {
        Ok(program) => Command::new(program)
            .arg0(name)
            .args(arguments)
            .env(VARIABLES[0], SPIN_COUNT)
            .exec(),
        Err(error) => error,
    };
    log::warn!("idle threads of llama.cpp will spin: {error}");
}

/// Gives freed memory back to the system.
pub fn trim_allocator() {
    // SAFETY: malloc_trim has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// Seconds since this process was started (exec).
#[must_use]
pub fn seconds_since_exec() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // Field 22; the name in field 2 may hold blanks and parentheses.
    let start_ticks: f64 = stat[stat.rfind(')')? + 1..]
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()?;
    // SAFETY: sysconf has no preconditions.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: clock_gettime writes the timespec it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let now_seconds = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9;
    Some((now_seconds - start_ticks / ticks_per_second).max(0.0))
}

/// Physical cores this process may use: what llama.cpp's own programs take by default.
#[must_use]
pub fn core_count() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let mut siblings = std::collections::BTreeSet::new();
    for cpu in 0.. {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let Ok(list) = fs::read_to_string(path) else {
            break;
        };
        siblings.insert(list);
    }
    if siblings.is_empty() {
        allowed
    } else {
        allowed.min(siblings.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_knows_its_age() {
        let age = seconds_since_exec().expect("/proc/self/stat is there on Linux");
        assert!((0.0..86_400.0).contains(&age), "{age}");
    }
}
