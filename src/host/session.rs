//! A model ready to generate: opened, loaded, with a context; then prompts in and tokens out. Invariants: the context
//! dies before the model, the model before the flea handle; a stop request ends computing and waiting alike and keeps
//! what has been generated. The last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::engine::{Stats, Trace, read_catalog};
use crate::error::{Error, ErrorKind, Result};
use crate::host::context::{ContextOptions, LlamaContext, LlamaModel, Origin, Progress};
use crate::host::device::{Handle, StreamOptions, Streamed};
use crate::host::figures::{DecodeFigures, Figures};
use crate::host::file::ModelFile;
use crate::host::header::VirtualFile;
use crate::host::kv_disk::{KvDisk, KvDiskOptions};
use crate::host::sample::{LogitsHash, Sampler};
use crate::host::text::TextAssembler;
use crate::host::{KvType, Token, log, process};
use crate::io::ShardFile;
use crate::io::profile::{self, Device, Found};
use crate::mem::limits;
use crate::model::{Format, gguf};

/// The context when nobody says how large: the model's own, but not more than this.
pub const CONTEXT_TOKENS_DEFAULT_MAX: u32 = 4096;

/// What to open, and how.
#[derive(Debug)]
pub struct SessionOptions {
    /// The model.
    pub path: PathBuf,
    /// How to stream it; `None` = llama.cpp's CPU backend without flea.
    pub stream: Option<StreamOptions>,
    /// Tokens in the context; `None` = the model's own, at most [`CONTEXT_TOKENS_DEFAULT_MAX`].
    pub context_tokens: Option<u32>,
    /// Tokens computed in one pass over the weights.
    pub ubatch_tokens: u32,
    /// Computing threads; `None` = one per core.
    pub threads_count: Option<u32>,
    /// Numbers of the KV cache.
    pub kv_type: KvType,
    /// Where keys and values go that do not fit in memory; only where the model is streamed.
    pub kv_disk: Option<KvDiskOptions>,
    /// Set to stop.
    pub stop: &'static AtomicBool,
}

/// A model ready to generate.
#[derive(Debug)]
pub struct Session {
    // Drop order: the context uses the model, the model's weights lie in the windows of `streamed`.
    context: LlamaContext,
    model: LlamaModel,
    streamed: Option<Streamed>,
    stop: &'static AtomicBool,
    context_tokens: usize,
    used_tokens: usize,
    model_bytes: u64,
    loader_bytes: u64,
    profile: String,
    hash: LogitsHash,
    /// Counters at the end of the last prompt; see [`crate::host::device::Handle::counters`].
    after_prompt: (Stats, u64),
}

/// What happens while generating.
#[derive(Debug)]
pub enum Step<'a> {
    /// The row of logits the next token is chosen from.
    Row(&'a [f32]),
    /// Text to show: whole characters.
    Text(&'a str),
}

/// Why generating ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// As many tokens as asked for.
    Limit,
    /// The model ended its text.
    Text,
    /// No more room in the context.
    ContextFull,
    /// Stopped on request.
    Stopped,
}

/// What was generated, and how long it took.
#[derive(Debug)]
pub struct Generation {
    /// Every token chosen, also the one that ends the text.
    pub tokens: Vec<Token>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub end: End,
    /// Tokens of the prompt.
    pub prompt_tokens_count: usize,
    /// Until the first token.
    pub prompt_seconds: f64,
    /// From the first token to the last.
    pub decode_seconds: f64,
    /// From exec to the first token.
    pub first_token_seconds: Option<f64>,
}

/// Watches the first reads from another thread.
#[derive(Debug)]
pub struct Monitor(Arc<Handle>);

impl Monitor {
    /// Bytes read so far, and bytes that stay resident; `None` before there is a plan.
    #[must_use]
    pub fn read_of_resident(&self) -> Option<(u64, u64)> {
        let info = self.0.info().ok().filter(|info| info.planned != 0)?;
        let stats = self.0.stats().ok()?;
        Some((stats.bytes_read, info.resident_bytes))
    }
}

