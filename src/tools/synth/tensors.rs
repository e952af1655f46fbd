//! The tensors of a synthetic model: names, shapes and storage as llama.cpp wants them, in the order of real files.
//!
//! The order inside a layer is that of converted models (the names of the original sorted, so feed-forward stands before
//! attention), because a plan must cope with it. The spread of the weights keeps activations near one at any depth:
//! a matrix has 1/sqrt(row length), the last matrix of each residual branch also 1/sqrt(2 * layers).

use super::blocks::Kind;
use super::gemma3n;
use super::roles::roles;
use super::shape::{Arch, Quant, Shape};
use super::vocab::QUIET_TOKENS;

/// Standard deviation of the logits: the greedy choice stands out, sampling still has a choice.
const LOGIT_STD: f32 = 3.0;
/// Special tokens and bytes are this much weaker, so that they never win. Norms make up for it on the way in.
const QUIET: f32 = 0.25;
/// Norms, biases and routers differ by this much from row to row, so that a wrong one shows.
const NORM_STD: f32 = 0.1;
/// Of gpt-oss; its logits have a standard deviation of 1 before [`super::router`] weakens some.
const ROUTER_BIAS_STD: f32 = 0.02;

/// How a tensor's weights are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fill {
    /// Mean; only of `F32` tensors other than 0.
    pub mean: f32,
    /// Standard deviation.
    pub std: f32,
    /// The first rows are weaker by [`Fill::quiet`].
    pub quiet_rows: u64,
}

impl Fill {
    pub(super) const fn matrix(std: f32) -> Self {
        Self {
            mean: 0.0,
            std,
            quiet_rows: 0,
        }
    }

    pub(super) const fn norm(mean: f32) -> Self {
        Self {
            mean,
            std: NORM_STD * mean.abs(),
            quiet_rows: 0,
        }
    }

    /// The fill of the quiet rows.
    #[must_use]
    pub const fn quiet(self) -> Self {
        Self {
            mean: self.mean,
            std: self.std * QUIET,
            quiet_rows: 0,
        }
    }
}

/// One tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// As llama.cpp names it.
    pub name: String,
    /// ggml order, row length first.
    pub shape: Vec<u64>,
    /// Storage.
    pub kind: Kind,
    /// Its weights.
    pub fill: Fill,
}

impl Tensor {
    /// Weights in it.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes in the file, without padding.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.kind.bytes(self.elements())
    }
}

/// All tensors of a model, in file order.
#[must_use]
pub fn list(shape: &Shape) -> Vec<Tensor> {
    let mut outside = outside(shape).into_iter();
    let mut tensors: Vec<Tensor> = outside.next().into_iter().collect();
    for layer in 0..shape.layers {
        tensors.extend(layer_tensors(shape, layer));
    }
    tensors.extend(outside);
    tensors
}

/// The embeddings, which stand before the layers, and what stands behind them.
fn outside(shape: &Shape) -> Vec<Tensor> {
    let mut tensors = vec![token_embd(shape)];
    if shape.arch == Arch::Gemma3n {
        tensors.extend(gemma3n::outside(shape));
    }
    tensors.push(Tensor {
        name: "output_norm.weight".to_owned(),
        shape: vec![shape.embd],
        kind: Kind::F32,
        fill: Fill::norm(LOGIT_STD / (head_std(shape) * root(shape.embd))),
    });
    if !shape.tied {
        tensors.push(Tensor {
            name: "output.weight".to_owned(),
            shape: vec![shape.embd, shape.vocab],
            kind: head_kind(shape.quant),
            fill: Fill {
                quiet_rows: QUIET_TOKENS,
                ..Fill::matrix(head_std(shape))
            },
        });
    }
    tensors
}

/// Bytes and weights of all tensors, without listing them: layers come in two kinds, with and without more bits.
#[must_use]
pub fn totals(shape: &Shape) -> (u64, u64) {
    let sum = |tensors: &[Tensor]| {
        let bytes: u64 = tensors.iter().map(Tensor::bytes).sum();
        let elements: u64 = tensors.iter().map(Tensor::elements).sum();
        (bytes, elements)
    };
    let (mut bytes, mut elements) = sum(&outside(shape));
    for more_bits in [false, true] {
        let mut alike = (0..shape.layers).filter(|layer| has_more_bits(shape, *layer) == more_bits);
        if let Some(layer) = alike.next() {
            let (layer_bytes, layer_elements) = sum(&layer_tensors(shape, layer));
            let count = 1 + alike.count() as u64;
            bytes += count * layer_bytes;
            elements += count * layer_elements;
        }
    }
    (bytes, elements)
}

pub(super) fn root(count: u64) -> f32 {
    (count as f32).sqrt()
}

/// Embeddings that are also the output head must be weak against what the layers add: a strong one would make every
/// token predict itself, and the greedy choice would never leave it. gemma multiplies them by sqrt(embd).
fn embd_std(shape: &Shape) -> f32 {
    match (shape.arch, shape.tied) {
        (Arch::Gemma3 | Arch::Gemma3n, _) => 0.05 / root(shape.embd),
        (_, true) => 0.2 / root(shape.embd),
        (_, false) => 0.5,
    }
}

