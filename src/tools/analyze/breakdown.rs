//! A model in bytes, by component: what it needs for a context, with weights and KV stored as asked.

use super::kv_store::KvStore;
use crate::error::{Error, ErrorKind, Result};
use crate::model::arch::{Encoder, Geometry, KvGroup, KvKind};
use crate::units::{HumanBytes, MIB};

/// What a program holds besides the model: itself, its libraries, the tokenizer.
pub const RUNTIME_BYTES: u64 = 96 * MIB;
/// Bytes of activations per value of the hidden width: four f32 vectors of 512 tokens of a prompt.
pub const ACTIVATION_BYTES_PER_WIDTH: u64 = 512 * 4 * 4;
/// States are kept in f32.
const STATE_ELEMENT_BYTES: u128 = 4;
/// Encoders come in 16 bits, whatever the text model is stored in.
const ENCODER_BITS: f64 = 16.0;

/// Which encoders are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strip {
    names: Vec<String>,
}

impl Strip {
    /// Every encoder.
    pub const ALL: &'static str = "encoders";

    /// Those of these names; [`Self::ALL`] is all of them.
    #[must_use]
    pub fn new(names: &[String]) -> Self {
        Self {
            names: names.to_vec(),
        }
    }

    /// Whether this one is left out.
    #[must_use]
    pub fn takes(&self, encoder: &str) -> bool {
        self.names
            .iter()
            .any(|name| name == Self::ALL || name == encoder)
    }

    /// Checks that every name means an encoder of the model.
    ///
    /// # Errors
    /// `Invalid`, with those the model has.
    pub fn check(&self, encoders: &[Encoder]) -> Result<()> {
        let known = |name: &String| {
            name == Self::ALL
                || matches!(name.as_str(), "vision" | "audio")
                || encoders.iter().any(|encoder| encoder.name == *name)
        };
        match self.names.iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => Err(Error::new(
                ErrorKind::Invalid,
                format!("no encoder is called '{name}'; strip encoders, vision or audio"),
            )),
        }
    }
}

/// What is asked about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Tokens of context.
    pub context_count: u64,
    /// Bits that a weight takes.
    pub weight_bits: f64,
    /// How keys and values are stored.
    pub kv: KvStore,
    /// Layers whose keys and values have memory at a time while a drive holds those of all, as `flea run --kv-disk` does
    /// it; `None`: memory holds all.
    pub kv_slots_count: Option<u32>,
    /// Encoders that are left out.
    pub strip: Strip,
}

impl Question {
    /// How keys and values lie in memory: what a codec makes of them only a drive holds, where there is one.
    #[must_use]
    pub fn kv_in_memory(&self) -> KvStore {
        match (self.kv, self.kv_slots_count) {
            (KvStore::Coded(_), Some(_)) => KvStore::default(),
            (kv, _) => kv,
        }
    }
}

/// One part of the whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Its name in tables and JSON.
    pub name: String,
    /// What it is.
    pub what: String,
    /// Its bytes.
    pub bytes: u64,
}

/// The bytes of a model by component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breakdown {
    /// The layers, with all experts.
    pub decoder_bytes: u64,
    /// The token embedding; the head too, where they are one.
    pub embedding_bytes: u64,
    /// A head of its own.
    pub head_bytes: u64,
    /// Per-layer embeddings.
    pub row_table_bytes: u64,
    /// Keys and values of layers that see everything.
    pub kv_full_bytes: u64,
    /// Keys and values of layers with a window.
    pub kv_windowed_bytes: u64,
    /// Memory for keys and values that a drive holds.
    pub kv_ring_bytes: u64,
    /// Those on the drive, no part of the whole: a token reads them with a full context.
    pub kv_drive_bytes: u64,
    /// States of layers that have one.
    pub state_bytes: u64,
    /// Encoders that were not stripped: name and bytes.
    pub encoders: Vec<(String, u64)>,
    /// What is computed with on the way.
    pub activation_bytes: u64,
    /// The program itself.
    pub runtime_bytes: u64,
    /// The largest layer, part of the decoder.
    pub largest_layer_bytes: u64,
    /// All routed experts, part of the decoder.
    pub expert_bytes: u64,
    /// The routed experts that one token uses, part of them.
    pub active_expert_bytes: u64,
}

