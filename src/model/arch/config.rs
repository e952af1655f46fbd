//! The geometry that a config.json of Hugging Face describes: known before a byte of the weights is fetched.
//!
//! Architectures name the same thing differently; the names that published models use are tried in turn, and what a model
//! type means without saying (a gate, tied embeddings, biases) stands in tables here. A number of the wrong type, or one
//! that is missing and cannot be guessed, is an error that names the key. Vision and sound encoders are estimated from
//! their layers. Beside the catalog in **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use serde_json::Value;

use super::recipe::{EncoderRecipe, ExpertRecipe, Latent, PerLayer, Recipe, State};
use super::{Geometry, LAYER_COUNT_MAX};
use crate::error::{Error, ErrorKind, Result};

/// Feed-forward parts without a gate: two matrices instead of three.
const WITHOUT_GATE: [&str; 12] = [
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "falcon",
    "phi",
    "opt",
    "bloom",
    "mpt",
    "starcoder2",
    "nemotron",
    "codegen",
];
/// Embeddings are the head unless the config says otherwise.
const TIED: [&str; 6] = ["gemma", "gpt2", "cohere", "falcon", "bloom", "mpt"];
/// Windows without a list of layers: of every so many layers the last one sees everything.
const WINDOW_PERIODS: [(&str, u64); 4] =
    [("gemma2", 2), ("gemma3", 6), ("cohere2", 4), ("gpt_oss", 2)];
/// Windows that count only when the config switches them on.
const WINDOW_SWITCHED: &str = "qwen";

/// The object with the language model's numbers, and its type.
struct Config<'a> {
    name: &'a str,
    root: &'a Value,
    text: &'a Value,
    model_type: String,
}

/// The geometry of the model `name` that a config.json describes.
///
/// # Errors
/// `Invalid`: not an object, a key that is missing or holds no count, or numbers that do not go together.
pub fn from_config(name: &str, root: &Value) -> Result<Geometry> {
    if !root.is_object() {
        return Err(fault(name, "a config.json holds an object"));
    }
    let nested = ["text_config", "llm_config", "language_config"];
    let text = nested
        .iter()
        .find_map(|key| root.get(*key).filter(|value| value.is_object()));
    let text = text.unwrap_or(root);
    let type_of = |value: &Value| {
        value
            .get("model_type")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let model_type = type_of(text).or_else(|| type_of(root)).unwrap_or_default();
    let config = Config {
        name,
        root,
        text,
        model_type,
    };
    config.recipe()?.geometry()
}

fn fault(name: &str, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Invalid, format!("{name}: {what}"))
}

/// A whole number, however JSON writes it.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        // 2^53: up to there a float is exactly the whole number that was written.
        let is_whole = number.fract() == 0.0 && (0.0..9.0e15).contains(&number);
        is_whole.then_some(number as u64)
    })
}