/// Strength of the residual stream's first value, the embedding.
fn embd_strength(shape: &Shape) -> f32 {
    match shape.arch {
        Arch::Gemma3 | Arch::Gemma3n => embd_std(shape) * root(shape.embd),
        _ => embd_std(shape),
    }
}

/// Strength of what one branch adds to the residual stream, which grows with all of them to a half. gemma's must outgrow
/// its embeddings, which it multiplies by sqrt(embd).
fn branch_strength(shape: &Shape) -> f32 {
    let stream = match shape.arch {
        Arch::Gemma3 => 0.125 * root(shape.embd),
        _ => 1.0,
    };
    stream / root(2 * shape.layers)
}

/// Attention adds half as much, and in the first layer no more than the embedding: else the token at hand drowns in
/// those before it, and the same choice comes again and again.
fn attention_strength(shape: &Shape, layer: u64) -> f32 {
    let usual = 0.5 * branch_strength(shape);
    if layer == 0 {
        usual.min(embd_strength(shape))
    } else {
        usual
    }
}

fn head_std(shape: &Shape) -> f32 {
    if shape.tied {
        embd_std(shape)
    } else {
        1.0 / root(shape.embd)
    }
}

const fn head_kind(quant: Quant) -> Kind {
    match quant {
        Quant::Q4KM => Kind::Q6K,
        _ => quant.kind(),
    }
}

fn token_embd(shape: &Shape) -> Tensor {
    Tensor {
        name: "token_embd.weight".to_owned(),
        shape: vec![shape.embd, shape.vocab],
        kind: if shape.tied {
            head_kind(shape.quant)
        } else {
            shape.quant.kind()
        },
        fill: Fill {
            quiet_rows: QUIET_TOKENS,
            ..Fill::matrix(embd_std(shape))
        },
    }
}

fn layer_tensors(shape: &Shape, layer: u64) -> Vec<Tensor> {
    let tensor = |role: &&str| {
        let (dims, kind, fill) = layer_parts(shape, layer, role);
        Tensor {
            name: format!("blk.{layer}.{role}"),
            shape: dims,
            kind,
            fill,
        }
    };
    roles(shape.arch).iter().map(tensor).collect()
}

fn layer_parts(shape: &Shape, layer: u64, role: &str) -> (Vec<u64>, Kind, Fill) {
    let (embd, ffn, experts) = (shape.embd, shape.ffn, shape.experts);
    let q_width = shape.heads * shape.head_dim;
    let kv_width = shape.kv_heads * shape.head_dim;
    let matrix = |row: u64, rows: &[u64], scale: f32| {
        let dims = std::iter::once(row).chain(rows.iter().copied()).collect();
        (
            dims,
            matrix_kind(shape, layer, role),
            Fill::matrix(scale / root(row)),
        )
    };
    let vector = |width: u64, fill: Fill| (vec![width], Kind::F32, fill);
    // The last matrix of a branch sets its strength, or the norm behind it where there is one.
    let (attention, feed_forward) = match shape.arch {
        Arch::Gemma3 => (1.0, 1.0),
        _ => (attention_strength(shape, layer), branch_strength(shape)),
    };
    if shape.arch == Arch::Gemma3n
        && let Some(parts) = gemma3n::layer_parts(shape, role)
    {
        return parts;
    }
    match role {
        "attn_norm.weight" | "ffn_norm.weight" => vector(embd, Fill::norm(1.0)),
        // gpt-oss calls the norm in front of its experts so.
        "post_attention_norm.weight" if shape.arch == Arch::GptOss => vector(embd, Fill::norm(1.0)),
        "post_attention_norm.weight" => vector(embd, Fill::norm(attention_strength(shape, layer))),
        "post_ffw_norm.weight" => vector(embd, Fill::norm(branch_strength(shape))),
        // Twice the usual strength of queries: attention that looks somewhere.
        "attn_q_norm.weight" => vector(shape.head_dim, Fill::norm(2.0)),
        "attn_k_norm.weight" => vector(shape.head_dim, Fill::norm(1.0)),
        "attn_q.bias" => vector(q_width, Fill::matrix(NORM_STD)),
        "attn_k.bias" | "attn_v.bias" => vector(kv_width, Fill::matrix(NORM_STD)),
        "attn_q.weight" => matrix(embd, &[q_width], 2.0),
        "attn_k.weight" | "attn_v.weight" => matrix(embd, &[kv_width], 1.0),
        "attn_output.weight" => matrix(q_width, &[embd], attention),
        "ffn_gate.weight" | "ffn_up.weight" => matrix(embd, &[ffn], 1.0),
        "ffn_down.weight" => matrix(ffn, &[embd], feed_forward),
        "attn_output.bias" => vector(embd, Fill::matrix(NORM_STD * attention)),
        "attn_sinks.weight" => vector(shape.heads, Fill::matrix(1.0)),
        "ffn_gate_exps.bias" | "ffn_up_exps.bias" => {
            (vec![ffn, experts], Kind::F32, Fill::matrix(NORM_STD))
        }
        "ffn_down_exps.bias" => (
            vec![embd, experts],
            Kind::F32,
            Fill::matrix(NORM_STD * feed_forward),
        ),
        // Weak: the state decides, not the bias.
        "ffn_gate_inp.bias" => vector(experts, Fill::matrix(ROUTER_BIAS_STD)),
        "ffn_gate_inp.weight" => (
            vec![embd, experts],
            Kind::F32,
            Fill::matrix(1.0 / root(embd)),
        ),
        "ffn_gate_exps.weight" | "ffn_up_exps.weight" => matrix(embd, &[ffn, experts], 1.0),
        "ffn_down_exps.weight" => matrix(ffn, &[embd, experts], feed_forward),
        other => unreachable!("role {other} is not in the table"),
    }
}

