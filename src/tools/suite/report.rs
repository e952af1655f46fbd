//! What the suite found: cases of rows of measures, with the drive's own lines beside them. Reads and writes itself as
//! JSON and becomes a Markdown page; both say the same for the same samples.
//!
//! Invariants: a row that could not be measured is a row that says why; a case on an unsteady drive says NOISY where its
//! ratios would stand. No measuring here.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::fio::Chosen;
use super::machine::Machine;
use super::stat::{Goal, Measure, SPREAD_MAX, Series, Verdict};

/// What a case calls one of its measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spec {
    /// Heading of the column.
    pub name: &'static str,
    /// Decimals that mean something.
    pub decimals: u32,
    /// A ratio to the drive's line: not told on an unsteady drive.
    pub ratio: bool,
    /// What it has to reach.
    pub goal: Option<Goal>,
}

impl Spec {
    /// A plain figure.
    #[must_use]
    pub const fn figure(name: &'static str, decimals: u32) -> Self {
        Self {
            name,
            decimals,
            ratio: false,
            goal: None,
        }
    }

    /// A ratio to the drive's line.
    #[must_use]
    pub const fn ratio(name: &'static str) -> Self {
        Self {
            ratio: true,
            ..Self::figure(name, 3)
        }
    }

    /// With something to reach.
    #[must_use]
    pub const fn goal(self, goal: Goal) -> Self {
        Self {
            goal: Some(goal),
            ..self
        }
    }
}

/// One variant of a case.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Which variant.
    pub label: String,
    /// What was measured of it.
    pub measures: Vec<Measure>,
    /// Why there is nothing, or less than the rounds.
    pub missing: Option<String>,
    /// That is what the variant does here (killed for memory), and no defect of the measuring.
    pub died: bool,
}

impl Row {
    /// The measure of this name.
    #[must_use]
    pub fn measure(&self, name: &str) -> Option<&Measure> {
        self.measures.iter().find(|measure| measure.name == name)
    }
}

/// Collects rows in the order in which they first come.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Book {
    /// The rows.
    pub rows: Vec<Row>,
}

impl Book {
    fn row(&mut self, label: &str) -> &mut Row {
        let index = self.rows.iter().position(|row| row.label == label);
        let index = index.unwrap_or_else(|| {
            self.rows.push(Row {
                label: label.to_owned(),
                ..Row::default()
            });
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }

    /// Adds a sample.
    pub fn add(&mut self, label: &str, spec: Spec, value: f64) {
        let row = self.row(label);
        if !row.measures.iter().any(|measure| measure.name == spec.name) {
            row.measures.push(Measure {
                name: spec.name.to_owned(),
                decimals: spec.decimals,
                ratio: spec.ratio,
                goal: spec.goal,
                series: Series::default(),
            });
        }
        let found = row
            .measures
            .iter_mut()
            .find(|measure| measure.name == spec.name);
        if let Some(measure) = found {
            measure.series.add(value);
        }
    }

    /// Gives a variant its row, also when it has no sample yet.
    pub fn begin(&mut self, label: &str) {
        self.row(label);
    }

    /// Notes why a variant has no sample this time; `died`: because that is what it does.
    pub fn miss(&mut self, label: &str, reason: &str, died: bool) {
        let row = self.row(label);
        row.missing = Some(reason.to_owned());
        row.died = died;
    }
}

/// One case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// What `--cases` calls it, with the model where there are several.
    pub name: String,
    /// What it is, for people.
    pub title: String,
    /// How it is measured and what the columns mean.
    pub about: String,
    /// The model or file it used.
    pub model: String,
    /// When it began.
    pub measured_at: String,
    /// The flea that measured.
    pub version: String,
    /// Rounds that count.
    pub rounds: u32,
    /// Rounds thrown away and measured again because the drive changed within them.
    pub repeated_rounds: u32,
    /// Rounds that count although the drive changed within them: measuring again had not helped.
    #[serde(default)]
    pub unsteady_rounds: u32,
    /// Ended before all its rounds.
    pub interrupted: bool,
    /// What ended it.
    #[serde(default)]
    pub ended_by: Option<String>,
    /// Where it was measured.
    #[serde(default)]
    pub machine: Option<Machine>,
    /// Which fio lines.
    pub shapes: Option<Chosen>,
    /// The best fio line, before and after each round.
    pub fio_best: Series,
    /// The best fio line with a large footprint, before and after each round.
    pub fio_large: Series,
    /// The variants.
    pub rows: Book,
    /// What a reader has to know.
    pub notes: Vec<String>,
    /// The measure that its plot shows.
    pub plot: Option<String>,
}

impl CaseReport {
    /// True when the drive changed its speed between rounds.
    #[must_use]
    pub fn has_wandered(&self) -> bool {
        self.fio_large
            .spread()
            .is_some_and(|spread| spread > SPREAD_MAX)
    }

