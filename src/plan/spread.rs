//! Layers over several GPUs: which of them each has, and what of the host's memory each may use.
//!
//! A pass goes through the layers in order, so every GPU has a run of them, and what computes is handed on once per GPU. The
//! runs' bytes stand in the proportion of what each GPU's memory may hold: then all of them keep the same share of their
//! layers and send the same share over their links. Invariants, property-tested below: every layer is in exactly one run, runs
//! are in order and none is empty, a tensor that is cut over several layers is in one run, and every boundary is the nearest to its
//! proportional place that this leaves. Pure. Part of plan: file -> catalog -> **plan** -> reader -> pool -> lease -> host.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, LayerKind};
use crate::units::HumanBytes;

/// The layers of each GPU, of which GPU `i` may hold `budgets_bytes[i]`.
///
/// # Errors
/// `Invalid` for more GPUs than there are layers to tell apart, and for none.
pub fn layers(catalog: &Catalog, budgets_bytes: &[u64]) -> Result<Vec<Range<usize>>> {
    let starts = starts(catalog);
    let (units_count, gpus_count) = (starts.len(), budgets_bytes.len());
    if gpus_count == 0 || gpus_count > units_count {
        let context = format!(
            "{gpus_count} GPUs for a model of {units_count} parts (its layers, and its output head): name as many or fewer"
        );
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    // Bytes before each layer.
    let mut before: Vec<u128> = vec![0];
    for layer in &catalog.layers {
        before.push(before[before.len() - 1] + u128::from(layer.bytes));
    }
    let total = before[catalog.layers.len()];
    let sum = |budgets: &[u64]| budgets.iter().map(|bytes| u128::from(*bytes)).sum::<u128>();
    let budget = sum(budgets_bytes).max(1);
    let mut runs = Vec::with_capacity(gpus_count);
    let mut unit = 0;
    for gpu in 0..gpus_count {
        let first = starts[unit];
        let left = gpus_count - gpu - 1;
        let end = match left {
            0 => catalog.layers.len(),
            _ => {
                let place = total * sum(&budgets_bytes[..=gpu]) / budget;
                // One for this GPU, and one for each of those that follow.
                unit = (unit + 1..=units_count - left)
                    .min_by_key(|unit| before[starts[*unit]].abs_diff(place))
                    .unwrap_or(unit + 1);
                starts[unit]
            }
        };
        runs.push(first..end);
    }
    Ok(runs)
}

/// Where a run may begin: at every layer, but inside no tensor, and with the whole head.
fn starts(catalog: &Catalog) -> Vec<usize> {
    let mut inside = vec![false; catalog.layers.len()];
    for span in catalog.tensors.iter().filter_map(|tensor| tensor.layers) {
        let cut = span.first as usize + 1..span.last as usize + 1;
        inside
            .iter_mut()
            .take(cut.end)
            .skip(cut.start)
            .for_each(|inside| *inside = true);
    }
    let is_head = |layer: usize| matches!(catalog.layers[layer].kind, LayerKind::Head { .. });
    (0..catalog.layers.len())
        .filter(|layer| *layer == 0 || !(inside[*layer] || is_head(*layer) && is_head(layer - 1)))
        .collect()
}

/// What each GPU needs of the host's memory at least, and what it sends over its link in each pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wants {
    /// With less it cannot stream.
    pub least_bytes: u64,
    /// More than this is of no use to it but for what it reads once.
    pub link_bytes: u64,
}

