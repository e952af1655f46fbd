//! The prediction: what a plan will do on a drive and a host of given speed.
//!
//! The bound is simple: a pass takes no less than its reads and no less than its compute. How near a ring of few slots
//! comes to it is found by playing the pipeline: one drive that fills slots in the order of the pass, one host that
//! computes a layer's resident part while the rest arrives. Experts are known when their router has run, so nothing is read
//! ahead: host and drive take turns, and what a host loses at each turn is measured by nobody. That sum is told as the upper
//! bound that it is. Part of plan: file -> catalog -> **plan** -> reader -> pool
//! -> lease -> host.

use std::collections::VecDeque;

use super::budget::HOST_RESERVE_BYTES;
use super::{LayerPlan, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, DType};

/// Passes played before the measured ones, so that the empty ring of the start is forgotten.
const PASSES_BEFORE_COUNT: u32 = 4;
/// Passes averaged. The pipeline may alternate between passes of slightly different length.
const PASSES_MEASURED_COUNT: u32 = 8;

/// A drive, as far as a pass minds it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DriveRate {
    /// What it reads with enough in flight.
    pub bytes_per_second: f64,
    /// What a read takes beside its bytes; 0 where that is not known.
    pub latency_seconds: f64,
}

/// What to expect of one pass, once the first few are over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// One pass: a token, or a batch of the prompt.
    pub seconds_per_pass: f64,
    /// Passes per second; `None` when a pass takes no time (nothing streamed, compute left out).
    pub tokens_per_second: Option<f64>,
    /// What reading alone takes: the streamed bytes at the drive's rate, and of experts a latency for each layer that waits.
    pub read_seconds: f64,
    /// What computing alone takes, as given.
    pub compute_seconds: f64,
    /// The least a pass could take: the larger of the two.
    pub bound_seconds: f64,
    /// Time per pass in which the host waits for the drive.
    pub stall_seconds: f64,
    /// That time as a share of the pass, 0 to 1.
    pub stall_share: f64,
    /// Whether a pass takes longer by what is not known: of experts that are fetched.
    pub is_upper_bound: bool,
}

/// Predicts a pass of `plan` on `drive` and a host that needs `compute_seconds` per pass with
/// all weights in memory, spread over the layers by their bytes.
///
/// # Errors
/// `Invalid` for a rate that is not positive or a time that is negative or not finite.
pub fn predict(plan: &Plan, drive: &DriveRate, compute_seconds: f64) -> Result<Prediction> {
    let read_bytes_per_second = drive.bytes_per_second;
    if !(drive.latency_seconds >= 0.0 && drive.latency_seconds.is_finite()) {
        return Err(invalid("a drive's latency", drive.latency_seconds));
    }
    if !(read_bytes_per_second > 0.0 && read_bytes_per_second.is_finite()) {
        return Err(invalid("a drive rate", read_bytes_per_second));
    }
    if !(compute_seconds >= 0.0 && compute_seconds.is_finite()) {
        return Err(invalid("a compute time", compute_seconds));
    }
    let read_seconds = plan.streamed_bytes_per_pass as f64 / read_bytes_per_second
        + waiting_layers(plan) * drive.latency_seconds;
    let bound_seconds = read_seconds.max(compute_seconds);
    let seconds_per_pass = match plan.experts {
        // Which experts a layer needs is known when its router has run: nothing is read ahead.
        Some(_) => compute_seconds + read_seconds,
        None => {
            let stages = stages(plan, read_bytes_per_second, compute_seconds);
            // Sums of floats may fall short of the bound by their rounding.
            play(&stages, plan.slots_count).max(bound_seconds)
        }
    };
    let stall_seconds = seconds_per_pass - compute_seconds;
    let is_timed = seconds_per_pass > 0.0;
    Ok(Prediction {
        seconds_per_pass,
        tokens_per_second: is_timed.then(|| 1.0 / seconds_per_pass),
        read_seconds,
        compute_seconds,
        bound_seconds,
        stall_seconds,
        stall_share: if is_timed {
            stall_seconds / seconds_per_pass
        } else {
            0.0
        },
        is_upper_bound: plan.experts.is_some() && plan.streamed_bytes_per_pass > 0,
    })
}

