//! How values stand in flead.toml: sizes as `64KiB`, times as `30s`, `auto` for "let flea choose".
//!
//! Each module is a pair of functions for `#[serde(with = ...)]`; what one writes the other reads back to the same value.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::ser::Serializer;

use crate::units::{GIB, KIB, MIB, parse_size};

/// A text or a whole number: the two forms that sizes and counts have.
struct Number<F>(F, &'static str);

impl<F: Fn(&str) -> Result<u64, String>> Visitor<'_> for Number<F> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
        (self.0)(text).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<u64, E> {
        u64::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
    }
}

/// A size in the shortest exact form: `64KiB`.
fn size_text(bytes: u64) -> String {
    for (unit, name) in [(GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
        if bytes != 0 && bytes.is_multiple_of(unit) {
            return format!("{}{name}", bytes / unit);
        }
    }
    bytes.to_string()
}

pub(in crate::daemon) mod size {
    use super::*;

    pub(in crate::daemon) fn serialize<S: Serializer>(
        bytes: &u64,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.serialize_str(&size_text(*bytes))
    }

    pub(in crate::daemon) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<u64, D::Error> {
        from.deserialize_any(Number(parse_size, "a size such as \"64KiB\""))
    }
}

pub(in crate::daemon) mod auto_size {
    use super::*;

    pub(in crate::daemon) fn serialize<S: Serializer>(
        bytes: &u64,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match bytes {
            0 => to.serialize_str("auto"),
            bytes => size::serialize(bytes, to),
        }
    }

    pub(in crate::daemon) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<u64, D::Error> {
        let parse = |text: &str| {
            if text == "auto" {
                Ok(0)
            } else {
                parse_size(text)
            }
        };
        from.deserialize_any(Number(parse, "a size such as \"4MiB\", or \"auto\""))
    }
}

pub(super) mod auto {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        count: &u64,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match count {
            0 => to.serialize_str("auto"),
            count => to.serialize_u64(*count),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<u64, D::Error> {
        let parse = |text: &str| match text {
            "auto" => Ok(0),
            text => text
                .parse()
                .map_err(|_| format!("'{text}' is neither a count nor \"auto\"")),
        };
        from.deserialize_any(Number(parse, "a count, or \"auto\""))
    }
}

/// Units of time, longest first.
const TIMES: [(&str, u64); 5] = [
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// `30s`, `150ms`, `2m` in nanoseconds.
fn parse_duration(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.trim().split_at(split);
    let scale = TIMES.iter().find(|(name, _)| *name == unit.trim());
    let wrong = || format!("'{text}' is not a time; write 30s, 150ms or 2m");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let (_, scale) = scale.ok_or_else(wrong)?;
    number.checked_mul(*scale).ok_or_else(wrong)
}

pub(in crate::daemon) mod duration {
    use super::*;

    pub(in crate::daemon) fn serialize<S: Serializer>(ns: &u64, to: S) -> Result<S::Ok, S::Error> {
        let (name, scale) = TIMES
            .iter()
            .find(|(_, scale)| *ns != 0 && ns.is_multiple_of(*scale))
            .unwrap_or(&("s", 1_000_000_000));
        to.serialize_str(&format!("{}{name}", ns / scale))
    }

    pub(in crate::daemon) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<u64, D::Error> {
        struct Time;
        impl Visitor<'_> for Time {
            type Value = u64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time with its unit, such as \"30s\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
                parse_duration(text).map_err(E::custom)
            }
        }
        from.deserialize_str(Time)
    }
}

/// Types that have a form as text: how they are parsed, and how they are written.
macro_rules! as_text {
    ($name:ident, $type:ty, $expected:literal, $parse:expr, $write:expr) => {
        pub(super) mod $name {
            use super::*;

            pub(in super::super) fn serialize<S: Serializer>(
                value: &$type,
                to: S,
            ) -> Result<S::Ok, S::Error> {
                let write: fn(&$type) -> String = $write;
                to.serialize_str(&write(value))
            }

            pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
                from: D,
            ) -> Result<$type, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        let parse: fn(&str) -> Result<$type, String> = $parse;
                        parse(text).map_err(E::custom)
                    }
                }
                from.deserialize_str(Text)
            }
        }
    };
}

as_text!(
    memory,
    crate::units::MemorySpec,
    "a size such as \"24GiB\", or \"auto\"",
    |text| text.parse(),
    |value| match value {
        crate::units::MemorySpec::Auto => "auto".to_owned(),
        crate::units::MemorySpec::Bytes(bytes) => size_text(*bytes),
        crate::units::MemorySpec::Percent(percent) => format!("{percent}%"),
    }
);
as_text!(
    mode,
    u32,
    "a mode in octal such as \"0660\"",
    |text| match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("'{text}' is not a mode; write 0660 or 0666")),
    },
    |mode| format!("{mode:04o}")
);
as_text!(
    reader,
    crate::io::ReaderKind,
    "\"auto\", \"io_uring\" or \"pread\"",
    |text| text.parse(),
    |value| value.name().to_owned()
);
as_text!(
    listen,
    Option<std::net::SocketAddr>,
    "a loopback address such as \"127.0.0.1:9464\", or \"off\"",
    |text| match text {
        "off" => Ok(None),
        text => text.parse().map(Some).map_err(|_| format!(
            "'{text}' is not an address; write 127.0.0.1:9464, [::1]:9464 or off"
        )),
    },
    |value| value.map_or_else(|| "off".to_owned(), |address| address.to_string())
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_need_their_unit() {
        assert_eq!(parse_duration("30s"), Ok(30_000_000_000));
        assert_eq!(parse_duration("150ms"), Ok(150_000_000));
        assert_eq!(parse_duration("2m"), Ok(120_000_000_000));
        for text in ["", "30", "s", "-1s", "1h", "1.5s", "99999999999999m"] {
            assert!(parse_duration(text).is_err(), "{text} must be refused");
        }
    }

    #[test]
    fn sizes_are_written_exactly() {
        for bytes in [0, 1, 1023, 64 * KIB, 3 * MIB, 2 * GIB + 1] {
            assert_eq!(parse_size(&size_text(bytes)), Ok(bytes));
        }
        assert_eq!(size_text(64 * KIB), "64KiB");
    }
}
