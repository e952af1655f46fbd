//! The plan of experts over random files: never over budget, every page in exactly one place, every layer's experts fit.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::model::{DType, Metadata, Shard, TensorInfo, catalog, gguf};
use crate::units::MIB;

/// A made-up mixture: for each layer the floats of one expert per stack, and of an always used tensor before each stack.
#[derive(Debug, Clone)]
struct Mixture {
    layers: Vec<Vec<(u64, u64)>>,
    experts_count: u64,
    used_count: u64,
    gap_bytes: u64,
}

impl Mixture {
    fn catalog(&self) -> Catalog {
        let mut at_bytes = 4096;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: [u64; 4], dims: u32| {
            let len_bytes = 4 * shape.iter().product::<u64>();
            tensors.push(TensorInfo {
                name,
                dtype: DType::F32,
                shape,
                dims,
                offset_bytes: at_bytes,
                len_bytes,
            });
            at_bytes += len_bytes + self.gap_bytes;
        };
        add("token_embd.weight".to_owned(), [8, 16, 1, 1], 2);
        let always = ["attn_q", "attn_k", "attn_v"];
        let stacks = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];
        for (layer, parts) in self.layers.iter().enumerate() {
            for (index, &(always_floats, expert_floats)) in parts.iter().enumerate() {
                let name = |what: &str| format!("blk.{layer}.{what}.weight");
                add(name(always[index]), [always_floats, 1, 1, 1], 2);
                add(
                    name(stacks[index]),
                    [expert_floats, 1, self.experts_count, 1],
                    3,
                );
            }
        }
        add("output.weight".to_owned(), [8, 16, 1, 1], 2);
        let mut catalog = catalog::from_gguf(vec![gguf::ShardHeader {
            shard: Shard {
                path: PathBuf::from("made-up.gguf"),
                len_bytes: at_bytes,
            },
            version: 3,
            alignment_bytes: 4,
            metadata: Metadata::default(),
            key_count: 0,
            metadata_range: 24..24,
            raw_metadata: Vec::new(),
            tensors,
            data_offset_bytes: 4096,
            split: None,
        }])
        .expect("a catalog");
        catalog.expert_count = Some(self.experts_count);
        catalog.experts_used_count = Some(self.used_count);
        catalog
    }
}

fn any_mixture() -> impl Strategy<Value = Mixture> {
    let floats = prop_oneof![1..64u64, 512..2048u64, 1024..20_000u64];
    let layer = prop::collection::vec((1..4000u64, floats), 1..=3);
    (
        prop::collection::vec(layer, 1..6),
        2..9u64,
        prop_oneof![Just(0u64), 4..64u64, 4096..9000u64],
    )
        .prop_flat_map(|(layers, experts_count, gap)| {
            (1..experts_count).prop_map(move |used_count| Mixture {
                layers: layers.clone(),
                experts_count,
                used_count,
                gap_bytes: gap / 4 * 4,
            })
        })
}

/// Which run holds a page: how many resident runs and how many units.
fn holders(plan: &Plan, page: u64) -> (usize, usize) {
    let holds = |run: &PageRun| (run.first_page..run.end_page()).contains(&page);
    let units = &plan.experts.as_ref().expect("experts").units;
    (
        plan.resident.iter().filter(|run| holds(run)).count(),
        units.iter().filter(|unit| holds(&unit.run)).count(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_keeps_its_budget_and_every_page_has_one_place(mixture in any_mixture(), extra_pages in 0..400u64) {
        let catalog = mixture.catalog();
        let options = ExpertOptions::default();
        let least = smallest_budget_bytes(&catalog, &options).unwrap();
        prop_assert_eq!(plan(&catalog, least.saturating_sub(1), &options).unwrap_err().kind(), ErrorKind::Refused);
        let budget = least + extra_pages * PAGE_4K;
        let plan = plan(&catalog, budget, &options).unwrap();
        let experts = plan.experts.as_ref().unwrap();
        prop_assert!(plan.resident_bytes + experts.cache_bytes <= budget);
        let slots: u64 = experts.classes.iter().map(|c| c.slot_pages * u64::from(c.slots_count)).sum();
        prop_assert_eq!(slots * PAGE_4K, experts.cache_bytes);
        for layer in &catalog.layers {
            for part in &layer.uses {
                for page in part.extent.offset_bytes / PAGE_4K..part.extent.end_bytes().div_ceil(PAGE_4K) {
                    let (resident, units) = holders(&plan, page);
                    prop_assert_eq!(resident + units, 1, "page {}", page);
                }
            }
        }
        for unit in &experts.units {
            let class = &experts.classes[unit.class as usize];
            prop_assert!((1..=class.slot_pages).contains(&unit.run.page_count));
            prop_assert!(unit.run.first_page * PAGE_4K + PAGE_4K > unit.extent.offset_bytes);
            // No byte of anything else in its pages.
            let own = unit.run.extent(PAGE_4K, u64::MAX);
            let others = catalog.layers.iter().flat_map(|l| &l.uses).filter(|u| own.overlaps(&u.extent)).count();
            prop_assert_eq!(others, 1);
        }
        // Any used_count experts of any layer have room together.
        for layer in 0..catalog.layers.len() as u32 {
            for (class, entry) in (0u32..).zip(&experts.classes) {
                let mut by_expert = vec![0u32; mixture.experts_count as usize];
                for unit in experts.units.iter().filter(|unit| (unit.layer, unit.class) == (layer, class)) {
                    by_expert[unit.expert_index as usize] += 1;
                }
                by_expert.sort_unstable_by_key(|count| std::cmp::Reverse(*count));
                let wanted: u32 = by_expert.iter().take(mixture.used_count as usize).sum();
                prop_assert!(wanted <= entry.slots_count, "{} > {}", wanted, entry.slots_count);
            }
        }
        let accounted: u64 = plan.layers.iter().map(|layer| layer.resident_bytes).sum();
        prop_assert!(accounted <= plan.resident_bytes);
        prop_assert!((0.0..=1.0).contains(&experts.hit_rate));
        prop_assert!(plan.streamed_bytes_per_pass <= experts.used_bytes_per_token);
    }
}

#[test]
fn what_everything_fits_into_is_planned_as_layers() {
    let mixture = Mixture {
        layers: vec![vec![(100, 5000); 3]; 4],
        experts_count: 8,
        used_count: 2,
        gap_bytes: 0,
    };
    let catalog = mixture.catalog();
    let method = super::super::Method::Experts {
        layers: super::super::PlanOptions::for_catalog(&catalog),
        experts: ExpertOptions::default(),
    };
    let all = method.plan(&catalog, 64 * MIB).unwrap();
    assert!(all.experts.is_none() && all.is_resident());
    let least = method.smallest_budget_bytes(&catalog).unwrap();
    let some = method.plan(&catalog, least).unwrap();
    assert!(some.experts.is_some() && !some.is_resident());
    let error = method.plan(&catalog, least - 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(
        error.context().contains(&format!("{least} bytes")),
        "{error}"
    );
}

#[test]
fn the_hit_rate_is_the_share_without_skew_and_more_with() {
    for share in [0.1, 0.25, 0.5, 0.9] {
        let even = hit_rate(128, share, 0.0);
        assert!((even - share).abs() < 1e-6, "{even} of {share}");
        let skewed = hit_rate(128, share, 1.0);
        assert!(skewed > even + 0.05 && skewed < 1.0, "{skewed} of {share}");
    }
    assert!((hit_rate(128, 1.0, 0.7) - 1.0).abs() < 1e-9);
}