/// Divides the host's memory for weights: to each what it needs at least, the rest in the proportion of what they send.
///
/// # Errors
/// `Refused`, with the arithmetic.
pub fn memory(total_bytes: u64, wants: &[Wants]) -> Result<Vec<u64>> {
    let least: u64 = wants.iter().map(|wants| wants.least_bytes).sum();
    let Some(rest) = total_bytes.checked_sub(least) else {
        let each: Vec<String> = wants
            .iter()
            .map(|wants| wants.least_bytes.to_string())
            .collect();
        let context = format!(
            "{} ({total_bytes} bytes) of host memory for weights do not do: the GPUs need {} ({} bytes) to stream from it",
            HumanBytes(total_bytes),
            HumanBytes(least),
            each.join(" + ")
        );
        return Err(Error::new(ErrorKind::Refused, context));
    };
    let sent: u128 = wants.iter().map(|wants| u128::from(wants.link_bytes)).sum();
    let share = |wants: &Wants| {
        let more = u128::from(rest) * u128::from(wants.link_bytes) / sent.max(1);
        wants.least_bytes + more as u64
    };
    Ok(wants.iter().map(share).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::DType;
    use crate::plan::testing::{NASTY, any_case, even_catalog, with_tensors};
    use crate::units::{GIB, MIB};

    #[test]
    fn equal_layers_go_by_budget() {
        let catalog = even_catalog(12, &[(0, 8 * MIB)]);
        let runs = |budgets: &[u64]| layers(&catalog, budgets).unwrap();
        assert_eq!(runs(&[GIB])[0], 0..12);
        assert_eq!(runs(&[GIB, GIB]), [0..6, 6..12]);
        assert_eq!(runs(&[2 * GIB, GIB]), [0..8, 8..12]);
        assert_eq!(runs(&[GIB, GIB, 2 * GIB]), [0..3, 3..6, 6..12]);
        // However little a GPU may hold, it has a layer: that it is too little is for its own plan to say.
        assert_eq!(runs(&[1, 100 * GIB, 1]), [0..1, 1..11, 11..12]);
        assert_eq!(runs(&[100 * GIB, 1, 1]), [0..10, 10..11, 11..12]);
        assert_eq!(runs(&[0, 0]), [0..1, 1..12]);
        assert_eq!(runs(&[1; 12]).len(), 12);
    }

    #[test]
    fn more_gpus_than_layers_are_refused() {
        let catalog = even_catalog(3, &[(0, MIB)]);
        let error = layers(&catalog, &[1; 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains("4 GPUs"), "{error}");
        assert!(layers(&catalog, &[]).is_err());
    }

    #[test]
    fn a_head_in_pieces_stays_on_one_gpu() {
        let mut catalog = even_catalog(6, &[(0, MIB)]);
        for layer in &mut catalog.layers[2..] {
            layer.kind = LayerKind::Head {
                first_row: 0,
                row_count: 1,
            };
        }
        assert_eq!(layers(&catalog, &[1, 1]).unwrap(), [0..2, 2..6]);
        assert_eq!(layers(&catalog, &[1, 1, 1]).unwrap(), [0..1, 1..2, 2..6]);
        assert!(layers(&catalog, &[1; 4]).is_err());
    }

    #[test]
    fn a_tensor_in_pieces_stays_on_one_gpu() {
        let mut catalog = with_tensors(even_catalog(6, &[(0, MIB)]), &[(DType::F32, 8)]);
        catalog.tensors[0].layers = Some(crate::model::LayerSpan {
            first: 1,
            last: 4,
            rows_per_layer: 1,
        });
        assert_eq!(layers(&catalog, &[1, 1]).unwrap(), [0..1, 1..6]);
        assert_eq!(layers(&catalog, &[9, 1]).unwrap(), [0..5, 5..6]);
    }

    #[test]
    fn memory_goes_by_need_and_then_by_what_is_sent() {
        let wants = |least_bytes, link_bytes| Wants {
            least_bytes,
            link_bytes,
        };
        let both = [wants(10, 100), wants(20, 300)];
        assert_eq!(memory(30, &both).unwrap(), [10, 20]);
        assert_eq!(memory(430, &both).unwrap(), [110, 320]);
        assert_eq!(
            memory(500, &[wants(10, 0), wants(20, 0)]).unwrap(),
            [10, 20]
        );
        let error = memory(29, &both).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.context().contains("10 + 20 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn every_layer_is_on_one_gpu_in_order_and_by_budget(case in any_case(NASTY), budgets in prop::collection::vec(1..1u64 << 40, 1..6)) {
            let catalog = case.0;
            let count = catalog.layers.len();
            let Ok(runs) = layers(&catalog, &budgets) else {
                prop_assert!(budgets.len() > count);
                return Ok(());
            };
            prop_assert_eq!(runs.len(), budgets.len());
            prop_assert_eq!((runs[0].start, runs[runs.len() - 1].end), (0, count));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end == pair[1].start));
            prop_assert!(runs.iter().all(|run| !run.is_empty()));
            let bytes = |run: &Range<usize>| catalog.layers[run.clone()].iter().map(|layer| layer.bytes).sum::<u64>() as f64;
            let largest = catalog.layers.iter().map(|layer| layer.bytes).max().unwrap_or(0) as f64;
            let whole: f64 = budgets.iter().map(|bytes| *bytes as f64).sum();
            let (mut wanted, mut given) = (0.0, 0.0);
            for (run, budget) in runs.iter().zip(&budgets) {
                wanted += bytes(&(0..count)) * (*budget as f64 / whole);
                given += bytes(run);
                // Half a layer, but that GPUs with next to nothing have one each.
                let spare = (budgets.len() - 2.min(budgets.len())) as f64 + 1.0;
                prop_assert!((given - wanted).abs() <= spare * largest + 1.0, "{given} {wanted} {largest}");
            }
        }

        #[test]
        fn memory_is_never_passed_and_never_less_than_needed(total in 0..1u64 << 44,
            wants in prop::collection::vec((0..1u64 << 40, 0..1u64 << 44), 1..6)) {
            let wants: Vec<Wants> = wants.into_iter().map(|(least_bytes, link_bytes)| Wants { least_bytes, link_bytes }).collect();
            let least: u64 = wants.iter().map(|wants| wants.least_bytes).sum();
            match memory(total, &wants) {
                Ok(shares) => {
                    prop_assert!(shares.iter().sum::<u64>() <= total);
                    prop_assert!(shares.iter().zip(&wants).all(|(share, wants)| *share >= wants.least_bytes));
                }
                Err(_) => prop_assert!(least > total),
            }
        }
    }
}
