//! The figures of dhurandhar 0.1.3, for people who have them in front of them: its constants, its arithmetic, its words.
//!
//! What is wrong with them stays wrong here, that is the point: megabytes that are MiB, encoders whose parameters count as
//! megabytes, published sizes that replace computed ones at 4 bits only (and with that the token embedding vanishes), the
//! same cache for layers with and without attention, a bound of random rows at the drive's sequential rate. The right ones
//! are those of [`super::breakdown`] and [`super::verdict`].

use serde::{Deserialize, Serialize};

use super::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;

/// The name of this arithmetic on the command line.
pub const NAME: &str = "dhurandhar-0.1.3";
/// Memory that it adds where per-layer embeddings are mapped.
const MAPPED_MB: f64 = 64.0;
/// A computed size this near to a published one gives way to it.
const NEAR: std::ops::RangeInclusive<f64> = 0.7..=1.3;
/// The bits at which it does.
const PUBLISHED_BITS: u32 = 4;
/// Tokens per second that its notes call the target.
const TARGET: f64 = 15.0;

/// What it believes of a model: its own names.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Belief {
    num_hidden_layers: u64,
    hidden_size: u64,
    intermediate_size: u64,
    vocab_size: u64,
    num_attention_heads: u64,
    num_key_value_heads: u64,
    head_dim: u64,
    local_to_global_ratio: u64,
    sliding_window: u64,
    shared_kv_last_n_layers: u64,
    ple_hidden_size: u64,
    param_count_b: f64,
    is_moe: bool,
    mamba_state_dim: u64,
    mamba_num_layers: u64,
    vision_encoder_mb: f64,
    audio_encoder_mb: f64,
    published_decoder_gb: f64,
    published_embeddings_gb: f64,
    runtime_overhead_mb: f64,
}

/// What it is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ask {
    /// Tokens of context; its own limit it never checks.
    pub context: u64,
    /// Bits of a weight.
    pub quant_bits: u32,
    /// Bits of a key's or value's number.
    pub kv_bits: u32,
    /// Without the audio encoder.
    pub strip_audio: bool,
}

/// Its answer, rounded as it rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)] // The names are its own.
pub struct Answer {
    pub context: u64,
    pub quant_bits: u32,
    pub kv_bits: u32,
    pub strip_audio: bool,
    pub decoder_mb: f64,
    pub embedding_mb: f64,
    pub kv_cache_mb: f64,
    pub mamba_state_mb: f64,
    pub vision_encoder_mb: f64,
    pub audio_encoder_mb: f64,
    pub activations_overhead_mb: f64,
    pub runtime_overhead_mb: f64,
    pub resident_total_mb: f64,
    pub mmap_total_mb: f64,
    pub ple_to_decoder_ratio: f64,
    pub devices: Vec<DeviceAnswer>,
}

/// Its answer for one device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct DeviceAnswer {
    pub device: String,
    pub mode: &'static str,
    pub headroom_mb: f64,
    pub flash_tps: Option<f64>,
    pub notes: String,
}

impl Belief {
    /// True for the layers that it takes to see everything.
    fn is_global(&self, layer: u64) -> bool {
        let ratio = self.local_to_global_ratio;
        ratio == 0 || (layer + 1).is_multiple_of(ratio + 1) || layer + 1 == self.num_hidden_layers
    }

    fn fresh_kv_layers(&self) -> u64 {
        self.num_hidden_layers - self.shared_kv_last_n_layers
    }

    /// Parameters of the decoder as it counts them: four norms a layer, keys and values only where they are not shared.
    #[must_use]
    pub fn decoder_params(&self) -> u64 {
        let (layers, hidden) = (self.num_hidden_layers, self.hidden_size);
        let queries_and_output = 2 * hidden * self.num_attention_heads * self.head_dim;
        let keys_and_values = 2 * hidden * self.num_key_value_heads * self.head_dim;
        let feed_forward = 3 * hidden * self.intermediate_size;
        layers * (queries_and_output + feed_forward + 4 * hidden)
            + self.fresh_kv_layers() * keys_and_values
            + hidden
    }

    /// Parameters of its per-layer embeddings.
    #[must_use]
    pub const fn ple_table_params(&self) -> u64 {
        self.vocab_size * self.ple_hidden_size * self.num_hidden_layers
    }

    /// Parameters of its embeddings.
    #[must_use]
    pub const fn embedding_params(&self) -> u64 {
        let projections = self.num_hidden_layers * self.hidden_size * self.ple_hidden_size;
        self.vocab_size * self.hidden_size + self.ple_table_params() + projections
    }

    /// Bytes of its KV cache.
    #[must_use]
    pub fn kv_bytes(&self, context: u64, kv_bits: u32) -> u64 {
        let tokens = |layer: u64| {
            if self.is_global(layer) {
                context
            } else {
                context.min(self.sliding_window)
            }
        };
        let tokens: u64 = (0..self.fresh_kv_layers()).map(tokens).sum();
        tokens * 2 * self.num_key_value_heads * self.head_dim * u64::from(kv_bits) / 8
    }

