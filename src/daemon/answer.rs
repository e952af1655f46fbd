//! What the daemon answers: one function per method, each with parameters that are checked first.

use super::hosted::Hosted;
use super::server::Server;
use super::session::{Attachment, Kick};
use super::worker::{Done, Job};
use crate::error::{Error, ErrorKind, Result};
use crate::proto::message::{
    Attach, Budget, Failure, Hello, Hint, Load, Method, Named, Nothing, Page, Request, Welcome,
    to_value,
};
use crate::proto::snapshot::{ClientState, LeaseState, Snapshot};
use crate::proto::{PACKET_BYTES_MAX, PROTOCOL};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Bytes of rows that go into one page of an answer: with what stands around them it stays under a packet.
const PAGE_BYTES: usize = PACKET_BYTES_MAX * 3 / 4;
/// Longest name of a client that is kept.
const NAME_CHARS_MAX: usize = 64;

/// What becomes of a request.
#[derive(Debug)]
pub enum Answer {
    /// It is answered, with these descriptors beside it.
    Now(Result<Value>, Vec<OwnedFd>),
    /// The worker has it.
    Later,
}

/// Answers a request of session `id`.
pub fn answer(server: &mut Server, id: u64, request: &Request) -> Answer {
    match try_answer(server, id, request) {
        Ok(answer) => answer,
        Err(error) => Answer::Now(Err(error), Vec::new()),
    }
}

fn try_answer(server: &mut Server, id: u64, request: &Request) -> Result<Answer> {
    let now = |value: Value| Ok(Answer::Now(Ok(value), Vec::new()));
    match request.method {
        Method::Hello => now(hello(server, id, &request.parameters()?)?),
        Method::Status => {
            request.parameters::<Nothing>()?;
            now(to_value(&snapshot(server))?)
        }
        Method::Models => {
            let page: Page = request.parameters()?;
            let models = server.shelf.models();
            let models = models.iter().map(|model| model.snapshot());
            now(paged("models", page.from, models)?)
        }
        Method::Stats => {
            let page: Page = request.parameters()?;
            let models = server.shelf.models();
            let models = models.iter().map(|model| model.snapshot());
            let mut value = paged("models", page.from, models)?;
            value["clients"] = paged("clients", 0, clients(server))?["clients"].take();
            now(value)
        }
        Method::Metrics => {
            let page: Page = request.parameters()?;
            let text = super::metrics::text(&snapshot(server));
            let lines = text.lines().map(str::to_owned);
            now(paged("lines", page.from, lines)?)
        }
        Method::Leases => {
            let page: Page = request.parameters()?;
            now(paged("leases", page.from, leases(server))?)
        }
        Method::Load => {
            may_change(server, id)?;
            let load: Load = request.parameters()?;
            server.shelf.resolve(&load.path)?;
            let job = Job::Load {
                path: load.path,
                pin: load.pin,
                attach: false,
            };
            server.worker.give(Some(id), job)?;
            Ok(Answer::Later)
        }
        Method::Unload => {
            may_change(server, id)?;
            let named: Named = request.parameters()?;
            let model = server.shelf.named(&named.model)?;
            server.worker.give(Some(id), Job::Unload(model))?;
            Ok(Answer::Later)
        }
        Method::Pin | Method::Unpin => {
            may_change(server, id)?;
            let named: Named = request.parameters()?;
            let model = server.shelf.named(&named.model)?;
            let pinned = request.method == Method::Pin;
            model.pinned.store(pinned, Ordering::Relaxed);
            now(to_value(&model.snapshot())?)
        }
        Method::Budget => {
            let budget: Budget = request.parameters()?;
            let Some(bytes) = budget.bytes else {
                return now(budget_value(server));
            };
            may_change(server, id)?;
            let job = Job::Budget {
                bytes,
                configured: true,
            };
            server.worker.give(Some(id), job)?;
            Ok(Answer::Later)
        }
        Method::Attach => attach(server, id, &request.parameters()?),
        Method::Detach => {
            request.parameters::<Nothing>()?;
            if let Some(session) = server.sessions.get_mut(&id) {
                session.detach();
            }
            now(json!({}))
        }
        Method::Catalog => {
            let page: Page = request.parameters()?;
            let model = attached(server, id)?;
            now(paged("rows", page.from, model.rows.iter())?)
        }
        Method::Plan => plan(server, id, &request.parameters()?),
        Method::Failure => {
            let asked: Failure = request.parameters()?;
            let model = attached(server, id)?;
            check_layer(&model, asked.layer)?;
            now(match model.failure(asked.layer) {
                None => json!({ "fatal": false }),
                Some(failure) => json!({
                    "fatal": failure.fatal,
                    "status": failure.error.kind().name(),
                    "message": failure.error.context(),
                }),
            })
        }
        Method::Hint => {
            let hint: Hint = request.parameters()?;
            let model = attached(server, id)?;
            for layer in &hint.layers {
                check_layer(&model, *layer)?;
            }
            model.board.hint(id, &hint.layers);
            model.wake();
            now(json!({}))
        }
    }
}