    /// Rows that should have a figure and have none.
    #[must_use]
    pub fn missing_count(&self) -> usize {
        let rows = self.rows.rows.iter();
        rows.filter(|row| row.measures.is_empty() && !row.died)
            .count()
    }

    /// How many goals came out as `verdict`.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        let measures = self.rows.rows.iter().flat_map(|row| &row.measures);
        measures
            .filter(|measure| measure.verdict() == Some(verdict))
            .count()
    }

    /// True for a part of what another one is, or is a larger part of.
    fn is_less_than(&self, other: &Self) -> bool {
        let is_as_long = self.rounds == other.rounds;
        self.interrupted && (self.rounds < other.rounds || is_as_long && !other.interrupted)
    }

    fn rounds_text(&self) -> String {
        let mut text = format!("{} rounds", self.rounds);
        // Writing to a String cannot fail.
        if self.repeated_rounds > 0 {
            let more = self.repeated_rounds;
            let _ = write!(
                text,
                ", {more} more thrown away: the drive changed within them"
            );
        }
        if self.unsteady_rounds > 0 {
            let few = self.unsteady_rounds;
            let _ = write!(
                text,
                ", {few} of them taken although the drive changed within"
            );
        }
        text
    }

    fn markdown(&self, plot_file: Option<&str>, here: &Machine) -> String {
        let mut text = format!("## {}\n\n{}\n\n", self.title, self.about);
        let rounds = self.rounds_text();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{}, {}, flea {}, {rounds}.",
            self.model, self.measured_at, self.version
        );
        text += &self.fio_lines();
        if let Some(machine) = &self.machine {
            for (name, value) in machine.differences(here) {
                let _ = writeln!(text, "Measured with another {name}: {value}.");
            }
        }
        if self.interrupted {
            let cause = self.ended_by.as_deref().unwrap_or("interrupted");
            let _ = writeln!(text, "\n**Fewer rounds than asked for: {cause}.**");
        }
        text += &self.table();
        for row in &self.rows.rows {
            if let Some(reason) = &row.missing {
                let what = match (row.died, row.measures.is_empty()) {
                    (true, _) => "",
                    (false, true) => "**not measured**, ",
                    (false, false) => "not measured in every round, ",
                };
                let _ = writeln!(text, "* {}: {what}{reason}", row.label);
            }
        }
        for note in &self.notes {
            let _ = writeln!(text, "* {note}");
        }
        if let Some(file) = plot_file {
            let _ = writeln!(text, "\n![{}]({file})", self.title);
        }
        text
    }

    fn fio_lines(&self) -> String {
        let mut text = String::new();
        let Some(shapes) = self.shapes else {
            return text;
        };
        for (name, shape, series) in [
            ("fio, best of all shapes", shapes.best, &self.fio_best),
            (
                "fio, same footprint (128 MiB)",
                shapes.large,
                &self.fio_large,
            ),
        ] {
            if let (Some(median), Some(min), Some(max), Some(spread)) =
                (series.median(), series.min(), series.max(), series.spread())
            {
                let _ = writeln!(
                    text,
                    "{name}: {} {median:.3} GB/s ({min:.3}..{max:.3}, spread {:.0} %).",
                    shape.label(),
                    spread * 100.0
                );
            }
        }
        if self.has_wandered() {
            let _ = writeln!(
                text,
                "\nThe drive changed its speed by more than {:.0} % from round to round; ratios are to the lines right around each figure.",
                SPREAD_MAX * 100.0
            );
        }
        text
    }

    fn table(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for measure in self.rows.rows.iter().flat_map(|row| &row.measures) {
            if !names.contains(&measure.name.as_str()) {
                names.push(&measure.name);
            }
        }
        if names.is_empty() {
            return "\n".to_owned();
        }
        let mut text = format!(
            "\n| | {} |\n|---|{}\n",
            names.join(" | "),
            "---|".repeat(names.len())
        );
        for row in &self.rows.rows {
            let cells = names.iter().map(|name| {
                let measure = row.measures.iter().find(|measure| measure.name == *name);
                measure.map_or_else(String::new, |measure| measure.cell())
            });
            let cells: Vec<String> = cells.collect();
            let _ = writeln!(text, "| {} | {} |", row.label, cells.join(" | "));
        }
        text += "\n";
        text
    }
}

/// Everything in one directory of results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// What.
    pub cases: Vec<CaseReport>,
}

