//! What a synthetic model can be: its architecture, and how its matrices are stored.
//!
//! The names on the command line and in the file, both llama.cpp's.

use std::fmt;
use std::str::FromStr;

use super::blocks::Kind;
use super::vocab::Tokenizer;

/// Architectures, by the names of llama.cpp (mixtral is its llama with experts).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// Llama 2 and 3, Mistral.
    Llama,
    /// Qwen 2: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: norms on queries and keys.
    Qwen3,
    /// Gemma 3: sliding windows, norms behind each branch, always tied embeddings.
    Gemma3,
    /// Mixtral.
    Mixtral,
    /// Qwen 3 with many small experts.
    Qwen3Moe,
    /// gpt-oss: experts with biases, attention sinks, every other layer with a sliding window.
    GptOss,
    /// Gemma 3n: a second table of embeddings, one row of it for each token and layer; four streams side by side.
    Gemma3n,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Llama,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma3,
        Self::Mixtral,
        Self::Qwen3Moe,
        Self::GptOss,
        Self::Gemma3n,
    ];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mixtral => "mixtral",
            _ => self.gguf_name(),
        }
    }

    /// `general.architecture`.
    #[must_use]
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama | Self::Mixtral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
            Self::Qwen3Moe => "qwen3moe",
            Self::GptOss => "gpt-oss",
            Self::Gemma3n => "gemma3n",
        }
    }

    /// True where the feed-forward part is a mixture of experts.
    #[must_use]
    pub const fn has_experts(self) -> bool {
        matches!(self, Self::Mixtral | Self::Qwen3Moe | Self::GptOss)
    }

    /// True where embeddings and output head are always one tensor.
    #[must_use]
    pub const fn is_always_tied(self) -> bool {
        matches!(self, Self::Gemma3 | Self::Gemma3n)
    }

    /// The tokenizer its models come with.
    #[must_use]
    pub const fn tokenizer(self) -> Tokenizer {
        match self {
            Self::Llama | Self::Mixtral | Self::Gemma3 | Self::Gemma3n => Tokenizer::SentencePiece,
            Self::Qwen2 | Self::Qwen3 | Self::Qwen3Moe | Self::GptOss => Tokenizer::BytePairs,
        }
    }
}

/// How the matrices are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quant {
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits.
    Q8_0,
    /// 4 bits.
    Q4_0,
    /// 4 bits in blocks of 256, everywhere.
    Q4K,
    /// llama.cpp's mix: mostly Q4_K, some tensors Q6_K, attention of eight-expert models Q8_0 and Q5_K.
    Q4KM,
    /// 6 bits in blocks of 256.
    Q6K,
    /// Experts in 4-bit floats with one exponent for 32, the rest 8 bits: how gpt-oss comes.
    Mxfp4,
}

impl Quant {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4K,
        Self::Q4KM,
        Self::Q6K,
        Self::Mxfp4,
    ];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_k",
            Self::Q4KM => "q4_k_m",
            Self::Q6K => "q6_k",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// `general.file_type`, llama.cpp's number of the mix.
    #[must_use]
    pub const fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4K => 14,
            Self::Q4KM => 15,
            Self::Q6K => 18,
            Self::Bf16 => 32,
            Self::Mxfp4 => 38,
        }
    }

    /// The kind of most matrices.
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self {
            Self::F16 => Kind::F16,
            Self::Bf16 => Kind::Bf16,
            Self::Q8_0 | Self::Mxfp4 => Kind::Q8_0,
            Self::Q4_0 => Kind::Q4_0,
            Self::Q4K | Self::Q4KM => Kind::Q4K,
            Self::Q6K => Kind::Q6K,
        }
    }
}

macro_rules! named {
    ($type:ty, $what:literal) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                Self::ALL
                    .into_iter()
                    .find(|value| value.name().eq_ignore_ascii_case(text))
                    .ok_or_else(|| {
                        let names = Self::ALL.map(Self::name).join(", ");
                        format!(
                            concat!("'{}' is not ", $what, "; there are {}"),
                            text, names
                        )
                    })
            }
        }
    };
}

named!(Arch, "an architecture");
named!(Quant, "a weight type");