impl Breakdown {
    /// The bytes of `geometry` for `question`.
    ///
    /// # Errors
    /// `Invalid`: a context beyond the model's, a KV type that its heads do not fit, more bytes than can be counted.
    pub fn new(geometry: &Geometry, question: &Question) -> Result<Self> {
        check_context(geometry, question.context_count)?;
        question.strip.check(&geometry.encoders)?;
        let bits = question.weight_bits;
        let weights = |count: u128| bytes_of(geometry, count as f64 * bits / 8.0);
        let kv = KvBytes::new(geometry, question)?;
        let kept = geometry
            .encoders
            .iter()
            .filter(|encoder| !question.strip.takes(&encoder.name));
        let encoders = kept.map(|encoder| {
            let bytes = bytes_of(
                geometry,
                encoder.parameter_count as f64 * ENCODER_BITS / 8.0,
            )?;
            Ok((encoder.name.clone(), bytes))
        });
        let state = geometry.state_element_count() * STATE_ELEMENT_BYTES;
        let experts = geometry.expert_parameter_count();
        let dense = geometry
            .blocks
            .iter()
            .map(|block| u128::from(block.dense_parameter_count))
            .sum::<u128>();
        Ok(Self {
            decoder_bytes: weights(geometry.decoder_parameter_count())?,
            embedding_bytes: weights(geometry.embedding_parameter_count())?,
            head_bytes: weights(geometry.head_parameter_count())?,
            row_table_bytes: weights(geometry.row_table_parameter_count())?,
            kv_full_bytes: kv.full_bytes,
            kv_windowed_bytes: kv.windowed_bytes,
            kv_ring_bytes: kv.ring_bytes,
            kv_drive_bytes: kv.drive_bytes,
            state_bytes: bytes_of(geometry, state as f64)?,
            encoders: encoders.collect::<Result<_>>()?,
            activation_bytes: geometry
                .hidden_count
                .saturating_mul(ACTIVATION_BYTES_PER_WIDTH),
            runtime_bytes: RUNTIME_BYTES,
            largest_layer_bytes: weights(geometry.largest_layer_parameter_count())?,
            expert_bytes: weights(experts)?,
            active_expert_bytes: weights(geometry.active_parameter_count().saturating_sub(dense))?,
        })
    }

    /// Keys and values in memory.
    #[must_use]
    pub const fn kv_bytes(&self) -> u64 {
        let whole = self.kv_full_bytes.saturating_add(self.kv_windowed_bytes);
        whole.saturating_add(self.kv_ring_bytes)
    }

    /// What must be in memory whatever is streamed: keys, values, states, encoders, activations, the program.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let encoders = self.encoders.iter().map(|(_, bytes)| bytes).sum::<u64>();
        [
            self.kv_bytes(),
            self.state_bytes,
            encoders,
            self.activation_bytes,
            self.runtime_bytes,
        ]
        .iter()
        .sum()
    }

    /// What can be streamed: the layers, the embedding and the head.
    #[must_use]
    pub const fn streamable_bytes(&self) -> u64 {
        self.decoder_bytes + self.embedding_bytes + self.head_bytes
    }

    /// Everything: the sum of the components.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.components()
            .iter()
            .map(|component| component.bytes)
            .sum()
    }

    /// Every component, in the order of a table; those of no bytes are left out.
    #[must_use]
    pub fn components(&self) -> Vec<Component> {
        let embedding = if self.head_bytes == 0 {
            "token embedding, also the head"
        } else {
            "token embedding"
        };
        let mut parts = vec![
            (
                "decoder",
                "layers and what they share".to_owned(),
                self.decoder_bytes,
            ),
            ("embedding", embedding.to_owned(), self.embedding_bytes),
            ("head", "output head".to_owned(), self.head_bytes),
            (
                "per_layer_tables",
                "per-layer embeddings, only rows are needed".to_owned(),
                self.row_table_bytes,
            ),
            (
                "kv_full",
                "keys and values, layers that see everything".to_owned(),
                self.kv_full_bytes,
            ),
            (
                "kv_windowed",
                "keys and values, layers with a window".to_owned(),
                self.kv_windowed_bytes,
            ),
            (
                "kv_ring",
                format!(
                    "keys and values of a few layers; the drive holds {}",
                    HumanBytes(self.kv_drive_bytes)
                ),
                self.kv_ring_bytes,
            ),
            (
                "state",
                "states, whatever the context".to_owned(),
                self.state_bytes,
            ),
        ];
        for (name, bytes) in &self.encoders {
            parts.push(("encoder", format!("{name} encoder, 16 bits"), *bytes));
        }
        parts.push((
            "activations",
            "activations of 512 tokens of a prompt".to_owned(),
            self.activation_bytes,
        ));
        parts.push(("runtime", "the program".to_owned(), self.runtime_bytes));
        let component = |(name, what, bytes): (&str, String, u64)| Component {
            name: name.to_owned(),
            what,
            bytes,
        };
        parts
            .into_iter()
            .filter(|(_, _, bytes)| *bytes > 0)
            .map(component)
            .collect()
    }
}