/// Layers of a token that wait for experts, on average: the drive has stood still meanwhile and begins with a whole latency.
fn waiting_layers(plan: &Plan) -> f64 {
    let Some(experts) = &plan.experts else {
        return 0.0;
    };
    let mut layers: Vec<u32> = experts.units.iter().map(|unit| unit.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let used = i32::try_from(experts.used_count).unwrap_or(i32::MAX);
    let waits = 1.0 - experts.hit_rate.clamp(0.0, 1.0).powi(used);
    layers.len() as f64 * waits
}

/// What a tensor of a layer costs beside its bytes, in operations: its multiplication, about one more (a norm, rope, an
/// addition, attention), and its share of beginning a layer. Two leave llama, qwen3 and qwen3moe of 1 to 2 GiB, resident,
/// 6 to 15 % faster than they were, three come within 7 % of each.
const NODES_PER_TENSOR: f64 = 3.0;

/// Seconds that computing one token takes with all weights in memory: every tensor of the layers at the rate of its type
/// (bytes of weights per second), of routed experts only as many as a token uses, and `node_seconds` for each operation.
/// `None` where a type has no rate.
#[must_use]
pub fn compute_seconds(
    catalog: &Catalog,
    node_seconds: f64,
    bytes_per_second: &dyn Fn(DType) -> Option<f64>,
) -> Option<f64> {
    let used = catalog.layers.iter().flat_map(|layer| &layer.uses);
    let seconds = used.map(|used| {
        let tensor = catalog.tensors.get(used.tensor_index as usize)?;
        let share = match (tensor.experts, catalog.expert_count) {
            (Some(_), Some(count)) => {
                catalog.experts_used_count.unwrap_or(count).min(count) as f64 / count as f64
            }
            _ => 1.0,
        };
        let rate = bytes_per_second(tensor.dtype).filter(|rate| *rate > 0.0)?;
        let bytes = used.extent.len_bytes as f64 * share;
        Some(bytes / rate + NODES_PER_TENSOR * node_seconds)
    });
    seconds.sum()
}

/// The most memory a host will hold while it runs `plan`: the pool, and what it reserves itself, without the reserve that
/// nobody uses. Reached once the context is full and a prompt has filled a ubatch.
#[must_use]
pub fn peak_bytes(plan: &Plan, host_bytes: u64) -> u64 {
    let pool_bytes = plan
        .resident_bytes
        .saturating_add(plan.ring_bytes)
        .saturating_add(plan.cache_bytes());
    pool_bytes.saturating_add(host_bytes.saturating_sub(HOST_RESERVE_BYTES))
}

fn invalid(what: &str, value: f64) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("{value} is not {what} to predict with"),
    )
}

/// One layer in seconds.
#[derive(Debug, Clone, Copy)]
struct Stage {
    /// Filling its slot; `None` when it is resident.
    read: Option<f64>,
    /// Computing with the resident part, possible before the read is done.
    before: f64,
    /// Computing with the rest.
    after: f64,
}

fn stages(plan: &Plan, read_bytes_per_second: f64, compute_seconds: f64) -> Vec<Stage> {
    let bytes = |layer: &LayerPlan| layer.resident_bytes as f64 + layer.transient_bytes as f64;
    let all_bytes: f64 = plan.layers.iter().map(bytes).sum();
    let seconds_per_byte = if all_bytes > 0.0 {
        compute_seconds / all_bytes
    } else {
        0.0
    };
    let stage = |layer: &LayerPlan| Stage {
        read: layer
            .transient
            .map(|_| layer.transient_bytes as f64 / read_bytes_per_second),
        before: layer.resident_bytes as f64 * seconds_per_byte,
        after: layer.transient_bytes as f64 * seconds_per_byte,
    };
    plan.layers.iter().map(stage).collect()
}

