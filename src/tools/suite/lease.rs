//! The cost of a lease: acquire and release of a layer that is ready. `cargo bench --bench ready` measures the same and
//! counts allocations and system calls besides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::blank;
use super::lab::{Case, Lab, RoundLine, Run};
use super::report::{Book, CaseReport, Spec};
use super::stat::Goal;
use crate::engine::{BudgetSpec, Model, OpenOptions};
use crate::error::Result;

/// Pairs of acquire and release in one measurement.
const PAIRS: u32 = 2_000_000;

/// Acquire and release of ready layers.
#[derive(Debug)]
pub struct Lease {
    /// A small model.
    pub path: PathBuf,
}

/// Opens a model with every layer resident and read.
///
/// # Errors
/// Those of opening and reading it.
pub fn open_resident(path: &Path) -> Result<Model> {
    let file_bytes = std::fs::metadata(path)
        .map_err(|error| {
            crate::error::Error::from_io(&error, format_args!("look at {}", path.display()))
        })?
        .len();
    let options = OpenOptions {
        // Twice the file is room for every page of it and the rounding.
        budget: BudgetSpec::Pool(2 * file_bytes),
        ..OpenOptions::default()
    };
    let model = Model::open(path, options)?;
    for layer in 0..model.catalog().layers.len() as u32 {
        model.acquire(layer, None, None)?;
        model.release(layer)?;
    }
    Ok(model)
}

/// Acquires and releases layer after layer, `pairs` times.
///
/// # Errors
/// Those of acquire and release.
pub fn walk(model: &Model, pairs: u32) -> Result<()> {
    let layers = model.catalog().layers.len() as u32;
    for pair in 0..pairs {
        let layer = pair % layers;
        model.acquire(layer, None, None)?;
        model.release(layer)?;
    }
    Ok(())
}

impl Case for Lease {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            notes: vec![
                "Allocations and system calls: `cargo bench --bench ready` counts them.".to_owned(),
            ],
            ..blank(
                "lease",
                "A lease: acquire and release of a ready layer",
                "One thread, layer after layer of a model that is all in memory, the stream idle.",
                &self.path,
            )
        }
    }

    fn round(&mut self, _lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let measured = open_resident(&self.path).and_then(|model| {
            walk(&model, PAIRS / 10)?;
            let began = Instant::now();
            walk(&model, PAIRS)?;
            let nanoseconds = began.elapsed().as_secs_f64() * 1e9 / f64::from(PAIRS);
            Ok(BTreeMap::from([("ns", nanoseconds)]))
        });
        Ok(vec![Run::of("acquire + release", measured)?])
    }

    fn judge(&self, runs: &[Run], _line: &RoundLine, book: &mut Book) {
        for run in runs {
            if let Some(nanoseconds) = run.get("ns") {
                let spec = Spec::figure("ns", 0).goal(Goal::AtMost(200.0));
                book.add(&run.label, spec, nanoseconds);
            }
        }
    }
}
