//! The llama.cpp model and context, owned: parameters that are equal for streamed and plain runs (repack off, one output
//! row, flash attention as llama.cpp decides), and calls that turn its return codes into errors. Invariants: a context
//! never outlives its model; no panic crosses into C. The last step of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ffi::{CString, c_void};
use std::panic::catch_unwind;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_sys_2 as llama;

use crate::error::{Error, ErrorKind, Result};
use crate::host::file::ModelFile;
use crate::host::log;

/// A token id.
pub type Token = llama::llama_token;

/// Tokens handed to llama.cpp in one call, as its own programs do; it cuts them into ubatches itself.
pub const BATCH_TOKENS: u32 = 2048;

/// The type of the KV cache's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvType(llama::ggml_type);

impl KvType {
    /// Names and ggml types that llama.cpp's CPU attention takes.
    const ALL: [(&'static str, llama::ggml_type); 9] = [
        ("f32", llama::GGML_TYPE_F32),
        ("f16", llama::GGML_TYPE_F16),
        ("bf16", llama::GGML_TYPE_BF16),
        ("q8_0", llama::GGML_TYPE_Q8_0),
        ("q5_1", llama::GGML_TYPE_Q5_1),
        ("q5_0", llama::GGML_TYPE_Q5_0),
        ("q4_1", llama::GGML_TYPE_Q4_1),
        ("q4_0", llama::GGML_TYPE_Q4_0),
        ("iq4_nl", llama::GGML_TYPE_IQ4_NL),
    ];

    /// Halves: what keys and values are in unless somebody says otherwise.
    pub const F16: Self = Self(llama::GGML_TYPE_F16);

    /// The names, for help and messages.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::ALL.iter().map(|(name, _)| *name)
    }
}

impl std::str::FromStr for KvType {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Self::ALL
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, number)| Self(*number))
            .ok_or_else(|| {
                let names: Vec<_> = Self::names().collect();
                format!(
                    "'{text}' is not a KV type; it is one of {}",
                    names.join(", ")
                )
            })
    }
}

/// How a context computes.
#[derive(Debug, Clone, Copy)]
pub struct ContextOptions {
    /// Tokens the KV cache holds.
    pub context_tokens: u32,
    /// Tokens computed at once: one pass over the weights each.
    pub ubatch_tokens: u32,
    /// Threads that compute.
    pub threads_count: u32,
    /// The KV cache's numbers.
    pub kv_type: KvType,
}

/// Starts llama.cpp; once per process is enough and more does no harm.
pub fn start_backend() {
    // SAFETY: no preconditions.
    unsafe { llama::llama_backend_init() };
}

/// A loaded model.
#[derive(Debug)]
pub struct LlamaModel {
    raw: NonNull<llama::llama_model>,
}

/// Called with the share of the model that is loaded; false cancels.
pub type Progress<'a> = &'a mut dyn FnMut(f32) -> bool;

extern "C" fn on_progress(share: f32, user_data: *mut c_void) -> bool {
    // SAFETY: user_data is the address of the `Progress` in `LlamaModel::load`, which outlives the load.
    let progress = unsafe { &mut *user_data.cast::<Progress<'_>>() };
    catch_unwind(std::panic::AssertUnwindSafe(|| progress(share))).unwrap_or(false)
}

/// Where a model is loaded from.
#[derive(Debug)]
pub enum Origin<'a> {
    /// llama.cpp opens and maps the files itself (plain runs).
    Path(&'a Path),
    /// Through our stream, for the devices given (streamed runs).
    Stream(&'a mut ModelFile, Devices<'a>),
}

/// Where a streamed model is placed.
#[derive(Debug, Clone, Copy)]
pub struct Devices<'a> {
    /// One, or one for each GPU.
    pub devices: &'a [llama::ggml_backend_dev_t],
    /// How many of llama.cpp's layers each has, with zeros up to `llama_max_devices`.
    pub split: &'a [f32],
    /// Tables of embeddings whose rows the first reads: llama.cpp gives it none of its own accord.
    pub tables: &'a [String],
}

