//! Figures of repeated measurements: median, least, most, spread, and the verdict against a goal.
//!
//! Invariants: nothing is averaged away (every sample stays in the report), a ratio whose samples do not agree is not told
//! as a figure, and the same samples always give the same text. No I/O here.

use serde::{Deserialize, Serialize};

/// Samples may spread this much, most less least over the median; beyond it a ratio says nothing, and a drive has changed.
pub const SPREAD_MAX: f64 = 0.15;

/// Samples in the order they were taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The samples.
    pub samples: Vec<f64>,
}

impl Series {
    /// Adds a sample.
    pub fn add(&mut self, value: f64) {
        self.samples.push(value);
    }

    /// The middle sample; the mean of the two in the middle when their number is even; `None` without samples.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            odd if odd % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }

    /// The least sample.
    #[must_use]
    pub fn min(&self) -> Option<f64> {
        self.samples.iter().copied().min_by(f64::total_cmp)
    }

    /// The largest sample.
    #[must_use]
    pub fn max(&self) -> Option<f64> {
        self.samples.iter().copied().max_by(f64::total_cmp)
    }

    /// Largest less least, over the median.
    #[must_use]
    pub fn spread(&self) -> Option<f64> {
        let median = self.median()?;
        let range = self.max()? - self.min()?;
        (median.abs() > 0.0).then(|| range / median.abs())
    }
}

/// What a figure has to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Not less.
    AtLeast(f64),
    /// Not more.
    AtMost(f64),
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(goal) => value >= goal,
            Self::AtMost(goal) => value <= goal,
        }
    }
}

/// What came of a goal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Reached.
    Pass,
    /// Not reached.
    Miss,
    /// The samples lie too far apart to say.
    Noisy,
    /// Not measured.
    Missing,
}

impl Verdict {
    /// The word in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Miss => "MISS",
            Self::Noisy => "NOISY",
            Self::Missing => "MISSING",
        }
    }
}

/// One quantity of a row: what it is, its samples, its goal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// What was measured: `GB/s`, `of fio best`.
    pub name: String,
    /// Decimals that mean something.
    pub decimals: u32,
    /// True for a figure that is only worth telling where its samples agree: a ratio to the drive's line.
    pub ratio: bool,
    /// What it has to reach.
    pub goal: Option<Goal>,
    /// The samples, one for each round.
    pub series: Series,
}

impl Measure {
    /// A ratio of which the samples lie too far apart.
    fn is_noisy(&self) -> bool {
        self.ratio
            && self
                .series
                .spread()
                .is_some_and(|spread| spread > SPREAD_MAX)
    }

    /// The verdict, if there is a goal. What every sample reaches is reached and what none reaches is missed, however far apart
    /// they lie.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let goal = self.goal?;
        let met = |value: &f64| goal.is_met(*value);
        Some(match self.series.median() {
            None => Verdict::Missing,
            Some(_) if self.series.samples.iter().all(met) => Verdict::Pass,
            Some(_) if !self.series.samples.iter().any(met) => Verdict::Miss,
            Some(_) if self.is_noisy() => Verdict::Noisy,
            Some(median) if goal.is_met(median) => Verdict::Pass,
            Some(_) => Verdict::Miss,
        })
    }

    /// The cell of a table: the median with its range and the verdict; `NOISY` and the range for a ratio that says nothing.
    #[must_use]
    pub fn cell(&self) -> String {
        let decimals = self.decimals as usize;
        let (Some(median), Some(min), Some(max)) =
            (self.series.median(), self.series.min(), self.series.max())
        else {
            return "-".to_owned();
        };
        let is_told = matches!(self.verdict(), Some(Verdict::Pass | Verdict::Miss));
        if self.is_noisy() && !is_told {
            return format!(
                "{} ({min:.decimals$}..{max:.decimals$})",
                Verdict::Noisy.name()
            );
        }
        let mut text = format!("{median:.decimals$}");
        let ends = [format!("{min:.decimals$}"), format!("{max:.decimals$}")];
        if ends[0] != ends[1] {
            text += &format!(" ({}..{})", ends[0], ends[1]);
        }
        if let Some(verdict) = self.verdict() {
            text += &format!(" {}", verdict.name());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(samples: &[f64], goal: Goal) -> Measure {
        Measure {
            name: "x".to_owned(),
            decimals: 2,
            ratio: true,
            goal: Some(goal),
            series: Series {
                samples: samples.to_vec(),
            },
        }
    }

    #[test]
    fn medians_and_spreads() {
        let series = |samples: &[f64]| Series {
            samples: samples.to_vec(),
        };
        assert_eq!(series(&[3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(series(&[4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(
            series(&[2.0, 1.8, 2.2])
                .spread()
                .map(|s| (s * 100.0).round()),
            Some(20.0)
        );
        assert_eq!((series(&[]).median(), series(&[]).spread()), (None, None));
    }

    #[test]
    fn samples_that_disagree_hide_a_ratio_and_nothing_else() {
        let reached = measure(&[0.98, 0.96, 0.99], Goal::AtLeast(0.97));
        assert_eq!(reached.verdict(), Some(Verdict::Pass));
        assert_eq!(reached.cell(), "0.98 (0.96..0.99) PASS");
        let apart = measure(&[0.98, 0.80, 0.99], Goal::AtLeast(0.97));
        assert_eq!(
            (apart.verdict(), apart.cell()),
            (Some(Verdict::Noisy), "NOISY (0.80..0.99)".to_owned())
        );
        let far = measure(&[8.0, 12.0, 9.0], Goal::AtLeast(5.0));
        assert_eq!(far.cell(), "9.00 (8.00..12.00) PASS");
        let never = measure(&[2.0, 3.0, 2.5], Goal::AtLeast(5.0));
        assert_eq!(never.cell(), "2.50 (2.00..3.00) MISS");
        let absolute = Measure {
            ratio: false,
            ..measure(&[1.3, 0.9, 1.4], Goal::AtMost(1.2))
        };
        assert_eq!(absolute.cell(), "1.30 (0.90..1.40) MISS");
        assert_eq!(
            measure(&[], Goal::AtMost(1.0)).verdict(),
            Some(Verdict::Missing)
        );
    }
}
