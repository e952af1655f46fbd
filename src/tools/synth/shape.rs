//! The shape of a synthetic model: what was asked for, sensible values for the rest, and the rules both must obey.
//!
//! With a target size, width, depth and the width of the feed-forward part are chosen so that the file comes out within
//! a few percent of it; whatever was given stays as given. All numbers are bounded here, so that later products fit
//! 64 bits with ease.

pub use super::arch::{Arch, Quant};
use super::tensors;
use super::vocab::{QUIET_TOKENS, VOCAB_MAX, VOCAB_MIN};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GIB, HumanBytes, MIB};

/// Limits of llama.cpp, and of sense.
const LAYERS_MAX: u64 = 512;
const EXPERTS_MAX: u64 = 512;
const EMBD_MAX: u64 = 1 << 16;
const FFN_MAX: u64 = 1 << 18;
const HEADS_MAX: u64 = 512;
const CTX_MAX: u64 = 1 << 24;
/// Below this size the steps of layers and widths are too coarse, and the vocabulary is adapted as well.
const VOCAB_IS_FREE_BYTES: u64 = 128 * MIB;
/// A target size may be missed by this share of it before that is an error.
const SIZE_SLACK: f64 = 0.05;

/// What the user asked for; what is left open is chosen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    /// About this many bytes of file.
    pub size_bytes: Option<u64>,
    /// Transformer layers.
    pub layers: Option<u64>,
    /// Width of the model.
    pub embd: Option<u64>,
    /// Width of the feed-forward part (of one expert, where there are experts).
    pub ffn: Option<u64>,
    /// Attention heads.
    pub heads: Option<u64>,
    /// Heads of keys and values.
    pub kv_heads: Option<u64>,
    /// Width of a head.
    pub head_dim: Option<u64>,
    /// Tokens in the vocabulary.
    pub vocab: Option<u64>,
    /// Experts per layer.
    pub experts: Option<u64>,
    /// Experts used per token.
    pub experts_used: Option<u64>,
    /// Context length the model claims.
    pub ctx: Option<u64>,
    /// Output head and embeddings share one tensor.
    pub tied: bool,
}

impl Wish {
    /// Nothing is zero or so large that a product could overflow; the finer rules are those of [`Shape`].
    fn check(&self) -> Result<()> {
        for (flag, value) in [
            ("layers", self.layers),
            ("embd", self.embd),
            ("ffn", self.ffn),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("head-dim", self.head_dim),
            ("vocab", self.vocab),
            ("ctx", self.ctx),
        ] {
            if let Some(value) = value
                && !(1..=CTX_MAX).contains(&value)
            {
                return Err(invalid(format!("--{flag} {value} is out of range")));
            }
        }
        Ok(())
    }
}

/// A complete, valid shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Architecture.
    pub arch: Arch,
    /// Storage of the matrices.
    pub quant: Quant,
    /// Transformer layers.
    pub layers: u64,
    /// Width of the model.
    pub embd: u64,
    /// Width of the feed-forward part (of one expert).
    pub ffn: u64,
    /// Attention heads.
    pub heads: u64,
    /// Heads of keys and values.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Tokens in the vocabulary.
    pub vocab: u64,
    /// Experts per layer, 0 in a dense model.
    pub experts: u64,
    /// Experts used per token.
    pub experts_used: u64,
    /// Context length.
    pub ctx: u64,
    /// No output tensor: the embeddings serve.
    pub tied: bool,
}

impl Shape {
    /// The shape for a wish.
    ///
    /// # Errors
    /// `Invalid`: numbers that do not go together, or a size that cannot be reached with them.
    pub fn choose(arch: Arch, quant: Quant, wish: &Wish) -> Result<Self> {
        wish.check()?;
        let shape = match wish.size_bytes {
            Some(size_bytes) => fit(arch, quant, wish, size_bytes)?,
            None => fill(arch, quant, wish, wish.embd.unwrap_or(512), 4096),
        };
        shape.check()?;
        Ok(shape)
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn tensor_bytes(&self) -> u64 {
        tensors::totals(self).0
    }

    /// Weights of all tensors.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        tensors::totals(self).1
    }

