//! The order in which a host walks the layers, learned as it goes.
//!
//! Each layer remembers which layer followed it the last time; before anything was seen that is the next one in the
//! file, and the last is followed by the first, so prefetch runs across the end of a pass. A hint overrides what was
//! learned, once. A wrong guess costs a wait and never a wrong byte.

/// Learned successor of every layer, and the hint in force.
#[derive(Debug)]
pub struct Order {
    successor: Vec<u32>,
    cursor: Option<u32>,
    hint: Vec<u32>,
    hint_position: usize,
    /// Acquires that were not what the order predicted.
    pub mispredicts: u64,
    /// How many acquires until each layer is due; `u32::MAX` when it is not in sight. Refreshed by [`Order::look_ahead`].
    distance: Vec<u32>,
    upcoming: Vec<u32>,
}

impl Order {
    /// The order of a model with `layer_count` layers of which nothing is known yet.
    #[must_use]
    pub fn new(layer_count: usize) -> Self {
        let count = u32::try_from(layer_count).unwrap_or(u32::MAX).max(1);
        Self {
            successor: (0..count).map(|layer| (layer + 1) % count).collect(),
            cursor: None,
            hint: Vec::new(),
            hint_position: 0,
            mispredicts: 0,
            distance: vec![u32::MAX; layer_count],
            upcoming: Vec::with_capacity(layer_count),
        }
    }

    /// A host has acquired `layer`.
    pub fn note(&mut self, layer: u32) {
        if self.cursor == Some(layer) {
            return;
        }
        if self.predicted() != Some(layer) {
            self.mispredicts += 1;
        }
        if let Some(found) = self.hint[self.hint_position..]
            .iter()
            .position(|hinted| *hinted == layer)
        {
            self.hint_position += found + 1;
        }
        if let Some(cursor) = self.cursor {
            self.successor[cursor as usize] = layer;
        }
        self.cursor = Some(layer);
    }

    /// The host says what comes next. Layers out of range must have been refused before.
    pub fn set_hint(&mut self, layers: &[u32]) {
        self.hint.clear();
        self.hint.extend_from_slice(layers);
        self.hint_position = 0;
    }

    fn predicted(&self) -> Option<u32> {
        match self.hint.get(self.hint_position) {
            Some(hinted) => Some(*hinted),
            None => Some(
                self.cursor
                    .map_or(0, |cursor| self.successor[cursor as usize]),
            ),
        }
    }

    /// Works out the layers to come, nearest first, each once, and their distances.
    pub fn look_ahead(&mut self) -> &[u32] {
        self.distance.fill(u32::MAX);
        self.upcoming.clear();
        if self.distance.is_empty() {
            return &self.upcoming;
        }
        for index in self.hint_position..self.hint.len() {
            let layer = self.hint[index];
            self.push_upcoming(layer);
        }
        let last = self.hint[self.hint_position..]
            .last()
            .copied()
            .or(self.cursor);
        let mut layer = last.map_or(0, |last| self.successor[last as usize]);
        for _ in 0..self.successor.len() {
            self.push_upcoming(layer);
            layer = self.successor[layer as usize];
        }
        &self.upcoming
    }

    fn push_upcoming(&mut self, layer: u32) {
        let distance = &mut self.distance[layer as usize];
        if *distance == u32::MAX {
            *distance = u32::try_from(self.upcoming.len()).unwrap_or(u32::MAX - 1);
            self.upcoming.push(layer);
        }
    }

    /// The distance of `layer` at the last [`Order::look_ahead`].
    #[must_use]
    pub fn distance(&self, layer: u32) -> u32 {
        self.distance[layer as usize]
    }

    /// The `index`-th layer to come at the last [`Order::look_ahead`].
    #[must_use]
    pub fn upcoming(&self, index: usize) -> Option<u32> {
        self.upcoming.get(index).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_order_is_the_files_and_wraps() {
        let mut order = Order::new(3);
        assert_eq!(order.look_ahead(), [0, 1, 2]);
        order.note(0);
        order.note(1);
        assert_eq!(order.look_ahead(), [2, 0, 1]);
        assert_eq!(order.mispredicts, 0);
    }

    #[test]
    fn a_strange_order_is_learned_in_one_pass() {
        let mut order = Order::new(4);
        for layer in [0, 2, 1, 3] {
            order.note(layer);
        }
        assert!(order.mispredicts > 0);
        order.note(0);
        let before = order.mispredicts;
        assert_eq!(order.look_ahead(), [2, 1, 3, 0]);
        for layer in [2, 1, 3, 0] {
            order.note(layer);
        }
        assert_eq!(order.mispredicts, before);
    }

    #[test]
    fn a_hint_goes_first_and_is_used_up() {
        let mut order = Order::new(4);
        order.note(0);
        order.set_hint(&[3, 1]);
        assert_eq!(order.look_ahead()[..2], [3, 1]);
        order.note(3);
        order.note(1);
        assert_eq!(order.mispredicts, 0);
        assert_eq!(order.look_ahead()[0], 2);
    }

    #[test]
    fn layers_that_are_never_used_are_out_of_sight() {
        let mut order = Order::new(4);
        for layer in [0, 2, 0, 2, 0] {
            order.note(layer);
        }
        assert_eq!(order.look_ahead(), [2, 0]);
        assert_eq!(order.distance(1), u32::MAX);
    }
}
