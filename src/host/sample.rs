//! From a row of logits to a token, through llama.cpp's own sampler chain in the order of its programs. Temperature 0 is
//! greedy. The raw rows are hashed (FNV-1a 64 over their bytes) before any sampler changes a number, so two runs can be
//! compared without keeping them. The last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use llama_cpp_sys_2 as llama;

use crate::error::{Error, ErrorKind, Result};
use crate::host::context::{LlamaContext, LlamaModel, Token};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy)]
pub struct SampleOptions {
    /// 0 = always the likeliest.
    pub temperature: f32,
    /// Only the k likeliest; 0 or less = all.
    pub top_k: i32,
    /// Only the likeliest that make up this share.
    pub top_p: f32,
    /// Seed of the dice.
    pub seed: u32,
    /// Never choose a token that ends the text.
    pub ignore_end: bool,
}

/// llama.cpp's sampler chain.
#[derive(Debug)]
pub struct Sampler {
    chain: NonNull<llama::llama_sampler>,
}

impl Sampler {
    /// Builds the chain.
    ///
    /// # Errors
    /// `NoMemory`.
    pub fn new(model: &LlamaModel, options: &SampleOptions) -> Result<Self> {
        // SAFETY: no preconditions; the chain owns the samplers added to it.
        let chain = unsafe {
            let mut params = llama::llama_sampler_chain_default_params();
            params.no_perf = true;
            llama::llama_sampler_chain_init(params)
        };
        let chain = NonNull::new(chain)
            .ok_or_else(|| Error::new(ErrorKind::NoMemory, "llama.cpp cannot make a sampler"))?;
        let sampler = Self { chain };
        let biases = biases(model, options.ignore_end);
        // SAFETY: every init function takes plain numbers; the bias list is copied; the vocabulary belongs to a live model.
        unsafe {
            if !biases.is_empty() {
                sampler.add(llama::llama_sampler_init_logit_bias(
                    llama::llama_vocab_n_tokens(model.vocab()),
                    i32::try_from(biases.len()).unwrap_or(i32::MAX),
                    biases.as_ptr(),
                ));
            }
            if options.temperature > 0.0 {
                sampler.add(llama::llama_sampler_init_top_k(options.top_k));
                sampler.add(llama::llama_sampler_init_top_p(options.top_p, 1));
                sampler.add(llama::llama_sampler_init_temp(options.temperature));
                sampler.add(llama::llama_sampler_init_dist(options.seed));
            } else {
                sampler.add(llama::llama_sampler_init_greedy());
            }
        }
        Ok(sampler)
    }

    /// # Safety
    /// `sampler` comes from a `llama_sampler_init_*` function and belongs to nobody else.
    unsafe fn add(&self, sampler: *mut llama::llama_sampler) {
        // SAFETY: the chain is alive and takes ownership.
        unsafe { llama::llama_sampler_chain_add(self.chain.as_ptr(), sampler) };
    }

    /// Chooses a token from the last row of logits.
    pub fn sample(&mut self, context: &LlamaContext) -> Token {
        // SAFETY: chain and context are alive, and the context has an output row (the caller has read it).
        unsafe { llama::llama_sampler_sample(self.chain.as_ptr(), context.raw(), -1) }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: ours alone, and freed once with all samplers in it.
        unsafe { llama::llama_sampler_free(self.chain.as_ptr()) };
    }
}

/// Tokens that must never be chosen: those the model itself suppresses, and on request those that end the text.
fn biases(model: &LlamaModel, ignore_end: bool) -> Vec<llama::llama_logit_bias> {
    let never = |token| llama::llama_logit_bias {
        token,
        bias: f32::NEG_INFINITY,
    };
    let mut count = 0;
    // SAFETY: the vocabulary belongs to a live model; the list it gives has `count` tokens and lives as long.
    let suppressed =
        unsafe { llama::llama_vocab_get_suppress_tokens(model.vocab(), &raw mut count) };
    let mut biases = Vec::new();
    if !suppressed.is_null() {
        let count = usize::try_from(count).unwrap_or(0);
        // SAFETY: as above.
        let suppressed = unsafe { std::slice::from_raw_parts(suppressed, count) };
        biases.extend(suppressed.iter().copied().map(never));
    }
    if ignore_end {
        let tokens = 0..Token::try_from(model.vocab_count()).unwrap_or(0);
        biases.extend(tokens.filter(|token| model.ends_text(*token)).map(never));
    }
    biases
}

/// FNV-1a, 64 bits.
#[derive(Debug, Clone, Copy)]
pub struct LogitsHash(u64);

impl Default for LogitsHash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl LogitsHash {
    /// Takes a row.
    pub fn update(&mut self, row: &[f32]) {
        for byte in bytemuck::cast_slice::<f32, u8>(row) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// 16 hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv_1a() {
        let mut hash = LogitsHash::default();
        assert_eq!(hash.hex(), "cbf29ce484222325");
        // The bytes "abcd": the published test vector.
        hash.update(&[f32::from_le_bytes(*b"abcd")]);
        assert_eq!(hash.hex(), "fc179f83ee0724dd");
    }
}
