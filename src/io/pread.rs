//! The pread reader: up to four threads that read the same descriptors, for systems that do not allow io_uring. Files of
//! several drives (copies of a model) have as many threads and a queue for each drive.
//!
//! Invariants: same behaviour as the ring; a drive that hangs keeps no other waiting; the lock is never held across a system
//! call other than waiting for it; a thread that never comes back keeps its entry, and the memory of that entry is reported
//! as not returned.
//! Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::coded_file::CodedFile;
use super::direct::ShardFile;
use super::fault::Injector;
use super::request::{Ask, Busy, Flight, Label, Rules, Step, Tally};
use super::{Completion, Counters, Request, pin_current_thread};
use crate::error::{Error, ErrorKind, Result};

/// Most threads for one drive. On the drive of `default_request_bytes`, 4 MiB requests, GB/s: one thread 1.3 to 1.8, two 1.6, three
/// and four 1.7 with 0.010 CPU seconds per GB; more threads only contend.
const THREADS_MOST: usize = 4;

/// How long a dropped reader waits for its threads.
const DROP_BOUND: Duration = Duration::from_secs(2);

/// One request in the table. The flight is away while a thread works on it.
#[derive(Debug)]
enum Entry {
    Vacant,
    Queued(Flight),
    Reading {
        label: Label,
        /// The caller was told that the memory is not back.
        reported: bool,
    },
    Done(Flight, Result<()>),
}

#[derive(Debug)]
struct Table {
    entries: Box<[Entry]>,
    vacant: Vec<u32>,
    /// One for each drive.
    queues: Box<[VecDeque<u32>]>,
    done: VecDeque<u32>,
    woken: bool,
    stop: bool,
    running_threads: usize,
    tally: Tally,
    timeouts: u64,
    quarantined: u64,
    busy: Busy,
}

struct Shared {
    table: Mutex<Table>,
    /// There is something to read, or it is time to stop: one for each drive.
    work: Box<[Condvar]>,
    /// Something is done, a thread ended, or the waker was used.
    news: Condvar,
    files: Arc<[ShardFile]>,
    files_per_drive: usize,
    rules: Rules,
    injector: Injector,
}

impl Shared {
    /// Which drive a file is on.
    fn drive_of(&self, shard_index: u32) -> usize {
        (shard_index as usize / self.files_per_drive).min(self.work.len() - 1)
    }

    fn wake_all(&self) {
        self.work.iter().for_each(Condvar::notify_all);
    }

    /// No thread panics while it holds the lock; if one did, the table is still the best knowledge there is.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the wait of a pread reader.
#[derive(Clone)]
pub(super) struct PreadWaker(Arc<Shared>);

impl fmt::Debug for PreadWaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PreadWaker")
    }
}

impl PreadWaker {
    pub(super) fn wake(&self) {
        self.0.lock().woken = true;
        self.0.news.notify_all();
    }
}

/// See the module.
pub struct PreadReader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    depth: usize,
}

impl fmt::Debug for PreadReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreadReader")
            .field("depth", &self.depth)
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

impl PreadReader {
    /// The files are those of `drives_count` drives, equally many of each, one drive behind the other.
    pub(super) fn new(
        files: Arc<[ShardFile]>,
        rules: Rules,
        depth: usize,
        injector: Injector,
        cpus: &[u32],
        drives_count: usize,
    ) -> Result<Self> {
        let drives_count = drives_count.max(1);
        // Twice the depth: requests that never come back must not stop the others.
        let entry_count = depth * 2;
        let shared = Arc::new(Shared {
            table: Mutex::new(Table {
                entries: (0..entry_count).map(|_| Entry::Vacant).collect(),
                vacant: (0..entry_count as u32).rev().collect(),
                queues: (0..drives_count)
                    .map(|_| VecDeque::with_capacity(entry_count))
                    .collect(),
                done: VecDeque::with_capacity(entry_count),
                woken: false,
                stop: false,
                running_threads: 0,
                tally: Tally::default(),
                timeouts: 0,
                quarantined: 0,
                busy: Busy::default(),
            }),
            work: (0..drives_count).map(|_| Condvar::new()).collect(),
            news: Condvar::new(),
            files_per_drive: (files.len() / drives_count).max(1),
            files,
            rules,
            injector,
        });
        let mut reader = Self {
            shared,
            threads: Vec::with_capacity(THREADS_MOST * drives_count),
            depth,
        };
        let threads_per_drive = (depth / drives_count).clamp(1, THREADS_MOST);
        for number in 0..threads_per_drive * drives_count {
            reader.start_thread(number, number / threads_per_drive, cpus)?;
        }
        Ok(reader)
    }

