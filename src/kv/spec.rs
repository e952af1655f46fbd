//! What a coder is asked for: codec, rate and length of the vectors, as text, as numbers, and checked.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// Vectors of one frame.
pub const COUNT_MAX: usize = 1 << 24;
/// Shortest and longest vector.
pub const DIM_MIN: usize = 16;
/// See [`DIM_MIN`].
pub const DIM_MAX: usize = 1024;
/// Values that share a scale in the formats of ggml.
pub const BLOCK: usize = 32;

/// The codecs. Their numbers are part of the format: appended to, never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Codec {
    /// ggml's 8-bit blocks of 32: 8.5 bits.
    Q8_0 = 1,
    /// ggml's 4-bit blocks of 32: 4.5 bits.
    Q4_0 = 2,
    /// Hadamard rotation, Lloyd-Max levels, one scale per vector.
    Tq = 3,
    /// Hadamard rotation, uniform steps, entropy coded.
    TqEc = 4,
    /// Hadamard rotation, trellis-coded.
    Tcq = 5,
    /// 3D rotors, Lloyd-Max levels.
    Rotor = 6,
    /// A calibrated basis, bits where the variance is.
    Spectral = 7,
    /// The codec of dhurandhar 0.1.3, to compare with: sign and a uniform residual.
    Dh013 = 8,
}

impl Codec {
    /// Every codec, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Q8_0,
        Self::Q4_0,
        Self::Tq,
        Self::TqEc,
        Self::Tcq,
        Self::Rotor,
        Self::Spectral,
        Self::Dh013,
    ];

    /// The codec of a number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| *codec as u8 == number)
    }

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Tq => "tq",
            Self::TqEc => "tq-ec",
            Self::Tcq => "tcq",
            Self::Rotor => "rotor",
            Self::Spectral => "spectral",
            Self::Dh013 => "dh013",
        }
    }

    /// The rates it can be asked for: lowest, highest, and whether they must be whole.
    const fn rates(self) -> (u16, u16, bool) {
        match self {
            Self::Q8_0 => (8, 8, true),
            Self::Q4_0 => (4, 4, true),
            Self::Tq | Self::Rotor => (1, 8, true),
            Self::TqEc => (1, 8, false),
            Self::Tcq => (1, 4, true),
            Self::Spectral => (1, 8, true),
            Self::Dh013 => (2, 8, true),
        }
    }
}

/// Bits per value, in steps of 1/256: what the codec itself spends, without scales and heads. For `dh013` the bits of its
/// residual, to which a sign bit comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(pub u16);

impl Rate {
    /// A whole number of bits.
    #[must_use]
    pub const fn bits(bits: u16) -> Self {
        Self(bits.saturating_mul(256))
    }

    /// As a number.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / 256.0
    }

    /// The whole bits in it.
    #[must_use]
    pub const fn whole(self) -> u32 {
        (self.0 / 256) as u32
    }
}

/// Codec, rate and length of the vectors: always one that a coder can be made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spec {
    /// The codec.
    pub codec: Codec,
    /// Its rate.
    pub rate: Rate,
    /// Values of a vector: the head's size of the model.
    pub dim: usize,
}

