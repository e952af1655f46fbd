//! `flea cost`: money per million tokens, from what a machine costs, what it draws, and how many tokens it makes.

use std::process::ExitCode;

use serde_json::json;

use super::plan::positive;
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::tools::analyze::{Cost, Device, Price, device, source};

const EXAMPLES: &str = "\
Examples:
  flea cost --tokens-per-second 7.1 --price 900 --watts 12
  flea cost --tokens-per-second 2 --device my-boxes.toml:nas --kwh-price 0.35 --life-years 5 --use 25
  flea cost --model llama-3.2-3b --device my-boxes.toml:nas
  flea cost --tokens-per-second 7.1 --price 900 --watts 12 --json

The machine's price is spread over the part of its life in which it computes; --use 25 means a quarter of it. The money is
that of the prices. `flea analyze` and `flea plan` say how many tokens per second to expect.";

/// Say what a million tokens cost: the machine over its life, and its electricity
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Tokens that the machine makes per second
    #[arg(long, value_name = "X", value_parser = positive, required_unless_present = "model")]
    tokens_per_second: Option<f64>,

    /// The model that runs on --device: its tokens per second are those of `flea analyze`, a bound
    #[arg(
        long,
        value_name = "MODEL",
        conflicts_with = "tokens_per_second",
        requires = "device"
    )]
    model: Option<String>,

    /// What the machine costs
    #[arg(long, value_name = "MONEY", value_parser = super::plan::not_negative, required_unless_present = "device")]
    price: Option<f64>,

    /// What it draws while it computes
    #[arg(long, value_name = "W", value_parser = super::plan::not_negative, required_unless_present = "device")]
    watts: Option<f64>,

    /// A file of devices and the name of one, with a price and watts: my.toml:box; or my.toml, if it has only one
    #[arg(long, value_name = "FILE[:NAME]")]
    device: Option<String>,

    /// What a kilowatt-hour costs
    #[arg(long, value_name = "MONEY", default_value_t = 0.30, value_parser = super::plan::not_negative)]
    kwh_price: f64,

    /// How long the machine lasts
    #[arg(long, value_name = "YEARS", default_value_t = 4.0, value_parser = positive)]
    life_years: f64,

    /// The share of its life in which it computes, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 100.0, value_parser = positive)]
    r#use: f64,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `flea cost`.
///
/// # Errors
/// `Invalid`: numbers out of range, a device without a price; what reading a file of devices gives.
pub fn command(args: &Args) -> Result<ExitCode> {
    let device = args.device.as_deref().map(chosen).transpose()?;
    let of_device = |value: fn(&Device) -> Option<f64>| device.as_ref().and_then(value);
    let need = |given: Option<f64>, of_device: Option<f64>, what: &str| {
        given.or(of_device).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!("the device has no {what}; give --{what}, or write it into the file"),
            )
        })
    };
    let price = Price {
        machine: need(args.price, of_device(|device| device.price), "price")?,
        watts: need(args.watts, of_device(|device| device.watts), "watts")?,
        per_kwh: args.kwh_price,
        life_years: args.life_years,
        use_share: args.r#use / 100.0,
    };
    let tokens_per_second = match (&args.model, args.tokens_per_second, &device) {
        (Some(model), _, Some(device)) => super::analyze::tokens_per_second(model, device)?,
        (_, given, _) => given.unwrap_or(0.0),
    };
    let cost = Cost::per_million(&price, tokens_per_second)?;
    if args.json {
        super::print_json(&json!({
            "tokens_per_second": tokens_per_second,
            "price": price.machine,
            "watts": price.watts,
            "kwh_price": price.per_kwh,
            "life_years": price.life_years,
            "use_share": price.use_share,
            "machine_per_million_tokens": cost.machine,
            "electricity_per_million_tokens": cost.electricity,
            "cost_per_million_tokens": cost.total(),
            "hours_per_million_tokens": cost.hours,
            "kwh_per_million_tokens": cost.kwh,
        }))?;
    } else {
        super::print(&text(&price, &cost, tokens_per_second))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The device that `FILE[:NAME]` means.
fn chosen(text: &str) -> Result<Device> {
    let (file, name) = match text.rsplit_once(':') {
        Some((file, name)) if file.ends_with(".toml") => (file, Some(name)),
        _ => (text, None),
    };
    let devices = device::parse(file.as_ref(), &source::read_text(file.as_ref())?)?;
    match (name, devices.as_slice()) {
        (Some(name), devices) => device::find(devices, name).cloned(),
        (None, [only]) => Ok(only.clone()),
        (None, devices) => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{file} has {} devices; say which: {file}:{}",
                devices.len(),
                devices[0].name
            ),
        )),
    }
}

fn text(price: &Price, cost: &Cost, tokens_per_second: f64) -> String {
    let mut table = Table::fields();
    table.field(
        "a million tokens",
        format_args!(
            "{} ({} hours at {tokens_per_second:.2} tokens/s)",
            money(cost.total()),
            money(cost.hours)
        ),
    );
    table.field(
        "- machine",
        format_args!(
            "{} ({} over {} years, used {:.0} % of the time)",
            money(cost.machine),
            money(price.machine),
            price.life_years,
            price.use_share * 100.0
        ),
    );
    table.field(
        "- electricity",
        format_args!(
            "{} ({} kWh at {})",
            money(cost.electricity),
            money(cost.kwh),
            money(price.per_kwh)
        ),
    );
    table.to_string()
}

/// Two places, and more where the first two say nothing.
fn money(value: f64) -> String {
    if value == 0.0 || value >= 0.1 {
        format!("{value:.2}")
    } else {
        format!("{value:.5}")
    }
}