impl Session {
    /// Opens and loads a model; no weight that is streamed is read before the first prompt.
    ///
    /// # Errors
    /// Whatever is wrong with the file, the budget or the options; `Canceled` when stopped while loading.
    pub fn open(options: &SessionOptions, progress: Progress<'_>) -> Result<Self> {
        let (model_bytes, files) = gguf_files(&options.path)?;
        let drive = files.first().map(Device::of_shard);
        let profile = drive.map_or(Found::Nothing, |drive| profile::find(&drive));
        log::install();
        crate::host::context::start_backend();
        let streamed = open_streamed(options)?;
        let (model, loader_bytes) = match &streamed {
            Some(streamed) => load_streamed(streamed, files, progress)?,
            None => {
                let first = files
                    .first()
                    .map_or(options.path.as_path(), ShardFile::path);
                (LlamaModel::load(Origin::Path(first), progress)?, 0)
            }
        };
        model.check_generates_text()?;
        let context_tokens = context_tokens(&model, options.context_tokens);
        let context = new_context(options, &model, streamed.as_ref(), context_tokens)?;
        // What loading needed once must not count against the weights.
        process::trim_allocator();
        Ok(Self {
            context,
            model,
            streamed,
            stop: options.stop,
            context_tokens: context_tokens as usize,
            used_tokens: 0,
            model_bytes,
            loader_bytes,
            profile: profile.to_string(),
            hash: LogitsHash::default(),
            after_prompt: (Stats::default(), 0),
        })
    }

    /// The model, for its tokenizer and template.
    #[must_use]
    pub const fn model(&self) -> &LlamaModel {
        &self.model
    }

    /// A view of the first reads for another thread; drop it before the session. `None` in a plain run.
    #[must_use]
    pub fn monitor(&self) -> Option<Monitor> {
        self.streamed
            .as_ref()
            .map(|streamed| Monitor(streamed.handle()))
    }

    /// Sends events to `trace`; before the first prompt. A plain run has none.
    ///
    /// # Errors
    /// `Unsupported` where several GPUs compute.
    pub fn trace_into(&self, trace: Arc<Trace>) -> Result<()> {
        match &self.streamed {
            Some(streamed) if !streamed.handle().model().trace_into(trace) => Err(Error::new(
                ErrorKind::Unsupported,
                "what several GPUs do is not traced: trace one of them",
            )),
            _ => Ok(()),
        }
    }

    /// The name of a layer.
    #[must_use]
    pub fn layer_label(&self, layer: u32) -> String {
        let label = |streamed: &Streamed| {
            let handle = streamed.handle();
            let layer = handle.model().catalog().layers.get(layer as usize)?;
            Some(layer.label.clone())
        };
        let label = self.streamed.as_ref().and_then(label);
        label.unwrap_or_else(|| format!("layer {layer}"))
    }

    /// FNV-1a 64 over all rows of logits so far, 16 hexadecimal digits.
    #[must_use]
    pub fn logits_hash(&self) -> String {
        self.hash.hex()
    }

