//! What the planner promises, tried on random catalogs and compared with plain searches that look at every page, every
//! slot size and every distribution.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::testing::{NASTY, TINY, any_case, even_catalog};
use super::*;
use crate::units::{GIB, KIB};

/// The whole model resident: no budget above this changes anything.
fn resident_budget(catalog: &Catalog, options: &PlanOptions) -> u64 {
    plan(catalog, 1 << 60, options).unwrap().resident_bytes
}

/// A budget between the smallest and a little more than the whole, by a fraction of 1000.
fn budget_at(catalog: &Catalog, options: &PlanOptions, per_mille: u64) -> u64 {
    let smallest = smallest_budget_bytes(catalog, options).unwrap();
    let span = resident_budget(catalog, options) - smallest;
    smallest + (span / 1000 * per_mille) + (span % 1000 * per_mille / 1000)
}

fn overlap(run: &PageRun, extent: &Extent, page_bytes: u64) -> u64 {
    if run.shard_index != extent.shard_index {
        return 0;
    }
    let first = (run.first_page * page_bytes).max(extent.offset_bytes);
    let end = (run.end_page() * page_bytes).min(extent.end_bytes());
    end.saturating_sub(first)
}

/// Runs that are sorted, not empty, and share no page.
fn disjoint(runs: &[PageRun]) -> bool {
    let apart = |pair: &[PageRun]| {
        pair[0].shard_index < pair[1].shard_index || pair[0].end_page() <= pair[1].first_page
    };
    runs.iter().all(|run| run.page_count > 0) && runs.windows(2).all(apart)
}

/// Every promise that one plan alone can keep or break.
fn check(catalog: &Catalog, options: &PlanOptions, plan: &Plan) -> TestCaseResult {
    let page_bytes = options.page_bytes;
    prop_assert!(plan.resident_bytes + plan.ring_bytes <= plan.weight_budget_bytes);
    prop_assert_eq!(plan.layers.len(), catalog.layers.len());
    prop_assert!(disjoint(&plan.resident));
    let merged = plan.resident.windows(2).all(|pair| {
        pair[0].shard_index != pair[1].shard_index || pair[0].end_page() != pair[1].first_page
    });
    prop_assert!(merged, "neighbouring resident runs are one run");
    let resident_pages: u64 = plan.resident.iter().map(|run| run.page_count).sum();
    prop_assert_eq!(plan.resident_bytes, resident_pages * page_bytes);
    prop_assert_eq!(
        plan.ring_bytes,
        u64::from(plan.slots_count) * plan.slot_pages * page_bytes
    );

    let runs: Vec<PageRun> = plan.layers.iter().filter_map(|l| l.transient).collect();
    let mut all: Vec<PageRun> = plan.resident.iter().chain(&runs).copied().collect();
    all.sort_unstable();
    prop_assert!(
        disjoint(&all),
        "no page is resident and transient, or in two runs"
    );

    for (layer, layer_plan) in catalog.layers.iter().zip(&plan.layers) {
        let mut resident_bytes = 0;
        for used in &layer.uses {
            let in_resident: u64 = plan
                .resident
                .iter()
                .map(|run| overlap(run, &used.extent, page_bytes))
                .sum();
            let in_run = layer_plan
                .transient
                .map_or(0, |run| overlap(&run, &used.extent, page_bytes));
            prop_assert_eq!(in_resident + in_run, used.extent.len_bytes, "covered once");
            resident_bytes += in_resident;
        }
        prop_assert_eq!(layer_plan.resident_bytes, resident_bytes);
        let Some(run) = layer_plan.transient else {
            prop_assert_eq!(layer_plan.transient_bytes, 0);
            continue;
        };
        prop_assert!((1..=plan.slot_pages).contains(&run.page_count));
        let shard_len_bytes = catalog.shards[run.shard_index as usize].len_bytes;
        let end = (run.end_page() * page_bytes).min(shard_len_bytes);
        prop_assert_eq!(
            layer_plan.transient_bytes,
            end - run.first_page * page_bytes
        );
    }
    for run in &runs {
        let layers_in_run = catalog
            .layers
            .iter()
            .filter(|layer| {
                layer
                    .uses
                    .iter()
                    .any(|u| overlap(run, &u.extent, page_bytes) > 0)
            })
            .count();
        prop_assert_eq!(layers_in_run, 1, "a run holds bytes of one layer only");
    }
    check_ring(plan)
}

