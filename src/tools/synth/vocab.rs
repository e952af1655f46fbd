//! A vocabulary of made-up but readable words, so that text goes in and text comes out.
//!
//! Both kinds are laid out alike: 3 special tokens, the 256 bytes, then (SentencePiece only) single characters, then
//! syllables, and words of two and three syllables with and without a leading space. Every word can be reached by
//! merging two shorter tokens, as the tokenizers require. All tokens differ.

use crate::tools::gguf_write::{Metadata, Value};

/// Special tokens and bytes, at the front of every vocabulary. They are quiet: never the greedy choice.
pub const QUIET_TOKENS: u64 = 3 + 256;

/// Both kinds of vocabulary have at least their bytes, characters and all the syllables.
pub const VOCAB_MIN: u64 = 512;
/// All words of three syllables used up.
pub const VOCAB_MAX: u64 = 1_000_000;

const ONSETS: &[u8; 20] = b"bcdfghjklmnprstvwxyz";
const VOWELS: &[u8; 5] = b"aeiou";
const SYLLABLES: usize = ONSETS.len() * VOWELS.len();

/// Which tokenizer an architecture's models come with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tokenizer {
    /// SentencePiece with byte fallback: llama, gemma.
    SentencePiece,
    /// Byte-level pairs as in GPT-2: qwen.
    BytePairs,
}

const TYPE_NORMAL: i32 = 1;
const TYPE_UNKNOWN: i32 = 2;
const TYPE_CONTROL: i32 = 3;
const TYPE_BYTE: i32 = 6;

/// Writes the tokenizer's keys for a vocabulary of `count` tokens.
pub fn set_vocabulary(metadata: &mut Metadata, tokenizer: Tokenizer, count: u64) {
    let words = Words::new(tokenizer, count as usize);
    let types = (0..count).map(|id| token_type(tokenizer, id)).collect();
    let ids = match tokenizer {
        Tokenizer::SentencePiece => {
            metadata.set("tokenizer.ggml.model", &text("llama"));
            metadata.set("tokenizer.ggml.pre", &text("default"));
            // The tokenizer merges the pair with the highest score first: shorter words stand further up.
            let scores = (0..count).map(|id| -(id as f32)).collect();
            metadata.set("tokenizer.ggml.scores", &Value::F32s(scores));
            [("unknown", 0), ("bos", 1), ("eos", 2)].as_slice()
        }
        Tokenizer::BytePairs => {
            metadata.set("tokenizer.ggml.model", &text("gpt2"));
            metadata.set("tokenizer.ggml.pre", &text("qwen2"));
            metadata.set("tokenizer.ggml.merges", &Value::Texts(words.merges));
            [("padding", 0), ("bos", 0), ("eos", 2)].as_slice()
        }
    };
    metadata.set("tokenizer.ggml.tokens", &Value::Texts(words.tokens));
    metadata.set("tokenizer.ggml.token_type", &Value::I32s(types));
    for (name, id) in ids {
        metadata.set(format!("tokenizer.ggml.{name}_token_id"), &Value::U32(*id));
    }
    let begin = tokenizer == Tokenizer::SentencePiece;
    metadata.set("tokenizer.ggml.add_bos_token", &Value::Bool(begin));
    metadata.set("tokenizer.ggml.add_eos_token", &Value::Bool(false));
}

fn text(value: &str) -> Value {
    Value::Text(value.to_owned())
}

fn token_type(tokenizer: Tokenizer, id: u64) -> i32 {
    match (tokenizer, id) {
        (Tokenizer::SentencePiece, 0) => TYPE_UNKNOWN,
        (_, 0..3) => TYPE_CONTROL,
        (Tokenizer::SentencePiece, 3..QUIET_TOKENS) => TYPE_BYTE,
        _ => TYPE_NORMAL,
    }
}

/// Tokens in the order of their ids, and the merge that makes each word.
struct Words {
    tokens: Vec<String>,
    merges: Vec<String>,
    count: usize,
}