impl Config<'_> {
    /// The first of `keys` that is there and not null. A list (a number for each layer) counts as its largest.
    fn number_in(&self, object: &Value, keys: &[&str]) -> Result<Option<u64>> {
        let present = |key: &str| object.get(key).filter(|value| !value.is_null());
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, present(key)?))) else {
            return Ok(None);
        };
        let number = match value {
            Value::Array(values) => values
                .iter()
                .map(whole)
                .collect::<Option<Vec<_>>>()
                .and_then(|v| v.into_iter().max()),
            value => whole(value),
        };
        number.map(Some).ok_or_else(|| {
            fault(
                self.name,
                format_args!("'{key}' is {}, not a count", shortened(value)),
            )
        })
    }

    fn number(&self, keys: &[&str]) -> Result<Option<u64>> {
        self.number_in(self.text, keys)
    }

    fn need(&self, keys: &[&str]) -> Result<u64> {
        self.number(keys)?.ok_or_else(|| {
            let known = keys.join("' or '");
            fault(
                self.name,
                format_args!(
                    "no '{known}'; a model of another kind can be described in a TOML or YAML file"
                ),
            )
        })
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.text
            .get(key)
            .or_else(|| self.root.get(key))
            .and_then(Value::as_bool)
    }

    fn is_one_of(&self, families: &[&str]) -> bool {
        families
            .iter()
            .any(|family| self.model_type.starts_with(family))
    }

    fn recipe(&self) -> Result<Recipe> {
        let hidden = self.need(&["hidden_size", "n_embd", "d_model", "dim"])?;
        let layers = self.need(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"])?;
        if layers > LAYER_COUNT_MAX {
            return Err(fault(
                self.name,
                format_args!("{layers} layers; at most {LAYER_COUNT_MAX} are possible"),
            ));
        }
        let heads = self.need(&["num_attention_heads", "n_head", "n_heads", "num_heads"])?;
        let feed_forward = self.number(&[
            "intermediate_size",
            "n_inner",
            "ffn_dim",
            "ffn_hidden_size",
            "hidden_dim",
        ])?;
        let feed_forward = feed_forward.unwrap_or(hidden.saturating_mul(4));
        let kinds = self.layer_kinds(layers)?;
        let window = self.window()?;
        let (global_every, global_layers) = self.globals(layers, window, kinds.as_deref());
        let per_layer = self
            .number(&["hidden_size_per_layer_input"])?
            .filter(|width| *width > 0);
        let wide = self.flag("use_double_wide_mlp").unwrap_or(false);
        Ok(Recipe {
            name: self.name.to_owned(),
            family: self.model_type.clone(),
            sources: Vec::new(),
            layers,
            hidden,
            vocabulary: self.need(&["vocab_size", "n_vocab"])?,
            context_max: self.number(&[
                "max_position_embeddings",
                "n_positions",
                "n_ctx",
                "max_seq_len",
                "seq_length",
            ])?,
            tied_embeddings: self
                .flag("tie_word_embeddings")
                .unwrap_or_else(|| self.is_one_of(&TIED)),
            heads,
            kv_heads: self.number(&[
                "num_key_value_heads",
                "num_kv_heads",
                "n_head_kv",
                "multi_query_group_num",
            ])?,
            head_dim: self.head_dim()?,
            value_dim: self.number(&["v_head_dim"])?,
            global_head_dim: self.number(&["global_head_dim"])?,
            global_kv_heads: self.number(&["num_global_key_value_heads"])?,
            window,
            global_every,
            global_layers,
            shared_kv_layers: self.number(&["num_kv_shared_layers"])?.unwrap_or(0),
            feed_forward,
            shared_kv_feed_forward: wide.then(|| feed_forward.saturating_mul(2)),
            feed_forward_matrices: if WITHOUT_GATE.contains(&self.model_type.as_str()) {
                2
            } else {
                3
            },
            attention_biases: self
                .flag("attention_bias")
                .or_else(|| self.flag("qkv_bias"))
                .unwrap_or_else(|| self.is_one_of(&["qwen2"])),
            norms: 2,
            other_layer_parameters: 0,
            latent: self.latent()?,
            experts: self.experts(feed_forward)?,
            state: self.state(hidden, layers, kinds.as_deref())?,
            per_layer_embeddings: match per_layer {
                Some(width) => Some(PerLayer {
                    width,
                    vocabulary: self.number(&["vocab_size_per_layer_input"])?,
                }),
                None => None,
            },
            encoders: self.encoders()?,
        })
    }

    fn head_dim(&self) -> Result<Option<u64>> {
        // The part of a latent attention's key that carries no position; the rest comes on top.
        self.number(&["qk_nope_head_dim", "head_dim", "kv_channels"])
    }

    fn latent(&self) -> Result<Option<Latent>> {
        let Some(kv_rank) = self.number(&["kv_lora_rank"])?.filter(|rank| *rank > 0) else {
            return Ok(None);
        };
        Ok(Some(Latent {
            kv_rank,
            rope_dim: self.number(&["qk_rope_head_dim"])?.unwrap_or(64),
            query_rank: self.number(&["q_lora_rank"])?.filter(|rank| *rank > 0),
        }))
    }

    fn window(&self) -> Result<Option<u64>> {
        if self.is_one_of(&[WINDOW_SWITCHED]) && self.flag("use_sliding_window") != Some(true) {
            return Ok(None);
        }
        let window = self.number(&["sliding_window", "attention_chunk_size"])?;
        Ok(window.filter(|window| *window > 0))
    }

    /// What each layer is, where the config lists it.
    fn layer_kinds(&self, layers: u64) -> Result<Option<Vec<String>>> {
        let list = ["layer_types", "layers_block_type"]
            .iter()
            .find_map(|key| self.text.get(*key)?.as_array());
        if let Some(list) = list {
            let kinds: Option<Vec<String>> = list
                .iter()
                .map(|kind| kind.as_str().map(str::to_owned))
                .collect();
            return match kinds {
                Some(kinds) if kinds.len() as u64 == layers => Ok(Some(kinds)),
                _ => Err(fault(
                    self.name,
                    format_args!("'layer_types' does not name {layers} layers"),
                )),
            };
        }
        let Some(period) = self
            .number(&["attn_layer_period"])?
            .filter(|period| *period > 0)
        else {
            return Ok(None);
        };
        let offset = self.number(&["attn_layer_offset"])?.unwrap_or(0);
        let kind = |layer: u64| {
            if layer % period == offset {
                "attention"
            } else {
                "mamba"
            }
        };
        Ok(Some(
            (0..layers).map(|layer| kind(layer).to_owned()).collect(),
        ))
    }

    /// Which layers see everything where there is a window: by a period, or listed.
    fn globals(
        &self,
        layers: u64,
        window: Option<u64>,
        kinds: Option<&[String]>,
    ) -> (Option<u64>, Option<Vec<u64>>) {
        if window.is_none() {
            return (None, None);
        }
        if let Some(kinds) = kinds {
            let places = (0_u64..).zip(kinds);
            let global =
                places.filter(|(_, kind)| matches!(kind.as_str(), "full_attention" | "attention"));
            return (None, Some(global.map(|(layer, _)| layer).collect()));
        }
        // Qwen 2 begins its windows behind the first layers.
        if self.is_one_of(&[WINDOW_SWITCHED]) {
            let first = self
                .text
                .get("max_window_layers")
                .and_then(whole)
                .unwrap_or(0);
            return (None, Some((0..first.min(layers)).collect()));
        }
        let named = self.text.get("sliding_window_pattern").and_then(whole);
        let known = WINDOW_PERIODS
            .iter()
            .find(|(family, _)| self.is_one_of(&[*family]));
        (named.or(known.map(|(_, period)| *period)), None)
    }

    fn experts(&self, feed_forward: u64) -> Result<Option<ExpertRecipe>> {
        let count = self.number(&[
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "moe_num_experts",
        ])?;
        let Some(count) =
            count.filter(|count| *count > 1 && self.flag("enable_moe_block") != Some(false))
        else {
            return Ok(None);
        };
        let used = self.need(&[
            "num_experts_per_tok",
            "num_experts_per_token",
            "num_selected_experts",
            "moe_top_k",
            "moe_topk",
            "top_k_experts",
            "experts_per_token",
        ])?;
        let width = self
            .number(&["moe_intermediate_size", "expert_intermediate_size"])?
            .unwrap_or(feed_forward);
        let shared_count = self
            .number(&["n_shared_experts", "num_shared_experts"])?
            .unwrap_or(0);
        let named = self.number(&[
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
        ])?;
        // Gemma's experts stand beside a dense part that every token uses.
        let beside = if self.is_one_of(&["gemma4"]) {
            feed_forward
        } else {
            0
        };
        Ok(Some(ExpertRecipe {
            count,
            used,
            feed_forward: width,
            shared_feed_forward: named
                .unwrap_or(shared_count.saturating_mul(width))
                .saturating_add(beside),
            router_parameters: None,
            dense_first: self.number(&["first_k_dense_replace"])?.unwrap_or(0),
            every: self
                .number(&[
                    "decoder_sparse_step",
                    "interleave_moe_layer_step",
                    "expert_layer_period",
                ])?
                .filter(|every| *every > 0)
                .unwrap_or(1),
        }))
    }

    /// Layers of a state instead of attention: Mamba, and linear attention with a delta rule.
    fn state(&self, hidden: u64, layers: u64, kinds: Option<&[String]>) -> Result<Option<State>> {
        let is_state = |kind: &str| {
            matches!(
                kind,
                "mamba" | "mamba2" | "linear_attention" | "recurrent" | "conv"
            )
        };
        let places = (0..layers).zip(kinds.unwrap_or_default());
        let replaced: Vec<u64> = places
            .filter(|(_, kind)| is_state(kind))
            .map(|(layer, _)| layer)
            .collect();
        if replaced.is_empty() {
            return Ok(None);
        }
        let product = |factors: &[u64]| {
            factors
                .iter()
                .fold(1_u64, |product, factor| product.saturating_mul(*factor))
        };
        let (elements, parameters) =
            if let Some(heads) = self.number(&["linear_num_value_heads"])? {
                let key = self.need(&["linear_key_head_dim"])?;
                let value = self.need(&["linear_value_head_dim"])?;
                let keys = product(&[self.need(&["linear_num_key_heads"])?, key]);
                let (values, kernel) = (
                    product(&[heads, value]),
                    self.number(&["linear_conv_kernel_dim"])?.unwrap_or(4),
                );
                let convolved = keys.saturating_mul(2).saturating_add(values);
                let rows = convolved
                    .saturating_add(values.saturating_mul(2))
                    .saturating_add(heads.saturating_mul(2));
                let elements = product(&[heads, key, value])
                    .saturating_add(product(&[kernel.saturating_sub(1), convolved]));
                (
                    elements,
                    product(&[hidden, rows]).saturating_add(product(&[kernel, convolved])),
                )
            } else if let Some(length) = self.number(&["conv_L_cache"])? {
                // A short convolution: three gates in, one out.
                (
                    product(&[hidden, length.saturating_sub(1)]),
                    product(&[hidden, hidden, 4]),
                )
            } else {
                let state = self.need(&["mamba_d_state", "ssm_state_size", "state_size"])?;
                let inner = product(&[
                    self.number(&["mamba_expand", "expand"])?.unwrap_or(2),
                    hidden,
                ]);
                let kernel = self.number(&["mamba_d_conv", "conv_kernel"])?.unwrap_or(4);
                let groups = self.number(&["mamba_n_groups", "n_groups"])?.unwrap_or(0);
                let convolved = inner.saturating_add(product(&[2, groups, state]));
                let elements = product(&[inner, state])
                    .saturating_add(product(&[kernel.saturating_sub(1), convolved]));
                (
                    elements,
                    product(&[hidden, inner, 3]).saturating_add(product(&[inner, state, 2])),
                )
            };
        Ok(Some(State {
            elements_per_layer: elements,
            layers: Some(replaced),
            mixer_parameters: parameters,
        }))
    }

    /// Encoders as transformers of their width: four matrices of attention and two of feed-forward per layer.
    fn encoders(&self) -> Result<Vec<EncoderRecipe>> {
        let mut encoders = Vec::new();
        for (key, name) in [("vision_config", "vision"), ("audio_config", "audio")] {
            let Some(part) = self.root.get(key).filter(|part| part.is_object()) else {
                continue;
            };
            let layers = self.number_in(
                part,
                &[
                    "num_hidden_layers",
                    "depth",
                    "conf_num_hidden_layers",
                    "num_layers",
                ],
            )?;
            let width = self.number_in(part, &["hidden_size", "embed_dim", "d_model"])?;
            let (Some(layers), Some(width)) = (layers, width) else {
                continue;
            };
            let wide = self
                .number_in(part, &["intermediate_size"])?
                .unwrap_or(width.saturating_mul(4));
            let each = width
                .saturating_mul(4)
                .saturating_add(wide.saturating_mul(2))
                .saturating_mul(width);
            encoders.push(EncoderRecipe {
                name: name.to_owned(),
                parameters: each.saturating_mul(layers),
            });
        }
        Ok(encoders)
    }
}

/// A value as a message can hold it.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