    /// Its answer.
    ///
    /// # Errors
    /// `Invalid`: more context than its numbers can be multiplied with.
    pub fn answer(&self, ask: &Ask, devices: &[Device]) -> Result<Answer> {
        if ask.context == 0 || ask.context > 1 << 32 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "a context of {} tokens is out of range; 1 to 2^32 are possible",
                    ask.context
                ),
            ));
        }
        let bits = f64::from(ask.quant_bits);
        // It rounds each part before it adds them.
        let mb = |bytes: f64| bytes / MIB as f64;
        let decoder_params = if self.is_moe {
            self.param_count_b * 1e9
        } else {
            self.decoder_params() as f64
        };
        let decoder = published(
            self.published_decoder_gb,
            mb(decoder_params * bits / 8.0),
            ask.quant_bits,
        );
        let embedding = mb(self.embedding_params() as f64 * bits / 8.0);
        let embedding = published(self.published_embeddings_gb, embedding, ask.quant_bits);
        let (decoder, embedding) = (rounded(decoder, 2), rounded(embedding, 2));
        let kv = rounded(mb(self.kv_bytes(ask.context, ask.kv_bits) as f64), 2);
        let state = rounded(
            mb((self.mamba_state_dim * self.mamba_num_layers * 4) as f64),
            2,
        );
        let activations = self.hidden_size as f64 / 64.0;
        let audio = if ask.strip_audio {
            0.0
        } else {
            self.audio_encoder_mb
        };
        let resident = decoder
            + embedding
            + kv
            + state
            + self.vision_encoder_mb
            + audio
            + activations
            + self.runtime_overhead_mb;
        let has_rows = self.ple_hidden_size > 0;
        let mapped = if has_rows {
            resident - embedding + MAPPED_MB
        } else {
            resident
        };
        let row_bytes = (self.num_hidden_layers * self.ple_hidden_size) as f64 * bits / 8.0;
        let judged = devices
            .iter()
            .map(|device| judge(device, resident, mapped, has_rows.then_some(row_bytes)));
        Ok(Answer {
            context: ask.context,
            quant_bits: ask.quant_bits,
            kv_bits: ask.kv_bits,
            strip_audio: ask.strip_audio,
            decoder_mb: decoder,
            embedding_mb: embedding,
            kv_cache_mb: kv,
            mamba_state_mb: state,
            vision_encoder_mb: self.vision_encoder_mb,
            audio_encoder_mb: self.audio_encoder_mb,
            activations_overhead_mb: rounded(activations, 2),
            runtime_overhead_mb: self.runtime_overhead_mb,
            resident_total_mb: rounded(resident, 2),
            mmap_total_mb: rounded(mapped, 2),
            ple_to_decoder_ratio: rounded(embedding / decoder, 3),
            devices: judged.collect(),
        })
    }
}

fn published(published_gb: f64, computed_mb: f64, quant_bits: u32) -> f64 {
    let published_mb = published_gb * 1024.0;
    if quant_bits == PUBLISHED_BITS
        && published_mb > 0.0
        && NEAR.contains(&(computed_mb / published_mb))
    {
        return published_mb;
    }
    computed_mb
}

fn judge(device: &Device, resident: f64, mapped: f64, row_bytes: Option<f64>) -> DeviceAnswer {
    let memory = device.memory_bytes as f64 / MIB as f64;
    // GB are 2^30 bytes to it.
    let flash = row_bytes
        .map(|bytes| device.drive_gb_per_second.unwrap_or(0.0) * 1024.0 * MIB as f64 / bytes);
    let (mode, headroom) = if resident <= memory {
        ("resident", memory - resident)
    } else if row_bytes.is_some() && mapped <= memory {
        ("mmap", memory - mapped)
    } else {
        ("infeasible", memory - mapped)
    };
    let notes = match (mode, flash) {
        ("resident", Some(_)) => {
            format!("Fits resident with {headroom:.0} MB headroom. mmap not required.")
        }
        ("resident", None) => format!("Fits resident with {headroom:.0} MB headroom."),
        ("mmap", Some(flash)) => format!(
            "PLE must be mmap'd ({headroom:.0} MB headroom). Flash bound = {flash:.1} tok/s (target {TARGET:.1}). Viable but measure on device."
        ),
        (_, Some(_)) => format!(
            "Insufficient RAM even with mmap. Short by {:.0} MB.",
            -headroom
        ),
        (_, None) => {
            format!(
                "Insufficient RAM. Short by {:.0} MB. Need smaller model or larger device.",
                -headroom
            )
        }
    };
    DeviceAnswer {
        device: device.alias.clone().unwrap_or_else(|| device.name.clone()),
        mode,
        headroom_mb: rounded(headroom, 1),
        flash_tps: flash.map(|flash| rounded(flash, 1)),
        notes,
    }
}

/// As Python rounds: to the nearest decimal, of its decimal digits and not of a product.
fn rounded(value: f64, places: usize) -> f64 {
    format!("{value:.places$}").parse().unwrap_or(value)
}
