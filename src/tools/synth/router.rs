//! Routers that prefer some experts, so that caches can be measured on models that nobody has to download.
//!
//! Measured models contradict each other: in one report 10 % of the experts get 80 % of the uses, in another the most
//! used 10 % get 10 %, and only what was used just before is used again. Here the router of each layer draws a ranking
//! of its experts, and the rows of rank r are weaker by (1 + r/2)^-skew. Strong rows win half of the time, whenever the
//! state points their way. Experts of ranks 2j and 2j + 1 have opposite rows, so that one of them always wins, and the
//! share of the strong ones does not depend on luck. With 8 of 128 experts the most used 10 % get:
//!
//! | skew | 0 | 0.25 | 0.5 | 0.75 | 1 | 1.5 | 2 | 3 | 4 |
//! |---|---|---|---|---|---|---|---|---|---|
//! | share | 0.11 | 0.28 | 0.43 | 0.53 | 0.59 | 0.67 | 0.71 | 0.75 | 0.78 |

use super::Spec;
use super::blocks::Random;
use super::name_hash;
use super::tensors::Tensor;

/// No expert is preferred: the 10 % that get 10 %.
pub const EVEN: f32 = 0.0;
/// Few experts do nearly everything: the 10 % that get 80 %.
pub const HOT: f32 = 4.0;
/// Beyond this the weak rows are all alike.
pub const SKEW_MAX: f32 = 8.0;

/// What becomes of each row of one router.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Values of a row.
    row: usize,
    /// For each expert: the row to take the values from, and the factor.
    rows: Vec<(usize, f32)>,
}

impl Profile {
    /// None where the tensor is no router, or all experts are to be alike.
    pub(super) fn of(spec: &Spec, tensor: &Tensor) -> Option<Self> {
        let layer = tensor
            .name
            .strip_suffix(".ffn_gate_inp.weight")
            .or_else(|| tensor.name.strip_suffix(".ffn_gate_inp.bias"))?;
        let experts = spec.shape.experts as usize;
        (spec.router_skew > EVEN && experts > 0).then(|| {
            let mut random = Random::new(&[spec.seed, name_hash(layer)]);
            Self::draw(
                &mut random,
                tensor.elements() as usize / experts,
                experts,
                spec.router_skew,
            )
        })
    }

    fn draw(random: &mut Random, row: usize, experts: usize, skew: f32) -> Self {
        let mut ranking: Vec<usize> = (0..experts).collect();
        for last in (1..experts).rev() {
            ranking.swap(last, random.below(last as u64 + 1) as usize);
        }
        let mut rows = vec![(0, 0.0); experts];
        for (pair, experts) in ranking.chunks(2).enumerate() {
            let strength = (1.0 + pair as f32).powf(-skew);
            for (expert, sign) in experts.iter().zip([1.0, -1.0]) {
                rows[*expert] = (experts[0], sign * strength);
            }
        }
        Self { row, rows }
    }

    /// The rows of 32-bit reals, changed in place.
    pub(super) fn apply(&self, bytes: &mut [u8]) {
        let drawn: Vec<f32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|value| f32::from_le_bytes(*value))
            .collect();
        let values = self.rows.iter().flat_map(|(from, factor)| {
            let row = &drawn[from * self.row..][..self.row];
            row.iter().map(move |value| value * factor)
        });
        for (place, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *place = value.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMBD: usize = 64;
    const EXPERTS: usize = 128;
    const USED: usize = 8;

    /// Share of the uses that the most used tenth of 128 experts gets when 8 are chosen for each of many random states.
    fn top_tenth(skew: f32) -> f64 {
        let mut random = Random::new(&[7]);
        let mut bytes = Vec::new();
        for _ in 0..EMBD * EXPERTS {
            bytes.extend(random.normal().to_le_bytes());
        }
        if skew > EVEN {
            Profile::draw(&mut random, EMBD, EXPERTS, skew).apply(&mut bytes);
        }
        let weights: Vec<f32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        let mut uses = vec![0_u32; EXPERTS];
        for _ in 0..2000 {
            let state: Vec<f32> = (0..EMBD).map(|_| random.normal()).collect();
            let mut logits: Vec<(f32, usize)> = weights
                .chunks(EMBD)
                .map(|row| row.iter().zip(&state).map(|(w, x)| w * x).sum())
                .zip(0..)
                .collect();
            logits.sort_by(|a, b| b.0.total_cmp(&a.0));
            for (_, expert) in &logits[..USED] {
                uses[*expert] += 1;
            }
        }
        uses.sort_unstable_by(|a, b| b.cmp(a));
        let top: u32 = uses[..13].iter().sum();
        f64::from(top) / f64::from(uses.iter().sum::<u32>())
    }

    #[test]
    fn the_presets_are_what_was_measured_elsewhere() {
        let even = top_tenth(EVEN);
        assert!((0.10..0.16).contains(&even), "{even}");
        let hot = top_tenth(HOT);
        assert!((0.74..0.82).contains(&hot), "{hot}");
    }

    #[test]
    fn more_skew_is_more_skew() {
        let shares: Vec<f64> = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0].map(top_tenth).to_vec();
        assert!(
            shares.windows(2).all(|pair| pair[0] + 0.02 < pair[1]),
            "{shares:?}"
        );
    }

    #[test]
    fn every_expert_has_a_rank_and_an_opposite() {
        let profile = Profile::draw(&mut Random::new(&[1]), 4, 9, 1.0);
        let mut factors: Vec<f32> = profile
            .rows
            .iter()
            .map(|(_, factor)| factor.abs())
            .collect();
        factors.sort_by(f32::total_cmp);
        assert_eq!(
            factors,
            [0.2, 0.25, 0.25, 1.0 / 3.0, 1.0 / 3.0, 0.5, 0.5, 1.0, 1.0]
        );
        let sum: f32 = profile.rows.iter().map(|(_, factor)| factor).sum();
        assert!((sum - 0.2).abs() < 1e-6, "all but the odd one out cancel");
    }
}
