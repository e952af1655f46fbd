//! The daemon's answers as tables for people.

use std::fmt::Write as _;

use serde_json::Value;

use crate::cli::table::{Align, Table};
use crate::proto::snapshot::{ClientState, LeaseState, ModelState, Snapshot};
use crate::units::HumanBytes;

/// `flea-ctl status`.
pub(super) fn status(snapshot: &Snapshot) -> String {
    let mut table = Table::fields();
    table.field(
        "flead",
        format!("{} (pid {})", snapshot.version, snapshot.pid),
    );
    table.field("socket", &snapshot.socket);
    table.field("up", duration(snapshot.uptime_seconds));
    table.field("budget", budget(snapshot));
    table.field(
        "pools",
        format!(
            "{} held, {} planned",
            HumanBytes(snapshot.pool_bytes),
            HumanBytes(snapshot.planned_bytes)
        ),
    );
    table.field("pressure", pressure(snapshot));
    table.field("connections", snapshot.connections);
    if snapshot.revoked_total + snapshot.refused_total > 0 {
        let (revoked, refused) = (snapshot.revoked_total, snapshot.refused_total);
        table.field(
            "closed",
            format!("{revoked} revoked, {refused} over a limit"),
        );
    }
    if snapshot.barred > 0 {
        let end = if snapshot.barred == 1 { "" } else { "es" };
        let text = format!("{} process{end} that kept a layer", snapshot.barred);
        table.field("barred", text);
    }
    let mut text = table.to_string();
    let _ = write!(text, "\n{}", models(&snapshot.models));
    for model in snapshot
        .models
        .iter()
        .filter(|model| !model.fallbacks.is_empty())
    {
        // A silent fallback is a bug.
        let _ = writeln!(
            text,
            "model {} does not run as wished: {}",
            model.id,
            model.fallbacks.join(", ")
        );
    }
    if !snapshot.clients.is_empty() {
        let _ = write!(text, "\n{}", clients(&snapshot.clients));
    }
    text
}

fn budget(snapshot: &Snapshot) -> String {
    let (now, configured) = (snapshot.budget_bytes, snapshot.budget_configured_bytes);
    if now < configured {
        format!(
            "{} of {}: held down by memory pressure",
            HumanBytes(now),
            HumanBytes(configured)
        )
    } else {
        HumanBytes(now).to_string()
    }
}

fn pressure(snapshot: &Snapshot) -> String {
    let Some(pressure) = &snapshot.pressure else {
        return "not watched".to_owned();
    };
    let mut text = format!(
        "{}, {} available, tasks stalled {:.2} % of 10 s, {} times smaller, {} times larger",
        pressure.state,
        HumanBytes(pressure.available_bytes),
        pressure.some_avg10,
        pressure.shrinks_total,
        pressure.grows_total
    );
    if !pressure.reason.is_empty() {
        let _ = write!(text, "; last because {}", pressure.reason);
    }
    text
}

/// `flea-ctl models`.
pub(super) fn models(models: &[ModelState]) -> String {
    if models.is_empty() {
        return "no model is loaded\n".to_owned();
    }
    let mut table = Table::new(&[
        ("model", Align::Right),
        ("state", Align::Left),
        ("size", Align::Right),
        ("resident", Align::Right),
        ("pool", Align::Right),
        ("layers", Align::Right),
        ("clients", Align::Right),
        ("weight", Align::Right),
        ("reader", Align::Left),
        ("path", Align::Left),
    ]);
    for model in models {
        let state = if model.pinned {
            format!("{}, pinned", model.state)
        } else {
            model.state.clone()
        };
        let share = percent(model.resident_bytes, model.model_bytes);
        table.row([
            model.id.to_string(),
            state,
            HumanBytes(model.model_bytes).to_string(),
            share,
            HumanBytes(model.pool_bytes).to_string(),
            model.layers.to_string(),
            model.clients.to_string(),
            model.weight.to_string(),
            reader(model),
            model.path.clone(),
        ]);
    }
    table.to_string()
}

/// What moves the weights: `io_uring direct`.
fn reader(model: &ModelState) -> String {
    let way = if model.direct_io {
        "direct"
    } else {
        "buffered"
    };
    format!("{} {way}", model.reader)
}

fn clients(clients: &[ClientState]) -> String {
    let mut table = Table::new(&[
        ("client", Align::Right),
        ("pid", Align::Right),
        ("uid", Align::Right),
        ("model", Align::Right),
        ("attached", Align::Right),
        ("leases", Align::Right),
        ("layer", Align::Right),
        ("acquires", Align::Right),
        ("name", Align::Left),
    ]);
    for client in clients {
        table.row([
            client.id.to_string(),
            client.pid.to_string(),
            client.uid.to_string(),
            client.model.to_string(),
            duration(client.attached_seconds),
            client.leases.to_string(),
            client
                .layer
                .map_or_else(|| "-".to_owned(), |layer| layer.to_string()),
            client.acquires_total.to_string(),
            printable(&client.name),
        ]);
    }
    table.to_string()
}

