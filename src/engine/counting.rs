//! A model's counters, put together from reader, state and pool; [`super::stats`] says what they mean.

use super::model::{Model, Running};
use super::stats::{Fallback, FallbackKind, Stats};
use std::sync::PoisonError;

impl Model {
    /// Counters so far; all zero before the plan is made. Measures the pool's pages, which takes milliseconds.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = self.counters();
        if let Some(running) = self.running.get() {
            running.add_pages_to(&mut stats);
        }
        stats
    }

    /// [`Model::stats`] without what has to be measured: `huge_page_share` is 0 and fallbacks of memory are missing.
    #[must_use]
    pub fn counters(&self) -> Stats {
        let mut stats = Stats {
            reader: self.options.reader.kind,
            backing: self.options.backing,
            direct_io: self.files.iter().all(|file| file.direct().is_direct()),
            fallbacks: self.lost_shards(),
            mirrors: self.copies.stats(),
            page_bytes: self.page_bytes,
            ..Stats::default()
        };
        if let Some(running) = self.running.get() {
            running.add_to(&mut stats);
        }
        self.add_rows_to(&mut stats);
        stats
    }

    fn lost_shards(&self) -> Vec<Fallback> {
        let shards = self.files.iter().filter_map(|file| {
            let reason = file.direct().fallback()?;
            let reason = format!("{}: {reason}", file.path().display());
            Some(Fallback {
                kind: FallbackKind::Buffered,
                reason,
            })
        });
        let dropped = self
            .copies
            .stats()
            .into_iter()
            .filter(|copy| copy.is_dropped);
        shards.chain(dropped.map(Fallback::of_mirror)).collect()
    }
}

impl Running {
    fn add_to(&self, stats: &mut Stats) {
        let counters = *self
            .core
            .counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        stats.reader = self.started.reader_kind;
        stats.bytes_read = counters.bytes;
        stats.reads = counters.reads;
        stats.retries = counters.retries;
        stats.read_ns = counters.busy_ns;
        stats.load_latency = self.core.load_latency.summary();
        stats.resident_bytes = self.plan.resident_bytes;
        if let Some(reason) = &self.started.fallback {
            stats.fallbacks.push(Fallback {
                kind: FallbackKind::Pread,
                reason: reason.clone(),
            });
        }
        stats.fallbacks.extend(self.not_bound.clone());
        let state = self.core.state();
        stats.acquires = state.acquires;
        stats.releases = state.releases;
        stats.loads = state.loads;
        stats.stalls = state.stalls;
        stats.stall_ns = state.stall_ns;
        stats.stall_counts = state.stall_counts;
        stats.slots = state.slot_counts();
        stats.experts = state.expert_counts();
        stats.mispredicts = state.mispredicts();
    }

    fn add_pages_to(&self, stats: &mut Stats) {
        // Measured without the pool's lock: walking the page tables takes milliseconds that the stream has not.
        let probe = self.core.pool().probe();
        match probe.report() {
            Ok(pages) => {
                stats.huge_page_share = pages.huge_page_share;
                stats.page_bytes = pages.page_bytes;
                stats
                    .fallbacks
                    .extend(pages.fallbacks.iter().map(Fallback::of_memory));
            }
            Err(error) => log::warn!("the pool's pages could not be measured: {error}"),
        }
    }
}
