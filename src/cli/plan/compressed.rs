//! What `flea plan` tells of a compressed model: how many bytes of it are read, and why no speed follows from that.
//!
//! Invariant: nothing is predicted from a number that nobody measured. Weights come no faster than they are decoded, by
//! threads that share their cores with computing, or by a GPU; how fast that is no profile knows.

use serde::Serialize;

use super::prediction::Basis;
use crate::error::Result;
use crate::io::coded_file::CodedFile;
use crate::plan::Plan;
use crate::units::HumanBytes;

/// What is read of it, as `--json` has it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(in crate::cli) struct CompressedReport {
    /// Length of the compressed file.
    file_bytes: u64,
    /// What is read of it in a pass, for the bytes that the plan streams.
    stored_bytes_per_pass: u64,
    /// What reading that takes; a pass takes no less. `null` without a rate of the drive.
    read_seconds: Option<f64>,
}

impl CompressedReport {
    /// What `plan`, made for the weights, reads of the file.
    ///
    /// # Errors
    /// `Internal` for a plan of another model.
    pub(super) fn new(plan: &Plan, coded: &CodedFile, basis: Option<&Basis>) -> Result<Self> {
        let stored_bytes_per_pass = stored_bytes_per_pass(plan, coded)?;
        let seconds =
            |basis: &Basis| stored_bytes_per_pass as f64 / (basis.drive_gb_per_second * 1e9);
        Ok(Self {
            file_bytes: coded.stored_bytes(),
            stored_bytes_per_pass,
            read_seconds: basis.map(seconds),
        })
    }

    /// The line for people.
    pub(super) fn text(&self) -> String {
        format!(
            "{} are read for that, of a file of {}",
            HumanBytes(self.stored_bytes_per_pass),
            HumanBytes(self.file_bytes)
        )
    }

    /// Why nothing is predicted, what is known, and what to do.
    pub(super) fn why(&self) -> String {
        let least = self.read_seconds.map_or(String::new(), |seconds| {
            format!("reading alone takes {seconds:.3} s per token; ")
        });
        format!(
            "a compressed model comes no faster than it is decoded, and that rate is in no profile; {least}`flea bench stream` \
             measures reading and decoding, `flea run` all of it"
        )
    }
}

fn stored_bytes_per_pass(plan: &Plan, coded: &CodedFile) -> Result<u64> {
    if let Some(experts) = &plan.experts {
        // Which are missing is known when a router has run: on average they are as much shorter as all are.
        let len_bytes: u64 = experts.units.iter().map(|unit| unit.extent.len_bytes).sum();
        let stored = experts.units.iter();
        let stored = stored.map(|unit| coded.stored_len_bytes(&unit.extent));
        let stored_bytes = stored.sum::<Result<u64>>()?;
        let share = stored_bytes as f64 / len_bytes.max(1) as f64;
        return Ok((plan.streamed_bytes_per_pass as f64 * share) as u64);
    }
    let runs = plan.layers.iter().filter_map(|layer| layer.transient);
    runs.map(|run| coded.stored_len_bytes(&run.extent(plan.page_bytes, coded.len_bytes())))
        .sum()
}
