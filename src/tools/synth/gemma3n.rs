//! What Gemma 3n has beyond Gemma 3: a second table of embeddings with one row for each token and layer, four streams
//! side by side (AltUp), and a short cut of low rank beside attention (Laurel). Widths are those that llama.cpp fixes.

use super::blocks::Kind;
use super::shape::Shape;
use super::tensors::{Fill, Tensor, root};

/// Values of the second table for each token and layer.
pub const PER_LAYER_WIDTH: u64 = 256;
/// Streams side by side; the first is the one that layers compute with.
pub const STREAMS: u64 = 4;
/// Width of the short cut.
const LAUREL_RANK: u64 = 64;
/// A layer hands its normed input on beside attention. With a norm around -1 it takes away instead of adding, and the
/// embedding, which is also the output head, does not make every token predict itself.
const INPUT_NORM: f32 = -1.0;
/// Strength of what attention, the short cut and the second table add to the stream; the feed-forward part adds 1.
const ADDED: f32 = 0.5;

/// The tensors outside of the layers, in file order.
pub(super) fn outside(shape: &Shape) -> Vec<Tensor> {
    let (embd, layers) = (shape.embd, shape.layers);
    let width = PER_LAYER_WIDTH * layers;
    let kind = shape.quant.kind();
    let tensor = |name: &str, dims: Vec<u64>, kind: Kind, fill: Fill| Tensor {
        name: format!("{name}.weight"),
        shape: dims,
        kind,
        fill,
    };
    let streams = |name: &str| {
        let dims = vec![embd, embd, STREAMS - 1];
        tensor(name, dims, kind, Fill::matrix(1.0 / root(embd)))
    };
    vec![
        streams("altup_proj"),
        streams("altup_unembd_proj"),
        // llama.cpp multiplies the rows by the root of their width.
        tensor(
            "per_layer_token_embd",
            vec![width, shape.vocab],
            kind,
            Fill::matrix(1.0 / root(PER_LAYER_WIDTH)),
        ),
        tensor(
            "per_layer_model_proj",
            vec![embd, width],
            kind,
            Fill::matrix(1.0 / root(embd)),
        ),
        tensor(
            "per_layer_proj_norm",
            vec![PER_LAYER_WIDTH],
            Kind::F32,
            Fill::norm(1.0),
        ),
    ]
}

/// The roles that only Gemma 3n has, or fills otherwise than the rest.
pub(super) fn layer_parts(shape: &Shape, role: &str) -> Option<(Vec<u64>, Kind, Fill)> {
    let embd = shape.embd;
    let vector = |width: u64, fill: Fill| Some((vec![width], Kind::F32, fill));
    let small =
        |row: u64, rows: u64, std: f32| Some((vec![row, rows], Kind::F32, Fill::matrix(std)));
    let matrix = |row: u64, rows: u64| {
        let whole = row.is_multiple_of(shape.quant.kind().block_elements());
        // As llama.cpp falls back where a row is no whole number of blocks.
        let kind = if whole {
            shape.quant.kind()
        } else {
            Kind::Q8_0
        };
        Some((vec![row, rows], kind, Fill::matrix(1.0 / root(row))))
    };
    match role {
        "altup_correct_coef.weight" => small(STREAMS, STREAMS, 0.1),
        "altup_predict_coef.weight" => small(STREAMS, STREAMS * STREAMS, 0.1),
        // llama.cpp divides the input by its width: this makes it about 1 again.
        "altup_router.weight" => small(embd, STREAMS, root(embd)),
        "altup_router_norm.weight" | "altup_correct_scale.weight" => vector(embd, Fill::norm(1.0)),
        "attn_norm.weight" => vector(embd, Fill::norm(INPUT_NORM)),
        // There is no other scale in its attention.
        "attn_q_norm.weight" => vector(shape.head_dim, Fill::norm(2.0 / root(shape.head_dim))),
        "laurel_l.weight" => matrix(embd, LAUREL_RANK),
        "laurel_r.weight" => matrix(LAUREL_RANK, embd),
        "inp_gate.weight" => matrix(embd, PER_LAYER_WIDTH),
        "proj.weight" => matrix(PER_LAYER_WIDTH, embd),
        "laurel_post_norm.weight" | "post_attention_norm.weight" | "post_norm.weight" => {
            vector(embd, Fill::norm(ADDED))
        }
        "post_ffw_norm.weight" => vector(embd, Fill::norm(1.0)),
        _ => None,
    }
}
