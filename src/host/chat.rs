//! A conversation in the model's own chat template: what is said is kept, and each turn gives the text that is new to
//! the KV cache. Beside the last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ffi::CString;

use llama_cpp_sys_2 as llama;

use crate::error::{Error, ErrorKind, Result};
use crate::host::context::LlamaModel;

/// A conversation so far.
#[derive(Debug)]
pub struct Chat {
    template: CString,
    messages: Vec<(CString, CString)>,
    // What the KV cache has seen, in bytes of the formatted conversation.
    seen_bytes: usize,
}

impl Chat {
    /// Starts a conversation.
    ///
    /// # Errors
    /// `Unsupported` when the model has no chat template, or one that llama.cpp does not know.
    pub fn new(model: &LlamaModel) -> Result<Self> {
        let template = model.chat_template().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "the model has no chat template; leave --chat out and write the prompt as it was trained",
            )
        })?;
        let chat = Self {
            template,
            messages: Vec::new(),
            seen_bytes: 0,
        };
        let probe = (c"user".to_owned(), c"".to_owned());
        format(&chat.template, &[probe], true)?;
        Ok(chat)
    }

    /// Adds what the user says; gives the text to be computed before the answer.
    ///
    /// # Errors
    /// `Invalid` for text with a NUL byte.
    pub fn ask(&mut self, text: &str) -> Result<String> {
        self.messages.push((c"user".to_owned(), message(text)?));
        let whole = format(&self.template, &self.messages, true)?;
        let fresh = whole.get(self.seen_bytes..).unwrap_or_default();
        Ok(String::from_utf8_lossy(fresh).into_owned())
    }

    /// Adds what the model answered. The KV cache has seen the answer but not the token that ended it, so the next turn
    /// begins right behind the answer's text, where the template kept it as it was.
    ///
    /// # Errors
    /// `Invalid` for text with a NUL byte.
    pub fn answered(&mut self, text: &str) -> Result<()> {
        let mut seen = format(&self.template, &self.messages, true)?;
        seen.extend_from_slice(text.as_bytes());
        self.messages
            .push((c"assistant".to_owned(), message(text)?));
        let whole = format(&self.template, &self.messages, false)?;
        self.seen_bytes = if whole.starts_with(&seen) {
            seen.len()
        } else {
            whole.len()
        };
        Ok(())
    }
}

fn message(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new(ErrorKind::Invalid, "the text holds a NUL byte"))
}

fn format(
    template: &CString,
    messages: &[(CString, CString)],
    answer_next: bool,
) -> Result<Vec<u8>> {
    let raw: Vec<llama::llama_chat_message> = messages
        .iter()
        .map(|(role, content)| llama::llama_chat_message {
            role: role.as_ptr(),
            content: content.as_ptr(),
        })
        .collect();
    let mut text: Vec<u8> = Vec::new();
    // The first call asks for the length, the second fills.
    for _ in 0..2 {
        // SAFETY: template and messages are NUL-terminated and alive; text has the length passed.
        let len = unsafe {
            llama::llama_chat_apply_template(
                template.as_ptr(),
                raw.as_ptr(),
                raw.len(),
                answer_next,
                text.as_mut_ptr().cast(),
                i32::try_from(text.len()).unwrap_or(i32::MAX),
            )
        };
        let len = usize::try_from(len).map_err(|_| {
            Error::new(
                ErrorKind::Unsupported,
                "llama.cpp does not know this model's chat template; leave --chat out",
            )
        })?;
        let filled = len <= text.len();
        text.resize(len, 0);
        if filled {
            break;
        }
    }
    Ok(text)
}
