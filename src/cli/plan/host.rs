//! What `flea run` would hold besides weights, estimated: for `flea plan`, which has no host to ask.

use std::path::PathBuf;

use serde::Serialize;

use super::{Args, RowsReport};
use crate::cli::values;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Catalog;
use crate::plan::SLOTS_DEFAULT;
use crate::plan::budget::{HostShape, KV_BLOCK_COUNT};
use crate::tools::analyze::KvStore;
use crate::units::HumanBytes;

/// Context that `flea run` takes unless told otherwise, or the model's if that is shorter.
pub(in crate::cli) const CONTEXT_DEFAULT_COUNT: u64 = 4096;
/// llama.cpp's cache holds a multiple of this.
const CONTEXT_STEP_COUNT: u64 = 256;
/// Tokens of a ubatch that `flea run` takes unless told otherwise.
pub(in crate::cli) const UBATCH_DEFAULT_COUNT: u32 = 512;

/// The KV cache, as `flea run` is told.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "KV cache")]
pub struct KvArgs {
    /// How keys and values are stored: a type of llama.cpp's cache (f16, q8_0) or, with --kv-disk, a codec (tq-ec:4)
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(in crate::cli) kv_type: KvStore,

    /// Keep keys and values in DIR, and in memory those of --kv-slots layers
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) kv_disk: Option<PathBuf>,

    /// Layers whose keys and values are in memory at a time, 2 to 64
    #[arg(long, value_name = "N", requires = "kv_disk", default_value_t = SLOTS_DEFAULT, value_parser = values::slots)]
    pub(in crate::cli) kv_slots: u32,
}

impl KvArgs {
    /// Refuses what `flea run` would refuse.
    pub(super) fn check(&self) -> Result<()> {
        match (self.kv_type, &self.kv_disk) {
            (KvStore::Bits(bits), _) => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "--kv-type {bits} is no type that runs; give f16, q8_0 or another of llama.cpp's"
                ),
            )),
            (KvStore::Coded(choice), None) => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "--kv-type {choice} codes rows that are on the drive, and none are: give --kv-disk DIR, or a type of llama.cpp's as q8_0"
                ),
            )),
            (_, Some(directory)) if !directory.is_dir() => Err(Error::new(
                ErrorKind::NotFound,
                format!("--kv-disk {}: no such directory", directory.display()),
            )),
            _ => Ok(()),
        }
    }
}

/// What `flea run` with its defaults would hold besides the weights.
pub(super) fn estimate(args: &Args, catalog: &Catalog) -> u64 {
    host_shape(args, catalog).host_bytes()
}

/// The host whose memory is estimated.
pub(in crate::cli) fn host_shape(args: &Args, catalog: &Catalog) -> HostShape {
    let own_count = catalog
        .context_length
        .map_or(CONTEXT_DEFAULT_COUNT, |length| {
            length.min(CONTEXT_DEFAULT_COUNT)
        });
    let context_count = args.ctx.map_or(own_count, u64::from);
    // llama.cpp rounds the cells of its cache up; no ubatch is larger than the context.
    let context_count = context_count.next_multiple_of(CONTEXT_STEP_COUNT);
    let ubatch_count = u64::from(args.ubatch).min(context_count);
    let mut shape = HostShape::of_catalog(catalog, context_count, ubatch_count);
    if let KvStore::Type(dtype) = args.kv.kv_type {
        shape.kv_block_bytes =
            dtype.block_bytes() * (KV_BLOCK_COUNT / dtype.block_elements().max(1));
    }
    if args.kv.kv_disk.is_some() {
        shape.kv_slots_count = u64::from(args.kv.kv_slots);
    }
    if let Some(rows) = RowsReport::new(catalog, args.host_rows) {
        shape.host_tensor_bytes = rows.kept_bytes(shape.host_tensor_bytes);
    }
    shape
}

/// Keys and values on a drive, as `--json` has them.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct KvReport {
    /// What memory holds of them.
    memory_bytes: u64,
    /// All of them, as memory would hold them. With a full context so much is read for each token, or what a codec
    /// makes of it.
    cache_bytes: u64,
    slots_count: u64,
}

impl KvReport {
    pub(super) fn new(args: &Args, catalog: &Catalog) -> Option<Self> {
        let shape = host_shape(args, catalog);
        (shape.kv_slots_count > 0).then(|| Self {
            memory_bytes: shape.kv_bytes(),
            cache_bytes: shape.kv_cache_bytes(),
            slots_count: shape.kv_slots_count.min(shape.kv_layers_count),
        })
    }

    /// The line for people.
    pub(super) fn text(&self) -> String {
        format!(
            "{} of {} in memory ({} layers), the host's; the others are read for each token, as far as the context is full",
            HumanBytes(self.memory_bytes),
            HumanBytes(self.cache_bytes),
            self.slots_count
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::KIB;

    #[test]
    fn types_and_drives_are_checked() {
        let kv = |kv_type: &str, kv_disk: Option<&str>| KvArgs {
            kv_type: kv_type.parse().unwrap(),
            kv_disk: kv_disk.map(PathBuf::from),
            kv_slots: 3,
        };
        kv("q8_0", None).check().unwrap();
        kv("tq-ec:4", Some("/")).check().unwrap();
        for (refused, word) in [
            (kv("4", None), "no type that runs"),
            (kv("tq:4", None), "--kv-disk"),
            (kv("f16", Some("/no/such")), "no such directory"),
        ] {
            let error = refused.check().unwrap_err();
            assert!(error.context().contains(word), "{error}");
        }
    }

    #[test]
    fn the_line_names_both_sizes() {
        let report = KvReport {
            memory_bytes: 48 * KIB,
            cache_bytes: 512 * KIB,
            slots_count: 3,
        };
        assert!(
            report
                .text()
                .starts_with("48.0 KiB of 512.0 KiB in memory (3 layers)")
        );
    }
}
