//! `flea-ctl top`: what the daemon does now, once a second. Rates are differences of two snapshots.
//!
//! On a terminal the picture is drawn over the last one; elsewhere, and with `--json`, one picture follows the other.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::Options;
use super::show::printable;
use crate::cli::table::{Align, Table};
use crate::error::Result;
use crate::proto::Control;
use crate::proto::message::{self, Method};
use crate::proto::snapshot::{ModelState, Snapshot};
use crate::units::HumanBytes;

/// How often a sleeping `top` looks whether it was interrupted.
const NAP: Duration = Duration::from_millis(50);

/// Arguments of `flea-ctl top`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds between two pictures
    #[arg(short, long, value_name = "S", default_value_t = 1.0, value_parser = interval)]
    pub interval: f64,

    /// Stop after so many pictures [default: at Ctrl-C]
    #[arg(short = 'n', long, value_name = "N", value_parser = crate::cli::count)]
    pub count: Option<u32>,

    /// Show at most so many models and so many clients, the busiest first
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = crate::cli::count)]
    pub rows: u32,
}

fn interval(text: &str) -> std::result::Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be 0.1 to 3600 seconds".to_owned()),
    }
}

/// One picture: rates over the last interval, states of now.
#[derive(Debug, Serialize)]
struct Picture {
    seconds: f64,
    read_gbps: f64,
    acquires_per_second: f64,
    stalls_per_second: f64,
    budget_bytes: u64,
    budget_configured_bytes: u64,
    pool_bytes: u64,
    pressure_avg10: Option<f64>,
    connections: u32,
    models: Vec<ModelRates>,
    clients: Vec<ClientRates>,
}

#[derive(Debug, Serialize)]
struct ModelRates {
    id: u32,
    path: String,
    state: String,
    read_gbps: f64,
    acquires_per_second: f64,
    stalls_per_second: f64,
    resident_share: f64,
    clients: u32,
}

#[derive(Debug, Serialize)]
struct ClientRates {
    id: u64,
    pid: i32,
    name: String,
    model: u32,
    acquires_per_second: f64,
    leases: u32,
    layer: Option<u32>,
}

/// Runs `flea-ctl top` until Ctrl-C, which is the way to end it and no failure.
///
/// # Errors
/// `Connection` when the daemon cannot be reached, or goes away.
pub fn command(options: &Options, args: &Args) -> Result<()> {
    let stop = crate::cli::stop_on_signal()?;
    let over = !options.json && std::io::stdout().is_terminal();
    let mut daemon = options.connect()?;
    let mut before = (Instant::now(), take(&mut daemon)?);
    let mut drawn = 0;
    while args.count.is_none_or(|count| drawn < count) {
        let due = before.0 + Duration::from_secs_f64(args.interval);
        while Instant::now() < due && !stop.load(Ordering::Relaxed) {
            sleep(NAP.min(due.saturating_duration_since(Instant::now())));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let now = (Instant::now(), take(&mut daemon)?);
        let seconds = now.0.duration_since(before.0).as_secs_f64();
        let picture = Picture::between(&before.1, &now.1, seconds);
        if options.json {
            crate::cli::print_json(&picture)?;
        } else {
            // Home, and clear what is below: less flicker than clearing first.
            let (clear, rest) = if over {
                ("\x1b[H", "\x1b[J")
            } else {
                ("", "\n")
            };
            crate::cli::print(&format!(
                "{clear}{}{rest}",
                picture.text(args.rows as usize, over)
            ))?;
        }
        before = now;
        drawn += 1;
    }
    Ok(())
}

fn take(daemon: &mut Control) -> Result<Snapshot> {
    message::from_value(daemon.call(Method::Status, &json!({}))?)
}

/// Growth of a counter per second; a model that was loaded anew begins at zero again.
fn rate(before: u64, now: u64, seconds: f64) -> f64 {
    now.saturating_sub(before) as f64 / seconds.max(1e-9)
}

impl Picture {
    fn between(before: &Snapshot, now: &Snapshot, seconds: f64) -> Self {
        let mut models: Vec<ModelRates> = now
            .models
            .iter()
            .map(|model| {
                // What a model did before it was first seen is not of this interval.
                let earlier = before.models.iter().find(|old| old.id == model.id);
                ModelRates::between(earlier.unwrap_or(model), model, seconds)
            })
            .collect();
        let mut clients: Vec<ClientRates> = now
            .clients
            .iter()
            .map(|client| {
                let earlier = before.clients.iter().find(|old| old.id == client.id);
                let earlier = earlier.map_or(client.acquires_total, |old| old.acquires_total);
                ClientRates {
                    id: client.id,
                    pid: client.pid,
                    name: client.name.clone(),
                    model: client.model,
                    acquires_per_second: rate(earlier, client.acquires_total, seconds),
                    leases: client.leases,
                    layer: client.layer,
                }
            })
            .collect();
        models.sort_by(|a, b| b.read_gbps.total_cmp(&a.read_gbps).then(a.id.cmp(&b.id)));
        clients.sort_by(|a, b| {
            b.acquires_per_second
                .total_cmp(&a.acquires_per_second)
                .then(a.id.cmp(&b.id))
        });
        let sum =
            |of: fn(&ModelRates) -> f64| models.iter().map(of).fold(0.0, |all, one| all + one);
        Self {
            seconds,
            read_gbps: sum(|model| model.read_gbps),
            acquires_per_second: sum(|model| model.acquires_per_second),
            stalls_per_second: sum(|model| model.stalls_per_second),
            budget_bytes: now.budget_bytes,
            budget_configured_bytes: now.budget_configured_bytes,
            pool_bytes: now.pool_bytes,
            pressure_avg10: now.pressure.as_ref().map(|pressure| pressure.some_avg10),
            connections: now.connections,
            models,
            clients,
        }
    }

    /// `over`: every line ends by clearing what an earlier picture left of it.
    fn text(&self, rows: usize, over: bool) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:.2} GB/s  {:.0} acquires/s  {:.0} stalls/s  pools {} of {}{}",
            self.read_gbps,
            self.acquires_per_second,
            self.stalls_per_second,
            HumanBytes(self.pool_bytes),
            HumanBytes(self.budget_bytes),
            if self.budget_bytes < self.budget_configured_bytes {
                ", held down by memory pressure"
            } else {
                ""
            }
        );
        if let Some(share) = self.pressure_avg10 {
            let _ = writeln!(
                text,
                "memory pressure {share:.2} % of 10 s, {} connections",
                self.connections
            );
        }
        let _ = write!(text, "\n{}", self.model_table(rows));
        let _ = write!(text, "\n{}", self.client_table(rows));
        if over {
            text.replace('\n', "\x1b[K\n")
        } else {
            text
        }
    }

    fn model_table(&self, rows: usize) -> String {
        let mut table = Table::new(&[
            ("model", Align::Right),
            ("GB/s", Align::Right),
            ("acquires/s", Align::Right),
            ("stalls/s", Align::Right),
            ("resident", Align::Right),
            ("clients", Align::Right),
            ("state", Align::Left),
            ("path", Align::Left),
        ]);
        for model in self.models.iter().take(rows) {
            table.row([
                model.id.to_string(),
                format!("{:.2}", model.read_gbps),
                format!("{:.0}", model.acquires_per_second),
                format!("{:.0}", model.stalls_per_second),
                format!("{:.1} %", model.resident_share * 100.0),
                model.clients.to_string(),
                model.state.clone(),
                model.path.clone(),
            ]);
        }
        table.to_string()
    }

    fn client_table(&self, rows: usize) -> String {
        let mut table = Table::new(&[
            ("client", Align::Right),
            ("pid", Align::Right),
            ("model", Align::Right),
            ("acquires/s", Align::Right),
            ("leases", Align::Right),
            ("layer", Align::Right),
            ("name", Align::Left),
        ]);
        for client in self.clients.iter().take(rows) {
            table.row([
                client.id.to_string(),
                client.pid.to_string(),
                client.model.to_string(),
                format!("{:.0}", client.acquires_per_second),
                client.leases.to_string(),
                client
                    .layer
                    .map_or_else(|| "-".to_owned(), |layer| layer.to_string()),
                printable(&client.name),
            ]);
        }
        table.to_string()
    }
}

