//! The io_uring reader: one ring, driven by one thread, registered files, plain READ into memory that the caller owns.
//!
//! Invariants: `user_data` is an index into the table of entries (no pointers), and an entry stays taken until the
//! kernel has given its memory back, also after its deadline; what the kernel may still write to is never freed here.
//! The ring is made disabled and enabled by the thread that uses it first, so that SINGLE_ISSUER binds to that one; a reader
//! for any thread does without.
//! No SQPOLL (20-40 times the CPU), no IOPOLL (hangs on requests that have to be split).
//! Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode, squeue};

use super::direct::ShardFile;
use super::fault::Injector;
use super::request::{Busy, Flight, Rules, Step, Tally};
use super::setup::{Refused, WakeEvent, entry_count};
use super::{Completion, Counters, Request};
use crate::error::{Error, ErrorKind, Result};

/// `user_data` of the read on the waker's eventfd, and of cancellations; entries count from 0.
const WAKE: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;

/// How long a request may take to come back after its deadline, once it is cancelled, before its memory is given up.
const CANCEL_GRACE: Duration = Duration::from_millis(100);

/// How long a dropped reader waits for its requests.
const DROP_BOUND: Duration = Duration::from_secs(2);

/// Where an entry's request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// With us, to be asked for when its pause is over.
    Paused(Instant),
    /// With the kernel.
    Kernel,
    /// Held back by a fault.
    Held(Instant),
}

#[derive(Debug)]
struct Entry {
    flight: Flight,
    state: State,
    /// The result of a held request.
    outcome: Result<()>,
    /// Its deadline passed and a cancellation was sent; with the grace over, it is reported.
    cancel_sent: Option<Instant>,
    /// The caller was told that the kernel keeps the memory. The entry now only waits for its return.
    reported: bool,
}

/// See the module.
pub struct UringReader {
    ring: ManuallyDrop<IoUring>,
    enabled: bool,
    fixed_files: bool,
    files: Arc<[ShardFile]>,
    rules: Rules,
    injector: Injector,
    depth: usize,
    entries: Box<[Option<Entry>]>,
    vacant: Vec<u32>,
    /// Completions that needed no kernel, waiting for the next wait.
    immediate: VecDeque<Completion>,
    wake: Arc<WakeEvent>,
    /// Where the ring puts the eventfd's count. The kernel owns it while `wake_armed`.
    wake_count: ManuallyDrop<Box<u64>>,
    wake_armed: bool,
    woken: bool,
    tally: Tally,
    timeouts: u64,
    quarantined: u64,
    busy: Busy,
}

impl fmt::Debug for UringReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringReader")
            .field("depth", &self.depth)
            .field("in_flight", &self.busy.active())
            .field("fixed_files", &self.fixed_files)
            .finish_non_exhaustive()
    }
}

