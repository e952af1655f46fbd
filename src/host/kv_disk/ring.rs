//! Which layers' keys and values have memory, and what the worker does next. Pure: no memory, no files, no threads.
//!
//! A layer is away (on the drive only), here, or at work (being read, written or coded). Invariants: never more layers
//! here or at work than there are slots; a layer that somebody computes with stays; a layer is never given up while
//! it is one of the next that will be needed. The order is learned: each layer remembers which one came after it last,
//! a wrong guess costs a wait and nothing else.

use std::ops::Range;

/// Layers read ahead of the one that is computed with.
const AHEAD: usize = 2;

/// Rows of the two tensors of a layer that were written and are not on the drive.
pub type Dirty = [Option<Range<u64>>; 2];

/// Where a layer's keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Away,
    AtWork,
    Here,
}

#[derive(Debug)]
struct Entry {
    status: Status,
    leases: u32,
    dirty: Dirty,
    /// Its dirty rows are to be looked at by the codec before anybody computes with it again.
    unsettled: bool,
    next: usize,
}

/// What the worker is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Bring a layer in, in the memory of another where `from` says so, whose dirty rows go to the drive first.
    Load {
        /// Which.
        layer: usize,
        /// The one to be given up, and what of it is not on the drive.
        from: Option<(usize, Dirty)>,
    },
    /// Let the codec look at what was written.
    Settle {
        /// Which.
        layer: usize,
        /// What was written.
        dirty: Dirty,
    },
}

/// See the module's head.
#[derive(Debug)]
pub struct Ring {
    entries: Vec<Entry>,
    slots: usize,
    used: usize,
    /// The layer that was asked for last.
    current: usize,
    urgent: Option<usize>,
    settles: bool,
}

impl Ring {
    /// A ring of `slots` slots; `settles` where a codec has to see what is written.
    pub fn new(slots: usize, settles: bool) -> Self {
        Self {
            entries: Vec::new(),
            slots,
            used: 0,
            current: 0,
            urgent: None,
            settles,
        }
    }

    /// One more layer, behind those that are there.
    pub fn push(&mut self) {
        let number = self.entries.len();
        if let Some(last) = self.entries.last_mut() {
            last.next = number;
        }
        self.entries.push(Entry {
            status: Status::Away,
            leases: 0,
            dirty: [None, None],
            unsettled: false,
            next: 0,
        });
    }

    /// Says that a layer is needed now; true when it is there, and then it is leased.
    pub fn acquire(&mut self, layer: usize) -> bool {
        if self.current != layer {
            self.entries[self.current].next = layer;
            self.current = layer;
        }
        let entry = &mut self.entries[layer];
        if entry.status == Status::Here && !entry.unsettled {
            entry.leases += 1;
            self.urgent = None;
            return true;
        }
        self.urgent = Some(layer);
        false
    }

    /// Rows of a tensor that were written under a lease.
    pub fn wrote(&mut self, layer: usize, side: usize, rows: Range<u64>) {
        let dirty = &mut self.entries[layer].dirty[side];
        *dirty = Some(match dirty.take() {
            Some(old) => old.start.min(rows.start)..old.end.max(rows.end),
            None => rows,
        });
    }

    /// Gives a lease back.
    pub fn release(&mut self, layer: usize) {
        let entry = &mut self.entries[layer];
        entry.leases = entry.leases.saturating_sub(1);
        if self.settles && entry.leases == 0 && entry.dirty.iter().any(Option::is_some) {
            entry.unsettled = true;
        }
    }

    /// The next thing to do, and marks what it concerns as being at work.
    pub fn next_job(&mut self) -> Option<Job> {
        if let Some(layer) = self.urgent {
            match self.entries[layer].status {
                Status::Here if self.entries[layer].unsettled => return Some(self.settle(layer)),
                // Where every slot is taken, one has to be settled before it can be given up.
                Status::Away => {
                    if let Some(job) = self.load(layer, 0) {
                        return Some(job);
                    }
                }
                Status::Here | Status::AtWork => {}
            }
        }
        let waiting =
            |entry: &Entry| entry.status == Status::Here && entry.unsettled && entry.leases == 0;
        if let Some(layer) = self.entries.iter().position(waiting) {
            return Some(self.settle(layer));
        }
        let mut layer = self.current;
        for ahead in 1..=AHEAD.min(self.slots.saturating_sub(1)) {
            layer = self.entries.get(layer)?.next;
            if self.entries[layer].status == Status::Away {
                return self.load(layer, ahead);
            }
        }
        None
    }

    fn settle(&mut self, layer: usize) -> Job {
        let entry = &mut self.entries[layer];
        entry.status = Status::AtWork;
        Job::Settle {
            layer,
            dirty: std::mem::take(&mut entry.dirty),
        }
    }

    /// `ahead`: how many steps from now the layer is needed.
    fn load(&mut self, layer: usize, ahead: usize) -> Option<Job> {
        let from = if self.used < self.slots {
            self.used += 1;
            None
        } else {
            let victim = self.victim(ahead)?;
            self.entries[victim].status = Status::AtWork;
            Some((victim, std::mem::take(&mut self.entries[victim].dirty)))
        };
        self.entries[layer].status = Status::AtWork;
        Some(Job::Load { layer, from })
    }

