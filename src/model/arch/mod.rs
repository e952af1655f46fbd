//! The geometry of a model: how many layers of which kind, how wide, and what a context costs, known without its weights.
//!
//! One type, [`Geometry`], whatever it was read from: a GGUF's catalog ([`gguf`]), a config.json ([`config`]), or a
//! description a person wrote ([`recipe`]). Counts of parameters by component and values of KV by kind of layer come from
//! it; what they weigh in bytes is the business of whoever chose the types. Invariants: every number is bounded by a named
//! `*_MAX` when a geometry is made ([`Geometry::checked`]), and sums are made in 128 bits, so no product overflows; the
//! totals are the sums of the components. Beside the catalog in **file -> catalog** -> plan -> reader -> pool -> lease ->
//! host; nothing that streams depends on it.

pub mod config;
pub mod gguf;
pub mod recipe;

#[cfg(test)]
mod tests;

use crate::error::{Error, ErrorKind, Result};

/// Layers of a model. The deepest published have 160.
pub const LAYER_COUNT_MAX: u64 = 4096;
/// Width of anything: residual stream, feed-forward, all heads together.
pub const WIDTH_MAX: u64 = 1 << 24;
/// Tokens of a vocabulary.
pub const VOCABULARY_MAX: u64 = 1 << 28;
/// Experts of a layer.
pub const EXPERT_COUNT_MAX: u64 = 1 << 16;
/// Tokens of a context.
pub const CONTEXT_MAX: u64 = 1 << 40;
/// Parameters of one component of one layer: a quadrillion, a thousand of today's largest models.
pub const PARAMETER_MAX: u64 = 1 << 50;
/// Encoders of a model.
pub const ENCODER_COUNT_MAX: usize = 16;

/// What a model is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// What people call it.
    pub name: String,
    /// The architecture: `llama`, `gemma4`.
    pub family: String,
    /// Width of the residual stream.
    pub hidden_count: u64,
    /// Tokens of the vocabulary.
    pub vocabulary_count: u64,
    /// Tokens of context the model was trained for; `None` where nobody says.
    pub context_max_count: Option<u64>,
    /// True when the head multiplies with the token embedding.
    pub tied_embeddings: bool,
    /// The layers in the order of a pass.
    pub blocks: Vec<Block>,
    /// Parameters of the decoder outside of its layers: the last norm, projections that all layers share.
    pub outside_parameter_count: u64,
    /// The table that gives every layer a row per token (per-layer embeddings).
    pub row_table: Option<RowTable>,
    /// What turns pictures and sound into tokens.
    pub encoders: Vec<Encoder>,
}

/// One layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Block {
    /// Its attention; `None` in a layer that has only a state.
    pub attention: Option<Attention>,
    /// Values of its state (recurrent, or of a convolution), whatever the context.
    pub state_element_count: u64,
    /// Its routed experts.
    pub experts: Option<Experts>,
    /// Parameters that every token uses: all but the routed experts.
    pub dense_parameter_count: u64,
}

/// What a layer's attention keeps of every token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Heads of the queries.
    pub head_count: u64,
    /// Heads of keys and values.
    pub kv_head_count: u64,
    /// Values of a key.
    pub key_count: u64,
    /// Values of a value; 0 where keys and values are kept as one latent vector.
    pub value_count: u64,
    /// The last tokens it sees; `None`: all of them.
    pub window_count: Option<u64>,
    /// True when it uses the keys and values of an earlier layer and keeps none.
    pub shares_kv: bool,
}

/// The routed experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// How many.
    pub count: u64,
    /// How many of them a token uses.
    pub used_count: u64,
    /// Parameters of one.
    pub each_parameter_count: u64,
}

/// A table of rows that are looked up, never multiplied with: one row per token, cut into one piece per layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowTable {
    /// Rows.
    pub row_count: u64,
    /// Values of a row, all layers together.
    pub width_count: u64,
}

/// What turns pictures or sound into tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoder {
    /// `vision`, `audio`.
    pub name: String,
    /// Its parameters.
    pub parameter_count: u64,
}

/// Which part of a context a layer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KvKind {
    /// Every token.
    Full,
    /// The last ones.
    Windowed,
}

impl KvKind {
    /// As tables and JSON name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Windowed => "windowed",
        }
    }
}

/// Vectors of one length that layers of one kind keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvGroup {
    /// Which layers.
    pub kind: KvKind,
    /// Values of one vector.
    pub vector_count: u64,
    /// How many vectors.
    pub count: u128,
}

