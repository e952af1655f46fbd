//! A geometry from the numbers that people write down: widths, heads, and which layer does what.
//!
//! A [`Recipe`] is what a description in TOML, YAML or JSON holds, and what [`super::config`] makes of a config.json; the
//! parameters of every layer follow from it by the usual matrices. Unknown keys are refused: a mistyped one would silently
//! be a default. Norms of heads and routers' biases that a recipe does not name are not counted: a millionth of a model.
//! Beside the catalog in **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use serde::Deserialize;

use super::{
    Attention, Block, ENCODER_COUNT_MAX, EXPERT_COUNT_MAX, Encoder, Experts, Geometry,
    LAYER_COUNT_MAX, PARAMETER_MAX, RowTable, WIDTH_MAX,
};
use crate::error::{Error, ErrorKind, Result};

/// What a person writes about a model. Counts are plain numbers; what is left out is the usual or not there.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What people call it.
    #[serde(default)]
    pub name: String,
    /// The architecture.
    #[serde(default)]
    pub family: String,
    /// Where the numbers are from.
    #[serde(default)]
    pub sources: Vec<String>,
    /// Layers.
    pub layers: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// Tokens of context it was trained for.
    pub context_max: Option<u64>,
    /// The head multiplies with the token embedding.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Heads of the queries.
    pub heads: u64,
    /// Heads of keys and values; left out: heads.
    pub kv_heads: Option<u64>,
    /// Width of a head; left out: hidden / heads.
    pub head_dim: Option<u64>,
    /// Width of a head's values, where it is another.
    pub value_dim: Option<u64>,
    /// Width of a head in layers that see everything, where others have a window.
    pub global_head_dim: Option<u64>,
    /// KV heads of layers that see everything, where others have a window.
    pub global_kv_heads: Option<u64>,
    /// The last tokens that windowed layers see.
    pub window: Option<u64>,
    /// With a window: every so many layers the last one sees everything; 0: none does.
    pub global_every: Option<u64>,
    /// With a window: the layers that see everything, counted from 0. Instead of `global_every`.
    pub global_layers: Option<Vec<u64>>,
    /// So many last layers use keys and values of earlier ones.
    #[serde(default)]
    pub shared_kv_layers: u64,
    /// Width of the feed-forward part; 0: there is none.
    pub feed_forward: u64,
    /// Width of the feed-forward part of the layers that share keys and values, where it is another.
    pub shared_kv_feed_forward: Option<u64>,
    /// Matrices of a feed-forward part: 3 with a gate, 2 without.
    #[serde(default = "three")]
    pub feed_forward_matrices: u64,
    /// Queries, keys and values have biases.
    #[serde(default)]
    pub attention_biases: bool,
    /// Norms of a layer, each as wide as the residual stream.
    #[serde(default = "two")]
    pub norms: u64,
    /// More parameters of every layer than its matrices, norms and biases.
    #[serde(default)]
    pub other_layer_parameters: u64,
    /// Attention through a narrow latent vector (MLA).
    pub latent: Option<Latent>,
    /// Routed experts.
    pub experts: Option<ExpertRecipe>,
    /// What layers keep besides keys and values, or instead of them.
    pub state: Option<State>,
    /// Per-layer embeddings.
    pub per_layer_embeddings: Option<PerLayer>,
    /// What turns pictures and sound into tokens.
    #[serde(default)]
    pub encoders: Vec<EncoderRecipe>,
}

/// Attention that keeps one narrow vector per token instead of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Width of the compressed keys and values.
    pub kv_rank: u64,
    /// Width of the part of a key that carries the position.
    pub rope_dim: u64,
    /// Width of the queries' latent vector, where they have one.
    pub query_rank: Option<u64>,
}

/// Routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertRecipe {
    /// How many.
    pub count: u64,
    /// How many of them a token uses.
    pub used: u64,
    /// Width of one.
    pub feed_forward: u64,
    /// Width of the experts that every token uses, all together.
    #[serde(default)]
    pub shared_feed_forward: u64,
    /// Parameters of the router; left out: hidden times experts.
    pub router_parameters: Option<u64>,
    /// So many first layers have a dense feed-forward part instead.
    #[serde(default)]
    pub dense_first: u64,
    /// Every so many layers the last one has experts, the others a dense part.
    #[serde(default = "one")]
    pub every: u64,
}

/// What layers keep whatever the context.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Values per layer.
    pub elements_per_layer: u64,
    /// The layers that have it instead of attention; left out: every layer has it beside its attention.
    pub layers: Option<Vec<u64>>,
    /// Parameters of such a layer's mixer, instead of attention's.
    #[serde(default)]
    pub mixer_parameters: u64,
}

/// Per-layer embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerLayer {
    /// Values per token and layer.
    pub width: u64,
    /// Rows; left out: the vocabulary.
    pub vocabulary: Option<u64>,
}

/// What turns pictures or sound into tokens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderRecipe {
    /// `vision`, `audio`.
    pub name: String,
    /// Its parameters.
    pub parameters: u64,
}