/// llama.cpp's choice for Q4_K_M (llama-quant.cpp): half of the value and down projections get more bits, and with
/// eight experts attention, small beside them, gets still more.
fn matrix_kind(shape: &Shape, layer: u64, role: &str) -> Kind {
    if shape.quant == Quant::Mxfp4 && role.contains("_exps.") {
        return Kind::Mxfp4;
    }
    if shape.quant != Quant::Q4KM {
        return shape.quant.kind();
    }
    let more_bits = has_more_bits(shape, layer);
    match role {
        "attn_v.weight" | "attn_k.weight" if shape.experts == 8 => Kind::Q8_0,
        "attn_output.weight" if shape.experts == 8 => Kind::Q5K,
        "attn_v.weight" | "ffn_down.weight" | "ffn_down_exps.weight" if more_bits => Kind::Q6K,
        _ => Kind::Q4K,
    }
}

const fn has_more_bits(shape: &Shape, layer: u64) -> bool {
    let eighth = shape.layers / 8;
    layer < eighth || layer >= 7 * shape.layers / 8 || (layer - eighth) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::synth::shape::Wish;

    fn shape(arch: Arch, quant: Quant, tied: bool) -> Shape {
        let wish = Wish {
            tied,
            layers: Some(16),
            ..Wish::default()
        };
        Shape::choose(arch, quant, &wish).unwrap()
    }

    fn kind_of(tensors: &[Tensor], name: &str) -> Kind {
        tensors.iter().find(|t| t.name == name).unwrap().kind
    }

    #[test]
    fn the_mix_is_that_of_llama_cpp() {
        let tensors = list(&shape(Arch::Llama, Quant::Q4KM, false));
        // 16 layers: the first 2, the last 2, and every third between have more bits.
        for layer in 0..16 {
            let more = [0, 1, 4, 7, 10, 13, 14, 15].contains(&layer);
            let expected = if more { Kind::Q6K } else { Kind::Q4K };
            for role in ["attn_v", "ffn_down"] {
                assert_eq!(
                    kind_of(&tensors, &format!("blk.{layer}.{role}.weight")),
                    expected
                );
            }
        }
        assert_eq!(kind_of(&tensors, "output.weight"), Kind::Q6K);
        assert_eq!(kind_of(&tensors, "token_embd.weight"), Kind::Q4K);
    }

    #[test]
    fn eight_experts_get_better_attention() {
        let tensors = list(&shape(Arch::Mixtral, Quant::Q4KM, false));
        assert_eq!(kind_of(&tensors, "blk.3.attn_k.weight"), Kind::Q8_0);
        assert_eq!(kind_of(&tensors, "blk.3.attn_output.weight"), Kind::Q5K);
        assert_eq!(kind_of(&tensors, "blk.3.ffn_gate_inp.weight"), Kind::F32);
    }

    #[test]
    fn tied_models_have_one_table_in_the_kind_of_the_head() {
        let tensors = list(&shape(Arch::Qwen3, Quant::Q4KM, true));
        assert!(tensors.iter().all(|tensor| tensor.name != "output.weight"));
        assert_eq!(kind_of(&tensors, "token_embd.weight"), Kind::Q6K);
    }

    #[test]
    fn every_role_of_every_architecture_has_a_shape() {
        for arch in Arch::ALL {
            let shape = shape(arch, Quant::Q8_0, false);
            let tensors = list(&shape);
            let outside =
                if shape.tied { 2 } else { 3 } + if arch == Arch::Gemma3n { 5 } else { 0 };
            assert_eq!(tensors.len(), 16 * roles(arch).len() + outside);
            assert!(tensors.iter().all(|tensor| tensor.elements() > 0));
        }
    }

    #[test]
    fn totals_are_those_of_the_list() {
        for arch in Arch::ALL {
            for layers in [1, 7, 16] {
                let shape = Shape {
                    layers,
                    ..shape(arch, Quant::Q4KM, false)
                };
                let tensors = list(&shape);
                let bytes: u64 = tensors.iter().map(Tensor::bytes).sum();
                let elements: u64 = tensors.iter().map(Tensor::elements).sum();
                assert_eq!(totals(&shape), (bytes, elements), "{arch} {layers}");
            }
        }
    }
}
