//! `--kv-type` and `--kv-disk`: what keys and values are made of, and where they go; and what `--json` says of it.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use crate::cli::values;
use crate::error::{Error, ErrorKind, Result};
use crate::host::KvType;
use crate::host::kv_disk::{KvDiskFigures, KvDiskOptions, SLOTS_DEFAULT};
use crate::kv::{Choice, Codec};

/// Bits of a codec that is named without them.
const CODEC_BITS_DEFAULT: &str = "4";

/// The KV cache.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "KV cache")]
pub struct KvArgs {
    /// Numbers of the KV cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl; with --kv-disk also a codec for
    /// old rows on the drive, which changes the answer: tq, tq-ec, tcq, rotor (4 bits, or as in tq-ec:3)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = KvKind::from_str)]
    kv_type: KvKind,

    /// For contexts beyond memory: keep keys and values in a nameless file in DIR and read those of a layer back before
    /// it runs. The answer is the same bit for bit, but with a codec as --kv-type
    #[arg(long, value_name = "DIR", conflicts_with = "no_stream")]
    kv_disk: Option<PathBuf>,

    /// Layers whose keys and values are in memory at a time, 2 to 64
    #[arg(long, value_name = "N", requires = "kv_disk", default_value_t = SLOTS_DEFAULT, value_parser = values::slots)]
    kv_slots: u32,
}

/// What keys and values are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum KvKind {
    /// A type of ggml, in memory and on the drive.
    Plain(KvType),
    /// f16 in memory, old rows coded on the drive.
    Coded(Choice),
}

impl FromStr for KvKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let plain = match KvType::from_str(text) {
            Ok(plain) => return Ok(Self::Plain(plain)),
            Err(error) => error,
        };
        let (name, _) = text.split_once(':').unwrap_or((text, ""));
        let coded = [Codec::Tq, Codec::TqEc, Codec::Tcq, Codec::Rotor].map(Codec::name);
        if !coded.contains(&name) {
            return Err(format!(
                "{plain}; or, with --kv-disk, {}, with bits as in tq-ec:3",
                coded.join(", ")
            ));
        }
        let with_bits = if text.contains(':') {
            text.to_owned()
        } else {
            format!("{text}:{CODEC_BITS_DEFAULT}")
        };
        let choice = with_bits.parse::<Choice>();
        choice.map(Self::Coded).map_err(|error| error.to_string())
    }
}

impl KvArgs {
    /// What llama.cpp is told.
    pub fn kv_type(&self) -> KvType {
        match self.kv_type {
            KvKind::Plain(kv_type) => kv_type,
            KvKind::Coded(_) => KvType::F16,
        }
    }

    /// Where keys and values go.
    ///
    /// # Errors
    /// `Invalid`: a codec without a directory.
    pub fn disk(&self) -> Result<Option<KvDiskOptions>> {
        let codec = match self.kv_type {
            KvKind::Plain(_) => None,
            KvKind::Coded(choice) => Some(choice),
        };
        match (&self.kv_disk, codec) {
            (None, None) => Ok(None),
            (None, Some(choice)) => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "--kv-type {choice} codes rows that are on the drive, and none are: give --kv-disk DIR, or a type of llama.cpp's as q8_0"
                ),
            )),
            (Some(directory), codec) => Ok(Some(KvDiskOptions {
                directory: directory.clone(),
                slots_count: self.kv_slots,
                codec,
            })),
        }
    }
}

/// What `--json` says.
#[derive(Debug, Serialize)]
pub struct KvDiskAnswer {
    layers: usize,
    slots: usize,
    cache_bytes: u64,
    ring_bytes: u64,
    bytes_read: u64,
    bytes_written: u64,
    acquires: u64,
    waits: u64,
    stall_seconds: f64,
    loads: u64,
    /// Bytes in memory for one on the drive, of what was coded.
    coded_ratio: Option<f64>,
    coded_bytes: u64,
    direct_io: bool,
}

impl From<&KvDiskFigures> for KvDiskAnswer {
    fn from(figures: &KvDiskFigures) -> Self {
        let coded = figures.coded_bytes > 0;
        Self {
            layers: figures.layers_count,
            slots: figures.slots_count,
            cache_bytes: figures.cache_bytes,
            ring_bytes: figures.ring_bytes,
            bytes_read: figures.bytes_read,
            bytes_written: figures.bytes_written,
            acquires: figures.acquires,
            waits: figures.waits,
            stall_seconds: figures.stall_seconds,
            loads: figures.loads,
            coded_ratio: coded.then(|| figures.coded_raw_bytes as f64 / figures.coded_bytes as f64),
            coded_bytes: figures.coded_bytes,
            direct_io: figures.direct_io,
        }
    }
}