fn check_ring(plan: &Plan) -> TestCaseResult {
    let transient: Vec<&LayerPlan> = plan
        .layers
        .iter()
        .filter(|l| l.transient.is_some())
        .collect();
    if transient.is_empty() {
        prop_assert!(plan.is_resident());
        prop_assert_eq!((plan.slots_count, plan.ring_bytes), (0, 0));
        prop_assert!(plan.require_ring().is_ok());
        return Ok(());
    }
    prop_assert!(
        transient.len() > plan.slots_count as usize,
        "every slot has a use"
    );
    let slots: Vec<Option<u32>> = transient.iter().map(|l| l.slot_index).collect();
    if plan.require_ring().is_err() {
        prop_assert!(plan.slots_count == 2 && transient.len() % 2 == 1);
        prop_assert!(slots.iter().all(Option::is_none));
        return Ok(());
    }
    for (at, slot) in slots.iter().enumerate() {
        prop_assert!(slot.is_some_and(|slot| slot < plan.slots_count));
        prop_assert_ne!(
            *slot,
            slots[(at + 1) % slots.len()],
            "neighbours share a slot"
        );
    }
    Ok(())
}

/// The survey done the plain way: every page, one at a time. Gives `L_i` and the always resident pages.
fn plain_survey(catalog: &Catalog, page_bytes: u64) -> (Vec<u64>, u64) {
    let mut pages: BTreeMap<(u32, u64), BTreeSet<usize>> = BTreeMap::new();
    for (layer_index, layer) in catalog.layers.iter().enumerate() {
        for extent in layer
            .uses
            .iter()
            .map(|u| &u.extent)
            .filter(|e| e.len_bytes > 0)
        {
            let last = (extent.end_bytes() - 1) / page_bytes;
            for page in extent.offset_bytes / page_bytes..=last {
                pages
                    .entry((extent.shard_index, page))
                    .or_default()
                    .insert(layer_index);
            }
        }
    }
    let own = |at: &(u32, u64), layer: usize| {
        pages
            .get(at)
            .is_some_and(|layers| layers.len() == 1 && layers.contains(&layer))
    };
    let gap_pages = (64 * KIB).div_ceil(page_bytes) - 1;
    let mut lengths = vec![0u64; catalog.layers.len()];
    let mut owned_in_longest = vec![0u64; catalog.layers.len()];
    for (layer, length) in lengths.iter_mut().enumerate() {
        for start in pages.keys().filter(|at| own(at, layer)) {
            let (mut end, mut owned) = (start.1 + 1, 1);
            // Walk on while the next page with planned bytes is near, and this layer's own.
            loop {
                let mut near = (end..=end + gap_pages).map(|page| (start.0, page));
                match near.find(|at| pages.contains_key(at)) {
                    Some(at) if own(&at, layer) => (end, owned) = (at.1 + 1, owned + 1),
                    _ => break,
                }
            }
            if end - start.1 > *length {
                *length = end - start.1;
                owned_in_longest[layer] = owned;
            }
        }
    }
    let transient: u64 = owned_in_longest.iter().sum();
    (lengths, pages.len() as u64 - transient)
}

/// The fewest pages any slot size and any distribution of run lengths could stream within `budget_pages`; `None` where
/// nothing fits. Tries every slot size and, layer by layer, every length.
fn plain_least_streamed(
    lengths: &[u64],
    slots: u64,
    always: u64,
    budget_pages: u64,
) -> Option<u64> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let fewest_for = |slot_pages: u64| {
        let room = budget_pages.checked_sub(slots * slot_pages + always)?;
        // Reachable sums of held pages.
        let mut held: BTreeSet<u64> = BTreeSet::from([0]);
        for &length in lengths {
            let next = held
                .iter()
                .flat_map(|&sum| (0..=length.min(slot_pages)).map(move |run| sum + (length - run)));
            held = next.filter(|&sum| sum <= room).collect();
        }
        let all: u64 = lengths.iter().sum();
        held.last().map(|&most| all - most)
    };
    (0..=longest).filter_map(fewest_for).min()
}