/// `flea-ctl stats`.
pub(super) fn stats(of_models: &[ModelState], of_clients: &[ClientState]) -> String {
    if of_models.is_empty() {
        return models(of_models);
    }
    let mut table = Table::new(&[
        ("model", Align::Right),
        ("read", Align::Right),
        ("GB/s while reading", Align::Right),
        ("reads", Align::Right),
        ("retries", Align::Right),
        ("loads", Align::Right),
        ("acquires", Align::Right),
        ("stalls", Align::Right),
        ("mispredicts", Align::Right),
        ("path", Align::Left),
    ]);
    for model in of_models {
        table.row([
            model.id.to_string(),
            HumanBytes(model.bytes_read_total).to_string(),
            // Bytes per nanosecond are GB per second.
            format!(
                "{:.2}",
                model.bytes_read_total as f64 / (model.read_ns_total.max(1)) as f64
            ),
            model.reads_total.to_string(),
            model.retries_total.to_string(),
            model.loads_total.to_string(),
            model.acquires_total.to_string(),
            model.stalls_total.to_string(),
            model.mispredicts_total.to_string(),
            model.path.clone(),
        ]);
    }
    let mut text = table.to_string();
    if !of_clients.is_empty() {
        let _ = write!(text, "\n{}", clients(of_clients));
    }
    text
}

/// `flea-ctl leases`.
pub(super) fn leases(leases: &[LeaseState]) -> String {
    if leases.is_empty() {
        return "no layer is held\n".to_owned();
    }
    let mut table = Table::new(&[
        ("client", Align::Right),
        ("pid", Align::Right),
        ("model", Align::Right),
        ("layer", Align::Right),
        ("count", Align::Right),
    ]);
    for lease in leases {
        table.row([
            lease.client.to_string(),
            lease.pid.to_string(),
            lease.model.to_string(),
            lease.layer.to_string(),
            lease.count.to_string(),
        ]);
    }
    table.to_string()
}

/// An answer of plain fields, sizes in units.
pub(super) fn fields(answer: &Value) -> String {
    let mut table = Table::fields();
    for (name, value) in answer.as_object().into_iter().flatten() {
        match (name.strip_suffix("_bytes"), value.as_u64()) {
            (Some(short), Some(bytes)) => table.field(&short.replace('_', " "), HumanBytes(bytes)),
            _ => table.field(&name.replace('_', " "), value),
        };
    }
    table.to_string()
}

/// `part` of `whole`.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    format!("{:.1} %", part as f64 / whole as f64 * 100.0)
}

/// Seconds as people say them: `42 s`, `3 min`, `5.2 h`, `9.0 d`.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} d", s / 86_400.0),
    }
}

/// What a client calls itself is its own invention: no control characters on a terminal, and not too much of it.
pub(super) fn printable(name: &str) -> String {
    name.chars()
        .map(|letter| if letter.is_control() { '?' } else { letter })
        .take(40)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pressure_and_fallbacks_are_never_silent() {
        let snapshot = Snapshot {
            budget_bytes: 1 << 30,
            budget_configured_bytes: 2 << 30,
            models: vec![ModelState {
                id: 3,
                path: "/m/a.gguf".to_owned(),
                state: "ready".to_owned(),
                model_bytes: 4 << 30,
                resident_bytes: 1 << 30,
                fallbacks: vec!["small_pages".to_owned()],
                pinned: true,
                ..ModelState::default()
            }],
            ..Snapshot::default()
        };
        let text = status(&snapshot);
        for part in [
            "1.00 GiB of 2.00 GiB: held down by memory pressure",
            "not watched",
            "ready, pinned",
            "25.0 %",
            "model 3 does not run as wished: small_pages",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
    }

    #[test]
    fn a_client_cannot_write_on_our_terminal() {
        let name = "\x1b[31mred\u{7}\n".to_owned() + &"x".repeat(1000);
        let shown = printable(&name);
        assert!(
            !shown.chars().any(char::is_control) && shown.chars().count() == 40,
            "{shown}"
        );
    }

    #[test]
    fn fields_have_units() {
        let text = fields(&json!({"pool_bytes": 2048, "generation": 3}));
        assert_eq!(text, "pool        2.0 KiB\ngeneration  3\n");
    }

    #[test]
    fn times_are_short() {
        for (seconds, text) in [
            (3.2, "3 s"),
            (600.0, "10 min"),
            (7200.0, "2.0 h"),
            (864_000.0, "10.0 d"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
