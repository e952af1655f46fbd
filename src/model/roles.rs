//! Tensor roles: from a tensor's name to its place in a pass and the order of its use inside its layer.
//!
//! The order decides which part of a layer may arrive last, so it errs on the early side: a name the tables do not know
//! counts as used first ([`ORDER_UNKNOWN`]). A wrong order costs a wait, never a wrong byte. The tables follow llama.cpp's
//! `LLM_TENSOR_NAMES` and the module names of Hugging Face's transformers; where graphs differ, attention comes before
//! feed-forward, gate and up before down, the router before its experts, routed experts before shared ones.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

mod tables;

use tables::{GGUF_BLOCK, GGUF_HEAD, GGUF_ROWS, HF_BLOCK, HF_BLOCKS, HF_HEAD, HF_ROWS, Row};

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Role {
    /// One row per token of the vocabulary.
    TokenEmbedding,
    /// One row per position, token type and the like.
    OtherEmbedding,
    /// One row per token and layer.
    PerLayerEmbedding,
    /// Tables of the rotary position encoding.
    RopeTable,
    /// A normalisation or scale inside a layer.
    Norm,
    /// Attention's input side: query, key, value, their low-rank forms.
    Attention,
    /// Attention's output projection.
    AttentionOutput,
    /// A state-space, linear-attention, convolution or recurrent mixer.
    Mixer,
    /// Chooses the experts.
    Router,
    /// Feed-forward: gate and up.
    FeedForward,
    /// Feed-forward: down.
    FeedForwardDown,
    /// Gate and up of routed experts.
    Experts,
    /// Down of routed experts.
    ExpertsDown,
    /// Any part of a shared expert.
    SharedExpert,
    /// What mixes per-layer inputs or side streams in.
    Adapter,
    /// Only used to draft the token after the next.
    NextToken,
    /// The norm before the output head.
    OutputNorm,
    /// The output head.
    Output,
    /// None of these.
    Other,
}

impl Role {
    /// A word for tables.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::TokenEmbedding => "token rows",
            Self::OtherEmbedding => "rows",
            Self::PerLayerEmbedding => "per-layer rows",
            Self::RopeTable => "rope",
            Self::Norm => "norm",
            Self::Attention => "attention",
            Self::AttentionOutput => "attention out",
            Self::Mixer => "mixer",
            Self::Router => "router",
            Self::FeedForward => "ffn",
            Self::FeedForwardDown => "ffn down",
            Self::Experts => "experts",
            Self::ExpertsDown => "experts down",
            Self::SharedExpert => "shared expert",
            Self::Adapter => "adapter",
            Self::NextToken => "next token",
            Self::OutputNorm => "output norm",
            Self::Output => "output",
            Self::Other => "other",
        }
    }

    /// True for tables of which a pass needs single rows, chosen by the tokens.
    #[must_use]
    pub const fn is_row_table(self) -> bool {
        matches!(
            self,
            Self::TokenEmbedding | Self::OtherEmbedding | Self::PerLayerEmbedding
        )
    }

    /// True for routed experts, of which a pass needs only the chosen ones.
    #[must_use]
    pub const fn is_routed_expert(self) -> bool {
        matches!(self, Self::Experts | Self::ExpertsDown)
    }
}

/// Which vocabulary of tensor names a file uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// llama.cpp's (`blk.7.attn_q.weight`).
    Gguf,
    /// Hugging Face's (`model.layers.7.self_attn.q_proj.weight`).
    HuggingFace,
}

/// Where in a pass a tensor is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the block of this number.
    Block(u32),
    /// After the blocks.
    Head,
    /// Elsewhere: the host keeps it.
    Host,
}

/// What a tensor's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// Where in a pass it is used.
    pub place: Place,
    /// What it is for.
    pub role: Role,
    /// Its turn inside its layer: smaller is earlier.
    pub order: u16,
    /// The expert it belongs to, for files with one tensor per expert.
    pub expert_index: Option<u32>,
}

/// The order of a name no table knows: first, so that nothing is late.
pub const ORDER_UNKNOWN: u16 = 0;

/// What the name of a tensor says.
#[must_use]
pub fn classify(naming: Naming, name: &str) -> Meaning {
    let (block, rows, head) = match naming {
        Naming::Gguf => (split_block(name, &["blk."]), GGUF_ROWS, GGUF_HEAD),
        Naming::HuggingFace => (split_block(name, HF_BLOCKS), HF_ROWS, HF_HEAD),
    };
    if let Some((number, rest)) = block {
        return in_block(naming, number, rest);
    }
    let outside = |place, (role, order)| Meaning {
        place,
        role,
        order,
        expert_index: None,
    };
    if let Some(found) = lookup(head, name) {
        return outside(Place::Head, found);
    }
    outside(
        Place::Host,
        lookup(rows, name).unwrap_or((Role::Other, ORDER_UNKNOWN)),
    )
}

fn in_block(naming: Naming, number: u32, rest: &str) -> Meaning {
    let (stem, expert_index) = without_number(rest);
    let table = match naming {
        Naming::Gguf => GGUF_BLOCK,
        Naming::HuggingFace => HF_BLOCK,
    };
    let (role, order) = match (naming, expert_index, lookup(table, &stem)) {
        // blk.0.ffn_gate.3.weight, the first mixtral files: an expert under the dense name.
        (Naming::Gguf, Some(_), Some((Role::FeedForward, order))) => (Role::Experts, order + 40),
        (Naming::Gguf, Some(_), Some((Role::FeedForwardDown, order))) => {
            (Role::ExpertsDown, order + 40)
        }
        (_, _, found) => found.unwrap_or((Role::Other, ORDER_UNKNOWN)),
    };
    Meaning {
        place: Place::Block(number),
        role,
        order,
        expert_index: expert_index.filter(|_| role.is_routed_expert()),
    }
}

/// `blk.7.attn_q.weight` -> 7 and `attn_q.weight`.
fn split_block<'a>(name: &'a str, prefixes: &[&str]) -> Option<(u32, &'a str)> {
    let rest = prefixes
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    let (number, rest) = rest.split_once('.')?;
    Some((canonical_number(number)?, rest))
}

/// A number as programs write it: digits only, no leading zero. Anything else is part of a name.
fn canonical_number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}

/// Takes the first number out of a dotted name: `mlp.experts.3.up_proj` -> `mlp.experts.up_proj`, 3.
fn without_number(name: &str) -> (String, Option<u32>) {
    let mut number = None;
    let mut stem = String::with_capacity(name.len());
    for part in name.split('.') {
        if number.is_none() && canonical_number(part).is_some() {
            number = canonical_number(part);
            continue;
        }
        if !stem.is_empty() {
            stem.push('.');
        }
        stem.push_str(part);
    }
    (stem, number)
}

/// The row whose stem is the longest run of leading dotted parts of `name`.
fn lookup(table: &[Row], name: &str) -> Option<(Role, u16)> {
    let mut stem = name;
    loop {
        if let Some(&(_, role, order)) = table.iter().find(|row| row.0 == stem) {
            return Some((role, order));
        }
        stem = stem.rsplit_once('.')?.0;
    }
}

#[cfg(test)]
mod tests;