/// Ends a request that the worker had.
pub fn finish(server: &mut Server, id: u64, done: Done) -> (Result<Value>, Vec<OwnedFd>) {
    let model = match done.result {
        Ok(model) => model,
        Err(error) => return (Err(error), Vec::new()),
    };
    match (done.job, model) {
        (Job::Load { attach: true, .. }, Some(model)) => match attach_to(server, id, &model) {
            Ok((value, descriptors)) => (Ok(value), descriptors),
            Err(error) => (Err(error), Vec::new()),
        },
        (_, Some(model)) => (to_value(&model.snapshot()), Vec::new()),
        (Job::Budget { .. }, None) => (Ok(budget_value(server)), Vec::new()),
        (_, None) => (Ok(json!({})), Vec::new()),
    }
}

fn hello(server: &mut Server, id: u64, hello: &Hello) -> Result<Value> {
    if hello.protocol != PROTOCOL {
        let context = format!(
            "this flead speaks protocol {PROTOCOL}, the client {}: use programs of one version",
            hello.protocol
        );
        return Err(Error::new(ErrorKind::Unsupported, context));
    }
    if let Some(session) = server.sessions.get_mut(&id) {
        session.name = Some(hello.client.chars().take(NAME_CHARS_MAX).collect());
    }
    to_value(&Welcome {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    })
}

/// Changes are for root and the daemon's own user, and whoever the settings name.
fn may_change(server: &Server, id: u64) -> Result<()> {
    let own = nix::unistd::geteuid().as_raw();
    let uid = server.sessions.get(&id).map(|session| session.peer.uid());
    let admins = &server.settings.admins;
    if uid.is_some_and(|uid| uid == 0 || uid == own || admins.contains(&uid)) {
        return Ok(());
    }
    let context = "only root, flead's own user and its admins may change what the daemon does";
    Err(Error::new(ErrorKind::Permission, context))
}

fn attached(server: &Server, id: u64) -> Result<Arc<Hosted>> {
    let session = server.sessions.get(&id);
    let attached = session.and_then(|session| session.attached.as_ref());
    attached
        .map(|attached| Arc::clone(&attached.model))
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "attach to a model first"))
}

fn check_layer(model: &Hosted, layer: u32) -> Result<()> {
    let count = model.board.layer_count();
    if layer < count {
        return Ok(());
    }
    let context = format!("layer {layer} does not exist, the model has {count} layers");
    Err(Error::new(ErrorKind::Invalid, context))
}

fn attach(server: &mut Server, id: u64, asked: &Attach) -> Result<Answer> {
    if server
        .sessions
        .get(&id)
        .is_some_and(|session| session.attached.is_some())
    {
        let context =
            "a connection is attached to one model at a time; detach first, or connect again";
        return Err(Error::new(ErrorKind::Busy, context));
    }
    let pid = server.sessions.get(&id).map(|session| session.peer.pid());
    let barred = server.bars.check(pid.unwrap_or_default(), Instant::now());
    server.refused_total += u64::from(barred.is_err());
    barred?;
    if let Some(model) = server.shelf.loaded(&asked.path)?
        && model.budget_bytes() > 0
        && model.is_current()
    {
        let (value, descriptors) = attach_to(server, id, &model)?;
        return Ok(Answer::Now(Ok(value), descriptors));
    }
    let job = Job::Load {
        path: asked.path.clone(),
        pin: false,
        attach: true,
    };
    server.worker.give(Some(id), job)?;
    Ok(Answer::Later)
}

fn attach_to(server: &mut Server, id: u64, model: &Arc<Hosted>) -> Result<(Value, Vec<OwnedFd>)> {
    let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| Error::os(errno as i32, "make an eventfd"))?;
    let duplicated = |fd: std::os::fd::BorrowedFd<'_>| {
        fd.try_clone_to_owned()
            .map_err(|error| Error::from_io(&error, "duplicate a descriptor"))
    };
    let area = model.board.area().read_only_fd()?;
    let kick_too = duplicated(kick.as_fd())?;
    let page = model.board.attach(id)?;
    let page_fd = duplicated(page.descriptor());
    let Some(session) = server.sessions.get_mut(&id) else {
        model.board.detach(id);
        return Err(Error::new(ErrorKind::Connection, "the client is gone"));
    };
    session.attached = Some(Attachment {
        model: Arc::clone(model),
        kick: Kick {
            event: kick,
            heard_by: Arc::clone(&server.kicks),
        },
        since: Instant::now(),
        excess_ticks: 0,
        kicks: 0,
        paused: false,
    });
    let watched = server.listen_for_kicks(id);
    let descriptors = match (watched, page_fd) {
        (Ok(()), Ok(page_fd)) => vec![area, page_fd, kick_too],
        (Err(error), _) | (_, Err(error)) => {
            if let Some(session) = server.sessions.get_mut(&id) {
                session.detach();
            }
            return Err(error);
        }
    };
    let value = json!({
        "model": model.id,
        "client": id,
        "layers": model.board.layer_count(),
    });
    Ok((value, descriptors))
}