/// The latest first use of any run of this length in a layer's longest stretch, trying every start.
fn plain_latest_order(
    uses: &[crate::model::Use],
    stretch: &PageRun,
    pages: u64,
    page_bytes: u64,
) -> Option<u16> {
    let first_use = |first_page: u64| {
        let run = PageRun {
            first_page,
            page_count: pages,
            ..*stretch
        };
        let touched = uses
            .iter()
            .filter(|u| overlap(&run, &u.extent, page_bytes) > 0);
        touched.map(|u| u.order).min()
    };
    let starts = stretch.first_page..=stretch.end_page() - pages;
    starts.map(first_use).max().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_keeps_its_promises((catalog, options) in any_case(NASTY), per_mille in 0..=1050u64) {
        let budget = budget_at(&catalog, &options, per_mille);
        let plan = plan(&catalog, budget, &options).unwrap();
        check(&catalog, &options, &plan)?;
        prop_assert_eq!(plan.weight_budget_bytes, budget);
        prop_assert_eq!(plan.clone(), super::plan(&catalog, budget, &options).unwrap(), "deterministic");
        if !plan.is_resident() {
            let unused = budget - plan.resident_bytes - plan.ring_bytes;
            prop_assert!(unused < options.page_bytes, "full to within one page");
        }
    }

    #[test]
    fn the_smallest_budget_works_and_one_byte_less_is_refused((catalog, options) in any_case(NASTY)) {
        let smallest = smallest_budget_bytes(&catalog, &options).unwrap();
        let plan = plan(&catalog, smallest, &options).unwrap();
        prop_assert_eq!(plan.smallest_budget_bytes, smallest);
        check(&catalog, &options, &plan)?;
        let Some(less) = smallest.checked_sub(1) else { return Ok(()) };
        for budget in [less, smallest.saturating_sub(options.page_bytes), 0] {
            let error = super::plan(&catalog, budget, &options).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::Refused);
            let named = format!("smallest budget that works is {} ({smallest} bytes)", HumanBytes(smallest));
            prop_assert!(error.context().contains(&named), "{}", error);
        }
    }

    /// For every pair of budgets, not only for neighbours: each layer's bytes fall, so their sum does.
    #[test]
    fn a_larger_budget_never_streams_more((catalog, options) in any_case(NASTY)) {
        let first = smallest_budget_bytes(&catalog, &options).unwrap() / options.page_bytes;
        let last = resident_budget(&catalog, &options) / options.page_bytes + 2;
        let step = ((last - first) / 300).max(1);
        let mut before: Option<Plan> = None;
        for pages in (first..=last).step_by(step as usize) {
            let after = plan(&catalog, pages * options.page_bytes + 17, &options).unwrap();
            if let Some(before) = &before {
                prop_assert!(after.streamed_bytes_per_pass <= before.streamed_bytes_per_pass);
                for (after, before) in after.layers.iter().zip(&before.layers) {
                    prop_assert!(after.transient_bytes <= before.transient_bytes);
                }
            }
            before = Some(after);
        }
        prop_assert_eq!(before.map(|plan| plan.streamed_bytes_per_pass), Some(0));
    }

    #[test]
    fn the_survey_agrees_with_a_walk_over_every_page((catalog, options) in any_case(NASTY)) {
        let ground = Ground::survey(&catalog, options.page_bytes).unwrap();
        let lengths: Vec<u64> = ground.lengths().collect();
        let plain = plain_survey(&catalog, options.page_bytes);
        prop_assert_eq!((lengths, ground.always_resident_pages()), plain);
    }

    /// Exact in pages, for every budget of a small model. In bytes that is within one page of the least possible for
    /// each shard, since only a shard's last page can be shorter than a page.
    #[test]
    fn nothing_streams_less((catalog, options) in any_case(TINY)) {
        let page_bytes = options.page_bytes;
        let (lengths, always) = plain_survey(&catalog, page_bytes);
        let slots = u64::from(options.slots_count);
        let top = lengths.iter().sum::<u64>() + always + 2;
        for budget_pages in 0..=top {
            let least = plain_least_streamed(&lengths, slots, always, budget_pages);
            let plan = plan(&catalog, budget_pages * page_bytes, &options).ok();
            let run_pages = |plan: &Plan| -> u64 {
                plan.layers.iter().filter_map(|l| l.transient).map(|run| run.page_count).sum()
            };
            prop_assert_eq!(plan.as_ref().map(run_pages), least, "{} pages", budget_pages);
            if let Some(plan) = plan {
                let least_bytes = least.unwrap_or(0) * page_bytes;
                let clipped = catalog.shards.len() as u64 * page_bytes;
                prop_assert!(plan.streamed_bytes_per_pass <= least_bytes);
                prop_assert!(plan.streamed_bytes_per_pass + clipped > least_bytes || least_bytes == 0);
            }
        }
    }

    #[test]
    fn a_run_is_used_as_late_as_possible((catalog, options) in any_case(NASTY), per_mille in 0..1000u64) {
        let page_bytes = options.page_bytes;
        let plan = plan(&catalog, budget_at(&catalog, &options, per_mille), &options).unwrap();
        let ground = Ground::survey(&catalog, page_bytes).unwrap();
        for ((layer, layer_plan), stretch) in catalog.layers.iter().zip(&plan.layers).zip(ground.stretches()) {
            let (Some(run), Some(stretch)) = (layer_plan.transient, stretch) else { continue };
            let chosen = plain_latest_order(&layer.uses, &run, run.page_count, page_bytes);
            let latest = plain_latest_order(&layer.uses, stretch, run.page_count, page_bytes);
            prop_assert_eq!(chosen, latest);
            prop_assert!(stretch.first_page <= run.first_page && run.end_page() <= stretch.end_page());
        }
    }

    #[test]
    fn predictions_lie_between_the_bound_and_the_sum(
        (catalog, options) in any_case(NASTY), per_mille in 0..=1000u64, rate in 1e3..1e10f64, compute in 0.0..100.0f64,
    ) {
        let plan = plan(&catalog, budget_at(&catalog, &options, per_mille), &options).unwrap();
        let drive = DriveRate { bytes_per_second: rate, latency_seconds: 0.0 };
        let prediction = predict(&plan, &drive, compute).unwrap();
        let sum = prediction.read_seconds + compute;
        prop_assert!(prediction.seconds_per_pass >= prediction.bound_seconds);
        prop_assert!(prediction.seconds_per_pass <= sum * 1.000_001 + 1e-12, "{:?}", prediction);
        prop_assert!((0.0..=1.0).contains(&prediction.stall_share));
    }
}

