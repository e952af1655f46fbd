//! What the tiers promise, tried on random catalogs and on figures worked out by hand.

use proptest::prelude::*;

use super::*;
use crate::model::DType;
use crate::plan::smallest_budget_bytes;
use crate::plan::testing::{NASTY, any_case, even_catalog, with_tensors};
use crate::units::{GIB, MIB, PAGE_4K};

const KINDS: [(DType, u64); 3] = [(DType::Q4_K, 768), (DType::F32, 8), (DType::Q8_0, 512)];

/// The upper and the lower plan, each at a part of 1000 between its smallest budget and all it could use.
fn tiers(catalog: &Catalog, options: &PlanOptions, parts: (u64, u64)) -> (VramPlan, Plan) {
    let image = Image::new(catalog, VRAM_PAGE_BYTES).unwrap();
    let upper = PlanOptions {
        slots_count: 3,
        page_bytes: VRAM_PAGE_BYTES,
    };
    let vram_bytes = between(&image.catalog, &upper, parts.0);
    let vram = VramPlan::new(catalog, vram_bytes, 3).unwrap();
    let memory_bytes = between(&vram.below, options, parts.1);
    let lower = plan(&vram.below, memory_bytes, options).unwrap();
    (vram, lower)
}

fn between(catalog: &Catalog, options: &PlanOptions, part: u64) -> u64 {
    let smallest = smallest_budget_bytes(catalog, options).unwrap();
    let whole = plan(catalog, 1 << 60, options).unwrap().resident_bytes;
    smallest + (whole.saturating_sub(smallest)) / 1000 * part
}

fn parts() -> impl Strategy<Value = (u64, u64)> {
    (0..=1000u64, 0..=1000u64)
}

proptest! {
    #[test]
    fn every_byte_is_in_one_tier_and_no_budget_is_passed(case in any_case(NASTY), parts in parts()) {
        let (catalog, options) = (with_tensors(case.0, &KINDS), case.1);
        let (vram, lower) = tiers(&catalog, &options, parts);
        let upper = &vram.plan;
        prop_assert!(upper.resident_bytes + upper.ring_bytes <= upper.weight_budget_bytes);
        prop_assert!(lower.resident_bytes + lower.ring_bytes <= lower.weight_budget_bytes);
        let shares = vram.shares(&catalog, &lower);
        for (index, (layer, share)) in catalog.layers.iter().zip(&shares).enumerate() {
            prop_assert_eq!(share.vram_bytes + share.link_bytes(), layer.bytes);
            // What is below is exactly what the image's transient run holds.
            let run = upper.layers[index].transient;
            let in_run: u64 = run.iter().flat_map(|run| vram.image.pieces_in(index, run, VRAM_PAGE_BYTES))
                .map(|piece| piece.file.len_bytes).sum();
            prop_assert_eq!(share.link_bytes(), in_run);
            prop_assert!(share.drive_bytes <= lower.layers[index].transient_bytes);
        }
        let link: u64 = shares.iter().map(TierShare::link_bytes).sum();
        prop_assert_eq!(link, vram.link_bytes_per_pass());
    }

    #[test]
    fn more_of_either_never_moves_more(case in any_case(NASTY), one in parts(), other in parts()) {
        let (catalog, options) = (with_tensors(case.0, &KINDS), case.1);
        let (less, more) = ((one.0.min(other.0), one.1.min(other.1)), (one.0.max(other.0), one.1.max(other.1)));
        let (small, _) = tiers(&catalog, &options, less);
        let (large, _) = tiers(&catalog, &options, more);
        prop_assert!(large.plan.streamed_bytes_per_pass <= small.plan.streamed_bytes_per_pass);
        let (_, tight) = tiers(&catalog, &options, less);
        let (_, roomy) = tiers(&catalog, &options, (less.0, more.1));
        prop_assert!(roomy.streamed_bytes_per_pass <= tight.streamed_bytes_per_pass);
    }

    #[test]
    fn a_pass_takes_the_longest_of_its_streams(case in any_case(NASTY), parts in parts(),
        drive in 1.0e8..1.0e10f64, link in 1.0e9..6.0e10f64, compute in 0.0..0.5f64) {
        let (catalog, options) = (with_tensors(case.0, &KINDS), case.1);
        let (vram, lower) = tiers(&catalog, &options, parts);
        let shares = vram.shares(&catalog, &lower);
        let rates = TierRates { drive_bytes_per_second: drive, link_bytes_per_second: link };
        let times = TierTimes::new(&shares, &rates, compute).unwrap();
        let by_link = shares.iter().map(|s| s.link_bytes() as f64).sum::<f64>() / link;
        let by_drive = shares.iter().map(|s| s.drive_bytes as f64).sum::<f64>() / drive;
        let longest = by_link.max(by_drive).max(compute);
        prop_assert!((times.seconds_per_pass() - longest).abs() <= longest * 1e-12);
        let named = match times.bound {
            Bound::Link => by_link,
            Bound::Drive => by_drive,
            Bound::Compute => compute,
        };
        prop_assert!((named - longest).abs() <= longest * 1e-12);
    }

    /// With the budget that balances, the drive is not what the link waits for; with one page more in every layer's part
    /// from the drive it would be.
    #[test]
    fn at_the_balance_the_drive_is_just_hidden(case in any_case(NASTY), part in 0..=1000u64, ratio in 0.01..0.99f64) {
        let (catalog, options) = (with_tensors(case.0, &KINDS), case.1);
        let (vram, _) = tiers(&catalog, &options, (part, 0));
        let rates = TierRates { drive_bytes_per_second: ratio * 1e10, link_bytes_per_second: 1e10 };
        let budget = balance(&vram.below, &options, &rates).unwrap().unwrap();
        let lower = plan(&vram.below, budget, &options).unwrap();
        let times = TierTimes::new(&vram.shares(&catalog, &lower), &rates, 0.0).unwrap();
        prop_assert!(times.drive_seconds <= times.link_seconds * (1.0 + 1e-9), "{times:?}");
        let smallest = smallest_budget_bytes(&vram.below, &options).unwrap();
        prop_assert!(budget >= smallest);
    }

    #[test]
    fn the_level_is_the_highest_that_fits(lengths in prop::collection::vec(0..50u64, 0..20), pages in 0..600u64) {
        let given = |level: u64| lengths.iter().map(|length| length.min(&level)).sum::<u64>();
        let found = level(&lengths, pages);
        prop_assert!(given(found) <= pages);
        let longest = lengths.iter().max().copied().unwrap_or(0);
        prop_assert!(found == longest || given(found + 1) > pages, "{found}");
    }
}