fn plan(server: &Server, id: u64, page: &Page) -> Result<Answer> {
    let model = attached(server, id)?;
    let (told, pool) = model.plan()?;
    let mut value = paged("runs", page.from, told.runs.iter().copied())?;
    if let (Value::Object(value), Value::Object(figures)) = (&mut value, to_value(&told.figures)?) {
        value.extend(figures);
    }
    let descriptors = if page.from == 0 {
        vec![pool]
    } else {
        Vec::new()
    };
    Ok(Answer::Now(Ok(value), descriptors))
}

fn budget_value(server: &Server) -> Value {
    let (budget_bytes, configured_bytes) = server.shelf.budget();
    json!({
        "budget_bytes": budget_bytes,
        "budget_configured_bytes": configured_bytes,
        "planned_bytes": server.shelf.held_bytes(),
    })
}

/// As many items from `from` on as a packet holds, and where the next page begins.
fn paged<T: Serialize>(key: &str, from: u64, items: impl Iterator<Item = T>) -> Result<Value> {
    let mut page = Vec::new();
    let mut bytes = 0;
    let mut next = Value::Null;
    let skip = usize::try_from(from).unwrap_or(usize::MAX);
    for (index, item) in items.enumerate().skip(skip) {
        let item = to_value(&item)?;
        bytes += item.to_string().len() + 1;
        if bytes > PAGE_BYTES && !page.is_empty() {
            next = json!(index);
            break;
        }
        page.push(item);
    }
    Ok(json!({ key: page, "next": next }))
}

/// The daemon in one object.
#[must_use]
pub fn snapshot(server: &Server) -> Snapshot {
    let (budget_bytes, budget_configured_bytes) = server.shelf.budget();
    let models: Vec<_> = server
        .shelf
        .models()
        .iter()
        .map(|model| model.snapshot())
        .collect();
    Snapshot {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: server.since.elapsed().as_secs_f64(),
        socket: server.settings.socket.display().to_string(),
        budget_bytes,
        budget_configured_bytes,
        planned_bytes: server.shelf.held_bytes(),
        pool_bytes: models.iter().map(|model| model.pool_bytes).sum(),
        connections: u32::try_from(server.sessions.len()).unwrap_or(u32::MAX),
        revoked_total: server.revoked_total,
        refused_total: server.refused_total,
        barred: server.bars.count(Instant::now()),
        pressure: server.pressure.clone(),
        models,
        // A packet has room for some; `leases` and `stats` page.
        clients: clients(server).take(64).collect(),
    }
}

fn clients(server: &Server) -> impl Iterator<Item = ClientState> + '_ {
    // Each board is asked once: asking it for every client would cost the square of their number.
    let boards = server.shelf.models();
    let told: HashMap<u64, _> = boards.iter().flat_map(|model| model.board.told()).collect();
    let mut ids: Vec<u64> = server.sessions.keys().copied().collect();
    ids.sort_unstable();
    ids.into_iter().filter_map(move |id| {
        let session = &server.sessions[&id];
        let attached = session.attached.as_ref()?;
        let (leases, layer, acquires_total) = told.get(&id).copied().unwrap_or_default();
        Some(ClientState {
            id,
            pid: session.peer.pid(),
            uid: session.peer.uid(),
            name: session.name.clone().unwrap_or_default(),
            model: attached.model.id,
            attached_seconds: attached.since.elapsed().as_secs_f64(),
            leases,
            layer,
            acquires_total,
        })
    })
}

fn leases(server: &Server) -> impl Iterator<Item = LeaseState> + '_ {
    clients(server).flat_map(|client| {
        let session = &server.sessions[&client.id];
        let leases = session
            .attached
            .as_ref()
            .map(|attached| attached.model.board.leases(client.id));
        leases
            .unwrap_or_default()
            .into_iter()
            .map(move |(layer, count)| LeaseState {
                client: client.id,
                pid: client.pid,
                model: client.model,
                layer,
                count,
            })
    })
}
