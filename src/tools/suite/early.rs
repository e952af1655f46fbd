//! What it brings that compute begins with the part of a layer that is there: the same runs with `--whole-layers`.
//!
//! Both take turns right behind each other, each between lines of the drive. Invariant: a run in which nothing began early
//! has no figure, for it would compare a thing with itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::blank;
use super::decode::{Budget, run_streamed};
use super::lab::{Case, Lab, RoundLine, Run, find};
use super::report::{Book, CaseReport, Spec};
use crate::error::{Error, ErrorKind, Result};
use crate::io::cached;

/// Enough for a rate.
const TOKENS: usize = 5;
/// Weights in memory, percent of the model, and slots of the ring: two are the fewest that stream.
const SHAPES: [(u32, u32); 2] = [(25, 2), (75, 3)];

/// A model with and without sub-layer start.
#[derive(Debug)]
pub struct Early {
    /// The model.
    pub path: PathBuf,
    /// What to call it in the name of the case.
    pub slug: String,
}

fn label(percent: u32, slots: u32, whole: bool) -> String {
    let what = if whole {
        "whole layers"
    } else {
        "sub-layer start"
    };
    format!("{what}, {percent} %, {slots} slots")
}

impl Early {
    fn run(
        &self,
        lab: &Lab<'_>,
        percent: u32,
        slots: u32,
        whole: bool,
    ) -> Result<BTreeMap<&'static str, f64>> {
        let slots = slots.to_string();
        let mut arguments = vec!["--slots", slots.as_str()];
        arguments.extend(whole.then_some("--whole-layers"));
        let budget = Budget::Percent(percent);
        let figures = run_streamed(lab, &self.path, TOKENS, budget, &arguments)?;
        let early = figures.get("early_pieces").copied().unwrap_or(0.0);
        if whole == (early > 0.0) {
            let context = format!("{early} pieces began early");
            return Err(Error::new(ErrorKind::Internal, context));
        }
        Ok(figures)
    }
}

impl Case for Early {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        blank(
            &format!("early-{}", self.slug),
            &format!("Sub-layer start, {}", self.slug),
            "`flea run`, 5 tokens of prompt, context 256, page cache cold, with compute that begins with the part of a layer \
             that is there, and with --whole-layers. Ratios are taken within a round.",
            &self.path,
        )
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let both = |(percent, slots)| [(percent, slots, false), (percent, slots, true)];
        let variants = SHAPES.into_iter().flat_map(both);
        let runs = lab.between_lines(variants, |lab, (percent, slots, whole)| {
            let result = self.run(lab, percent, slots, whole);
            Run::of(label(percent, slots, whole), result)
        })?;
        cached::make_cold(&self.path)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        for run in runs {
            for (name, decimals, key) in [
                ("tokens/s", 3, "rate"),
                ("first token s", 2, "first_token"),
                ("early pieces", 0, "early_pieces"),
            ] {
                if let Some(value) = run.get(key) {
                    book.add(&run.label, Spec::figure(name, decimals), value);
                }
            }
        }
        // A drive that was slower for one of the two is no gain of the other: both are held against their own lines.
        let of_line = |run: &Run, rate: f64| rate / run.line_or(line).large.gb_per_second;
        let rate = |run: &Run| Some(of_line(run, run.get("rate")?));
        let first = |run: &Run| Some(of_line(run, run.get("first_token")?.recip()));
        for (percent, slots) in SHAPES {
            let early = label(percent, slots, false);
            let (Some(ours), Some(whole)) =
                (find(runs, &early), find(runs, &label(percent, slots, true)))
            else {
                continue;
            };
            if let (Some(ours), Some(whole)) = (rate(ours), rate(whole)) {
                book.add(&early, Spec::ratio("times whole layers"), ours / whole);
            }
            if let (Some(ours), Some(whole)) = (first(ours), first(whole)) {
                book.add(&early, Spec::ratio("first token, times"), ours / whole);
            }
        }
    }
}