#[test]
fn even_layers_finish_link_and_drive_together() {
    // Forty layers of 128 MiB; half of each stays in VRAM; the drive is a quarter of the link.
    let catalog = with_tensors(even_catalog(40, &[(0, 128 * MIB)]), &[(DType::F32, 512)]);
    let vram = VramPlan::new(&catalog, (40 + 3) * 64 * MIB, 3).unwrap();
    assert_eq!(vram.link_bytes_per_pass(), 40 * 64 * MIB);
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: PAGE_4K,
    };
    let rates = TierRates {
        drive_bytes_per_second: 2.5e9,
        link_bytes_per_second: 1e10,
    };
    let budget = balance(&vram.below, &options, &rates).unwrap().unwrap();
    // 48 MiB of each layer stay in memory and 16 come from the drive, which is also what a slot takes.
    assert_eq!(budget, (40 * 48 + 3 * 16) * MIB);
    let lower = plan(&vram.below, budget, &options).unwrap();
    let shares = vram.shares(&catalog, &lower);
    let even = TierShare {
        vram_bytes: 64 * MIB,
        memory_bytes: 48 * MIB,
        drive_bytes: 16 * MIB,
    };
    assert_eq!(shares, [even; 40]);
    let times = TierTimes::new(&shares, &rates, 0.0).unwrap();
    assert!((times.link_seconds - times.drive_seconds).abs() < 1e-12);
    assert_eq!(times.bound, Bound::Link);
    // Less memory leaves the link waiting, more only spares the drive.
    let less = plan(&vram.below, budget / 2, &options).unwrap();
    let times = TierTimes::new(&vram.shares(&catalog, &less), &rates, 0.0).unwrap();
    assert_eq!(times.bound, Bound::Drive);
    let equal = TierRates {
        drive_bytes_per_second: 1e10,
        ..rates
    };
    assert_eq!(balance(&vram.below, &options, &equal).unwrap(), None);
}

#[test]
fn a_model_that_fits_sends_nothing_and_one_page_too_little_is_refused() {
    let catalog = with_tensors(even_catalog(10, &[(0, 3 * MIB)]), &[(DType::F32, 512)]);
    let all = VramPlan::new(&catalog, GIB, 3).unwrap();
    assert_eq!(all.link_bytes_per_pass(), 0);
    assert!(all.plan.is_resident());
    assert!(all.below.layers.iter().all(|layer| layer.uses.is_empty()));
    let smallest = all.plan.smallest_budget_bytes;
    assert!(VramPlan::new(&catalog, smallest, 3).is_ok());
    let error = VramPlan::new(&catalog, smallest - 1, 3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.context().starts_with("VRAM: "), "{error}");
}

#[test]
fn nonsense_is_refused() {
    let rates = |drive: f64, link: f64| TierRates {
        drive_bytes_per_second: drive,
        link_bytes_per_second: link,
    };
    for (rates, compute) in [
        (rates(0.0, 1.0), 0.0),
        (rates(1.0, f64::NAN), 0.0),
        (rates(1.0, 1.0), -1.0),
        (rates(1.0, 1.0), f64::INFINITY),
    ] {
        let error = TierTimes::new(&[], &rates, compute).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