    fn check(&self) -> Result<()> {
        self.check_bounds()?;
        self.check_heads()?;
        self.check_experts()?;
        for tensor in tensors::list(self) {
            let (row, block) = (tensor.shape[0], tensor.kind.block_elements());
            if row % block != 0 {
                return Err(invalid(format!(
                    "{} has rows of {row} weights, but {} stores them {block} at a time; choose --embd, --ffn and \
                     heads times head width as multiples of {block}",
                    tensor.name, self.quant
                )));
            }
        }
        Ok(())
    }

    fn check_bounds(&self) -> Result<()> {
        for (flag, value, least, most) in [
            ("layers", self.layers, 1, LAYERS_MAX),
            ("embd", self.embd, 32, EMBD_MAX),
            ("ffn", self.ffn, 32, FFN_MAX),
            ("heads", self.heads, 1, HEADS_MAX),
            ("kv-heads", self.kv_heads, 1, self.heads),
            ("head-dim", self.head_dim, 2, 1024),
            ("vocab", self.vocab, VOCAB_MIN, VOCAB_MAX),
            ("ctx", self.ctx, 1, CTX_MAX),
        ] {
            if value < least || value > most {
                return Err(invalid(format!(
                    "--{flag} {value} is out of range; {least} to {most} will do"
                )));
            }
        }
        Ok(())
    }

    fn check_heads(&self) -> Result<()> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(invalid(format!(
                "--heads {} is not a multiple of --kv-heads {}",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid(format!(
                "a head of {} weights cannot be rotated; its width must be even (--head-dim)",
                self.head_dim
            )));
        }
        let natural = self.head_dim * self.heads == self.embd;
        if self.arch == Arch::Qwen2 && !natural {
            return Err(invalid(format!(
                "qwen2 wants --embd {} to be --heads {} times the head width {}",
                self.embd, self.heads, self.head_dim
            )));
        }
        Ok(())
    }

    fn check_experts(&self) -> Result<()> {
        if !self.arch.has_experts() {
            return if self.experts == 0 && self.experts_used == 0 {
                Ok(())
            } else {
                Err(invalid(format!(
                    "{} has no experts; mixtral, qwen3moe and gpt-oss do",
                    self.arch
                )))
            };
        }
        if !(2..=EXPERTS_MAX).contains(&self.experts)
            || !(1..=self.experts).contains(&self.experts_used)
        {
            return Err(invalid(format!(
                "--experts {} --experts-used {} is out of range; 2 to {EXPERTS_MAX}, and at most as many used",
                self.experts, self.experts_used
            )));
        }
        Ok(())
    }
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::Invalid, context)
}

/// The usual proportions around a width.
fn fill(arch: Arch, quant: Quant, wish: &Wish, embd: u64, vocab: u64) -> Shape {
    let head_width = if embd >= 1024 { 128 } else { 64 };
    let heads = wish
        .heads
        .unwrap_or_else(|| (embd / wish.head_dim.unwrap_or(head_width)).max(1));
    // A quarter of the heads for keys and values where that divides, as in most models of today.
    let kv_heads = [4, 2, 5, 3]
        .into_iter()
        .find(|share| heads.is_multiple_of(*share))
        .map_or(heads, |share| heads / share);
    let (experts, experts_used, ffn) = match arch {
        Arch::Mixtral => (8, 2, embd * 11 / 4),
        Arch::Qwen3Moe => (16, 4, embd * 3 / 8),
        Arch::GptOss => (16, 4, embd),
        _ => (0, 0, embd * 11 / 4),
    };
    let experts = wish.experts.unwrap_or(experts);
    Shape {
        arch,
        quant,
        layers: wish.layers.unwrap_or(8),
        embd,
        ffn: wish.ffn.unwrap_or(ffn.next_multiple_of(256)),
        heads,
        kv_heads: wish.kv_heads.unwrap_or(kv_heads),
        head_dim: wish.head_dim.unwrap_or_else(|| embd / heads.max(1)),
        vocab: wish.vocab.unwrap_or(vocab),
        experts,
        experts_used: wish.experts_used.unwrap_or(experts_used.min(experts)),
        ctx: wish.ctx.unwrap_or(4096),
        tied: wish.tied || arch.is_always_tied(),
    }
}

/// Widths to choose from: every one a multiple of 256, with whole heads.
const WIDTHS: [u64; 15] = [
    256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 10_240, 12_288, 16_384,
];

