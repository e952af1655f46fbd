//! The drive, shared: models that read at the same time have reads in flight in the proportion of their weights.
//!
//! A drive serves what is queued; whoever has more in flight gets more of it. A model that is alone has the whole depth,
//! and every model has at least one read in flight, so none starves.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The models that share drives.
#[derive(Debug, Default)]
pub struct Group {
    members: Mutex<Vec<Weak<Member>>>,
}

/// One model's share.
#[derive(Debug)]
pub struct Member {
    group: Arc<Group>,
    weight: AtomicU32,
    busy: AtomicBool,
}

impl Group {
    /// A new member of this weight.
    #[must_use]
    pub fn join(self: &Arc<Self>, weight: u32) -> Arc<Member> {
        let member = Arc::new(Member {
            group: Arc::clone(self),
            weight: AtomicU32::new(weight.max(1)),
            busy: AtomicBool::new(false),
        });
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|member| member.strong_count() > 0);
        members.push(Arc::downgrade(&member));
        member
    }

    /// Sum of the weights of the members that have something to read.
    fn busy_weight(&self) -> u64 {
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = members.iter().filter_map(Weak::upgrade);
        busy.filter(|member| member.busy.load(Ordering::Relaxed))
            .map(|member| u64::from(member.weight.load(Ordering::Relaxed)))
            .sum()
    }
}

impl Member {
    /// Changes the weight.
    pub fn set_weight(&self, weight: u32) {
        self.weight.store(weight.max(1), Ordering::Relaxed);
    }

    /// Says whether this model has something to read.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// How many reads this model may have in flight of a depth of `depth`.
    #[must_use]
    pub fn allowance(&self, depth: usize) -> usize {
        let mine = u64::from(self.weight.load(Ordering::Relaxed));
        let all = self.group.busy_weight().max(mine);
        ((depth as u64 * mine).div_ceil(all) as usize).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_it_has_everything_together_by_weight_and_never_nothing() {
        let group = Arc::new(Group::default());
        let (heavy, light) = (group.join(300), group.join(100));
        assert_eq!(heavy.allowance(16), 16);
        heavy.set_busy(true);
        assert_eq!(heavy.allowance(16), 16);
        light.set_busy(true);
        assert_eq!((heavy.allowance(16), light.allowance(16)), (12, 4));
        light.set_weight(1);
        assert_eq!(light.allowance(4), 1);
        heavy.set_busy(false);
        assert_eq!(light.allowance(4), 4);
        drop(heavy);
        assert_eq!(light.allowance(8), 8);
    }
}
