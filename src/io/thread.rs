//! The threads that drive a reader: where they run, and how soon after they are woken.
//!
//! Part of reader in `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};

/// The least slice that the kernel takes.
const SLICE_NS: u64 = 100_000;

/// Asks the scheduler to run the calling thread soon after it was woken, though every processor computes: a thread that
/// asks for a short slice is due before those with the usual 3 ms (Linux 6.12; nothing changes before). It sleeps most of
/// the time, so nobody loses by it; without that a drive with little in flight idles until a computing thread has had its
/// turn. Needs no privilege; a kernel or sandbox that refuses is let be.
pub fn wake_promptly() {
    // SAFETY: an all-zero sched_attr is a valid value; the kernel fills it in.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let len_bytes = size_of::<libc::sched_attr>() as u32; // 48
    attributes.size = len_bytes;
    // SAFETY: thread 0 is the caller; the struct is as long as said and outlives both calls.
    let status = unsafe {
        let pointer = &raw mut attributes;
        match libc::syscall(libc::SYS_sched_getattr, 0, pointer, len_bytes, 0) {
            0 if (*pointer).sched_policy == libc::SCHED_OTHER as u32 => {
                (*pointer).sched_runtime = SLICE_NS;
                libc::syscall(libc::SYS_sched_setattr, 0, pointer, 0)
            }
            // Somebody gave the thread a policy of his own.
            0 => 0,
            failed => failed,
        }
    };
    if status != 0 {
        let error = std::io::Error::last_os_error();
        log::debug!("no short time slice for the thread that reads: {error}");
    }
}

/// Binds the calling thread to these CPUs; an empty list changes nothing.
///
/// # Errors
/// `Invalid` when none of them may be used.
pub fn pin_current_thread(cpus: &[u32]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        if (cpu as usize) < libc::CPU_SETSIZE as usize {
            // SAFETY: the index is below CPU_SETSIZE, checked above.
            unsafe { libc::CPU_SET(cpu as usize, &mut set) };
        }
    }
    // SAFETY: thread 0 is the caller, and the set is a whole cpu_set_t.
    let status = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if status == 0 {
        return Ok(());
    }
    Err(Error::last_os(format_args!("pin to CPUs {cpus:?}")).with_kind(ErrorKind::Invalid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_slice_is_taken_and_changes_nothing_else() {
        std::thread::spawn(|| {
            wake_promptly();
            // SAFETY: as in wake_promptly.
            let (status, attributes) = unsafe {
                let mut attributes: libc::sched_attr = std::mem::zeroed();
                let len_bytes = size_of::<libc::sched_attr>() as u32;
                let pointer = &raw mut attributes;
                let status = libc::syscall(libc::SYS_sched_getattr, 0, pointer, len_bytes, 0);
                (status, attributes)
            };
            assert_eq!(status, 0);
            assert_eq!(attributes.sched_policy, libc::SCHED_OTHER as u32);
            // Kernels before 6.12 know no slices of single threads, and say 0.
            assert!([0, SLICE_NS].contains(&attributes.sched_runtime));
        })
        .join()
        .unwrap();
    }
}