    fn start_thread(&mut self, number: usize, drive: usize, cpus: &[u32]) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let cpus = cpus.to_vec();
        self.shared.lock().running_threads += 1;
        let thread = std::thread::Builder::new()
            .name(format!("flea-read-{number}"))
            .spawn(move || {
                if let Err(error) = pin_current_thread(&cpus) {
                    log::warn!("reader thread: {error}");
                }
                read_until_stopped(&shared, drive);
                shared.lock().running_threads -= 1;
                shared.news.notify_all();
            })
            .map_err(|error| {
                self.shared.lock().running_threads -= 1;
                Error::from_io(&error, "start a reader thread")
            })?;
        self.threads.push(thread);
        Ok(())
    }

    pub(super) fn free(&self) -> usize {
        let table = self.shared.lock();
        let waiting = table.busy.active();
        self.depth.saturating_sub(waiting).min(table.vacant.len())
    }

    pub(super) fn in_flight(&self) -> usize {
        self.shared.lock().busy.active()
    }

    pub(super) fn waker(&self) -> PreadWaker {
        PreadWaker(Arc::clone(&self.shared))
    }

    pub(super) fn counters(&self) -> Counters {
        let table = self.shared.lock();
        Counters {
            bytes: table.tally.bytes,
            reads: table.tally.reads,
            shorts: table.tally.shorts,
            retries: table.tally.retries,
            timeouts: table.timeouts,
            quarantined: table.quarantined,
            busy_ns: table.busy.total_ns(),
        }
    }

    /// See [`super::Reader::submit`].
    pub(super) unsafe fn submit(&mut self, request: &Request) -> Result<()> {
        let flight = Flight::new(request, &self.shared.files, &self.shared.rules)?;
        let mut table = self.shared.lock();
        let vacant = (table.busy.active() < self.depth).then(|| table.vacant.pop());
        let Some(index) = vacant.flatten() else {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "reader: {} requests in flight and {} never given back by the kernel",
                    table.busy.active(),
                    table.quarantined
                ),
            ));
        };
        table.busy.enter();
        if flight.is_past_end() {
            flight.zero_tail();
            table.entries[index as usize] = Entry::Done(flight, Ok(()));
            table.done.push_back(index);
            return Ok(());
        }
        table.entries[index as usize] = Entry::Queued(flight);
        let drive = self.shared.drive_of(request.shard_index);
        table.queues[drive].push_back(index);
        drop(table);
        self.shared.work[drive].notify_one();
        Ok(())
    }

    /// See [`super::Reader::wait`].
    pub(super) fn wait(
        &mut self,
        timeout: Option<Duration>,
        out: &mut Vec<Completion>,
    ) -> Result<()> {
        let before = out.len();
        let give_up = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut table = self.shared.lock();
        loop {
            table.hand_over(&self.shared, out);
            let now = Instant::now();
            table.expire(now, &self.shared, out);
            let over = give_up.is_some_and(|at| at <= now);
            if std::mem::take(&mut table.woken) || out.len() > before || over {
                return Ok(());
            }
            let until = table.next_deadline().into_iter().chain(give_up).min();
            table = match until {
                None => self
                    .shared
                    .news
                    .wait(table)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    self.shared
                        .news
                        .wait_timeout(table, at.saturating_duration_since(now))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// See [`super::Reader::drain`].
    pub(super) fn drain(&mut self, bound: Duration) -> Vec<u64> {
        let give_up = Instant::now() + bound;
        let mut table = self.shared.lock();
        table.stop = true;
        self.shared.wake_all();
        while table.running_threads > 0 {
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            table = self
                .shared
                .news
                .wait_timeout(table, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        table.give_up_ours();
        let kept = table.entries.iter().filter_map(|entry| match entry {
            Entry::Reading { label, .. } => Some(label.key),
            _ => None,
        });
        kept.collect()
    }
}

impl Drop for PreadReader {
    fn drop(&mut self) {
        let kept = self.drain(DROP_BOUND);
        if self.shared.lock().running_threads == 0 {
            for thread in self.threads.drain(..) {
                if thread.join().is_err() {
                    log::error!("a reader thread panicked");
                }
            }
            return;
        }
        // Threads stuck in the kernel keep what they share alive by their own references.
        log::error!(
            "{} reads never came back from the kernel; their memory is left to it",
            kept.len()
        );
    }
}

impl Table {
    /// Moves what is done into `out`.
    fn hand_over(&mut self, shared: &Shared, out: &mut Vec<Completion>) {
        while let Some(index) = self.done.pop_front() {
            let entry = std::mem::replace(&mut self.entries[index as usize], Entry::Vacant);
            self.vacant.push(index);
            if let Entry::Done(flight, result) = entry {
                self.busy.leave();
                if result.is_ok() {
                    flight.zero_tail();
                    flight.flip(&shared.injector);
                }
                out.push(flight.label.completion(result, true));
            }
        }
    }

    /// Reports what is past its deadline: queued requests come back, those with a thread do not.
    fn expire(&mut self, now: Instant, shared: &Shared, out: &mut Vec<Completion>) {
        for index in 0..self.entries.len() {
            match &mut self.entries[index] {
                Entry::Queued(flight) if flight.label.deadline <= now => {
                    let late = flight.label.late(&shared.files, &shared.rules);
                    let shard_index = flight.label.shard_index;
                    out.push(flight.label.completion(Err(late), true));
                    self.entries[index] = Entry::Vacant;
                    let drive = shared.drive_of(shard_index);
                    self.queues[drive].retain(|&queued| queued != index as u32);
                    self.vacant.push(index as u32);
                }
                Entry::Reading { label, reported } if !*reported && label.deadline <= now => {
                    *reported = true;
                    self.quarantined += 1;
                    let late = label.late(&shared.files, &shared.rules);
                    out.push(label.completion(Err(late), false));
                }
                _ => continue,
            }
            self.timeouts += 1;
            self.busy.leave();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let clocks = self.entries.iter().filter_map(|entry| match entry {
            Entry::Queued(flight) => Some(flight.label.deadline),
            Entry::Reading {
                label,
                reported: false,
            } => Some(label.deadline),
            _ => None,
        });
        clocks.min()
    }

    /// What no thread works on is given up.
    fn give_up_ours(&mut self) {
        self.queues.iter_mut().for_each(VecDeque::clear);
        self.done.clear();
        for index in 0..self.entries.len() {
            if matches!(self.entries[index], Entry::Queued(_) | Entry::Done(..)) {
                self.entries[index] = Entry::Vacant;
                self.vacant.push(index as u32);
                self.busy.leave();
            }
        }
    }

    /// A thread takes the oldest request of its drive.
    fn take(&mut self, drive: usize) -> Option<(u32, Flight)> {
        let index = self.queues[drive].pop_front()?;
        let entry = &mut self.entries[index as usize];
        let Entry::Queued(flight) = std::mem::replace(entry, Entry::Vacant) else {
            return None;
        };
        *entry = Entry::Reading {
            label: flight.label,
            reported: false,
        };
        Some((index, flight))
    }

    /// A thread gives a request back.
    fn put(&mut self, index: u32, flight: Flight, result: Result<()>) {
        let entry = &mut self.entries[index as usize];
        if matches!(entry, Entry::Reading { reported: true, .. }) {
            *entry = Entry::Vacant;
            self.vacant.push(index);
            self.quarantined -= 1;
            log::warn!("a read came back after its deadline; its memory stays out of use");
            return;
        }
        *entry = Entry::Done(flight, result);
        self.done.push_back(index);
    }
}

/// The life of a reader thread.
fn read_until_stopped(shared: &Shared, drive: usize) {
    let mut table = shared.lock();
    while !table.stop {
        let Some((index, mut flight)) = table.take(drive) else {
            table = shared.work[drive]
                .wait(table)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(table);
        let mut tally = Tally::default();
        let result = read_whole(shared, &mut flight, &mut tally);
        flight.drop_behind(&shared.files);
        if let Some(delay) = shared.injector.delay() {
            std::thread::sleep(delay);
        }
        table = shared.lock();
        table.tally.add(&tally);
        table.put(index, flight, result);
        shared.news.notify_all();
    }
}

/// All reads of one request.
fn read_whole(shared: &Shared, flight: &mut Flight, tally: &mut Tally) -> Result<()> {
    let file = &shared.files[flight.label.shard_index as usize];
    loop {
        let ask = flight.ask(&shared.injector);
        let result = match file.coded() {
            Some(coded) => decode(coded, &ask)?,
            None => pread(file, &ask),
        };
        if ask.fate.stuck {
            hang_until_stopped(shared, flight.label.shard_index);
        }
        match flight.answer(result, &shared.files, &shared.rules, tally) {
            Step::Ask => {}
            Step::Pause(pause) => std::thread::sleep(pause),
            Step::Finished(result) => return result,
        }
    }
}

/// The same of a compressed file: bytes of the original, or what the kernel says. Damage is no errno, and trying again mends
/// none.
fn decode(coded: &CodedFile, ask: &Ask) -> Result<i64> {
    // SAFETY: the submitter vouched for len_bytes of writable memory at target until the completion.
    let bytes = unsafe { std::slice::from_raw_parts_mut(ask.target, ask.len_bytes as usize) };
    match coded.fill(ask.offset_bytes, bytes) {
        Ok(filled) => Ok(filled as i64),
        Err(error) => error.errno().map(|errno| -i64::from(errno)).ok_or(error),
    }
}

/// One system call: bytes, or a negative errno.
fn pread(file: &ShardFile, ask: &Ask) -> i64 {
    // SAFETY: the submitter vouched for len_bytes of writable memory at target until the completion, and the
    // descriptor is open as long as `file` is.
    let read = unsafe {
        libc::pread64(
            file.weights_fd(),
            ask.target.cast(),
            ask.len_bytes as usize,
            ask.offset_bytes as libc::off64_t,
        )
    };
    if read >= 0 {
        return read as i64;
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    -i64::from(errno.unwrap_or(libc::EIO))
}

/// What a thread does whose read is meant never to come back.
fn hang_until_stopped(shared: &Shared, shard_index: u32) {
    let drive = shared.drive_of(shard_index);
    let mut table = shared.lock();
    while !table.stop {
        table = shared.work[drive]
            .wait(table)
            .unwrap_or_else(PoisonError::into_inner);
    }
}
