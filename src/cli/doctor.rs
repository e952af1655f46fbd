//! `flea doctor`: prints what [`crate::tools::doctor`] found, worst last, so that it stands above the prompt.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde_json::json;

use super::table::{Align, Table};
use crate::error::Result;
use crate::tools::doctor::{Finding, Verdict, examine};

const EXAMPLES: &str = "\
Examples:
  flea doctor /models
  flea doctor model.gguf --json

PASS: as it should be. WARN: flea runs, but slower or with a fallback. FAIL: flea does not run here.
Exit codes: 0 nothing failed, 1 something did.";

/// Look at everything flea needs of this machine, and say what would mend it
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A model, or the directory models lie in
    #[arg(value_name = "PATH", default_value = ".")]
    path: PathBuf,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Standard output cannot be written.
pub fn command(args: &Args) -> Result<ExitCode> {
    let findings = examine(&args.path);
    let worst = findings.iter().map(|finding| finding.verdict).max();
    if args.json {
        super::print_json(&to_json(&findings, worst))?;
    } else {
        super::print(&to_text(&findings))?;
    }
    Ok(match worst {
        Some(Verdict::Fail) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

fn to_json(findings: &[Finding], worst: Option<Verdict>) -> serde_json::Value {
    let list: Vec<_> = findings
        .iter()
        .map(|finding| {
            json!({
                "name": finding.name,
                "verdict": finding.verdict.name(),
                "found": finding.found,
                "remedy": finding.remedy,
            })
        })
        .collect();
    json!({ "verdict": worst.map(Verdict::name), "findings": list })
}

fn to_text(findings: &[Finding]) -> String {
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    // Stable: findings of one verdict stay in the order of the pipeline.
    sorted.sort_by_key(|finding| finding.verdict);
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left), ("", Align::Left)]);
    for finding in sorted {
        table.row([finding.verdict.name(), finding.name, &finding.found]);
        if let Some(remedy) = &finding.remedy {
            table.row(["", "", &format!("-> {remedy}")]);
        }
    }
    table.to_string()
}