impl LlamaModel {
    /// Loads a model.
    ///
    /// # Errors
    /// What the stream met, else `Format` with what llama.cpp said; `Canceled` when `progress` said stop.
    pub fn load(origin: Origin<'_>, progress: Progress<'_>) -> Result<Self> {
        let mut canceled = false;
        let mut watch = |share: f32| {
            canceled = !progress(share);
            !canceled
        };
        let mut watch: Progress<'_> = &mut watch;
        // SAFETY: no preconditions.
        let mut params = unsafe { llama::llama_model_default_params() };
        params.progress_callback = Some(on_progress);
        params.progress_callback_user_data = std::ptr::from_mut(&mut watch).cast();
        params.use_extra_bufts = false; // repacked weights are a second copy in another layout: not the file's bytes
        params.lazy_mode = llama::LLAMA_LAZY_MODE_OFF;
        log::forget_errors();
        log::blame_model(true);
        let (raw, stream_error) = load_raw(origin, params)?;
        log::blame_model(false);
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw }),
            None if canceled => Err(Error::new(ErrorKind::Canceled, "stopped while loading")),
            None => Err(stream_error.unwrap_or_else(|| {
                log::explain(ErrorKind::Format, "llama.cpp cannot load the model")
            })),
        }
    }

    pub(crate) const fn raw(&self) -> *mut llama::llama_model {
        self.raw.as_ptr()
    }

    pub(crate) fn vocab(&self) -> *const llama::llama_vocab {
        // SAFETY: the model is alive; the vocabulary lives as long.
        unsafe { llama::llama_model_get_vocab(self.raw()) }
    }

    /// Tokens in the vocabulary: the width of a row of logits.
    #[must_use]
    pub fn vocab_count(&self) -> usize {
        // SAFETY: the vocabulary belongs to a live model.
        usize::try_from(unsafe { llama::llama_vocab_n_tokens(self.vocab()) }).unwrap_or(0)
    }

    /// The context the model was trained for.
    #[must_use]
    pub fn trained_context_tokens(&self) -> u32 {
        // SAFETY: the model is alive.
        u32::try_from(unsafe { llama::llama_model_n_ctx_train(self.raw()) }).unwrap_or(0)
    }

    /// Refuses models that do not go through text token by token.
    ///
    /// # Errors
    /// `Unsupported`.
    pub fn check_generates_text(&self) -> Result<()> {
        // SAFETY: the model is alive.
        let (encoder, decoder) = unsafe {
            (
                llama::llama_model_has_encoder(self.raw()),
                llama::llama_model_has_decoder(self.raw()),
            )
        };
        if encoder || !decoder {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this model is an encoder; flea run generates text with decoder models only",
            ));
        }
        Ok(())
    }

    /// Heads of keys and values of a layer.
    #[must_use]
    pub fn kv_head_count(&self) -> usize {
        // SAFETY: the model is alive.
        usize::try_from(unsafe { llama::llama_model_n_head_kv(self.raw()) }).unwrap_or(0)
    }

    /// The chat template of the model, if it has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<CString> {
        // SAFETY: the model is alive; NULL asks for the default template.
        let template = unsafe { llama::llama_model_chat_template(self.raw(), std::ptr::null()) };
        if template.is_null() {
            return None;
        }
        // SAFETY: not NULL, so a NUL-terminated string owned by the model.
        Some(unsafe { std::ffi::CStr::from_ptr(template) }.to_owned())
    }
}

/// The raw load, and the error that the stream met.
fn load_raw(
    origin: Origin<'_>,
    mut params: llama::llama_model_params,
) -> Result<(*mut llama::llama_model, Option<Error>)> {
    match origin {
        Origin::Path(path) => {
            let path = CString::new(path.as_os_str().as_encoded_bytes())
                .map_err(|_| Error::new(ErrorKind::Invalid, "the path holds a NUL byte"))?;
            // An empty list: no device but the CPU.
            let mut devices = [std::ptr::null_mut()];
            params.devices = devices.as_mut_ptr();
            params.n_gpu_layers = 0;
            params.load_mode = llama::LLAMA_LOAD_MODE_AUTO;
            // SAFETY: the path is NUL-terminated; params point to locals that outlive the call.
            let raw = unsafe { llama::llama_model_load_from_file(path.as_ptr(), params) };
            Ok((raw, None))
        }
        Origin::Stream(file, on) => {
            let mut devices = on.devices.to_vec();
            devices.push(std::ptr::null_mut());
            let mut patterns = table_patterns(on.tables)?;
            if on.devices.len() > 1 {
                // With an override of anything llama.cpp keeps no copies of what goes from one device to the next, for which
                // these, which compute in turn, have no use.
                patterns.push(c"^$".to_owned());
            }
            let overrides = placed_on(&patterns, devices[0]);
            params.tensor_split = on.split.as_ptr();
            params.tensor_buft_overrides = overrides.as_ptr();
            params.devices = devices.as_mut_ptr();
            params.n_gpu_layers = -1;
            params.load_mode = llama::LLAMA_LOAD_MODE_NONE;
            // SAFETY: the stream is open and rewound; params point to locals that outlive the call.
            let raw =
                unsafe { llama::llama_model_load_from_file_ptr(file.stream().cast(), params) };
            Ok((raw, file.take_error()))
        }
    }
}

