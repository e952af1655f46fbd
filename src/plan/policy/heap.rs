//! A binary heap of units that knows where each of them stands, so that any one can be taken out.
//!
//! The places are kept outside, in one array for several heaps: a unit is in one of them at most. `Vec::push` into
//! reserved memory is all the memory it takes. Part of [`super::Policy`].

/// The place of a unit that is in no heap.
pub(super) const ABSENT: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Entry {
    turn: (u64, u64),
    unit: u32,
}

/// The unit with the lowest turn stands first.
#[derive(Debug, Clone, Default)]
pub(super) struct Heap {
    entries: Vec<Entry>,
}

impl Heap {
    /// Room for this many units in all.
    pub(super) fn reserve(&mut self, count: u32) {
        let more = (count as usize).saturating_sub(self.entries.len());
        self.entries.reserve_exact(more);
    }

    pub(super) fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    pub(super) fn first(&self) -> Option<u32> {
        self.entries.first().map(|entry| entry.unit)
    }

    /// Adds a unit that is in no heap.
    pub(super) fn push(&mut self, slot_of: &mut [u32], unit: u32, turn: (u64, u64)) {
        debug_assert_eq!(slot_of[unit as usize], ABSENT);
        self.entries.push(Entry { turn, unit });
        self.rise(slot_of, self.entries.len() - 1);
    }

    /// Takes a unit out of this heap, in which it is.
    pub(super) fn remove(&mut self, slot_of: &mut [u32], unit: u32) {
        let slot = slot_of[unit as usize] as usize;
        slot_of[unit as usize] = ABSENT;
        self.entries.swap_remove(slot);
        if slot < self.entries.len() {
            // At most one of the two moves anything.
            self.rise(slot_of, slot);
            self.sink(slot_of, slot);
        }
    }

    /// Moves the entry up to where it belongs.
    fn rise(&mut self, slot_of: &mut [u32], mut slot: usize) {
        let entry = self.entries[slot];
        while slot > 0 {
            let parent = (slot - 1) / 2;
            if self.entries[parent].turn <= entry.turn {
                break;
            }
            self.put(slot_of, slot, self.entries[parent]);
            slot = parent;
        }
        self.put(slot_of, slot, entry);
    }

    /// Moves the entry down to where it belongs.
    fn sink(&mut self, slot_of: &mut [u32], mut slot: usize) {
        let entry = self.entries[slot];
        loop {
            let mut child = 2 * slot + 1;
            if child >= self.entries.len() {
                break;
            }
            if child + 1 < self.entries.len()
                && self.entries[child + 1].turn < self.entries[child].turn
            {
                child += 1;
            }
            if entry.turn <= self.entries[child].turn {
                break;
            }
            self.put(slot_of, slot, self.entries[child]);
            slot = child;
        }
        self.put(slot_of, slot, entry);
    }

    fn put(&mut self, slot_of: &mut [u32], slot: usize, entry: Entry) {
        self.entries[slot] = entry;
        slot_of[entry.unit as usize] = slot as u32;
    }
}
