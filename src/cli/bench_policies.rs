//! `flea bench policies`: arguments and report around [`crate::tools::policies`].

use std::time::Instant;

use clap::Args as ClapArgs;
use serde_json::{Value, json};

use super::table::{Align, Table};
use crate::error::Result;
use crate::plan::PolicyKind;
use crate::tools::policies::{Dims, Measured, Point, TraceSpec, measure, safest, worst_losses};

const EXAMPLES: &str = "\
Examples:
  flea bench policies
  flea bench policies --experts 256 --tokens 4000 --json
  flea bench policies --popular-share 0.3 --skew 1.2 --locality 0.5

Without a skew of your own there are three traces: hot (a tenth of the experts gets 80 % of the uses), drifting (no expert
is preferred, what was used lately is used again) and one half and half. Belady is the bound: it knows the future.";

/// Find out which cache policy suits which use of experts
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct PoliciesArgs {
    /// Layers
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = super::count)]
    layers: u32,

    /// Experts of a layer
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = super::count)]
    experts: u32,

    /// Experts that a token uses of a layer
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = super::count)]
    experts_used: u32,

    /// Tokens; the first quarter is not counted
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = super::count)]
    tokens: u32,

    /// A trace of your own: share of the choices made by popularity, the rest by recency
    #[arg(long, value_name = "SHARE", value_parser = share)]
    popular_share: Option<f64>,

    /// Popularity of rank r falls with r^-SKEW
    #[arg(long, value_name = "SKEW", requires = "popular_share", value_parser = exponent)]
    skew: Option<f64>,

    /// Recency: 1 = every expert alike, less = more of what was used lately
    #[arg(long, value_name = "EXPONENT", requires = "popular_share", value_parser = exponent)]
    locality: Option<f64>,

    /// Where all randomness comes from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> std::result::Result<f64, String> {
    let value = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    value.ok_or_else(|| format!("'{text}' is not a share from 0 to 1"))
}

fn exponent(text: &str) -> std::result::Result<f64, String> {
    let value = text
        .parse()
        .ok()
        .filter(|exponent| (0.01..=8.0).contains(exponent));
    value.ok_or_else(|| format!("'{text}' is not an exponent from 0.01 to 8"))
}

/// Measures and prints.
///
/// # Errors
/// Dimensions that make no model.
pub fn command(args: &PoliciesArgs) -> Result<()> {
    let presets = TraceSpec::presets();
    let own = args.popular_share.map(|popular_share| TraceSpec {
        name: "own",
        popular_share,
        skew: args.skew.unwrap_or(presets[0].skew),
        locality: args.locality.unwrap_or(presets[0].locality),
    });
    let specs = own.map_or_else(|| presets.to_vec(), |own| vec![own]);
    let dims = Dims {
        layers: args.layers,
        experts: args.experts,
        used: args.experts_used,
        tokens: args.tokens,
    };
    let began = Instant::now();
    let measured = measure(&specs, dims, args.seed)?;
    if args.json {
        let seconds = began.elapsed().as_secs_f64();
        super::print_json(&to_json(args, &measured, seconds))
    } else {
        super::print(&to_table(&measured))
    }
}

fn point_json(point: &Point) -> Value {
    let mut rates = serde_json::Map::new();
    for (kind, rate) in PolicyKind::ALL.iter().zip(point.rates) {
        rates.insert(kind.name().to_owned(), json!(rate));
    }
    json!({
        "cache_share": point.cache_share,
        "slots": point.slots,
        "belady": point.belady,
        "hit_rate": rates,
    })
}

fn to_json(args: &PoliciesArgs, measured: &[Measured], seconds: f64) -> Value {
    let trace = |measured: &Measured| {
        json!({
            "trace": measured.spec.name,
            "popular_share": measured.spec.popular_share,
            "skew": measured.spec.skew,
            "locality": measured.spec.locality,
            "top_tenth_share": measured.top_tenth_share,
            "points": measured.points.iter().map(point_json).collect::<Vec<_>>(),
        })
    };
    let losses: serde_json::Map<String, Value> = PolicyKind::ALL
        .iter()
        .zip(worst_losses(measured))
        .map(|(kind, loss)| (kind.name().to_owned(), json!(loss)))
        .collect();
    json!({
        "layers": args.layers,
        "experts": args.experts,
        "experts_used": args.experts_used,
        "tokens": args.tokens,
        "seed": args.seed,
        "traces": measured.iter().map(trace).collect::<Vec<_>>(),
        "worst_loss_percent": losses,
        "safest": safest(measured).name(),
        "default": PolicyKind::default().name(),
        "seconds": seconds,
    })
}

fn to_table(measured: &[Measured]) -> String {
    let mut columns = vec![
        ("trace", Align::Left),
        ("top 10 %", Align::Right),
        ("cache", Align::Right),
        ("belady", Align::Right),
    ];
    columns.extend(PolicyKind::ALL.map(|kind| (kind.name(), Align::Right)));
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let mut table = Table::new(&columns);
    for trace in measured {
        for point in &trace.points {
            let mut cells = vec![
                trace.spec.name.to_owned(),
                percent(trace.top_tenth_share),
                format!("{:.0} %", 100.0 * point.cache_share),
                percent(point.belady),
            ];
            cells.extend(point.rates.map(percent));
            table.row(cells);
        }
    }
    let mut losses = vec![
        "worst loss".to_owned(),
        String::new(),
        String::new(),
        String::new(),
    ];
    losses.extend(worst_losses(measured).map(|loss| format!("-{loss:.1}")));
    table.row(losses);
    format!(
        "hits of 100 uses, after the first quarter of the trace\n{table}\nloses least: {}; default: {}\n",
        safest(measured),
        PolicyKind::default()
    )
}
