//! What tokens cost: the machine spread over its life, and its electricity.

use crate::error::{Error, ErrorKind, Result};

/// Seconds of a year.
const YEAR_SECONDS: f64 = 365.25 * 86_400.0;
/// Joules of a kilowatt-hour.
const KWH_JOULES: f64 = 3.6e6;

/// What a machine costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Price {
    /// Of the machine.
    pub machine: f64,
    /// Drawn while it computes.
    pub watts: f64,
    /// Of a kilowatt-hour.
    pub per_kwh: f64,
    /// How long it lasts.
    pub life_years: f64,
    /// The share of its life in which it computes, above 0 to 1.
    pub use_share: f64,
}

/// What a million tokens cost, in the money of the prices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// The machine's share.
    pub machine: f64,
    /// The electricity.
    pub electricity: f64,
    /// How long they take.
    pub hours: f64,
    /// The energy.
    pub kwh: f64,
}

impl Cost {
    /// The cost of a million tokens at `tokens_per_second`.
    ///
    /// # Errors
    /// `Invalid`: a number that is negative, not finite, or zero where it divides.
    pub fn per_million(price: &Price, tokens_per_second: f64) -> Result<Self> {
        let positive = [
            ("tokens per second", tokens_per_second),
            ("the life in years", price.life_years),
            ("the share of use", price.use_share),
        ];
        let not_negative = [
            ("the price", price.machine),
            ("watts", price.watts),
            ("the price of a kilowatt-hour", price.per_kwh),
        ];
        for (what, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(bad(what, value, "above 0"));
            }
        }
        for (what, value) in not_negative {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(bad(what, value, "0 or more"));
            }
        }
        if price.use_share > 1.0 {
            return Err(bad("the share of use", price.use_share, "at most 1"));
        }
        let seconds = 1e6 / tokens_per_second;
        let kwh = price.watts * seconds / KWH_JOULES;
        let cost = Self {
            machine: price.machine * seconds / (price.life_years * YEAR_SECONDS * price.use_share),
            electricity: kwh * price.per_kwh,
            hours: seconds / 3600.0,
            kwh,
        };
        if !cost.total().is_finite() {
            return Err(bad(
                "the cost",
                cost.total(),
                "a number that can be counted",
            ));
        }
        Ok(cost)
    }

    /// All of it.
    #[must_use]
    pub const fn total(&self) -> f64 {
        self.machine + self.electricity
    }
}

fn bad(what: &str, value: f64, range: &str) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("{what} is {value}; it must be {range}"),
    )
}
