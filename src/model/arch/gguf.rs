//! The geometry of a GGUF: counted from its tensors, so that what a file holds is what is said, whatever its architecture.
//!
//! Parameters are sums of tensors. What no tensor says (heads, windows, which layers share) comes from the metadata; an
//! architecture whose windows nobody described counts every layer as one that sees everything, which asks for too much
//! memory and never for too little. Beside the catalog in **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::{Attention, Block, Experts, Geometry, LAYER_COUNT_MAX, RowTable};
use crate::error::{ErrorKind, Result};
use crate::model::{Catalog, Role, Tensor, Value};

/// Every so many layers the last one sees everything, in architectures whose files do not say so (llama.cpp's defaults).
const WINDOW_PERIODS: [(&str, u64); 9] = [
    ("gemma2", 2),
    ("gemma3", 6),
    ("gemma3n", 5),
    ("cohere2", 4),
    ("gpt-oss", 2),
    ("olmo2", 4),
    ("olmo3", 4),
    ("exaone4", 4),
    ("llama4", 4),
];

/// What the tensors of one block say.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    dense: u64,
    routed: u64,
    experts: u64,
    key_rows: Option<u64>,
    value_rows: Option<u64>,
    latent_rows: Option<u64>,
    /// Rows and columns of queries, keys and values in one matrix.
    fused: Option<(u64, u64)>,
    has_queries: bool,
    has_state: bool,
    has_short_convolution: bool,
}

/// The geometry of the model that `catalog` describes.
///
/// # Errors
/// `Format`: tensors and metadata that no model has.
pub fn from_catalog(catalog: &Catalog) -> Result<Geometry> {
    geometry(catalog).map_err(|error| error.with_kind(ErrorKind::Format))
}

fn geometry(catalog: &Catalog) -> Result<Geometry> {
    let mut blocks: Vec<Found> = Vec::new();
    let mut outside = 0_u64;
    let mut embedding = None;
    let mut row_table = None;
    for tensor in catalog
        .tensors
        .iter()
        .filter(|t| t.host_kept || t.layers.is_some())
    {
        let elements = tensor.element_count();
        match block_of(&tensor.name) {
            Some((index, part)) => {
                if blocks.len() <= index {
                    blocks.resize(index + 1, Found::default());
                }
                blocks[index].take(tensor, part, elements);
            }
            None if tensor.role == Role::PerLayerEmbedding
                && tensor.name.contains("token_embd") =>
            {
                row_table = Some(RowTable {
                    row_count: tensor.row_count(),
                    width_count: tensor.shape[0],
                });
            }
            None if tensor.name == "token_embd.weight" => {
                embedding = Some((tensor.shape[0], tensor.row_count()));
            }
            None if tensor.name == "output.weight" => {}
            None => outside = outside.saturating_add(elements),
        }
    }
    let (hidden, vocabulary) = embedding.unwrap_or((0, 0));
    let layer_count = blocks.len() as u64;
    let reader = Reader {
        catalog,
        hidden_count: hidden,
        layer_count,
    };
    let blocks = (0_u64..)
        .zip(&blocks)
        .map(|(index, found)| reader.block(index, found));
    Geometry {
        name: catalog
            .name
            .clone()
            .unwrap_or_else(|| catalog.architecture.clone()),
        family: catalog.architecture.clone(),
        hidden_count: hidden,
        vocabulary_count: vocabulary,
        context_max_count: catalog.context_length,
        tied_embeddings: catalog.tied_embeddings,
        blocks: blocks.collect(),
        outside_parameter_count: outside,
        row_table,
        encoders: Vec::new(),
    }
    .checked()
}

/// `blk.7.attn_k.weight`: 7 and `attn_k.weight`.
fn block_of(name: &str) -> Option<(usize, &str)> {
    let (number, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let index = number.parse().ok()?;
    (index < LAYER_COUNT_MAX as usize).then_some((index, part))
}

impl Found {
    fn take(&mut self, tensor: &Tensor, part: &str, elements: u64) {
        let rows = tensor.shape[1];
        match tensor.experts {
            Some(experts) => {
                self.routed = self.routed.saturating_add(elements);
                self.experts = self
                    .experts
                    .max(u64::from(experts.first) + u64::from(experts.count));
            }
            None => self.dense = self.dense.saturating_add(elements),
        }
        match part {
            "attn_k.weight" => self.key_rows = Some(rows),
            "attn_v.weight" => self.value_rows = Some(rows),
            "attn_kv_a_mqa.weight" => self.latent_rows = Some(rows),
            "attn_qkv.weight" => self.fused = Some((rows, tensor.shape[0])),
            "attn_q.weight" | "attn_q_b.weight" => self.has_queries = true,
            _ if part.starts_with("ssm_") => self.has_state = true,
            _ if part.starts_with("shortconv") => self.has_short_convolution = true,
            _ => {}
        }
    }
}

struct Reader<'a> {
    catalog: &'a Catalog,
    hidden_count: u64,
    layer_count: u64,
}

