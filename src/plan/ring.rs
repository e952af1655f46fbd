//! The shared backing's ring: which slot each streamed layer uses, fixed when the plan is made.
//!
//! Invariant: two layers that use one slot are at least two apart on the circle of a pass, so that a slot is never
//! wanted for the next layer while its present one is computed with. `i mod D` would break that at the wrap, where the
//! last layer and the first of the next pass are neighbours. Part of plan: file -> catalog -> **plan** -> reader ->
//! pool -> lease -> host.

/// Nearest that two layers of one slot may be.
pub(super) const DISTANCE_MIN: u32 = 2;

/// The slot of each of `layers_count` streamed layers, in the order of a pass, on a ring of `slots_count` slots: the
/// layers are cut into ceil(N / D) nearly equal blocks, and the slot is the place in the block. Empty when the layers of
/// one slot would come too near ([`distance`]), which takes two slots and an odd number of layers.
pub(super) fn assign(layers_count: u32, slots_count: u32) -> Vec<u32> {
    if layers_count == 0 || distance(layers_count, slots_count) < DISTANCE_MIN {
        return Vec::new();
    }
    let blocks_count = layers_count.div_ceil(slots_count);
    let first_of = |block: u32| {
        let first = u64::from(block) * u64::from(layers_count) / u64::from(blocks_count);
        first as u32
    };
    let place_in = |block: u32| 0..first_of(block + 1) - first_of(block);
    (0..blocks_count).flat_map(place_in).collect()
}

/// The least distance between two layers of one slot, over the wrap too: the length of the shortest block. `u32::MAX`
/// where no two layers share a slot.
pub(super) fn distance(layers_count: u32, slots_count: u32) -> u32 {
    if layers_count <= slots_count {
        return u32::MAX;
    }
    match slots_count {
        0 => 0,
        slots => layers_count / layers_count.div_ceil(slots),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance on the circle between the nearest two layers of one slot, counted rather than computed.
    fn counted_distance(slots: &[u32]) -> Option<u32> {
        let count = slots.len();
        let next = |i: usize| (1..count).find(|step| slots[(i + step) % count] == slots[i]);
        (0..count).filter_map(next).min().map(|step| step as u32)
    }

    #[test]
    fn layers_of_one_slot_are_two_apart_for_every_ring_up_to_64_slots() {
        for slots_count in 2..=64u32 {
            for layers_count in 1..=300u32 {
                let slots = assign(layers_count, slots_count);
                if slots_count == 2 && layers_count % 2 == 1 && layers_count > 1 {
                    assert!(slots.is_empty(), "{layers_count} layers on 2 slots");
                    continue;
                }
                assert_eq!(slots.len(), layers_count as usize);
                assert!(slots.iter().all(|&slot| slot < slots_count));
                let used = slots.iter().max().map_or(0, |slot| slot + 1);
                let blocks = layers_count.div_ceil(slots_count);
                assert_eq!(used, layers_count.div_ceil(blocks));
                let counted = counted_distance(&slots).unwrap_or(u32::MAX);
                assert!(counted >= DISTANCE_MIN, "{layers_count} on {slots_count}");
                assert_eq!(counted, distance(layers_count, slots_count));
            }
        }
    }

    /// The layout the design rejects: layers 0 and N-1 share a slot.
    #[test]
    fn the_remainder_rule_would_break_at_the_wrap() {
        let remainder: Vec<u32> = (0..22).map(|i| i % 3).collect();
        assert_eq!(counted_distance(&remainder), Some(1));
        assert_eq!(counted_distance(&assign(22, 3)), Some(2));
    }

    #[test]
    fn no_slots_give_no_ring() {
        assert!(assign(5, 0).is_empty());
        assert!(assign(0, 3).is_empty());
        assert_eq!(assign(3, 3), [0, 1, 2]);
    }
}
