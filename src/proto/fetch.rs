//! What a client fetches over the socket when it attaches, and when the plan has changed: catalog, plan, counters.

use super::message::{self, Method, from_value};
use super::plan::{ClientPlan, Figures, Placed};
use super::snapshot::ModelState;
use super::{Control, Packet};
use crate::engine::board::{self, place};
use crate::engine::{Fallback, FallbackKind};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::{PoolFile, SharedWords};
use crate::model::{Catalog, records};
use serde::Deserialize;
use serde_json::json;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// Answer to `attach`; area, page and eventfd come with it.
#[derive(Debug, Deserialize)]
pub(super) struct AttachedAnswer {
    /// The model's number.
    pub(super) model: u32,
    /// Its layers.
    pub(super) layers: u32,
}

/// One page of the answer to `catalog`.
#[derive(Debug, Deserialize)]
struct CatalogPage {
    rows: Vec<records::Record>,
    next: Option<u64>,
}

/// One page of the answer to `plan`; the pool's file comes with the first.
#[derive(Debug, Deserialize)]
struct PlanPage {
    #[serde(flatten)]
    figures: Figures,
    runs: Vec<Placed>,
    next: Option<u64>,
}

pub(super) fn program_name() -> String {
    let path = std::env::current_exe().ok();
    let name = path.as_deref().and_then(Path::file_name);
    name.map_or_else(
        || "libflea".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

pub(super) fn fallback(name: &str) -> Option<Fallback> {
    let kinds = [
        FallbackKind::Buffered,
        FallbackKind::Pread,
        FallbackKind::SmallPages,
        FallbackKind::Numa,
    ];
    let kind = kinds.into_iter().find(|kind| kind.name() == name)?;
    Some(Fallback {
        kind,
        reason: format!("the daemon: {name}"),
    })
}

pub(super) fn check_layout(area: &SharedWords) -> Result<()> {
    match area.load(place::LAYOUT) {
        board::LAYOUT => Ok(()),
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the daemon's shared words have layout {other}, this libflea knows {}",
                board::LAYOUT
            ),
        )),
    }
}

pub(super) fn opened<T: serde::de::DeserializeOwned>(packet: Packet) -> Result<(T, Vec<OwnedFd>)> {
    let value = message::parse_reply(&packet.bytes)?;
    Ok((from_value(value)?, packet.descriptors))
}

pub(super) fn fetch_catalog(control: &mut Control) -> Result<Catalog> {
    let mut rows = Vec::new();
    let mut from = 0;
    loop {
        let page: CatalogPage =
            from_value(control.call(Method::Catalog, &json!({ "from": from }))?)?;
        rows.extend(page.rows);
        match page.next {
            Some(next) if next > from => from = next,
            _ => return records::catalog(rows),
        }
    }
}

/// The plan in force. A plan that changes while it is being told is begun again.
pub(super) fn fetch_plan(control: &mut Control, layer_count: usize) -> Result<ClientPlan> {
    'again: loop {
        let packet = control.exchange(Method::Plan, &json!({ "from": 0 }))?;
        let (first, mut descriptors) = match opened::<PlanPage>(packet) {
            // Another plan is being made at this moment.
            Err(error) if error.kind() == ErrorKind::Again => {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            other => other?,
        };
        let Some(pool) = descriptors.pop() else {
            let context = "the daemon's plan came without its pool";
            return Err(Error::new(ErrorKind::Connection, context));
        };
        let (mut runs, mut next) = (first.runs, first.next);
        while let Some(from) = next {
            let answer = control.call(Method::Plan, &json!({ "from": from }));
            if matches!(&answer, Err(error) if error.kind() == ErrorKind::Again) {
                continue 'again;
            }
            let page: PlanPage = from_value(answer?)?;
            if page.figures.generation != first.figures.generation {
                continue 'again;
            }
            runs.extend(page.runs);
            next = page.next.filter(|next| *next > from);
        }
        return ClientPlan::new(first.figures, PoolFile::new(pool)?, runs, layer_count);
    }
}

pub(super) fn fetch_state(control: &mut Control, model: u32) -> Result<ModelState> {
    let models = control.list(Method::Models, "models")?;
    let states = models.into_iter().map(from_value::<ModelState>);
    let mut states = states.collect::<Result<Vec<_>>>()?.into_iter();
    states.find(|state| state.id == model).ok_or_else(|| {
        let context = format!("the daemon does not have model {model} any more");
        Error::new(ErrorKind::Connection, context)
    })
}