impl Report {
    /// Takes `case` in, in place of an older one of that name; false where that one has as many rounds, and this has not all
    /// that it was to have.
    pub fn put(&mut self, case: CaseReport) -> bool {
        match self.cases.iter_mut().find(|old| old.name == case.name) {
            Some(old) if case.is_less_than(old) => return false,
            Some(old) => *old = case,
            None => self.cases.push(case),
        }
        true
    }

    /// The page. `plots` are the names of the files of the cases that have one, in the order of the cases.
    #[must_use]
    pub fn markdown(&self, plots: &[Option<String>]) -> String {
        let mut text = String::from("# Results of `flea bench suite`\n\n");
        text += "Medians, least and most in brackets. PASS and MISS are against the goals that flea has set itself; ";
        text += "ratios are taken within a round, against the mean of the fio lines before and after it.\n\n| | |\n|---|---|\n";
        for (name, value) in self.machine.fields() {
            let _ = writeln!(text, "| {name} | {value} |");
        }
        let count = |verdict| {
            self.cases
                .iter()
                .map(|case| case.count(verdict))
                .sum::<usize>()
        };
        let _ = writeln!(
            text,
            "\nGoals: {} PASS, {} MISS, {} NOISY. Rows without a figure: {}.\n",
            count(Verdict::Pass),
            count(Verdict::Miss),
            count(Verdict::Noisy),
            self.cases
                .iter()
                .map(CaseReport::missing_count)
                .sum::<usize>()
        );
        let sections: Vec<String> = self
            .cases
            .iter()
            .enumerate()
            .map(|(index, case)| {
                case.markdown(plots.get(index).and_then(Option::as_deref), &self.machine)
            })
            .collect();
        text + &sections.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(lines: &[f64]) -> CaseReport {
        let mut rows = Book::default();
        rows.add("flea 10 %", Spec::figure("GB/s", 2), 1.95);
        rows.add(
            "flea 10 %",
            Spec::ratio("of fio").goal(Goal::AtLeast(0.97)),
            0.98,
        );
        rows.miss("peer", "killed: out of memory", true);
        rows.miss("other peer", "llama-completion is not installed", false);
        CaseReport {
            name: "engine".to_owned(),
            title: "Engine".to_owned(),
            about: "How.".to_owned(),
            model: "m.gguf".to_owned(),
            measured_at: "2026-01-02 03:04 UTC".to_owned(),
            version: "0.1.0".to_owned(),
            rounds: 1,
            repeated_rounds: 0,
            unsteady_rounds: 0,
            interrupted: false,
            ended_by: None,
            machine: None,
            shapes: Some(Chosen {
                best: super::super::fio::SHAPES[0],
                large: super::super::fio::LARGE_SHAPES[0],
            }),
            fio_best: Series {
                samples: lines.to_vec(),
            },
            fio_large: Series {
                samples: lines.to_vec(),
            },
            rows,
            notes: vec!["a note".to_owned()],
            plot: None,
        }
    }

    #[test]
    fn a_page_tells_losses_and_noise() {
        let machine = Machine::look(std::path::Path::new("/"));
        let mut report = Report {
            machine,
            cases: vec![case(&[2.0, 2.1])],
        };
        let page = report.markdown(&[]);
        assert!(page.contains("| flea 10 % | 1.95 | 0.980 PASS |"), "{page}");
        assert!(
            page.contains("* peer: killed: out of memory\n* other peer: **not measured**, llama-completion is not"),
            "{page}"
        );
        assert!(
            page.contains("Goals: 1 PASS, 0 MISS, 0 NOISY. Rows without a figure: 1."),
            "{page}"
        );
        let mut apart = case(&[2.0, 1.0]);
        let ratio = Spec::ratio("of fio").goal(Goal::AtLeast(0.97));
        apart.rows.add("flea 10 %", ratio, 0.7);
        assert!(report.put(apart.clone()));
        assert_eq!(report.cases.len(), 1);
        let mut cut_short = apart;
        cut_short.interrupted = true;
        assert!(!report.put(cut_short.clone()), "it has no more rounds");
        cut_short.rounds = 2;
        cut_short.ended_by = Some("the disk is full".to_owned());
        cut_short.machine = Some(report.machine.clone());
        report.put(cut_short.clone());
        assert!(
            report
                .markdown(&[])
                .contains("**Fewer rounds than asked for: the disk is full.**")
        );
        report.machine.kernel = "another".to_owned();
        let page = report.markdown(&[]);
        assert!(page.contains("Measured with another kernel: "), "{page}");
        cut_short.interrupted = false;
        cut_short.machine = None;
        report.put(cut_short);
        let page = report.markdown(&[]);
        assert!(!page.contains("Measured with another"), "{page}");
        assert!(
            page.contains("| flea 10 % | 1.95 | NOISY (0.700..0.980) |")
                && page.contains("The drive changed its speed"),
            "{page}"
        );
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