/// Regular expressions that match these names and no others.
fn table_patterns(names: &[String]) -> Result<Vec<CString>> {
    let pattern = |name: &String| {
        let mut text = String::from("^");
        for letter in name.chars() {
            if !letter.is_ascii_alphanumeric() && letter != '_' {
                text.push('\\');
            }
            text.push(letter);
        }
        text.push('$');
        CString::new(text)
            .map_err(|_| Error::new(ErrorKind::Format, format!("a NUL byte in '{name}'")))
    };
    names.iter().map(pattern).collect()
}

/// Puts the tensors of these patterns on a device: llama.cpp gives no device the embeddings unless it is told to.
/// `patterns` have to outlive the result.
fn placed_on(
    patterns: &[CString],
    device: llama::ggml_backend_dev_t,
) -> Vec<llama::llama_model_tensor_buft_override> {
    // SAFETY: the device is registered, and its buffer type is as static as it is.
    let buft = unsafe { llama::ggml_backend_dev_buffer_type(device) };
    let entry = |pattern: &CString| llama::llama_model_tensor_buft_override {
        pattern: pattern.as_ptr(),
        buft,
    };
    let end = llama::llama_model_tensor_buft_override {
        pattern: std::ptr::null(),
        buft: std::ptr::null_mut(),
    };
    patterns.iter().map(entry).chain([end]).collect()
}

impl Drop for LlamaModel {
    fn drop(&mut self) {
        // SAFETY: ours alone, and freed once; contexts borrow nothing from it any more (Session drops them first).
        unsafe { llama::llama_model_free(self.raw()) };
    }
}

/// A context: KV cache and compute memory. It must be dropped before its model.
#[derive(Debug)]
pub struct LlamaContext {
    raw: NonNull<llama::llama_context>,
}

extern "C" fn on_abort_asked(stop: *mut c_void) -> bool {
    // SAFETY: the pointer is the address of a static-lived AtomicBool (see `LlamaContext::new`).
    unsafe { &*stop.cast::<AtomicBool>() }.load(Ordering::Relaxed)
}

impl LlamaContext {
    /// Makes a context; computing stops soon after `stop` is set.
    ///
    /// # Errors
    /// `NoMemory` or what llama.cpp said.
    pub fn new(
        model: &LlamaModel,
        options: &ContextOptions,
        stop: &'static AtomicBool,
    ) -> Result<Self> {
        // SAFETY: no preconditions.
        let mut params = unsafe { llama::llama_context_default_params() };
        params.n_ctx = options.context_tokens;
        params.n_batch = BATCH_TOKENS.max(options.ubatch_tokens);
        params.n_ubatch = options.ubatch_tokens;
        // Only the last token of a prompt needs a row of logits: with the default every ubatch reserves one per token.
        params.n_outputs_max = 1;
        params.n_seq_max = 1;
        let threads = i32::try_from(options.threads_count).unwrap_or(i32::MAX);
        params.n_threads = threads;
        params.n_threads_batch = threads;
        params.flash_attn_type = llama::LLAMA_FLASH_ATTN_TYPE_AUTO;
        params.type_k = options.kv_type.0;
        params.type_v = options.kv_type.0;
        params.abort_callback = Some(on_abort_asked);
        params.abort_callback_data = std::ptr::from_ref(stop).cast_mut().cast();
        params.no_perf = true;
        log::forget_errors();
        // SAFETY: the model is alive; the callback data is 'static.
        let raw = unsafe { llama::llama_init_from_model(model.raw(), params) };
        NonNull::new(raw)
            .map(|raw| Self { raw })
            .ok_or_else(|| log::explain(ErrorKind::NoMemory, "llama.cpp cannot make a context"))
    }

