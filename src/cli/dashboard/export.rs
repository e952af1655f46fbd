//! The page with its figures in it: one file that needs no program, no network and no other file.

use serde_json::{Map, Value, json};

use super::board::{Board, Settings, secret, with};
use super::measure::What;
use super::page;
use crate::cli::{failure, probe};
use crate::error::{Error, ErrorKind, Result};

/// The report: every model with these settings, the measurements there are, and flead as it is now.
///
/// # Errors
/// Settings that cannot be for the model that is chosen; what others refuse stands in the report.
pub(super) fn report(board: &Board, settings: &Settings) -> Result<String> {
    board.analyze(settings)?;
    let mut analyses = Map::new();
    for name in board.model_names() {
        let answer = match board.analyze(&with(settings, "model", name)) {
            Ok(report) => encode(&report)?,
            Err(error) => failure(&error),
        };
        analyses.insert(name.to_owned(), answer);
    }
    let mut measured = Map::new();
    for what in What::ALL {
        if let Some((value, from)) = board.measurer.result(what) {
            measured.insert(
                what.name().to_owned(),
                json!({"from": from, "value": value}),
            );
        }
    }
    let or_failure = |answer: Result<Value>| answer.unwrap_or_else(|error| failure(&error));
    let settings: Map<String, Value> = settings
        .iter()
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    let data = json!({
        "made": probe::now(),
        "page": board.describe()?,
        "settings": settings,
        "analyses": analyses,
        "measured": measured,
        "status": or_failure(board.status()),
        "stats": or_failure(board.stats()),
    });
    Ok(page::whole(&data.to_string(), &secret()?))
}

fn encode(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::Internal, format!("encode JSON: {error}")))
}