fn fit(arch: Arch, quant: Quant, wish: &Wish, size_bytes: u64) -> Result<Shape> {
    let vocab = match size_bytes {
        bytes if bytes < 16 * MIB => VOCAB_MIN,
        bytes if bytes < VOCAB_IS_FREE_BYTES => 4096,
        bytes if bytes < GIB => 16_000,
        _ => 32_000,
    };
    let widths = wish.embd.map_or_else(|| WIDTHS.to_vec(), |embd| vec![embd]);
    let best = widths
        .into_iter()
        .map(|embd| fill(arch, quant, wish, embd, vocab))
        .filter(|shape| shape.check_bounds().is_ok())
        .map(|shape| tune(shape, wish, size_bytes))
        .filter(|shape| shape.check().is_ok())
        .min_by(|a, b| badness(a, wish, size_bytes).total_cmp(&badness(b, wish, size_bytes)))
        .ok_or_else(|| {
            invalid(format!(
                "no shape of {} fits these options; leave more of them open",
                HumanBytes(size_bytes)
            ))
        })?;
    let reached = best.tensor_bytes();
    if miss(reached, size_bytes) > SIZE_SLACK {
        return Err(invalid(format!(
            "with these options the model comes to {}, not {}; leave --layers, --embd or --ffn open",
            HumanBytes(reached),
            HumanBytes(size_bytes)
        )));
    }
    Ok(best)
}

fn miss(reached: u64, wanted: u64) -> f64 {
    (reached as f64 / wanted.max(1) as f64 - 1.0).abs()
}

/// First the size, then proportions: somewhat deeper than real models of the width, because the ring of a model with few
/// layers takes a large share of it, and small budgets could not be tried.
fn badness(shape: &Shape, wish: &Wish, size_bytes: u64) -> f64 {
    let miss = miss(shape.tensor_bytes(), size_bytes);
    let far = if miss > SIZE_SLACK { 100.0 + miss } else { 0.0 };
    let usual = (shape.embd as f64 / 45.0).clamp(8.0, 96.0);
    let stretch = (shape.layers as f64 / usual).ln().abs();
    let usual_ffn = fill(shape.arch, shape.quant, wish, shape.embd, shape.vocab).ffn;
    far + stretch + (shape.ffn as f64 / usual_ffn as f64).ln().abs()
}

/// Layers, then the width of the feed-forward part, then (of small models) the vocabulary, so that the size comes out.
fn tune(mut shape: Shape, wish: &Wish, size_bytes: u64) -> Shape {
    if wish.layers.is_none() {
        shape.layers = crossing(2, LAYERS_MAX, |layers| {
            Shape { layers, ..shape }.tensor_bytes() >= size_bytes
        });
        let fewer = Shape {
            layers: (shape.layers - 1).max(2),
            ..shape
        };
        if miss(fewer.tensor_bytes(), size_bytes) < miss(shape.tensor_bytes(), size_bytes) {
            shape = fewer;
        }
    }
    if wish.ffn.is_none() {
        let wider = |steps: u64| Shape {
            ffn: steps * 256,
            ..shape
        };
        let steps = crossing(1, 4 * shape.embd.div_ceil(256).max(4), |steps| {
            wider(steps).tensor_bytes() >= size_bytes
        });
        let candidates = [wider((steps - 1).max(1)), wider(steps)];
        let off = |shape: &Shape| miss(shape.tensor_bytes(), size_bytes);
        shape =
            candidates.into_iter().fold(
                shape,
                |best, next| if off(&next) < off(&best) { next } else { best },
            );
    }
    if wish.vocab.is_none() && size_bytes < VOCAB_IS_FREE_BYTES {
        let usual = shape.vocab;
        shape.vocab = crossing(VOCAB_MIN.max(usual / 2), 4 * usual, |vocab| {
            Shape { vocab, ..shape }.tensor_bytes() >= size_bytes
        });
    }
    shape
}

/// The least value from `least` to `most` for which `reached` holds; `most` if for none. Bisection: `reached` is monotonic.
fn crossing(mut least: u64, mut most: u64, reached: impl Fn(u64) -> bool) -> u64 {
    while least < most {
        let middle = least.midpoint(most);
        if reached(middle) {
            most = middle;
        } else {
            least = middle + 1;
        }
    }
    least
}

const _: () = assert!(VOCAB_MIN > QUIET_TOKENS);

#[cfg(test)]
#[path = "shape_tests.rs"]
mod tests;
