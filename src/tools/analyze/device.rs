//! What a model is held against: how much memory programs may have, and how fast the drive is read.
//!
//! Five built in (`devices.toml`), others from a file of the same shape, or from the profile that `flea probe` kept. A
//! file's every number is checked before it is used, and a key that means nothing is refused.

use std::path::Path;

use serde::Deserialize;

use super::registry::nearest;
use crate::error::{Error, ErrorKind, Result};
use crate::io::profile::Profile;
use crate::units::parse_size;

/// Longest file that is taken for a description.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Fastest drive or memory believed, in 10^9 bytes per second.
const RATE_MAX: f64 = 100_000.0;
/// Devices of one file.
const DEVICE_COUNT_MAX: usize = 256;

/// One device.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// The name on the command line.
    pub name: String,
    /// Another name it goes by.
    pub alias: Option<String>,
    /// What it is.
    pub label: String,
    /// Everything that flea may hold on it.
    pub memory_bytes: u64,
    /// Sequential reads of its drive, 10^9 bytes per second; `None` where nobody knows.
    pub drive_gb_per_second: Option<f64>,
    /// Reads of its memory by all cores, 10^9 bytes per second; the bound of what is resident.
    pub memory_gb_per_second: Option<f64>,
    /// Price, and what it draws, for `flea cost`.
    pub price: Option<f64>,
    /// Watts while it computes.
    pub watts: Option<f64>,
    /// What was measured of it, where it was.
    pub profile: Option<Box<Profile>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    device: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    alias: Option<String>,
    label: Option<String>,
    memory: String,
    drive_gb_per_second: f64,
    memory_gb_per_second: Option<f64>,
    price: Option<f64>,
    watts: Option<f64>,
}

/// The devices that are built in.
///
/// # Errors
/// None; the file is part of the program and tested.
pub fn built_in() -> Result<Vec<Device>> {
    parse(Path::new("devices.toml"), include_str!("devices.toml"))
}

/// The devices of a file: `[[device]]` entries of TOML, like those in devices.toml.
///
/// # Errors
/// `Invalid`, with the line of a mistake or the number that cannot be.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Device>> {
    let invalid =
        |what: String| Error::new(ErrorKind::Invalid, format!("{}: {what}", path.display()));
    let file: File = toml::from_str(text).map_err(|error| invalid(error.to_string()))?;
    if file.device.is_empty() || file.device.len() > DEVICE_COUNT_MAX {
        return Err(invalid(format!(
            "{} devices; 1 to {DEVICE_COUNT_MAX} are possible",
            file.device.len()
        )));
    }
    let devices: std::result::Result<Vec<Device>, String> =
        file.device.into_iter().map(Entry::device).collect();
    devices.map_err(invalid)
}

impl Entry {
    fn device(self) -> std::result::Result<Device, String> {
        let name = self.name;
        let bad = |what: String| format!("device '{name}': {what}");
        let memory_bytes = parse_size(&self.memory).map_err(bad)?;
        if memory_bytes == 0 {
            return Err(bad("memory must be larger than zero".to_owned()));
        }
        let memory_rate = self.memory_gb_per_second;
        for rate in [Some(self.drive_gb_per_second), memory_rate]
            .into_iter()
            .flatten()
        {
            if !(rate > 0.0 && rate < RATE_MAX) {
                return Err(bad(format!(
                    "{rate} is no rate; above 0 and below {RATE_MAX} GB/s are possible"
                )));
            }
        }
        for value in [self.price, self.watts].into_iter().flatten() {
            if !(0.0..1e12).contains(&value) {
                return Err(bad(format!("{value} is no price and no power")));
            }
        }
        Ok(Device {
            label: self.label.unwrap_or_else(|| name.clone()),
            alias: self.alias,
            memory_bytes,
            drive_gb_per_second: Some(self.drive_gb_per_second),
            memory_gb_per_second: memory_rate,
            price: self.price,
            watts: self.watts,
            profile: None,
            name,
        })
    }
}

/// The device of a profile that `flea probe` kept: the drive and memory it measured, with `memory_bytes` to use.
///
/// # Errors
/// `Invalid`: a profile with no rate of the drive.
pub fn of_profile(name: &str, profile: Profile, memory_bytes: u64) -> Result<Device> {
    let rates = profile
        .sequential
        .iter()
        .filter_map(|rate| profile.stream_gb_per_second(rate.page_bytes));
    let drive = rates.reduce(f64::max).ok_or_else(|| {
        Error::new(
            ErrorKind::Invalid,
            format!("{name}: the profile holds no rate of the drive; run `flea probe` again"),
        )
    })?;
    Ok(Device {
        name: name.to_owned(),
        alias: None,
        label: format!("measured {}", profile.measured),
        memory_bytes,
        drive_gb_per_second: Some(drive),
        memory_gb_per_second: profile.memory.map(|memory| memory.read_all_gb_per_second),
        price: None,
        watts: None,
        profile: Some(Box::new(profile)),
    })
}

/// The device called `name` among `devices`.
///
/// # Errors
/// `Invalid`, with the names that are near and those there are.
pub fn find<'a>(devices: &'a [Device], name: &str) -> Result<&'a Device> {
    let is_it = |device: &&Device| {
        device.name.eq_ignore_ascii_case(name)
            || device
                .alias
                .as_deref()
                .is_some_and(|alias| alias.eq_ignore_ascii_case(name))
    };
    devices.iter().find(is_it).ok_or_else(|| {
        let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
        Error::new(
            ErrorKind::Invalid,
            format!(
                "no device is called '{name}'{}; there are {}, 'all', or a file of devices (.toml) or of `flea probe` (.json)",
                nearest(name, &names),
                names.join(", ")
            ),
        )
    })
}