const fn one() -> u64 {
    1
}

const fn two() -> u64 {
    2
}

const fn three() -> u64 {
    3
}

impl Recipe {
    /// The geometry of it.
    ///
    /// # Errors
    /// `Invalid`: numbers that no model has, or that do not go together.
    pub fn geometry(&self) -> Result<Geometry> {
        self.check()?;
        let blocks = (0..self.layers)
            .map(|index| self.block(index))
            .collect::<Result<Vec<_>>>()?;
        let row_table = self.per_layer_embeddings.map(|rows| RowTable {
            row_count: rows.vocabulary.unwrap_or(self.vocabulary),
            width_count: rows.width.saturating_mul(self.layers),
        });
        // One projection for the rows of all layers, and the last norm.
        let projection = row_table.map_or(Ok(0), |table| {
            self.product(&[self.hidden, table.width_count])
        })?;
        let encoders = self.encoders.iter().map(|encoder| Encoder {
            name: encoder.name.clone(),
            parameter_count: encoder.parameters,
        });
        Geometry {
            name: self.name.clone(),
            family: self.family.clone(),
            hidden_count: self.hidden,
            vocabulary_count: self.vocabulary,
            context_max_count: self.context_max,
            tied_embeddings: self.tied_embeddings,
            blocks,
            outside_parameter_count: projection.saturating_add(self.hidden),
            row_table,
            encoders: encoders.collect(),
        }
        .checked()
    }

    fn fault(&self, what: impl std::fmt::Display) -> Error {
        let name = if self.name.is_empty() {
            "the model"
        } else {
            &self.name
        };
        Error::new(ErrorKind::Invalid, format!("{name}: {what}"))
    }