/// The example of the design: a model 5 % over its budget streams little more than what is missing, where whole-layer
/// pinning would stream three layers of forty and more.
#[test]
fn five_percent_over_streams_about_five_percent() {
    let layer_bytes = 200 * MIB;
    let catalog = even_catalog(40, &[(1, layer_bytes / 4), (2, layer_bytes * 3 / 4)]);
    let options = PlanOptions::for_catalog(&catalog);
    assert_eq!(options.page_bytes, PAGE_2M);
    let budget = (catalog.model_bytes as f64 / 1.05) as u64;
    let plan = plan(&catalog, budget, &options).unwrap();
    let share = plan.streamed_bytes_per_pass as f64 / catalog.model_bytes as f64;
    assert!((0.045..0.056).contains(&share), "streams {share}");
    let runs = plan.layers.iter().filter_map(|l| l.transient);
    assert!(
        runs.into_iter()
            .all(|run| run.page_count.abs_diff(plan.slot_pages) <= 1)
    );
}

/// Attention is used first, so the streamed half lies in the feed-forward tensors, wherever the file has them.
#[test]
fn the_late_half_is_streamed() {
    let (early, late) = ((1, 8 * PAGE_4K), (9, 8 * PAGE_4K));
    for (tensors, late_first) in [([early, late], 8), ([late, early], 0)] {
        let catalog = even_catalog(10, &tensors);
        let options = PlanOptions {
            slots_count: 3,
            page_bytes: PAGE_4K,
        };
        // 10 layers x 9 pages held, a ring of 3 x 7.
        let plan = plan(&catalog, (90 + 21) * PAGE_4K, &options).unwrap();
        assert_eq!(plan.slot_pages, 7);
        for (index, layer) in plan.layers.iter().enumerate() {
            let run = layer.transient.unwrap();
            let start = index as u64 * 16 + late_first;
            assert!(
                start <= run.first_page && run.end_page() <= start + 8,
                "{run:?}"
            );
        }
    }
}

