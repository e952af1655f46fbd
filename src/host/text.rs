//! Text as it comes: tokens are byte strings that may end in the middle of a UTF-8 sequence, so bytes are held back
//! until they make characters. Invariant: what has been handed out is valid UTF-8, and nothing is lost: a sequence that
//! can never become valid is handed out as U+FFFD. Pure; the last step of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`.

/// Puts token bytes together into characters.
#[derive(Debug, Default)]
pub struct TextAssembler {
    pending: Vec<u8>,
}

impl TextAssembler {
    /// Takes the bytes of one token and gives the characters that are complete now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid_bytes = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid_bytes]));
                    let Some(bad_bytes) = error.error_len() else {
                        // The start of a character: the next token may finish it.
                        self.pending.drain(..valid_bytes);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid_bytes + bad_bytes);
                }
            }
        }
    }

    /// Gives what is left when no more tokens come.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_split_over_tokens_comes_out_whole() {
        let mut text = TextAssembler::default();
        let euro = "€".as_bytes();
        assert_eq!(text.push(&euro[..1]), "");
        assert_eq!(text.push(&euro[1..2]), "");
        assert_eq!(text.push(&euro[2..]), "€");
        assert_eq!(text.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_character_are_replaced_and_nothing_is_held_back() {
        let mut text = TextAssembler::default();
        assert_eq!(text.push(b"a\xFFb"), "a\u{FFFD}b");
        assert_eq!(text.push(&[0xE2, b'x']), "\u{FFFD}x");
        assert_eq!(text.push(&[0xF0, 0x9F]), "");
        assert_eq!(text.finish(), "\u{FFFD}");
    }
}
