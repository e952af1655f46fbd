//! What a run says when it is over: one object for `--json`, one line on stderr for a person.

use std::io::Write;

use serde::Serialize;

use crate::cli;
use crate::cli::run::gpu::{self, GpusAnswer};
use crate::cli::run::kv_disk::KvDiskAnswer;
use crate::error::Result;
use crate::host::{End, Figures, Generation, Session, Token};
use crate::units::GIB;

/// The answer of `--json`.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    text: &'a str,
    token_ids: &'a [Token],
    end: &'static str,
    prompt_tokens: usize,
    tokens_per_second: f64,
    prompt_tokens_per_second: f64,
    seconds_to_first_token: Option<f64>,
    model_bytes: u64,
    total_bytes: Option<u64>,
    host_bytes: Option<u64>,
    weight_budget_bytes: Option<u64>,
    resident_bytes: Option<u64>,
    streamed_bytes_per_pass: Option<u64>,
    loader_bytes: u64,
    logits_hash: &'a str,
    fallbacks: &'a [&'static str],
    bytes_read: u64,
    read_gb_per_second: f64,
    stall_seconds: f64,
    acquires: u64,
    loads: u64,
    early_pieces: u64,
    expert_cache_bytes: u64,
    expert_cuts: u64,
    expert_hits: u64,
    expert_misses: u64,
    expert_bytes_read: u64,
    rows_bytes: u64,
    rows: u64,
    row_reads: u64,
    row_bytes_read: u64,
    reader: &'static str,
    direct_io: bool,
    page_bytes: u64,
    huge_page_share: f64,
    peak_memory_bytes: u64,
    profile: String,
    mirrors: Vec<serde_json::Value>,
    kv_disk: Option<KvDiskAnswer>,
    expert_reads_ahead: u64,
    expert_bytes_read_ahead: u64,
    expert_bytes_unused: u64,
    decode_bytes_read: u64,
    decode_expert_hits: u64,
    decode_expert_misses: u64,
    decode_expert_bytes_read: u64,
    decode_expert_cuts: u64,
    decode_read_seconds: f64,
    expert_guesses: u64,
    expert_guesses_right: u64,
    gpu: Option<GpusAnswer>,
}

fn per_second(count: usize, seconds: f64) -> f64 {
    if count > 0 && seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}

/// Passes over the layers after the prompt: the first token comes out of the prompt's own.
fn decode_passes(generation: &Generation) -> usize {
    generation.tokens.len().saturating_sub(1)
}