impl UringReader {
    /// `ring`: of [`super::setup::build_ring`] for the same depth.
    pub(super) fn new(
        ring: IoUring,
        files: Arc<[ShardFile]>,
        rules: Rules,
        depth: usize,
        injector: Injector,
    ) -> std::result::Result<Self, Refused> {
        let entry_count = entry_count(depth);
        let descriptors: Vec<i32> = files.iter().map(ShardFile::weights_fd).collect();
        let fixed_files = match ring.submitter().register_files(&descriptors) {
            Ok(()) => true,
            Err(error) => {
                log::debug!("io_uring: files not registered ({error}), plain descriptors used");
                false
            }
        };
        let wake = Arc::new(WakeEvent::new()?);
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            enabled: false,
            fixed_files,
            files,
            rules,
            injector,
            depth,
            entries: (0..entry_count).map(|_| None).collect(),
            vacant: (0..entry_count as u32).rev().collect(),
            immediate: VecDeque::with_capacity(entry_count),
            wake,
            wake_count: ManuallyDrop::new(Box::new(0)),
            wake_armed: false,
            woken: false,
            tally: Tally::default(),
            timeouts: 0,
            quarantined: 0,
            busy: Busy::default(),
        })
    }

    pub(super) fn free(&self) -> usize {
        let waiting = self.busy.active() + self.immediate.len();
        self.depth.saturating_sub(waiting).min(self.vacant.len())
    }

    pub(super) fn in_flight(&self) -> usize {
        self.busy.active() + self.immediate.len()
    }

    pub(super) fn waker(&self) -> Arc<WakeEvent> {
        Arc::clone(&self.wake)
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            bytes: self.tally.bytes,
            reads: self.tally.reads,
            shorts: self.tally.shorts,
            retries: self.tally.retries,
            timeouts: self.timeouts,
            quarantined: self.quarantined,
            busy_ns: self.busy.total_ns(),
        }
    }

    /// See [`super::Reader::submit`].
    pub(super) unsafe fn submit(&mut self, request: &Request) -> Result<()> {
        let flight = Flight::new(request, &self.files, &self.rules)?;
        if self.free() == 0 {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "reader: {} requests in flight and {} never given back by the kernel",
                    self.in_flight(),
                    self.quarantined
                ),
            ));
        }
        if flight.is_past_end() {
            flight.zero_tail();
            self.immediate
                .push_back(flight.label.completion(Ok(()), true));
            return Ok(());
        }
        let Some(index) = self.vacant.pop() else {
            return Err(Error::new(ErrorKind::Internal, "reader: no vacant entry"));
        };
        self.entries[index as usize] = Some(Entry {
            flight,
            state: State::Paused(Instant::now()),
            outcome: Ok(()),
            cancel_sent: None,
            reported: false,
        });
        self.busy.enter();
        self.ask(index)
    }

    /// Puts the entry's next read into the submission queue.
    fn ask(&mut self, index: u32) -> Result<()> {
        let Some(entry) = self.entries[index as usize].as_mut() else {
            return Err(Error::new(ErrorKind::Internal, "reader: empty entry"));
        };
        let ask = entry.flight.ask(&self.injector);
        entry.state = State::Kernel;
        let shard = entry.flight.label.shard_index;
        let read = if self.fixed_files {
            opcode::Read::new(Fixed(shard), ask.target, ask.len_bytes)
                .offset(ask.offset_bytes)
                .build()
        } else {
            let fd = Fd(self.files[shard as usize].weights_fd());
            opcode::Read::new(fd, ask.target, ask.len_bytes)
                .offset(ask.offset_bytes)
                .build()
        };
        self.push(&read.user_data(u64::from(index)))
    }

    fn push(&mut self, sqe: &squeue::Entry) -> Result<()> {
        // SAFETY: what the entry points to outlives the operation: targets by the promise made at submit, wake_count
        // because it is leaked rather than freed while armed; the ring holds references to the descriptors.
        if unsafe { self.ring.submission().push(sqe) }.is_ok() {
            return Ok(());
        }
        // Cannot happen by the sizes in `new` unless the kernel left entries behind (EBUSY); make room once.
        self.enter(Some(Duration::ZERO))?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(sqe) }
            .map_err(|_| Error::new(ErrorKind::Internal, "io_uring: submission queue full"))
    }

    /// See [`super::Reader::wait`].
    pub(super) fn wait(
        &mut self,
        timeout: Option<Duration>,
        out: &mut Vec<Completion>,
    ) -> Result<()> {
        self.enable()?;
        let before = out.len();
        let give_up = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut polled = false;
        loop {
            self.arm_wake()?;
            out.extend(self.immediate.drain(..));
            self.reap(out)?;
            let now = Instant::now();
            self.run_clocks(now, out)?;
            let over = give_up.is_some_and(|at| at <= now);
            if std::mem::take(&mut self.woken) || out.len() > before || (over && polled) {
                return self.flush();
            }
            let pause = self.next_clock(give_up).map(|at| at - now.min(at));
            self.enter(pause)?;
            polled = true;
        }
    }

    /// Binds the ring to this thread.
    fn enable(&mut self) -> Result<()> {
        if !self.enabled && self.ring.params().is_setup_single_issuer() {
            self.ring
                .submitter()
                .register_enable_rings()
                .map_err(|error| Error::from_io(&error, "io_uring: enable the ring"))?;
        }
        self.enabled = true;
        Ok(())
    }

    fn arm_wake(&mut self) -> Result<()> {
        if self.wake_armed {
            return Ok(());
        }
        let fd = Fd(self.wake.fd());
        let place: *mut u64 = &mut **self.wake_count;
        self.push(
            &opcode::Read::new(fd, place.cast(), 8)
                .build()
                .user_data(WAKE),
        )?;
        self.wake_armed = true;
        Ok(())
    }

    /// Hands queued reads to the kernel without waiting.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.enable()?;
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(Some(Duration::ZERO))
    }

    /// One io_uring_enter: submits what is queued, waits for a completion or until the pause is over.
    fn enter(&mut self, pause: Option<Duration>) -> Result<()> {
        let queued = self.ring.submission().len() as u32;
        let submitter = self.ring.submitter();
        let result = match pause {
            None => submitter.submit_and_wait(1),
            // SAFETY: no argument block is passed, and the flags ask for completions only.
            Some(Duration::ZERO) => unsafe {
                submitter.enter::<libc::sigset_t>(queued, 0, EnterFlags::GETEVENTS.bits(), None)
            },
            Some(pause) => {
                let time = Timespec::from(pause);
                submitter.submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        let Err(error) = result else { return Ok(()) };
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR) => Ok(()),
            // The kernel is short of memory or of room for completions: give it room (reap) and time.
            Some(libc::EBUSY | libc::EAGAIN) => {
                if self.ring.completion().is_empty() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            }
            Some(libc::EEXIST) => Err(Error::new(
                ErrorKind::Invalid,
                "the reader belongs to the thread that used it first, and another one uses it",
            )),
            _ => Err(Error::from_io(&error, "io_uring_enter")),
        }
    }

    /// Takes all completions there are.
    fn reap(&mut self, out: &mut Vec<Completion>) -> Result<()> {
        loop {
            let Some(cqe) = self.ring.completion().next() else {
                return Ok(());
            };
            match cqe.user_data() {
                WAKE => {
                    self.wake_armed = false;
                    // A drained ring cancels this read; only a count is a wake.
                    if cqe.result() > 0 {
                        self.wake.taken();
                        self.woken = true;
                    }
                }
                CANCEL => {}
                index => self.answered(index as u32, i64::from(cqe.result()), out)?,
            }
        }
    }

    /// One read came back.
    fn answered(&mut self, index: u32, result: i64, out: &mut Vec<Completion>) -> Result<()> {
        let Some(Some(entry)) = self.entries.get_mut(index as usize) else {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("io_uring: completion for unknown entry {index}"),
            ));
        };
        if entry.flight.is_stuck() {
            return Ok(());
        }
        if entry.reported {
            // Its memory was given up as lost and may be closed by now: nothing may touch it any more.
            let late = Err(entry.flight.label.late(&self.files, &self.rules));
            self.hand_over(index, late, out);
            return Ok(());
        }
        let flight = &mut entry.flight;
        let step = flight.answer(result, &self.files, &self.rules, &mut self.tally);
        let expired = entry.cancel_sent.is_some() || entry.reported;
        match step {
            Step::Ask if !expired => self.ask(index),
            Step::Pause(pause) if !expired => {
                entry.state = State::Paused(Instant::now() + pause);
                Ok(())
            }
            Step::Finished(Ok(())) => {
                self.finish(index, Ok(()), out);
                Ok(())
            }
            Step::Finished(Err(error)) if !expired => {
                self.finish(index, Err(error), out);
                Ok(())
            }
            _ => {
                let late = entry.flight.label.late(&self.files, &self.rules);
                self.finish(index, Err(late), out);
                Ok(())
            }
        }
    }

    /// The request is over and its memory is back; a fault may hold that news up.
    fn finish(&mut self, index: u32, result: Result<()>, out: &mut Vec<Completion>) {
        if let (Some(delay), Some(entry)) =
            (self.injector.delay(), self.entries[index as usize].as_mut())
        {
            entry.state = State::Held(Instant::now() + delay);
            entry.outcome = result;
            return;
        }
        self.hand_over(index, result, out);
    }

    fn hand_over(&mut self, index: u32, result: Result<()>, out: &mut Vec<Completion>) {
        let Some(entry) = self.entries[index as usize].take() else {
            return;
        };
        self.vacant.push(index);
        entry.flight.drop_behind(&self.files);
        if entry.reported {
            self.quarantined -= 1;
            // There is room again: whoever waits for it has to look.
            self.woken = true;
            log::warn!("a read came back after its deadline; its memory stays out of use");
            return;
        }
        self.busy.leave();
        if result.is_ok() {
            entry.flight.zero_tail();
            entry.flight.flip(&self.injector);
        }
        out.push(entry.flight.label.completion(result, true));
    }

    /// Retries that are due, held completions, deadlines.
    fn run_clocks(&mut self, now: Instant, out: &mut Vec<Completion>) -> Result<()> {
        for index in 0..self.entries.len() as u32 {
            let Some(entry) = &mut self.entries[index as usize] else {
                continue;
            };
            match entry.state {
                State::Held(until) if until <= now => {
                    let outcome = std::mem::replace(&mut entry.outcome, Ok(()));
                    self.hand_over(index, outcome, out);
                    continue;
                }
                State::Paused(until) if until <= now && now < entry.flight.label.deadline => {
                    self.ask(index)?;
                    continue;
                }
                _ => {}
            }
            if !entry.reported && entry.flight.label.deadline <= now {
                self.expire(index, now, out)?;
            }
        }
        Ok(())
    }

    /// The deadline passed: cancel, and after the grace tell the caller that the memory is not back.
    fn expire(&mut self, index: u32, now: Instant, out: &mut Vec<Completion>) -> Result<()> {
        let Some(entry) = &mut self.entries[index as usize] else {
            return Ok(());
        };
        let late = entry.flight.label.late(&self.files, &self.rules);
        if matches!(entry.state, State::Paused(_)) {
            self.timeouts += 1;
            self.hand_over(index, Err(late), out);
            return Ok(());
        }
        match entry.cancel_sent {
            None => {
                entry.cancel_sent = Some(now);
                self.timeouts += 1;
                let cancel = opcode::AsyncCancel::new(u64::from(index)).build();
                self.push(&cancel.user_data(CANCEL))
            }
            Some(at) if at + CANCEL_GRACE <= now => {
                entry.reported = true;
                out.push(entry.flight.label.completion(Err(late), false));
                self.quarantined += 1;
                self.busy.leave();
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    /// When something has to be done even if nothing completes.
    fn next_clock(&self, give_up: Option<Instant>) -> Option<Instant> {
        let clocks = self.entries.iter().flatten().filter_map(|entry| {
            let own = match entry.state {
                State::Held(until) | State::Paused(until) => Some(until),
                State::Kernel => None,
            };
            let deadline = match entry.cancel_sent {
                _ if entry.reported => None,
                Some(at) => Some(at + CANCEL_GRACE),
                None => Some(entry.flight.label.deadline),
            };
            own.into_iter().chain(deadline).min()
        });
        clocks.chain(give_up).min()
    }

    /// See [`super::Reader::drain`].
    pub(super) fn drain(&mut self, bound: Duration) -> Vec<u64> {
        let give_up = Instant::now() + bound;
        if let Err(error) = self.enable().and_then(|()| self.cancel_all()) {
            log::warn!("draining the reader: {error}");
        }
        let mut thrown = Vec::new();
        while self.kernel_owns().next().is_some() || self.wake_armed {
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Another thread than the one that used the ring may not enter it (EEXIST); completions come all the same.
            if self
                .enter(Some(left.min(Duration::from_millis(20))))
                .is_err()
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            if let Err(error) = self.reap(&mut thrown) {
                log::warn!("draining the reader: {error}");
                break;
            }
            // Neither retries nor delays: what is with us is given up.
            self.give_up_ours();
        }
        self.give_up_ours();
        self.kernel_owns().collect()
    }

    fn cancel_all(&mut self) -> Result<()> {
        let deadline = Instant::now();
        for index in 0..self.entries.len() {
            if let Some(entry) = &mut self.entries[index]
                && entry.state == State::Kernel
            {
                entry.cancel_sent.get_or_insert(deadline);
                let cancel = opcode::AsyncCancel::new(index as u64).build();
                self.push(&cancel.user_data(CANCEL))?;
            }
        }
        if self.wake_armed {
            let cancel = opcode::AsyncCancel::new(WAKE).build();
            self.push(&cancel.user_data(CANCEL))?;
        }
        self.flush()
    }

    fn give_up_ours(&mut self) {
        for index in 0..self.entries.len() {
            if let Some(entry) = &self.entries[index]
                && entry.state != State::Kernel
            {
                if entry.reported {
                    self.quarantined -= 1;
                } else {
                    self.busy.leave();
                }
                self.entries[index] = None;
                self.vacant.push(index as u32);
            }
        }
    }

    fn kernel_owns(&self) -> impl Iterator<Item = u64> + '_ {
        let kept = self.entries.iter().flatten();
        kept.filter(|entry| entry.state == State::Kernel)
            .map(|entry| entry.flight.label.key)
    }
}

impl Drop for UringReader {
    fn drop(&mut self) {
        let kept = self.drain(DROP_BOUND);
        if kept.is_empty() && !self.wake_armed {
            // SAFETY: dropped once, here, and not used afterwards; nothing is in flight.
            unsafe {
                ManuallyDrop::drop(&mut self.ring);
                ManuallyDrop::drop(&mut self.wake_count);
            }
            return;
        }
        // The ring, the eventfd's place and the files stay, so that whatever the kernel still does finds them.
        log::error!(
            "{} reads never came back from the kernel; their memory is left to it",
            kept.len()
        );
        std::mem::forget(Arc::clone(&self.files));
        std::mem::forget(Arc::clone(&self.wake));
    }
}
