//! How the daemon's memory is divided between its models: everyone gets what it needs to work at all, the rest goes by
//! weight, and nobody gets more than it can use.

/// What one model may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The least that works.
    pub smallest_bytes: u64,
    /// The most that helps.
    pub largest_bytes: u64,
    /// Its share against others.
    pub weight: u32,
}

/// Divides `budget_bytes`; `None` when not even the smallest claims fit.
#[must_use]
pub fn divide(budget_bytes: u64, claims: &[Claim]) -> Option<Vec<u64>> {
    let mut parts: Vec<u64> = claims.iter().map(|claim| claim.smallest_bytes).collect();
    let smallest = parts
        .iter()
        .try_fold(0u64, |sum, part| sum.checked_add(*part))?;
    let mut rest = budget_bytes.checked_sub(smallest)?;
    // Each round gives the rest out by weight; who is full drops out, so there are at most as many rounds as claims.
    loop {
        let wants = |index: usize| claims[index].largest_bytes.saturating_sub(parts[index]);
        let hungry: Vec<usize> = (0..claims.len())
            .filter(|index| wants(*index) > 0)
            .collect();
        let weight: u128 = hungry
            .iter()
            .map(|i| u128::from(claims[*i].weight.max(1)))
            .sum();
        if hungry.is_empty() || rest == 0 {
            return Some(parts);
        }
        let given: Vec<(usize, u64)> = hungry
            .iter()
            .map(|&index| {
                let fair = u128::from(rest) * u128::from(claims[index].weight.max(1)) / weight;
                (
                    index,
                    wants(index).min(u64::try_from(fair).unwrap_or(u64::MAX)),
                )
            })
            .collect();
        let total: u64 = given.iter().map(|(_, bytes)| bytes).sum();
        for (index, bytes) in given {
            parts[index] += bytes;
        }
        rest -= total;
        if total == 0 {
            // Less than one byte for each: nothing worth dividing.
            return Some(parts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim(smallest_bytes: u64, largest_bytes: u64, weight: u32) -> Claim {
        Claim {
            smallest_bytes,
            largest_bytes,
            weight,
        }
    }

    #[test]
    fn by_weight_beyond_what_each_needs() {
        let claims = [claim(10, 1000, 100), claim(10, 1000, 300)];
        assert_eq!(divide(420, &claims), Some(vec![110, 310]));
        assert_eq!(divide(20, &claims), Some(vec![10, 10]));
        assert_eq!(divide(19, &claims), None);
        let claims = [claim(10, 20, 100), claim(10, 1000, 100)];
        assert_eq!(divide(420, &claims), Some(vec![20, 400]));
        assert_eq!(divide(5000, &claims), Some(vec![20, 1000]));
        assert_eq!(divide(5, &[]), Some(vec![]));
    }

    proptest! {
        #[test]
        fn never_more_than_there_is_nor_less_than_needed(
            budget in 0u64..1 << 50,
            claims in proptest::collection::vec((0u64..1 << 40, 0u64..1 << 40, 0u32..1000), 0..12),
        ) {
            let claims: Vec<Claim> = claims
                .into_iter()
                .map(|(small, more, weight)| claim(small, small + more, weight))
                .collect();
            if let Some(parts) = divide(budget, &claims) {
                prop_assert!(parts.iter().sum::<u64>() <= budget);
                for (part, claim) in parts.iter().zip(&claims) {
                    prop_assert!((claim.smallest_bytes..=claim.largest_bytes).contains(part));
                }
                let full = parts.iter().zip(&claims).all(|(part, claim)| *part == claim.largest_bytes);
                let left = budget - parts.iter().sum::<u64>();
                prop_assert!(full || left <= claims.len() as u64 + 1000);
            } else {
                let needed: u128 = claims.iter().map(|c| u128::from(c.smallest_bytes)).sum();
                prop_assert!(needed > u128::from(budget));
            }
        }
    }
}