    pub(crate) const fn raw(&self) -> *mut llama::llama_context {
        self.raw.as_ptr()
    }

    /// Tokens of the largest batch [`Self::decode`] takes.
    #[must_use]
    pub fn batch_tokens(&self) -> usize {
        // SAFETY: the context is alive.
        unsafe { llama::llama_n_batch(self.raw()) as usize }
    }

    /// Computes the tokens after those already in the KV cache.
    ///
    /// # Errors
    /// `Canceled` when stopped; else the return code in words. The caller knows better when a lease failed.
    pub fn decode(&mut self, tokens: &mut [Token]) -> Result<()> {
        let count = i32::try_from(tokens.len())
            .map_err(|_| Error::new(ErrorKind::Invalid, "too many tokens for one batch"))?;
        log::forget_errors();
        // SAFETY: the batch points to `tokens`, which outlives the call; llama_decode reads it only.
        let status = unsafe {
            let batch = llama::llama_batch_get_one(tokens.as_mut_ptr(), count);
            llama::llama_decode(self.raw(), batch)
        };
        match status {
            0 => Ok(()),
            1 => Err(Error::new(
                ErrorKind::Invalid,
                "the context is full; give a larger --ctx",
            )),
            2 => Err(Error::new(ErrorKind::Canceled, "stopped")),
            _ => Err(log::explain(
                ErrorKind::Internal,
                &format!("llama.cpp failed to compute (code {status})"),
            )),
        }
    }

    /// Tokens whose keys and values it holds.
    #[must_use]
    pub fn used_tokens(&self) -> usize {
        // SAFETY: the context is alive; its memory belongs to it.
        let last =
            unsafe { llama::llama_memory_seq_pos_max(llama::llama_get_memory(self.raw()), 0) };
        usize::try_from(last + 1).unwrap_or(0)
    }

    /// Forgets all tokens.
    pub fn forget(&mut self) {
        // SAFETY: the context is alive; its memory belongs to it.
        unsafe { llama::llama_memory_clear(llama::llama_get_memory(self.raw()), true) };
    }

    /// Keys and values of all tokens, as llama.cpp writes them.
    ///
    /// # Errors
    /// `Internal` where llama.cpp cannot write them.
    pub fn kv_state(&self) -> Result<Vec<u8>> {
        // SAFETY: the context is alive.
        let mut bytes = vec![0; unsafe { llama::llama_state_seq_get_size(self.raw(), 0) }];
        // SAFETY: the context is alive; as many bytes as it asked for, and says how many it has.
        let written = unsafe {
            llama::llama_state_seq_get_data(self.raw(), bytes.as_mut_ptr(), bytes.len(), 0)
        };
        if written == 0 || written > bytes.len() {
            return Err(log::explain(
                ErrorKind::Internal,
                "llama.cpp cannot save its keys and values",
            ));
        }
        bytes.truncate(written);
        Ok(bytes)
    }

    /// Puts back what [`Self::kv_state`] gave, in place of what is there.
    ///
    /// # Errors
    /// `Internal` where llama.cpp does not take it.
    pub fn restore_kv(&mut self, bytes: &[u8]) -> Result<()> {
        log::forget_errors();
        // SAFETY: the context is alive; the bytes are only read, and checked by llama.cpp.
        let read =
            unsafe { llama::llama_state_seq_set_data(self.raw(), bytes.as_ptr(), bytes.len(), 0) };
        if read == 0 {
            return Err(log::explain(
                ErrorKind::Internal,
                "llama.cpp does not take keys and values back",
            ));
        }
        Ok(())
    }

    /// The row of logits of the last token computed.
    ///
    /// # Errors
    /// `Internal` where llama.cpp has none.
    pub fn logits(&self, vocab_count: usize) -> Result<&[f32]> {
        // SAFETY: the context is alive; -1 is the last output row.
        let row = unsafe { llama::llama_get_logits_ith(self.raw(), -1) };
        if row.is_null() {
            return Err(Error::new(ErrorKind::Internal, "llama.cpp gave no logits"));
        }
        // SAFETY: a row has one number per token of the vocabulary and stays until the next decode, which needs &mut self.
        Ok(unsafe { std::slice::from_raw_parts(row, vocab_count) })
    }
}

impl Drop for LlamaContext {
    fn drop(&mut self) {
        // SAFETY: ours alone, and freed once.
        unsafe { llama::llama_free(self.raw()) };
    }
}