impl ModelRates {
    fn between(before: &ModelState, now: &ModelState, seconds: f64) -> Self {
        Self {
            id: now.id,
            path: now.path.clone(),
            state: now.state.clone(),
            read_gbps: rate(before.bytes_read_total, now.bytes_read_total, seconds) / 1e9,
            acquires_per_second: rate(before.acquires_total, now.acquires_total, seconds),
            stalls_per_second: rate(before.stalls_total, now.stalls_total, seconds),
            resident_share: now.resident_bytes as f64 / now.model_bytes.max(1) as f64,
            clients: now.clients,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::snapshot::ClientState;

    fn snapshot(bytes: u64, acquires: u64) -> Snapshot {
        Snapshot {
            budget_bytes: 1 << 30,
            budget_configured_bytes: 2 << 30,
            models: vec![
                ModelState {
                    id: 1,
                    model_bytes: 100,
                    resident_bytes: 25,
                    ..ModelState::default()
                },
                ModelState {
                    id: 2,
                    bytes_read_total: bytes,
                    acquires_total: acquires,
                    ..ModelState::default()
                },
            ],
            clients: vec![ClientState {
                id: 9,
                acquires_total: acquires,
                layer: Some(4),
                ..ClientState::default()
            }],
            ..Snapshot::default()
        }
    }

    #[test]
    fn rates_are_differences_and_the_busiest_comes_first() {
        let picture = Picture::between(&snapshot(1_000, 10), &snapshot(4_000_001_000, 30), 2.0);
        assert_eq!(
            (picture.read_gbps, picture.acquires_per_second),
            (2.0, 10.0)
        );
        let order: Vec<u32> = picture.models.iter().map(|model| model.id).collect();
        assert_eq!(order, [2, 1]);
        assert_eq!(
            (
                picture.models[1].resident_share,
                picture.clients[0].acquires_per_second
            ),
            (0.25, 10.0)
        );
        let text = picture.text(20, false);
        assert!(
            text.starts_with("2.00 GB/s  10 acquires/s  0 stalls/s")
                && text.contains("held down by memory pressure"),
            "{text}"
        );
        assert!(!text.contains('\x1b'), "plain where there is no terminal");
    }

    #[test]
    fn what_was_not_there_before_has_no_rate() {
        let fresh = Picture::between(&Snapshot::default(), &snapshot(1 << 40, 1000), 1.0);
        assert_eq!(
            (fresh.read_gbps, fresh.clients[0].acquires_per_second),
            (0.0, 0.0)
        );
        let anew = Picture::between(&snapshot(1 << 40, 1000), &snapshot(5, 5), 1.0);
        assert_eq!(
            (anew.read_gbps, anew.clients[0].acquires_per_second),
            (0.0, 0.0)
        );
    }
}