    /// Before anything is allocated or multiplied.
    fn check(&self) -> Result<()> {
        let within = |what: &str, value: u64, least: u64, most: u64| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(self.fault(format_args!(
                "{what} is {value}; {least} to {most} are possible"
            )))
        };
        within("layers", self.layers, 1, LAYER_COUNT_MAX)?;
        within("hidden", self.hidden, 1, WIDTH_MAX)?;
        within("heads", self.heads, 1, WIDTH_MAX)?;
        within("kv_heads", self.kv_heads.unwrap_or(1), 1, WIDTH_MAX)?;
        within("feed_forward", self.feed_forward, 0, WIDTH_MAX)?;
        within("feed_forward_matrices", self.feed_forward_matrices, 2, 3)?;
        within(
            "shared_kv_layers",
            self.shared_kv_layers,
            0,
            self.layers - 1,
        )?;
        within("norms", self.norms, 0, 64)?;
        within(
            "encoders",
            self.encoders.len() as u64,
            0,
            ENCODER_COUNT_MAX as u64,
        )?;
        for dim in [self.head_dim, self.value_dim, self.global_head_dim]
            .into_iter()
            .flatten()
        {
            within("the width of a head", dim, 1, WIDTH_MAX)?;
        }
        if self.head_dim.is_none()
            && self.latent.is_none()
            && !self.hidden.is_multiple_of(self.heads)
        {
            return Err(self.fault(format_args!(
                "a width of {} cannot be divided by {} heads; give another number of heads, or head_dim",
                self.hidden, self.heads
            )));
        }
        if let Some(experts) = &self.experts {
            within("experts.count", experts.count, 1, EXPERT_COUNT_MAX)?;
            within("experts.used", experts.used, 1, experts.count)?;
            within("experts.feed_forward", experts.feed_forward, 1, WIDTH_MAX)?;
            within("experts.every", experts.every, 1, self.layers)?;
        }
        if self.window.is_none() && (self.global_every.is_some() || self.global_layers.is_some()) {
            return Err(self.fault("global_every and global_layers mean nothing without a window"));
        }
        let listed = self.global_layers.iter().flatten();
        let of_state = self
            .state
            .iter()
            .flat_map(|state| state.layers.iter().flatten());
        for &layer in listed.chain(of_state) {
            within("a layer in a list", layer, 0, self.layers - 1)?;
        }
        Ok(())
    }

    fn product(&self, factors: &[u64]) -> Result<u64> {
        let product = factors
            .iter()
            .try_fold(1_u64, |product, factor| product.checked_mul(*factor));
        product
            .filter(|product| *product <= PARAMETER_MAX)
            .ok_or_else(|| {
                self.fault(format_args!(
                    "a part of {factors:?} parameters is more than any model has"
                ))
            })
    }

    /// Whether layer `index` sees every token.
    fn is_global(&self, index: u64) -> bool {
        match (&self.global_layers, self.global_every) {
            _ if self.window.is_none() => true,
            (Some(layers), _) => layers.contains(&index),
            (None, Some(0) | None) => false,
            (None, Some(every)) => index % every == every - 1,
        }
    }

    fn block(&self, index: u64) -> Result<Block> {
        let shares_kv = index >= self.layers - self.shared_kv_layers;
        let state = self.state.as_ref();
        let replaces = state.is_some_and(|state| {
            state
                .layers
                .as_ref()
                .is_some_and(|layers| layers.contains(&index))
        });
        let has_state = state.is_some_and(|state| state.layers.is_none()) || replaces;
        let (attention, mixer) = if replaces {
            (None, state.map_or(0, |state| state.mixer_parameters))
        } else {
            let attention = self.attention(index, shares_kv);
            (Some(attention), self.attention_parameters(&attention)?)
        };
        let (experts, feed_forward) = self.feed_forward_parameters(index, shares_kv)?;
        let rows = self
            .per_layer_embeddings
            .map_or(Ok(0), |rows| self.product(&[2, self.hidden, rows.width]))?;
        let parts = [
            mixer,
            feed_forward,
            rows,
            self.product(&[self.norms, self.hidden])?,
            self.other_layer_parameters,
        ];
        let dense = parts
            .iter()
            .try_fold(0_u64, |sum, part| sum.checked_add(*part));
        Ok(Block {
            attention,
            state_element_count: state
                .filter(|_| has_state)
                .map_or(0, |s| s.elements_per_layer),
            experts,
            dense_parameter_count: dense
                .ok_or_else(|| self.fault("a layer has more parameters than can be counted"))?,
        })
    }

    fn attention(&self, index: u64, shares_kv: bool) -> Attention {
        let is_global = self.is_global(index);
        let window_count = self.window.filter(|_| !is_global);
        if let Some(latent) = self.latent {
            return Attention {
                head_count: self.heads,
                kv_head_count: 1,
                key_count: latent.kv_rank.saturating_add(latent.rope_dim),
                value_count: 0,
                window_count,
                shares_kv,
            };
        }
        let plain = self.head_dim.unwrap_or(self.hidden / self.heads);
        let global = self.global_head_dim.filter(|_| is_global);
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        Attention {
            head_count: self.heads,
            kv_head_count: self
                .global_kv_heads
                .filter(|_| is_global)
                .unwrap_or(kv_heads),
            key_count: global.unwrap_or(plain),
            value_count: global.or(self.value_dim).unwrap_or(plain),
            window_count,
            shares_kv,
        }
    }

    /// Queries, keys, values and output, with biases. Layers that share keys and values come with matrices for them all
    /// the same: published checkpoints do.
    fn attention_parameters(&self, attention: &Attention) -> Result<u64> {
        let Attention {
            head_count,
            kv_head_count,
            key_count,
            value_count,
            ..
        } = *attention;
        if let Some(latent) = self.latent {
            return self.latent_parameters(&latent);
        }
        let queries = self.product(&[head_count, key_count])?;
        let keys = self.product(&[kv_head_count, key_count])?;
        let values = self.product(&[kv_head_count, value_count])?;
        let outputs = self.product(&[head_count, value_count])?;
        let width = queries.saturating_add(keys).saturating_add(values);
        let biases = if self.attention_biases { width } else { 0 };
        let matrices = self.product(&[self.hidden, width.saturating_add(outputs)])?;
        Ok(matrices.saturating_add(biases))
    }

    fn latent_parameters(&self, latent: &Latent) -> Result<u64> {
        let key = self.head_dim.unwrap_or(128);
        let value = self.value_dim.unwrap_or(key);
        let query_width = self.product(&[self.heads, key.saturating_add(latent.rope_dim)])?;
        let query = match latent.query_rank {
            Some(rank) => self
                .product(&[self.hidden, rank])?
                .saturating_add(self.product(&[rank, query_width])?),
            None => self.product(&[self.hidden, query_width])?,
        };
        let down = self.product(&[self.hidden, latent.kv_rank.saturating_add(latent.rope_dim)])?;
        let up = self.product(&[latent.kv_rank, self.heads, key.saturating_add(value)])?;
        let out = self.product(&[self.heads, value, self.hidden])?;
        Ok([query, down, up, out]
            .iter()
            .fold(0, |sum: u64, part| sum.saturating_add(*part)))
    }

    /// The routed experts of a layer, and the parameters of the feed-forward part that every token uses.
    fn feed_forward_parameters(
        &self,
        index: u64,
        shares_kv: bool,
    ) -> Result<(Option<Experts>, u64)> {
        let matrices = |width: u64| self.product(&[self.feed_forward_matrices, self.hidden, width]);
        let routed = self.experts.filter(|experts| {
            index >= experts.dense_first && index % experts.every == experts.every - 1
        });
        let Some(experts) = routed else {
            let wide = self.shared_kv_feed_forward.filter(|_| shares_kv);
            return Ok((None, matrices(wide.unwrap_or(self.feed_forward))?));
        };
        let router = match experts.router_parameters {
            Some(parameters) => parameters,
            None => self.product(&[self.hidden, experts.count])?,
        };
        let shared = matrices(experts.shared_feed_forward)?;
        let each = Experts {
            count: experts.count,
            used_count: experts.used,
            each_parameter_count: matrices(experts.feed_forward)?,
        };
        Ok((Some(each), shared.saturating_add(router)))
    }
}
