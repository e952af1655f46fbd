//! Text to tokens and back, with llama.cpp's tokenizer. Beside the last step of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use llama_cpp_sys_2 as llama;

use crate::error::{Error, ErrorKind, Result};
use crate::host::context::{LlamaModel, Token};

impl LlamaModel {
    /// True when the model can turn text into tokens.
    #[must_use]
    pub fn has_tokenizer(&self) -> bool {
        // SAFETY: the vocabulary belongs to a live model.
        unsafe { llama::llama_vocab_type(self.vocab()) != llama::LLAMA_VOCAB_TYPE_NONE }
    }

    /// The tokens of a text; `add_special` puts the model's own start in front.
    ///
    /// # Errors
    /// `Unsupported` for a model without tokenizer, `Invalid` for a text that is too long.
    pub fn tokenize(&self, text: &str, add_special: bool) -> Result<Vec<Token>> {
        if !self.has_tokenizer() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the model has no tokenizer; give ids with --prompt-tokens",
            ));
        }
        let text_len = i32::try_from(text.len()).map_err(|_| too_long(text.len()))?;
        let mut tokens: Vec<Token> = Vec::new();
        // The first call asks for the count, the second fills.
        for _ in 0..2 {
            let room = i32::try_from(tokens.len()).map_err(|_| too_long(text.len()))?;
            // SAFETY: text and tokens are valid for the lengths passed; the vocabulary belongs to a live model.
            let count = unsafe {
                llama::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    text_len,
                    tokens.as_mut_ptr(),
                    room,
                    add_special,
                    true,
                )
            };
            if count == i32::MIN {
                return Err(too_long(text.len()));
            }
            tokens.resize(count.unsigned_abs() as usize, 0);
            if count >= 0 {
                break;
            }
        }
        Ok(tokens)
    }

    /// The bytes of a token, appended; control tokens have none.
    pub fn token_bytes(&self, token: Token, bytes: &mut Vec<u8>) {
        if !self.has_tokenizer() {
            return;
        }
        let start = bytes.len();
        let mut room = 64;
        loop {
            bytes.resize(start + room, 0);
            // SAFETY: room bytes are writable behind start; the token is one of the vocabulary (llama.cpp checks).
            let count = unsafe {
                llama::llama_token_to_piece(
                    self.vocab(),
                    token,
                    bytes[start..].as_mut_ptr().cast(),
                    i32::try_from(room).unwrap_or(i32::MAX),
                    0,
                    false,
                )
            };
            match usize::try_from(count) {
                Ok(len) => {
                    bytes.truncate(start + len);
                    return;
                }
                Err(_) => room = count.unsigned_abs() as usize,
            }
        }
    }

    /// True when the token ends the text.
    #[must_use]
    pub fn ends_text(&self, token: Token) -> bool {
        // SAFETY: the vocabulary belongs to a live model.
        unsafe { llama::llama_vocab_is_eog(self.vocab(), token) }
    }

    /// The token a text starts with, where the model wants one.
    #[must_use]
    pub fn start_token(&self) -> Option<Token> {
        // SAFETY: the vocabulary belongs to a live model.
        let token = unsafe { llama::llama_vocab_bos(self.vocab()) };
        (token >= 0).then_some(token)
    }
}

fn too_long(len_bytes: usize) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("a text of {len_bytes} bytes is too long to be tokenized"),
    )
}