impl Geometry {
    /// The geometry, if its numbers could be a model's.
    ///
    /// # Errors
    /// `Invalid`, naming the number and what would do.
    pub fn checked(self) -> Result<Self> {
        let within = |what: &str, value: u64, least: u64, most: u64| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(self.fault(format_args!(
                    "{what} is {value}; {least} to {most} are possible"
                )))
            }
        };
        within(
            "the number of layers",
            self.blocks.len() as u64,
            1,
            LAYER_COUNT_MAX,
        )?;
        within("the hidden width", self.hidden_count, 1, WIDTH_MAX)?;
        within("the vocabulary", self.vocabulary_count, 1, VOCABULARY_MAX)?;
        within(
            "the largest context",
            self.context_max_count.unwrap_or(1),
            1,
            CONTEXT_MAX,
        )?;
        within(
            "the number of encoders",
            self.encoders.len() as u64,
            0,
            ENCODER_COUNT_MAX as u64,
        )?;
        let outside = "the number of parameters outside of the layers";
        within(outside, self.outside_parameter_count, 0, PARAMETER_MAX)?;
        for encoder in &self.encoders {
            within(
                "the number of an encoder's parameters",
                encoder.parameter_count,
                0,
                PARAMETER_MAX,
            )?;
        }
        if let Some(table) = self.row_table {
            within(
                "the number of rows of the per-layer embeddings",
                table.row_count,
                1,
                VOCABULARY_MAX,
            )?;
            let width_max = WIDTH_MAX * LAYER_COUNT_MAX;
            within(
                "the width of the per-layer embeddings",
                table.width_count,
                1,
                width_max,
            )?;
        }
        for (index, block) in self.blocks.iter().enumerate() {
            block.check(&|what, value, least, most| {
                within(&format!("{what} of layer {index}"), value, least, most)
            })?;
            if let Some(attention) = block.attention
                && !attention.head_count.is_multiple_of(attention.kv_head_count)
            {
                return Err(self.fault(format_args!(
                    "layer {index} has {} heads and {} KV heads; the first must be a multiple of the second",
                    attention.head_count, attention.kv_head_count
                )));
            }
        }
        Ok(self)
    }

    fn fault(&self, what: impl std::fmt::Display) -> Error {
        let name = if self.name.is_empty() {
            "the model"
        } else {
            &self.name
        };
        Error::new(ErrorKind::Invalid, format!("{name}: {what}"))
    }

    /// Parameters of the decoder: all layers with all experts, and what stands outside of them.
    #[must_use]
    pub fn decoder_parameter_count(&self) -> u128 {
        let blocks = self.blocks.iter().map(Block::parameter_count);
        blocks.sum::<u128>() + u128::from(self.outside_parameter_count)
    }

    /// Parameters of the layers that one token uses: of the routed experts only the chosen ones.
    #[must_use]
    pub fn active_parameter_count(&self) -> u128 {
        self.blocks.iter().map(Block::active_parameter_count).sum()
    }

    /// Parameters of all routed experts.
    #[must_use]
    pub fn expert_parameter_count(&self) -> u128 {
        self.blocks.iter().map(Block::expert_parameter_count).sum()
    }

    /// Parameters of the largest layer.
    #[must_use]
    pub fn largest_layer_parameter_count(&self) -> u128 {
        self.blocks
            .iter()
            .map(Block::parameter_count)
            .max()
            .unwrap_or(0)
    }

    /// Parameters of the token embedding.
    #[must_use]
    pub fn embedding_parameter_count(&self) -> u128 {
        u128::from(self.vocabulary_count) * u128::from(self.hidden_count)
    }

    /// Parameters of a head of its own; 0 where it is the token embedding.
    #[must_use]
    pub fn head_parameter_count(&self) -> u128 {
        if self.tied_embeddings {
            return 0;
        }
        self.embedding_parameter_count()
    }

    /// Parameters of the per-layer embeddings.
    #[must_use]
    pub fn row_table_parameter_count(&self) -> u128 {
        self.row_table.map_or(0, |table| {
            u128::from(table.row_count) * u128::from(table.width_count)
        })
    }

    /// Parameters of the text model: everything but the encoders.
    #[must_use]
    pub fn text_parameter_count(&self) -> u128 {
        self.decoder_parameter_count()
            + self.embedding_parameter_count()
            + self.head_parameter_count()
            + self.row_table_parameter_count()
    }

    /// Values of the states of all layers, whatever the context.
    #[must_use]
    pub fn state_element_count(&self) -> u128 {
        let elements = self.blocks.iter().map(|block| block.state_element_count);
        elements.map(u128::from).sum()
    }

    /// Routed experts of a layer and how many of them a token uses, of the first layer that has any.
    #[must_use]
    pub fn experts(&self) -> Option<Experts> {
        self.blocks.iter().find_map(|block| block.experts)
    }

    /// The vectors that a context of so many tokens keeps, full layers first, long vectors before short ones.
    #[must_use]
    pub fn kv_groups(&self, context_count: u64) -> Vec<KvGroup> {
        let mut groups: Vec<KvGroup> = Vec::new();
        for kept in self.kv_layers(context_count).flatten() {
            let same = |group: &&mut KvGroup| {
                group.kind == kept.kind && group.vector_count == kept.vector_count
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.count += kept.count,
                None => groups.push(kept),
            }
        }
        groups.sort_by_key(|group| (group.kind, std::cmp::Reverse(group.vector_count)));
        groups
    }

    /// The same layer by layer, of those that keep any: keys, values.
    pub fn kv_layers(&self, context_count: u64) -> impl Iterator<Item = Vec<KvGroup>> {
        let kept = self.blocks.iter().filter_map(|block| block.attention);
        let own = kept.filter(|attention| !attention.shares_kv);
        let groups = own.map(move |attention| attention.kv_groups(context_count));
        groups.filter(|groups| !groups.is_empty())
    }

    /// The lengths of the vectors it keeps, each once.
    #[must_use]
    pub fn kv_vector_counts(&self) -> Vec<u64> {
        let mut lengths: Vec<u64> = self.kv_groups(1).iter().map(|g| g.vector_count).collect();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Layers that keep keys and values of their own, by kind: those that see everything, those with a window.
    #[must_use]
    pub fn kv_layer_counts(&self) -> (usize, usize) {
        let own = self.blocks.iter().filter_map(|block| block.attention);
        let own = own.filter(|attention| !attention.shares_kv);
        let full = own.clone().filter(|a| a.kind() == KvKind::Full).count();
        (full, own.count() - full)
    }
}