impl Spec {
    /// Checks the three against each other.
    ///
    /// # Errors
    /// `Invalid`, with what the codec takes.
    pub fn new(codec: Codec, rate: Rate, dim: usize) -> Result<Self> {
        let invalid = |what: String| Error::new(ErrorKind::Invalid, what);
        let (low, high, whole) = codec.rates();
        let name = codec.name();
        if rate < Rate::bits(low)
            || rate > Rate::bits(high)
            || (whole && !rate.0.is_multiple_of(256))
        {
            let kind = if whole { "a whole number of " } else { "" };
            return Err(invalid(format!(
                "{name} at {} bits: it takes {kind}bits from {low} to {high}",
                rate.as_f64()
            )));
        }
        if !(DIM_MIN..=DIM_MAX).contains(&dim) {
            return Err(invalid(format!(
                "vectors of {dim} values: {DIM_MIN} to {DIM_MAX} can be coded"
            )));
        }
        if matches!(codec, Codec::Q8_0 | Codec::Q4_0) && !dim.is_multiple_of(BLOCK) {
            return Err(invalid(format!(
                "{name} needs vectors of a multiple of {BLOCK} values, not {dim}"
            )));
        }
        if codec == Codec::Tcq && dim < BLOCK {
            return Err(invalid(format!(
                "tcq needs vectors of at least {BLOCK} values, not {dim}: its ring would bite its tail"
            )));
        }
        Ok(Self { codec, rate, dim })
    }

    /// Reads `tq:4`, `tq-ec:2.5`, `q8_0`.
    ///
    /// # Errors
    /// `Invalid`, with what would be right.
    pub fn parse(text: &str, dim: usize) -> Result<Self> {
        let choice: Choice = text.parse()?;
        Self::new(choice.codec, choice.rate, dim)
    }
}

/// Codec and rate, before the length of the vectors is known: `tq:4`, `tq-ec:2.5`, `q8_0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Choice {
    /// The codec.
    pub codec: Codec,
    /// Its rate.
    pub rate: Rate,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.codec {
            Codec::Q8_0 | Codec::Q4_0 => f.write_str(self.codec.name()),
            codec => write!(f, "{}:{}", codec.name(), self.rate.as_f64()),
        }
    }
}

impl FromStr for Choice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rate) = match text.split_once(':') {
            Some((name, rate)) => (name, Some(rate)),
            None => (text, None),
        };
        let codec = Codec::ALL
            .into_iter()
            .find(|codec| codec.name() == name)
            .ok_or_else(|| {
                let known = Codec::ALL.map(Codec::name).join(", ");
                Error::new(
                    ErrorKind::Invalid,
                    format!("'{name}' is no KV codec; there are {known}"),
                )
            })?;
        let (low, high, _) = codec.rates();
        let rate = match rate {
            None if low == high => Rate::bits(low),
            None => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("'{text}' lacks its bits: write {name}:4"),
                ));
            }
            Some(rate) => match rate.parse::<f64>() {
                Ok(bits) if (0.0..=64.0).contains(&bits) => Rate((bits * 256.0).round() as u16),
                _ => {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("'{text}': '{rate}' is not a number of bits"),
                    ));
                }
            },
        };
        // Any length will do here: what is checked is the rate.
        Spec::new(codec, rate, 2 * BLOCK)?;
        Ok(Self { codec, rate })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let choice = Choice {
            codec: self.codec,
            rate: self.rate,
        };
        write!(f, "{choice} of {} values", self.dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_read_as_they_are_written() {
        for text in [
            "q8_0",
            "q4_0",
            "tq:4",
            "tq-ec:2.5",
            "tcq:3",
            "rotor:2",
            "spectral:3",
            "dh013:4",
        ] {
            let choice: Choice = text.parse().expect(text);
            assert_eq!(choice.to_string(), text);
        }
    }

    #[test]
    fn wrong_ones_say_what_is_right() {
        for (text, part) in [
            ("tq5:4", "there are q8_0"),
            ("tq", "write tq:4"),
            ("tq:2.5", "a whole number of bits from 1 to 8"),
            ("tcq:5", "from 1 to 4"),
            ("tq:x", "not a number"),
            ("tq:-1", "not a number"),
            ("tq:nan", "not a number"),
        ] {
            let error = text.parse::<Choice>().expect_err(text);
            assert!(error.context().contains(part), "{text}: {error}");
        }
        assert!(
            Spec::parse("q8_0", 48).is_err()
                && Spec::parse("tq:4", 8).is_err()
                && Spec::parse("tq:4", 2048).is_err()
        );
    }
}