/// Writes the object of `--json`.
///
/// # Errors
/// A stdout that cannot be written.
pub fn print_answer(session: &Session, generation: &Generation, figures: &Figures) -> Result<()> {
    cli::print_json(&Answer {
        text: &generation.text,
        token_ids: &generation.tokens,
        end: match generation.end {
            End::Limit => "limit",
            End::Text => "end_of_text",
            End::ContextFull => "context_full",
            End::Stopped => "interrupted",
        },
        prompt_tokens: generation.prompt_tokens_count,
        tokens_per_second: per_second(decode_passes(generation), generation.decode_seconds),
        prompt_tokens_per_second: per_second(
            generation.prompt_tokens_count,
            generation.prompt_seconds,
        ),
        seconds_to_first_token: generation.first_token_seconds,
        model_bytes: figures.model_bytes,
        total_bytes: figures.total_bytes,
        host_bytes: figures.host_bytes,
        weight_budget_bytes: figures.weight_budget_bytes,
        resident_bytes: figures.resident_bytes,
        streamed_bytes_per_pass: figures.streamed_bytes_per_pass,
        loader_bytes: figures.loader_bytes,
        logits_hash: &session.logits_hash(),
        fallbacks: &figures.fallbacks,
        bytes_read: figures.bytes_read,
        read_gb_per_second: gigabytes_per_second(figures),
        stall_seconds: figures.stall_seconds,
        acquires: figures.acquires,
        loads: figures.loads,
        early_pieces: figures.early_pieces,
        expert_cache_bytes: figures.expert_cache_bytes,
        expert_cuts: figures.expert_cuts,
        expert_hits: figures.expert_hits,
        expert_misses: figures.expert_misses,
        expert_bytes_read: figures.expert_bytes_read,
        rows_bytes: figures.rows_bytes,
        rows: figures.rows,
        row_reads: figures.row_reads,
        row_bytes_read: figures.row_bytes_read,
        reader: figures.reader,
        direct_io: figures.direct_io,
        page_bytes: figures.page_bytes,
        huge_page_share: figures.huge_page_share,
        peak_memory_bytes: figures.peak_memory_bytes,
        profile: figures.profile.clone(),
        mirrors: figures
            .mirrors
            .iter()
            .map(cli::bench::mirror_json)
            .collect(),
        kv_disk: figures.kv_disk.as_ref().map(KvDiskAnswer::from),
        expert_reads_ahead: figures.expert_reads_ahead,
        expert_bytes_read_ahead: figures.expert_bytes_read_ahead,
        expert_bytes_unused: figures.expert_bytes_unused,
        decode_bytes_read: figures.decode.bytes_read,
        decode_expert_hits: figures.decode.expert_hits,
        decode_expert_misses: figures.decode.expert_misses,
        decode_expert_bytes_read: figures.decode.expert_bytes_read,
        decode_expert_cuts: figures.decode.expert_cuts,
        decode_read_seconds: figures.decode.read_seconds,
        expert_guesses: figures.expert_guesses,
        expert_guesses_right: figures.expert_guesses_right,
        gpu: figures.gpu.as_ref().map(GpusAnswer::from),
    })
}

fn gigabytes_per_second(figures: &Figures) -> f64 {
    if figures.read_seconds > 0.0 {
        figures.bytes_read as f64 / 1e9 / figures.read_seconds
    } else {
        0.0
    }
}

/// The last line on stderr.
pub fn say_summary(generation: &Generation, figures: &Figures) {
    let tokens = per_second(decode_passes(generation), generation.decode_seconds);
    let mut line = match generation.tokens.len() {
        // The only token came out of the prompt's pass: there is no rate to tell.
        1 => "1 token".to_owned(),
        count => format!("{count} tokens, {tokens:.2} tokens/s"),
    };
    if let Some(resident_bytes) = figures.resident_bytes {
        // Of the weights that are planned: what the host keeps itself (token embeddings) is not flea's to stream.
        let planned_bytes = resident_bytes + figures.streamed_bytes_per_pass.unwrap_or(0);
        let resident = share(resident_bytes as f64, planned_bytes as f64);
        let seconds = generation.prompt_seconds + generation.decode_seconds;
        line += &format!(
            ", {:.2} GB/s streamed, {resident:.0} % resident ({:.2} of {:.2} GiB), stalled {:.0} % of the time",
            gigabytes_per_second(figures),
            resident_bytes as f64 / GIB as f64,
            planned_bytes as f64 / GIB as f64,
            share(figures.stall_seconds, seconds),
        );
    } else if figures.gpu.is_none() {
        line += ", not streamed";
    }
    if let Some(figures) = &figures.gpu {
        line += &gpu::summary(figures);
    }
    if let Some(kv) = &figures.kv_disk {
        line += &format!(
            ", keys and values {:.2} of {:.2} GiB in memory, {:.2} GB read and {:.2} GB written",
            kv.ring_bytes as f64 / GIB as f64,
            kv.cache_bytes as f64 / GIB as f64,
            kv.bytes_read as f64 / 1e9,
            kv.bytes_written as f64 / 1e9,
        );
    }
    if !figures.fallbacks.is_empty() {
        line += &format!(", fallbacks: {}", figures.fallbacks.join(", "));
    }
    // Nobody is left to tell when stderr is gone.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// `part` of `whole` in percent, at most 100: pages round up.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        (part / whole * 100.0).min(100.0)
    } else {
        0.0
    }
}
