//! Units: byte sizes, file extents and checked alignment arithmetic.
//!
//! Everything the house measures is in bytes (`_bytes`) or nanoseconds (`_ns`). The arithmetic here is checked or
//! saturating, because its inputs come from files that nobody has vouched for. Used by every room; depends on none.

use std::fmt;
use std::str::FromStr;

/// The smallest unit of O_DIRECT and of mapping: 4 KiB.
pub const PAGE_4K: u64 = 4096;
/// A huge page, and the alignment of every window: 2 MiB.
pub const PAGE_2M: u64 = 2 << 20;
/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;

/// `value` rounded down to a multiple of `align` (a power of two).
#[must_use]
pub const fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// `value` rounded up to a multiple of `align` (a power of two); `None` where that passes `u64::MAX`.
#[must_use]
pub const fn align_up(value: u64, align: u64) -> Option<u64> {
    debug_assert!(align.is_power_of_two());
    match value.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

/// A byte range of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Which file of the model.
    pub shard_index: u32,
    /// First byte, counted from the start of the file.
    pub offset_bytes: u64,
    /// Length of the range.
    pub len_bytes: u64,
}

impl Extent {
    /// One past the last byte. Extents in a catalog are bounded by the file's length, so this cannot overflow there.
    #[must_use]
    pub const fn end_bytes(&self) -> u64 {
        self.offset_bytes.saturating_add(self.len_bytes)
    }

    /// True when the two ranges share a byte.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.shard_index == other.shard_index
            && self.offset_bytes < other.end_bytes()
            && other.offset_bytes < self.end_bytes()
    }
}

/// How much memory the user grants: `4GiB`, `4GB`, `512M`, `50%`, or nothing (automatic).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MemorySpec {
    /// All that is free under every limit above this process.
    Auto,
    /// Everything the process may hold, in bytes.
    Bytes(u64),
    /// The weights in memory, as a percentage of the model (0 to 1000).
    Percent(f64),
}

impl FromStr for MemorySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        if trimmed.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        if let Some(number) = trimmed.strip_suffix('%') {
            let percent: f64 = number.trim().parse().map_err(|_| bad_size(text))?;
            return if percent > 0.0 && percent <= 1000.0 {
                Ok(Self::Percent(percent))
            } else {
                Err(bad_size(text))
            };
        }
        parse_size(trimmed).map(Self::Bytes)
    }
}

/// Parses `4GiB`, `4GB`, `512M`, `4096` (bytes). `K M G T` alone mean the binary units, `KB MB GB TB` the decimal ones.
///
/// # Errors
/// A sentence naming the text and the accepted forms.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let split = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => KIB,
        "m" | "mib" => MIB,
        "g" | "gib" => GIB,
        "t" | "tib" => GIB * 1024,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad_size(text)),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(|| bad_size(text));
    }
    let value: f64 = number.parse().map_err(|_| bad_size(text))?;
    let bytes = value * scale as f64;
    if bytes.is_finite() && (0.0..9.0e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(bad_size(text))
    }
}

fn bad_size(text: &str) -> String {
    format!(
        "'{text}' is not a size; write 4GiB, 4GB, 512M, a number of bytes, or a percentage such as 50%"
    )
}

/// Shows a byte count the way people read it: `4.00 GiB`, `512.0 MiB`, `17 B`.
#[derive(Debug, Clone, Copy)]
pub struct HumanBytes(pub u64);

impl fmt::Display for HumanBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        match bytes {
            b if b >= GIB => write!(f, "{:.2} GiB", b as f64 / GIB as f64),
            b if b >= MIB => write!(f, "{:.1} MiB", b as f64 / MIB as f64),
            b if b >= KIB => write!(f, "{:.1} KiB", b as f64 / KIB as f64),
            b => write!(f, "{b} B"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_in_every_documented_form() {
        for (text, bytes) in [
            ("4GiB", 4 * GIB),
            ("4GB", 4_000_000_000),
            ("512M", 512 * MIB),
            ("1.5k", 1536),
            ("7", 7),
            ("2 TiB", 2048 * GIB),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            "GiB",
            "-4G",
            "4XB",
            "1e400",
            "99999999999999999999T",
            "4 G B",
        ] {
            assert!(parse_size(text).is_err(), "{text} must be refused");
        }
    }

    #[test]
    fn memory_takes_percentages_and_auto() {
        assert_eq!("50%".parse(), Ok(MemorySpec::Percent(50.0)));
        assert_eq!("auto".parse(), Ok(MemorySpec::Auto));
        assert!("0%".parse::<MemorySpec>().is_err());
        assert!("nan%".parse::<MemorySpec>().is_err());
    }

    #[test]
    fn alignment_never_wraps() {
        assert_eq!(align_up(1, PAGE_4K), Some(4096));
        assert_eq!(align_up(u64::MAX, PAGE_4K), None);
        assert_eq!(align_down(8191, PAGE_4K), 4096);
    }
}
