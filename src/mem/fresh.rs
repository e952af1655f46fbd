//! Slots of experts that were never used: they get their memory when the first read is aimed at one.
//!
//! A cache of many GiB takes seconds to be cleared, and the first pass would wait for it. Slots of one size are used in the
//! order of their places, so a few MiB are given at a time, ahead of the reader: enough that huge pages are not split, and
//! short enough that the reads in flight last meanwhile. What was promised when the plan was made may be gone by then: that
//! is an error of the read, before the kernel answers with the OOM killer. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: the birth of a pool, beside [`super::fill`].
#![allow(unsafe_code)]

use super::host::{self, Protection};
use super::limits;
use crate::error::{ErrorKind, Result};
use crate::units::{MIB, PAGE_2M};
use std::ops::Range;

/// What is given memory in one go, where slots are smaller: 4 MiB are 2 ms at worst, and 8 MiB and more are in flight.
const STEP_BYTES: usize = (4 * MIB) as usize;
/// Bytes between two looks at what is free.
const CHECK_BYTES: usize = (64 * MIB) as usize;

/// Slots of one size, one behind the other.
#[derive(Debug)]
struct Row {
    slots: Range<u32>,
    begin: usize,
    slot_len: usize,
    /// Slots from this one on have no memory, or only a part of it.
    next: u32,
}

/// All slots without memory.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    rows: Vec<Row>,
    unchecked_bytes: usize,
}

impl Fresh {
    /// `slots` are parked from `begin` on, `slot_len` bytes each.
    pub(super) fn add(&mut self, slots: Range<u32>, begin: usize, slot_len: usize) {
        self.rows.push(Row {
            next: slots.start,
            slots,
            begin,
            slot_len,
        });
    }

    /// Sees to it that `slot` has memory.
    ///
    /// # Errors
    /// `NoMemory` when it ran out; the slot can be tried again.
    ///
    /// # Safety
    /// Every slot that never came through here is parked where [`Fresh::add`] said, mapped without access, and unused.
    pub(super) unsafe fn give_memory(&mut self, slot: u32) -> Result<()> {
        let unused = |row: &&mut Row| row.slots.contains(&slot) && slot >= row.next;
        let Some(row) = self.rows.iter_mut().find(unused) else {
            return Ok(());
        };
        let place = |slot: u32| row.begin + (slot - row.slots.start) as usize * row.slot_len;
        // From the first that has none, so that nothing is left behind, to the end of a huge page.
        let (start, end) = (place(row.next), place(row.slots.end));
        let step_end =
            (place(slot) + row.slot_len.max(STEP_BYTES)).next_multiple_of(PAGE_2M as usize);
        let len = step_end.min(end) - start;
        let last = if step_end >= end {
            row.slots.end
        } else {
            row.slots.start + ((step_end - row.begin) / row.slot_len) as u32
        };
        self.unchecked_bytes += len;
        if self.unchecked_bytes >= CHECK_BYTES {
            limits::check_free(len as u64, "the next slots for experts")
                .map_err(|error| error.with_kind(ErrorKind::NoMemory))?;
            self.unchecked_bytes = 0;
        }
        // SAFETY: parked slots that nobody uses, per this function's contract; what has memory already keeps it.
        unsafe {
            host::protect(start, len, Protection::ReadWrite)?;
            let given = host::populate(start, len);
            host::protect(start, len, Protection::None)?;
            given?;
        }
        row.next = last;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::limits::process_memory_bytes;

    #[test]
    fn memory_comes_step_by_step_and_to_the_last_slot() {
        const SLOT: usize = 540 << 10;
        const COUNT: u32 = 200;
        let len = SLOT * COUNT as usize;
        let base = host::reserve(len as u64).unwrap();
        let mut fresh = Fresh::default();
        fresh.add(7..7 + COUNT, base, SLOT);
        let before = process_memory_bytes().unwrap();
        // SAFETY: a fresh reservation of this test, all of it parked slots.
        unsafe { fresh.give_memory(7).unwrap() };
        let row = &fresh.rows[0];
        assert!((STEP_BYTES / SLOT..2 * STEP_BYTES / SLOT + 2).contains(&(row.next as usize - 7)));
        // One that the steps have not come to yet brings those before it along, and the others cost nothing.
        for slot in [150, 60, 7, 0, 151, 206, 300] {
            // SAFETY: as above.
            unsafe { fresh.give_memory(slot).unwrap() };
        }
        assert_eq!(fresh.rows[0].next, 7 + COUNT);
        let grown = process_memory_bytes().unwrap().saturating_sub(before);
        // SAFETY: as above.
        unsafe { host::unmap(base, len).unwrap() };
        // Other tests run beside this one: only a lower bound means something.
        assert!(grown >= len as u64 / 2, "{grown}");
    }
}