impl Block {
    fn check(&self, within: &dyn Fn(&str, u64, u64, u64) -> Result<()>) -> Result<()> {
        within("the state", self.state_element_count, 0, PARAMETER_MAX)?;
        within(
            "the number of parameters",
            self.dense_parameter_count,
            0,
            PARAMETER_MAX,
        )?;
        if let Some(experts) = self.experts {
            within("the number of experts", experts.count, 1, EXPERT_COUNT_MAX)?;
            within(
                "the number of experts a token uses",
                experts.used_count,
                1,
                experts.count,
            )?;
            within(
                "the size of an expert",
                experts.each_parameter_count,
                1,
                PARAMETER_MAX,
            )?;
        }
        if let Some(attention) = self.attention {
            within("the number of heads", attention.head_count, 1, WIDTH_MAX)?;
            within(
                "the number of KV heads",
                attention.kv_head_count,
                1,
                WIDTH_MAX,
            )?;
            within("the width of a key", attention.key_count, 1, WIDTH_MAX)?;
            within("the width of a value", attention.value_count, 0, WIDTH_MAX)?;
            within(
                "the window",
                attention.window_count.unwrap_or(1),
                1,
                CONTEXT_MAX,
            )?;
        }
        Ok(())
    }

    /// All its parameters.
    #[must_use]
    pub fn parameter_count(&self) -> u128 {
        u128::from(self.dense_parameter_count) + self.expert_parameter_count()
    }

    /// The parameters that one token uses.
    #[must_use]
    pub fn active_parameter_count(&self) -> u128 {
        let used = self.experts.map_or(0, |experts| {
            u128::from(experts.used_count) * u128::from(experts.each_parameter_count)
        });
        u128::from(self.dense_parameter_count) + used
    }

    /// The parameters of its routed experts.
    #[must_use]
    pub fn expert_parameter_count(&self) -> u128 {
        self.experts.map_or(0, |experts| {
            u128::from(experts.count) * u128::from(experts.each_parameter_count)
        })
    }
}

impl Attention {
    /// Which part of a context it keeps.
    #[must_use]
    pub const fn kind(&self) -> KvKind {
        match self.window_count {
            Some(_) => KvKind::Windowed,
            None => KvKind::Full,
        }
    }

    /// The vectors it keeps of a context of so many tokens.
    fn kv_groups(&self, context_count: u64) -> Vec<KvGroup> {
        let tokens = self.window_count.unwrap_or(u64::MAX).min(context_count);
        let count = u128::from(tokens) * u128::from(self.kv_head_count);
        let group = |vector_count| KvGroup {
            kind: self.kind(),
            vector_count,
            count,
        };
        let groups = [self.key_count, self.value_count].map(group);
        let kept = |group: &KvGroup| group.vector_count > 0 && group.count > 0;
        groups.into_iter().filter(kept).collect()
    }
}