/// Seconds per pass of the settled pipeline. A read starts when the drive is free and the slot that was filled
/// `slots_count` reads ago is released; a layer is released when it is computed.
fn play(stages: &[Stage], slots_count: u32) -> f64 {
    let mut drive_free = 0.0f64;
    let mut host_free = 0.0f64;
    // When the slots in use come free again, oldest first.
    let mut releases: VecDeque<f64> = VecDeque::new();
    let mut measured_from = 0.0;
    for pass in 0..PASSES_BEFORE_COUNT + PASSES_MEASURED_COUNT {
        if pass == PASSES_BEFORE_COUNT {
            measured_from = host_free;
        }
        for stage in stages {
            host_free += stage.before;
            let Some(read) = stage.read else {
                host_free += stage.after;
                continue;
            };
            if releases.len() >= slots_count as usize {
                let slot_free = releases.pop_front().unwrap_or(0.0);
                drive_free = drive_free.max(slot_free);
            }
            drive_free += read;
            host_free = host_free.max(drive_free) + stage.after;
            releases.push_back(host_free);
        }
    }
    (host_free - measured_from) / f64::from(PASSES_MEASURED_COUNT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::catalog::Experts;
    use crate::plan::experts::Unit;
    use crate::plan::testing::even_catalog;
    use crate::plan::{ExpertPlan, PageRun};
    use crate::units::Extent;

    /// `count` layers of 100 bytes, of which `streamed` are streamed.
    fn even_plan(count: u32, streamed: u64, slots_count: u32) -> Plan {
        let layer = LayerPlan {
            transient: (streamed > 0).then_some(PageRun {
                shard_index: 0,
                first_page: 0,
                page_count: 1,
            }),
            transient_bytes: streamed,
            resident_bytes: 100 - streamed,
            slot_index: None,
        };
        Plan {
            page_bytes: 4096,
            slots_count,
            slot_pages: u64::from(streamed > 0),
            layers: vec![layer; count as usize],
            resident: Vec::new(),
            resident_bytes: 0,
            ring_bytes: 0,
            streamed_bytes_per_pass: u64::from(count) * streamed,
            weight_budget_bytes: 0,
            smallest_budget_bytes: 0,
            always_resident_bytes: 0,
            experts: None,
        }
    }

    /// A drive that answers at once.
    fn at(bytes_per_second: f64) -> DriveRate {
        DriveRate {
            bytes_per_second,
            latency_seconds: 0.0,
        }
    }

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() <= 1e-9 * right.abs().max(1.0)
    }

    #[test]
    fn equal_layers_on_three_slots_reach_the_bound() {
        for (rate, compute) in [(100.0, 0.5), (100.0, 40.0), (500.0, 4.0)] {
            let prediction = predict(&even_plan(20, 50, 3), &at(rate), compute).unwrap();
            assert!(near(prediction.read_seconds, 1000.0 / rate));
            assert!(near(prediction.bound_seconds, (1000.0 / rate).max(compute)));
            assert!(
                prediction.seconds_per_pass <= prediction.bound_seconds * 1.001,
                "{prediction:?}"
            );
            assert!(near(
                prediction.stall_seconds,
                prediction.seconds_per_pass - compute
            ));
        }
    }

    /// With one slot drive and host take turns: the read of a layer waits for the compute of the one before.
    #[test]
    fn one_slot_takes_turns() {
        let prediction = predict(&even_plan(10, 100, 1), &at(100.0), 10.0).unwrap();
        assert!(near(prediction.bound_seconds, 10.0));
        assert!(near(prediction.seconds_per_pass, 20.0), "{prediction:?}");
        assert!(near(prediction.stall_share, 0.5));
    }

    /// A large resident layer between streamed ones leaves the drive idle once the ring is full.
    #[test]
    fn uneven_layers_stall_a_short_ring() {
        let mut plan = even_plan(10, 100, 2);
        plan.layers[9] = LayerPlan {
            transient: None,
            transient_bytes: 0,
            resident_bytes: 900,
            slot_index: None,
        };
        plan.streamed_bytes_per_pass = 900;
        let short = predict(&plan, &at(100.0), 9.0).unwrap();
        plan.slots_count = 9;
        let long = predict(&plan, &at(100.0), 9.0).unwrap();
        assert!(short.seconds_per_pass > long.seconds_per_pass + 1.0);
        assert!(long.seconds_per_pass >= long.bound_seconds);
    }

    /// Ten layers of which each fetches two of eight experts, as large a share of them missing as `hit_rate` leaves.
    fn expert_plan(hit_rate: f64) -> Plan {
        let unit = |layer| Unit {
            extent: Extent {
                shard_index: 0,
                offset_bytes: 0,
                len_bytes: 100,
            },
            run: PageRun {
                shard_index: 0,
                first_page: 0,
                page_count: 1,
            },
            layer,
            expert_index: 0,
            class: 0,
        };
        let mut plan = even_plan(10, 0, 0);
        plan.streamed_bytes_per_pass = (2000.0 * (1.0 - hit_rate)) as u64;
        plan.experts = Some(ExpertPlan {
            // Three tensors in each layer: a layer waits once for all of them.
            units: (0..30).map(|index| unit(index / 3)).collect(),
            classes: Vec::new(),
            cache_bytes: 0,
            experts_bytes: 8000,
            shared_bytes: 0,
            used_count: 2,
            skew: 0.0,
            hit_rate,
            used_bytes_per_token: 2000,
        });
        plan
    }

    /// Nothing is read ahead of a router, and each layer that waits pays a latency of its own.
    #[test]
    fn experts_take_turns_with_computing_and_are_a_bound() {
        let drive = DriveRate {
            latency_seconds: 0.5,
            ..at(100.0)
        };
        let half = predict(&expert_plan(0.5), &drive, 4.0).unwrap();
        // 1000 bytes, and of ten layers three quarters miss one of their two.
        assert!(near(half.read_seconds, 10.0 + 7.5 * 0.5), "{half:?}");
        assert!(near(half.seconds_per_pass, 4.0 + half.read_seconds));
        assert!(half.is_upper_bound);
        let none = predict(&expert_plan(1.0), &drive, 4.0).unwrap();
        assert!(near(none.seconds_per_pass, 4.0) && !none.is_upper_bound);
        assert!(
            !predict(&even_plan(10, 50, 3), &drive, 4.0)
                .unwrap()
                .is_upper_bound
        );
    }

    #[test]
    fn a_resident_plan_computes_only() {
        let prediction = predict(&even_plan(10, 0, 0), &at(100.0), 2.0).unwrap();
        assert!(near(prediction.seconds_per_pass, 2.0));
        assert!(prediction.stall_share < 1e-9);
        let idle = predict(&even_plan(10, 0, 0), &at(100.0), 0.0).unwrap();
        assert_eq!(idle.tokens_per_second, None);
    }

    #[test]
    fn compute_is_bytes_and_operations() {
        let mut catalog = even_catalog(4, &[(1, 4096), (5, 8192)]);
        let tensor = catalog.tensors[0].clone();
        catalog.tensors = vec![tensor; 8];
        for (index, used) in catalog
            .layers
            .iter_mut()
            .flat_map(|l| &mut l.uses)
            .enumerate()
        {
            used.tensor_index = index as u32;
        }
        let all_bytes = 4.0 * 12_288.0;
        let by = |rate: f64, node: f64| compute_seconds(&catalog, node, &|_| Some(rate));
        assert!(near(by(1024.0, 0.0).unwrap(), all_bytes / 1024.0));
        let more = by(1024.0, 0.5).unwrap() - by(1024.0, 0.0).unwrap();
        assert!(near(more, 8.0 * NODES_PER_TENSOR * 0.5));
        assert_eq!(compute_seconds(&catalog, 0.0, &|_| None), None);
        assert_eq!(by(0.0, 0.0), None);
        // Of eight experts two are used.
        let experts = Experts { first: 0, count: 8 };
        for tensor in &mut catalog.tensors {
            tensor.experts = Some(experts);
        }
        catalog.expert_count = Some(8);
        catalog.experts_used_count = Some(2);
        let quarter = compute_seconds(&catalog, 0.0, &|_| Some(1024.0)).unwrap();
        assert!(near(quarter, all_bytes / 1024.0 / 4.0));
    }

    #[test]
    fn the_peak_is_the_pool_and_the_host_without_its_reserve() {
        let mut plan = even_plan(10, 50, 3);
        plan.resident_bytes = 1000;
        plan.ring_bytes = 500;
        assert_eq!(peak_bytes(&plan, HOST_RESERVE_BYTES + 7), 1507);
        assert_eq!(peak_bytes(&plan, 0), 1500);
    }

    #[test]
    fn nonsense_is_refused() {
        let plan = even_plan(3, 50, 3);
        for (rate, compute) in [(0.0, 1.0), (-1.0, 1.0), (f64::NAN, 1.0), (1.0, -1.0)] {
            let error = predict(&plan, &at(rate), compute).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        assert!(predict(&plan, &at(1.0), f64::INFINITY).is_err());
        for latency_seconds in [-1.0, f64::NAN] {
            let drive = DriveRate {
                latency_seconds,
                ..at(1.0)
            };
            assert!(predict(&plan, &drive, 1.0).is_err());
        }
    }
}