    /// Tokens of the context.
    #[must_use]
    pub const fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// Computes `prompt` and generates up to `limit` tokens (`None` = until the text or the context ends). The context
    /// keeps what it has seen: call again to go on.
    ///
    /// # Errors
    /// `Invalid` for a prompt that does not fit; whatever stops the stream; what `sink` says.
    pub fn generate(
        &mut self,
        prompt: &[Token],
        limit: Option<usize>,
        sampler: &mut Sampler,
        sink: &mut dyn FnMut(Step<'_>) -> Result<()>,
    ) -> Result<Generation> {
        self.check_prompt(prompt)?;
        let started = Instant::now();
        let mut generation = Generation {
            tokens: Vec::new(),
            text: String::new(),
            end: End::Stopped,
            prompt_tokens_count: prompt.len(),
            prompt_seconds: 0.0,
            decode_seconds: 0.0,
            first_token_seconds: None,
        };
        let mut prompt = prompt.to_vec();
        let batch_tokens = self.context.batch_tokens();
        for batch in prompt.chunks_mut(batch_tokens) {
            if !self.decode(batch)? {
                return Ok(generation);
            }
        }
        generation.prompt_seconds = started.elapsed().as_secs_f64();
        generation.first_token_seconds = process::seconds_since_exec();
        if let Some(streamed) = &self.streamed {
            self.after_prompt = streamed.handle().counters();
        }
        // The pool stands and every kind of compute has run once: the level that stays.
        limits::process_memory_bytes()?;
        if limit != Some(0) {
            self.generate_tokens(limit, sampler, sink, &mut generation)?;
        } else {
            generation.end = End::Limit;
        }
        generation.decode_seconds = started.elapsed().as_secs_f64() - generation.prompt_seconds;
        Ok(generation)
    }

    fn generate_tokens(
        &mut self,
        limit: Option<usize>,
        sampler: &mut Sampler,
        sink: &mut dyn FnMut(Step<'_>) -> Result<()>,
        generation: &mut Generation,
    ) -> Result<()> {
        let mut assembler = TextAssembler::default();
        let mut bytes = Vec::new();
        let vocab_count = self.model.vocab_count();
        generation.end = loop {
            let row = self.context.logits(vocab_count)?;
            self.hash.update(row);
            sink(Step::Row(row))?;
            let token = sampler.sample(&self.context);
            generation.tokens.push(token);
            if self.model.ends_text(token) {
                break End::Text;
            }
            bytes.clear();
            self.model.token_bytes(token, &mut bytes);
            let text = assembler.push(&bytes);
            if !text.is_empty() {
                generation.text.push_str(&text);
                sink(Step::Text(&text))?;
            }
            if limit.is_some_and(|limit| generation.tokens.len() >= limit) {
                break End::Limit;
            }
            if self.used_tokens >= self.context_tokens {
                break End::ContextFull;
            }
            if !self.decode(&mut [token])? {
                break End::Stopped;
            }
        };
        let rest = assembler.finish();
        if !rest.is_empty() {
            generation.text.push_str(&rest);
            sink(Step::Text(&rest))?;
        }
        Ok(())
    }

    /// Forgets everything it has seen.
    ///
    /// # Errors
    /// `Canceled` when stopped.
    pub fn forget(&mut self) -> Result<()> {
        self.context.forget();
        self.used_tokens = 0;
        self.go_on()
    }

    /// Computes tokens after those it has seen, without choosing any.
    ///
    /// # Errors
    /// As [`Self::generate`]; `Canceled` when stopped.
    pub fn feed(&mut self, tokens: &[Token]) -> Result<()> {
        self.check_prompt(tokens)?;
        let mut tokens = tokens.to_vec();
        let batch_tokens = self.context.batch_tokens();
        for batch in tokens.chunks_mut(batch_tokens) {
            if !self.decode(batch)? {
                return self.go_on();
            }
        }
        Ok(())
    }

    /// The row of logits after the last token.
    ///
    /// # Errors
    /// `Internal` where there is none.
    pub fn logits(&self) -> Result<&[f32]> {
        self.context.logits(self.model.vocab_count())
    }

    /// Keys and values of what it has seen.
    ///
    /// # Errors
    /// As [`LlamaContext::kv_state`].
    pub fn kv_state(&self) -> Result<Vec<u8>> {
        self.context.kv_state()
    }

    /// Puts keys and values back that [`Self::kv_state`] gave.
    ///
    /// # Errors
    /// As [`LlamaContext::restore_kv`].
    pub fn restore_kv(&mut self, bytes: &[u8]) -> Result<()> {
        self.context.restore_kv(bytes)?;
        self.used_tokens = self.context.used_tokens();
        Ok(())
    }

    fn go_on(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "stopped"));
        }
        Ok(())
    }

    /// Computes tokens; false when stopped on request.
    fn decode(&mut self, tokens: &mut [Token]) -> Result<bool> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match self.context.decode(tokens) {
            Ok(()) => {
                self.used_tokens += tokens.len();
                Ok(true)
            }
            // A lease that was given up because of the stop is no failure either.
            Err(_) if self.stop.load(Ordering::Relaxed) => Ok(false),
            Err(error) => Err(self
                .streamed
                .as_ref()
                .and_then(Streamed::failure)
                .unwrap_or(error)),
        }
    }

    fn check_prompt(&self, prompt: &[Token]) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                "the prompt is empty and the model has no start token; give at least one token",
            ));
        }
        let vocab_count = self.model.vocab_count();
        if let Some(token) = prompt
            .iter()
            .find(|token| usize::try_from(**token).map_or(true, |token| token >= vocab_count))
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("token {token} is not in the vocabulary of {vocab_count} tokens"),
            ));
        }
        let needed = self.used_tokens + prompt.len();
        if needed > self.context_tokens {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the prompt has {} tokens, but {} of the context's {} are left; give --ctx {} or more",
                    prompt.len(),
                    self.context_tokens - self.used_tokens.min(self.context_tokens),
                    self.context_tokens,
                    needed + 1,
                ),
            ));
        }
        Ok(())
    }

    /// Figures about memory and streaming up to now.
    ///
    /// # Errors
    /// Where /proc cannot be read.
    pub fn figures(&self) -> Result<Figures> {
        let mut figures = Figures {
            model_bytes: self.model_bytes,
            loader_bytes: self.loader_bytes,
            reader: "none",
            peak_memory_bytes: limits::peak_memory_bytes()?,
            profile: self.profile.clone(),
            ..Figures::default()
        };
        if let Some(streamed) = &self.streamed {
            streamed.handle().fill(&mut figures)?;
            let now = streamed.handle().counters();
            figures.decode = DecodeFigures::between(&self.after_prompt, &now);
            figures.kv_disk = streamed.kv_disk().map(KvDisk::figures);
        }
        Ok(figures)
    }
}