/// Checks a context against the model's.
///
/// # Errors
/// `Invalid`: none at all, or more than the model was trained for.
pub fn check_context(geometry: &Geometry, context_count: u64) -> Result<()> {
    let most = geometry
        .context_max_count
        .unwrap_or(crate::model::arch::CONTEXT_MAX);
    if (1..=most).contains(&context_count) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "{}: a context of {context_count} tokens is out of range; the model takes 1 to {most}",
            geometry.name
        ),
    ))
}

/// Keys and values of a context.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvBytes {
    /// Of layers that see everything.
    pub full_bytes: u64,
    /// Of those with a window.
    pub windowed_bytes: u64,
    /// Memory for the largest layers, where a drive holds all.
    pub ring_bytes: u64,
    /// What the drive holds.
    pub drive_bytes: u64,
}

impl KvBytes {
    /// Either the first two, or, with slots, the last two; for any context, also one beyond the model's.
    ///
    /// # Errors
    /// `Invalid`: a type that the heads do not fit, more bytes than can be counted.
    pub fn new(geometry: &Geometry, question: &Question) -> Result<Self> {
        let context_count = question.context_count;
        if let Some(slots_count) = question.kv_slots_count {
            let mut layers = Vec::new();
            let mut on_drive = 0.0;
            for groups in geometry.kv_layers(context_count) {
                layers.push(stored_bytes(&groups, question.kv_in_memory())?);
                on_drive += stored_bytes(&groups, question.kv)?;
            }
            let largest = layers.iter().copied().fold(0.0, f64::max);
            // Slots for more layers than there are hold them all.
            let ring = (largest * f64::from(slots_count)).min(layers.iter().sum());
            return Ok(Self {
                ring_bytes: bytes_of(geometry, ring)?,
                drive_bytes: bytes_of(geometry, on_drive)?,
                ..Self::default()
            });
        }
        let groups = geometry.kv_groups(context_count);
        let of_kind = |kind| -> Result<u64> {
            let chosen: Vec<_> = groups.iter().filter(|g| g.kind == kind).copied().collect();
            bytes_of(geometry, stored_bytes(&chosen, question.kv)?)
        };
        Ok(Self {
            full_bytes: of_kind(KvKind::Full)?,
            windowed_bytes: of_kind(KvKind::Windowed)?,
            ..Self::default()
        })
    }
}

fn stored_bytes(groups: &[KvGroup], kv: KvStore) -> Result<f64> {
    let bytes = groups
        .iter()
        .map(|group| Ok(kv.vector_bytes(group.vector_count)? * group.count as f64));
    bytes.sum()
}

/// Whole bytes. An exabyte is the end: sums of a dozen of them still fit.
fn bytes_of(geometry: &Geometry, bytes: f64) -> Result<u64> {
    if bytes < (1_u64 << 60) as f64 {
        return Ok(bytes.ceil() as u64);
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "{}: {bytes:.1e} bytes are more than any machine has; some number is wrong",
            geometry.name
        ),
    ))
}
