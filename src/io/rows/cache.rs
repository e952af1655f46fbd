//! Which pages of the table are in memory, and in which slot: a policy over page numbers, and where each page is.

use crate::plan::{Admission, Policy, PolicyKind};

/// The slot of a page that is not cached.
const ABSENT: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct PageCache {
    kind: PolicyKind,
    policy: Policy,
    slot_of: Vec<u32>,
    used: u32,
}

impl PageCache {
    pub(super) fn new(kind: PolicyKind, pages_count: u32, slots: u32) -> Self {
        Self {
            kind,
            policy: Policy::new(kind, pages_count, slots),
            slot_of: vec![ABSENT; pages_count as usize],
            used: 0,
        }
    }

    /// Memory of its lists.
    pub(super) fn account_bytes(kind: PolicyKind, pages_count: u32, slots: u32) -> u64 {
        Policy::account_bytes(kind, pages_count, slots)
            + u64::from(pages_count) * size_of::<u32>() as u64
    }

    /// Forgets all pages.
    pub(super) fn clear(&mut self) {
        let pages_count = self.slot_of.len() as u32; // it was one
        *self = Self::new(self.kind, pages_count, self.capacity());
    }

    pub(super) const fn capacity(&self) -> u32 {
        self.policy.capacity()
    }

    /// The slot of a cached page, whose use is noted.
    pub(super) fn find(&mut self, page: u32) -> Option<u32> {
        self.policy.touch(page).then(|| self.slot_of[page as usize])
    }

    /// A slot for a page that was read. None when there are no slots.
    pub(super) fn admit(&mut self, page: u32) -> Option<u32> {
        let slot = match self.policy.admit(page) {
            Admission::Present => return Some(self.slot_of[page as usize]),
            Admission::Refused => return None,
            Admission::Free => {
                self.used += 1;
                self.used - 1
            }
            Admission::Evicted(other) => {
                std::mem::replace(&mut self.slot_of[other as usize], ABSENT)
            }
        };
        self.slot_of[page as usize] = slot;
        Some(slot)
    }
}