/// How many bytes of weights a GGUF file has, and its shards.
fn gguf_files(path: &Path) -> Result<(u64, Vec<ShardFile>)> {
    let (catalog, files) = read_catalog(path)?;
    if catalog.format == Format::Safetensors {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: llama.cpp needs GGUF, and this is safetensors; convert it with llama.cpp's convert_hf_to_gguf.py",
                path.display()
            ),
        ));
    }
    Ok((catalog.model_bytes, files))
}

/// What streams, where anything does, and the file of keys and values with it.
fn open_streamed(options: &SessionOptions) -> Result<Option<Streamed>> {
    let kv_disk = options.kv_disk.as_ref();
    if kv_disk.is_some() && options.stream.is_none() {
        return Err(Error::new(
            ErrorKind::Invalid,
            "keys and values are moved by the device that streams: not without one",
        ));
    }
    let kv_disk = kv_disk
        .map(|kv_disk| KvDisk::open(kv_disk, options.stop))
        .transpose()?;
    let stream = options.stream.as_ref();
    stream
        .map(|stream| Streamed::open(&options.path, stream, kv_disk))
        .transpose()
}

/// A context to compute in. Where the device that streams failed in it, its error is the one that says why.
fn new_context(
    options: &SessionOptions,
    model: &LlamaModel,
    streamed: Option<&Streamed>,
    context_tokens: u32,
) -> Result<LlamaContext> {
    let threads_count = options
        .threads_count
        .unwrap_or_else(|| u32::try_from(process::core_count()).unwrap_or(1));
    let kv_disk = streamed.and_then(Streamed::kv_disk);
    if let Some(kv_disk) = kv_disk {
        kv_disk.set_heads(model.kv_head_count());
    }
    let context_options = ContextOptions {
        context_tokens,
        ubatch_tokens: options.ubatch_tokens,
        threads_count,
        kv_type: options.kv_type,
    };
    let context = LlamaContext::new(model, &context_options, options.stop);
    if let Some(kv_disk) = kv_disk {
        kv_disk.ready()?;
    }
    context.map_err(|error| streamed.and_then(Streamed::failure).unwrap_or(error))
}

/// Loads through our stream; gives the model and the bytes that were read.
fn load_streamed(
    streamed: &Streamed,
    files: Vec<ShardFile>,
    progress: Progress<'_>,
) -> Result<(LlamaModel, u64)> {
    let shown = virtual_file(&files)?;
    let mut file = ModelFile::open(shown, files, Some(streamed.in_window()))?;
    let origin = Origin::Stream(&mut file, streamed.devices());
    let model = LlamaModel::load(origin, progress)?;
    streamed.loaded();
    if file.skipped_bytes() == 0 {
        return Err(Error::new(
            ErrorKind::Internal,
            "llama.cpp placed no weight on the device FLEA: nothing would be streamed",
        ));
    }
    ::log::debug!(
        "loader read {} bytes and left {} where they are",
        file.read_bytes(),
        file.skipped_bytes()
    );
    Ok((model, file.read_bytes()))
}

fn virtual_file(files: &[ShardFile]) -> Result<VirtualFile> {
    if let [single] = files {
        return Ok(VirtualFile::plain(single.len_bytes()));
    }
    let headers = files
        .iter()
        .map(|file| gguf::parse_shard(file.path(), file.len_bytes(), &mut file.header_reader()))
        .collect::<Result<Vec<_>>>()?;
    VirtualFile::joined(&headers)
}

fn context_tokens(model: &LlamaModel, wanted: Option<u32>) -> u32 {
    let trained = match model.trained_context_tokens() {
        0 => CONTEXT_TOKENS_DEFAULT_MAX,
        tokens => tokens,
    };
    wanted.unwrap_or_else(|| trained.min(CONTEXT_TOKENS_DEFAULT_MAX))
}

/// The prompt's tokens: as given, or of a text, or the model's start token where the text is empty.
///
/// # Errors
/// As [`LlamaModel::tokenize`].
pub fn prompt_tokens(model: &LlamaModel, text: &str, add_special: bool) -> Result<Vec<Token>> {
    let tokens = model.tokenize(text, add_special)?;
    if tokens.is_empty() {
        return Ok(model.start_token().into_iter().collect());
    }
    Ok(tokens)
}