impl Words {
    fn new(tokenizer: Tokenizer, count: usize) -> Self {
        let mut words = Self {
            tokens: Vec::with_capacity(count),
            merges: Vec::new(),
            count,
        };
        let space = match tokenizer {
            Tokenizer::SentencePiece => {
                words
                    .tokens
                    .extend(["<unk>", "<s>", "</s>"].map(String::from));
                words
                    .tokens
                    .extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
                words.tokens.push("\u{2581}".to_owned());
                words.tokens.extend(('!'..='~').map(String::from));
                "\u{2581}"
            }
            Tokenizer::BytePairs => {
                let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
                words.tokens.extend(special.map(String::from));
                words
                    .tokens
                    .extend((0..=255).map(|byte| byte_character(byte).to_string()));
                "\u{120}"
            }
        };
        words.add_syllables(space);
        words
    }

    fn add(&mut self, left: &str, right: &str) {
        if self.tokens.len() < self.count {
            self.tokens.push(format!("{left}{right}"));
            self.merges.push(format!("{left} {right}"));
        }
    }

    /// Shorter words first: the tokenizers merge in this order, and each word is made of two that stand before it.
    fn add_syllables(&mut self, space: &str) {
        for index in 0..SYLLABLES {
            let word = syllable(index);
            self.add(&word[..1], &word[1..]);
        }
        for index in 0..SYLLABLES {
            self.add(space, &syllable(index));
        }
        for index in 0..SYLLABLES * SYLLABLES {
            let (first, second) = pair(index);
            self.add(&first, &second);
            self.add(&format!("{space}{first}"), &second);
        }
        for index in 0..SYLLABLES * SYLLABLES * SYLLABLES {
            if self.tokens.len() == self.count {
                break;
            }
            let (first, second) = pair(index % (SYLLABLES * SYLLABLES));
            let third = syllable(index / (SYLLABLES * SYLLABLES));
            self.add(&format!("{space}{first}{second}"), &third);
        }
    }
}

fn syllable(index: usize) -> String {
    let onset = ONSETS[index / VOWELS.len() % ONSETS.len()];
    let vowel = VOWELS[index % VOWELS.len()];
    [onset, vowel].map(char::from).iter().collect()
}

/// All pairs of syllables, once each, well mixed: 7919 is prime to their number.
fn pair(index: usize) -> (String, String) {
    let mixed = index * 7919 % (SYLLABLES * SYLLABLES);
    (syllable(mixed / SYLLABLES), syllable(mixed % SYLLABLES))
}

/// GPT-2's printable stand-in for a byte: itself where it is a visible Latin-1 character, else one from 256 on.
fn byte_character(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let hidden_before = (0..byte).filter(|byte| !visible(*byte)).count() as u32;
    char::from_u32(256 + hidden_before).unwrap_or('?')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn tokens_are_as_many_as_asked_for_and_differ() {
        for tokenizer in [Tokenizer::SentencePiece, Tokenizer::BytePairs] {
            for count in [VOCAB_MIN, 4096, 32_000] {
                let words = Words::new(tokenizer, count as usize);
                let distinct: HashSet<&String> = words.tokens.iter().collect();
                assert_eq!(words.tokens.len() as u64, count);
                assert_eq!(distinct.len() as u64, count);
            }
        }
    }

    #[test]
    fn the_largest_vocabulary_exists() {
        let words = Words::new(Tokenizer::SentencePiece, VOCAB_MAX as usize);
        let distinct: HashSet<&String> = words.tokens.iter().collect();
        assert_eq!(distinct.len() as u64, VOCAB_MAX);
    }

    #[test]
    fn every_merge_joins_two_tokens_that_stand_before_its_result() {
        let words = Words::new(Tokenizer::BytePairs, 30_000);
        let mut known: HashSet<&str> = HashSet::new();
        known.extend(
            words.tokens[..QUIET_TOKENS as usize]
                .iter()
                .map(String::as_str),
        );
        let made = &words.tokens[QUIET_TOKENS as usize..];
        assert_eq!(made.len(), words.merges.len());
        for (merge, token) in words.merges.iter().zip(made) {
            let (left, right) = merge.split_once(' ').unwrap();
            assert!(known.contains(left) && known.contains(right), "{merge}");
            assert_eq!(&format!("{left}{right}"), token);
            known.insert(token);
        }
    }

    #[test]
    fn bytes_have_gpt2_characters() {
        assert_eq!(byte_character(b' '), '\u{120}');
        assert_eq!(byte_character(b'\n'), '\u{10a}');
        assert_eq!(byte_character(b'A'), 'A');
        assert_eq!(byte_character(0xad), '\u{143}');
    }
}