#[test]
fn a_model_of_few_layers_is_resident_or_refused() {
    let catalog = even_catalog(3, &[(1, 10 * PAGE_4K)]);
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: PAGE_4K,
    };
    assert_eq!(
        smallest_budget_bytes(&catalog, &options).unwrap(),
        30 * PAGE_4K
    );
    let plan = plan(&catalog, 30 * PAGE_4K, &options).unwrap();
    assert!(plan.is_resident() && plan.slots_count == 0 && plan.ring_bytes == 0);
    assert_eq!(plan.resident_share(), 1.0);
    let empty = even_catalog(0, &[]);
    assert!(super::plan(&empty, 0, &options).unwrap().is_resident());
}

#[test]
fn pages_follow_the_median_block() {
    assert_eq!(
        default_page_bytes(&even_catalog(5, &[(1, 32 * MIB)])),
        PAGE_2M
    );
    assert_eq!(
        default_page_bytes(&even_catalog(5, &[(1, 32 * MIB - 1)])),
        PAGE_4K
    );
    assert_eq!(default_page_bytes(&even_catalog(0, &[])), PAGE_4K);
    let mut catalog = even_catalog(5, &[(1, 8 * MIB)]);
    for head in &mut catalog.layers[2..] {
        head.kind = LayerKind::Head {
            first_row: 0,
            row_count: 1,
        };
        head.bytes = GIB;
    }
    assert_eq!(
        default_page_bytes(&catalog),
        PAGE_4K,
        "head pieces are not typical"
    );
}

#[test]
fn wrong_input_is_an_error() {
    let catalog = even_catalog(5, &[(1, 10 * PAGE_4K)]);
    for (slots_count, page_bytes) in [(1, PAGE_4K), (65, PAGE_4K), (3, 8192), (3, 0)] {
        let options = PlanOptions {
            slots_count,
            page_bytes,
        };
        assert_eq!(
            plan(&catalog, GIB, &options).unwrap_err().kind(),
            ErrorKind::Invalid
        );
    }
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: PAGE_4K,
    };
    let mut outside = catalog.clone();
    outside.shards[0].len_bytes -= 1;
    let error = plan(&outside, GIB, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.context().contains("blk.4"), "{error}");
    let mut overflowing = catalog;
    overflowing.layers[0].uses[0].extent.offset_bytes = u64::MAX;
    assert!(plan(&overflowing, GIB, &options).is_err());
}

/// 400 GB in 200 layers and 4 KiB pages, and a mixture whose experts are tensors of their own: the work must grow neither
/// with the pages nor with the square of the tensors. The best of five, because a busy machine may take the core away.
#[test]
fn a_hundred_million_pages_or_tensors_by_the_thousand_take_milliseconds() {
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: PAGE_4K,
    };
    let large: Vec<(u16, u64)> = (0..12).map(|order| (order, 166_666_661)).collect();
    let many: Vec<(u16, u64)> = (0..2304).map(|at| (at % 3 + 7, 4_000_037)).collect();
    for (catalog, most_ms) in [
        (even_catalog(200, &large), 100),
        (even_catalog(60, &many), 300),
    ] {
        let mut best = std::time::Duration::MAX;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            let plan = plan(&catalog, catalog.model_bytes / 4, &options).unwrap();
            best = best.min(start.elapsed());
            assert_eq!(plan.transient_layers_count() as usize, catalog.layers.len());
        }
        assert!(best.as_millis() < most_ms, "took {best:?}");
    }
}