    /// The layer whose next use is farthest away, if that is farther than `ahead` steps.
    fn victim(&self, ahead: usize) -> Option<usize> {
        let mut distance = vec![usize::MAX; self.entries.len()];
        let mut layer = self.current;
        for steps in 0..self.entries.len() {
            if distance[layer] != usize::MAX {
                break;
            }
            distance[layer] = steps;
            layer = self.entries[layer].next;
        }
        let free = |index: &usize| {
            let entry = &self.entries[*index];
            entry.status == Status::Here && entry.leases == 0 && !entry.unsettled
        };
        let farthest = (0..self.entries.len())
            .filter(free)
            .max_by_key(|index| distance[*index])?;
        (distance[farthest] > ahead).then_some(farthest)
    }

    /// A job has been done.
    pub fn done(&mut self, job: &Job) {
        match job {
            Job::Load { layer, from } => {
                self.entries[*layer].status = Status::Here;
                if let Some((victim, _)) = from {
                    self.entries[*victim].status = Status::Away;
                }
            }
            Job::Settle { layer, .. } => {
                self.entries[*layer].status = Status::Here;
                self.entries[*layer].unsettled = false;
            }
        }
    }

    /// Whether nothing is being worked on.
    pub fn is_idle(&self) -> bool {
        self.entries
            .iter()
            .all(|entry| entry.status != Status::AtWork)
    }

    /// Whether somebody computes with a layer.
    pub fn is_leased(&self) -> bool {
        self.entries.iter().any(|entry| entry.leases > 0)
    }

    /// Forgets all contents; every slot is free.
    pub fn clear(&mut self) {
        for entry in &mut self.entries {
            entry.status = Status::Away;
            entry.dirty = [None, None];
            entry.unsettled = false;
        }
        self.used = 0;
        self.urgent = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(layers: usize, slots: usize, settles: bool) -> Ring {
        let mut ring = Ring::new(slots, settles);
        (0..layers).for_each(|_| ring.push());
        ring
    }

    /// The worker at its quickest: everything it can do is done.
    fn work(ring: &mut Ring) -> Vec<Job> {
        std::iter::from_fn(|| {
            let job = ring.next_job()?;
            ring.done(&job);
            Some(job)
        })
        .collect()
    }

    fn use_layer(ring: &mut Ring, layer: usize) -> (bool, Vec<Job>) {
        let hit = ring.acquire(layer);
        let mut jobs = work(ring);
        assert!(hit || ring.acquire(layer), "layer {layer} did not come");
        ring.wrote(layer, 0, 3..4);
        jobs.extend(work(ring));
        ring.release(layer);
        jobs.extend(work(ring));
        (hit, jobs)
    }

    #[test]
    fn a_cycle_is_read_ahead_and_waits_for_nothing() {
        let mut ring = ring(10, 3, false);
        for layer in 0..10 {
            use_layer(&mut ring, layer);
        }
        for layer in 0..10 {
            let (hit, jobs) = use_layer(&mut ring, layer);
            assert!(hit, "layer {layer}");
            let [Job::Load { layer: next, from }] = &jobs[..] else {
                panic!("one layer comes for each that goes: {jobs:?}")
            };
            assert_eq!(*next, (layer + AHEAD) % 10);
            let before = (layer + 9) % 10;
            assert_eq!(*from, Some((before, [Some(3..4), None])), "its rows go out");
        }
    }

    #[test]
    fn what_fits_stays() {
        let mut ring = ring(4, 4, false);
        for layer in (0..4).cycle().take(12) {
            use_layer(&mut ring, layer);
        }
        let loads: usize = (0..4)
            .map(|layer| use_layer(&mut ring, layer).1.len())
            .sum();
        assert_eq!(loads, 0);
        // One slot too few: not everything moves because of it.
        let mut ring = self::ring(10, 9, false);
        for layer in (0..10).cycle().take(30) {
            use_layer(&mut ring, layer);
        }
        let loads: usize = (0..10)
            .map(|layer| use_layer(&mut ring, layer).1.len())
            .sum();
        assert!((1..=5).contains(&loads), "{loads}");
    }

    #[test]
    fn a_codec_sees_what_was_written_before_anybody_else() {
        let mut ring = ring(3, 3, true);
        let (_, jobs) = use_layer(&mut ring, 0);
        let settle = Job::Settle {
            layer: 0,
            dirty: [Some(3..4), None],
        };
        assert!(jobs.contains(&settle), "{jobs:?}");
        assert!(ring.acquire(0));
        ring.wrote(0, 1, 0..1);
        ring.release(0);
        assert!(!ring.acquire(0), "not before it is settled");
        assert!(matches!(
            ring.next_job(),
            Some(Job::Settle { layer: 0, .. })
        ));
    }

    proptest! {
        /// Any order of layers, any number of slots from two on: every layer comes, and the slots are never exceeded.
        #[test]
        fn every_layer_comes(layers in 1usize..12, slots in 2usize..6, settles: bool, order in proptest::collection::vec(0usize..12, 1..80)) {
            let mut ring = ring(layers, slots, settles);
            for layer in order {
                use_layer(&mut ring, layer % layers);
                let here = ring.entries.iter().filter(|entry| entry.status == Status::Here).count();
                prop_assert!(here <= slots && ring.used <= slots);
                prop_assert!(ring.is_idle() && !ring.is_leased());
            }
        }
    }
}