impl Reader<'_> {
    fn number(&self, key: &str) -> Option<u64> {
        self.catalog.architecture_number(key)
    }

    /// A number that is one for all layers, or one for each.
    fn number_of_layer(&self, key: &str, index: u64) -> Option<u64> {
        let key = format!("{}.{key}", self.catalog.architecture);
        match self.catalog.metadata.get(&key)? {
            Value::Unsigned(number) => Some(*number),
            Value::Integers(numbers) => u64::try_from(*numbers.get(index as usize)?).ok(),
            _ => None,
        }
    }

    fn block(&self, index: u64, found: &Found) -> Block {
        let used = self.catalog.experts_used_count.unwrap_or(found.experts);
        let experts = (found.experts > 0).then(|| Experts {
            count: found.experts,
            used_count: used.min(found.experts),
            each_parameter_count: found.routed / found.experts,
        });
        Block {
            attention: self.attention(index, found),
            state_element_count: self.state(found),
            experts,
            dense_parameter_count: found.dense,
        }
    }

    fn attention(&self, index: u64, found: &Found) -> Option<Attention> {
        let keeps =
            found.key_rows.is_some() || found.latent_rows.is_some() || found.fused.is_some();
        if !keeps && !found.has_queries {
            return None;
        }
        let head_count = self
            .number_of_layer("attention.head_count", index)
            .unwrap_or(1)
            .max(1);
        let kv_heads = self.number_of_layer("attention.head_count_kv", index);
        let kv_head_count = kv_heads.filter(|count| *count > 0).unwrap_or(head_count);
        let window_count = self.window(index);
        let shared = self.number("attention.shared_kv_layers").unwrap_or(0);
        let shares_kv = !keeps || index >= self.layer_count.saturating_sub(shared);
        if let Some(latent) = found.latent_rows {
            return Some(Attention {
                head_count,
                kv_head_count: 1,
                key_count: latent,
                value_count: 0,
                window_count,
                shares_kv,
            });
        }
        let (keys, values) = self.head_widths(found, head_count, kv_head_count);
        Some(Attention {
            head_count,
            kv_head_count,
            key_count: keys,
            value_count: values,
            window_count,
            shares_kv,
        })
    }

    /// Values of a key and of a value of one head.
    fn head_widths(&self, found: &Found, head_count: u64, kv_head_count: u64) -> (u64, u64) {
        let usual = self.hidden_count / head_count;
        let named_key = self.number("attention.key_length").unwrap_or(usual);
        let named_value = self.number("attention.value_length").unwrap_or(named_key);
        if let Some((rows, columns)) = found.fused {
            // Queries are as wide as the residual stream where these are fused; keys and values share the rest.
            let each = rows.saturating_sub(columns) / 2 / kv_head_count;
            return (each.max(1), each.max(1));
        }
        let keys = found
            .key_rows
            .map_or(named_key, |rows| rows / kv_head_count);
        // A layer without a matrix for its values uses its keys.
        let values = match (found.value_rows, found.key_rows) {
            (Some(rows), _) | (None, Some(rows)) => rows / kv_head_count,
            (None, None) => named_value,
        };
        (keys.max(1), values.max(1))
    }

    fn window(&self, index: u64) -> Option<u64> {
        let chunk = || self.number("attention.chunk_size");
        let window = self.number("attention.sliding_window").or_else(chunk);
        let window = window.filter(|window| *window > 0)?;
        let key = format!(
            "{}.attention.sliding_window_pattern",
            self.catalog.architecture
        );
        let is_windowed = match self.catalog.metadata.get(&key) {
            Some(Value::Integers(layers)) => {
                layers.get(index as usize).is_some_and(|flag| *flag != 0)
            }
            Some(Value::Unsigned(period)) => is_windowed(index, *period),
            _ => {
                let family = self.catalog.architecture.as_str();
                let known = WINDOW_PERIODS.iter().find(|(name, _)| *name == family);
                known.is_some_and(|(_, period)| is_windowed(index, *period))
            }
        };
        is_windowed.then_some(window)
    }

    fn state(&self, found: &Found) -> u64 {
        if found.has_short_convolution {
            let length = self.number("shortconv.l_cache").unwrap_or(0);
            return self.hidden_count.saturating_mul(length.saturating_sub(1));
        }
        if !found.has_state {
            return 0;
        }
        let number = |key: &str| self.number(key).unwrap_or(0);
        let (inner, state) = (number("ssm.inner_size"), number("ssm.state_size"));
        let groups = number("ssm.group_count")
            .saturating_mul(state)
            .saturating_mul(2);
        let convolution = number("ssm.conv_kernel").saturating_sub(1);
        inner
            .saturating_mul(state)
            .saturating_add(convolution.saturating_mul(inner.saturating_add(groups)))
    }
}

/// Of every `period` layers the last one sees everything; 0: none does.
const fn is_windowed(index: u64, period: u64) -> bool {
    period == 0 || index % period < period - 1
}
