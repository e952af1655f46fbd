//! What a KV codec does to a model: its answers with keys and values that went through the codec, against its answers
//! with those it computed.
//!
//! A passage is computed in f32, its KV state taken, coded, decoded and put back; then the passage goes on, token by
//! token, the same tokens in both runs. Every row of logits is compared. Mean squared errors alone mislead: a codec can
//! halve them and double the divergence. The passage that calibrates `spectral` is never one that is measured.

use crate::error::{Error, ErrorKind, Result};
use crate::host::kv_state::{KvState, Part, Side};
use crate::host::session::Session;
use crate::host::{SampleOptions, Sampler, Step, Token};
use crate::kv::quality::compare;
use crate::kv::{Choice, Codec, Coder, Rate, Spec, Values};

/// Divergence, in nats, that rounding may cause where nothing was coded.
const CONTROL_MAX: f64 = 1e-5;

/// How a guard keeps what hurts most: at q8_0, or tq:8 where the length of the vectors is no multiple of 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    /// Layers with a cache at each end.
    pub end_layers: usize,
    /// Last tokens before the question.
    pub recent_tokens: usize,
    /// First tokens, that attention sinks into.
    pub sink_tokens: usize,
}

impl Guard {
    /// What the reference recommends.
    pub const DEFAULT: Self = Self {
        end_layers: 2,
        recent_tokens: 128,
        sink_tokens: 4,
    };
    /// Everything goes through the codec.
    pub const NONE: Self = Self {
        end_layers: 0,
        recent_tokens: 0,
        sink_tokens: 0,
    };
}

/// A codec for keys and one for values.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// For keys.
    pub key: Choice,
    /// For values.
    pub value: Choice,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct GateOptions {
    /// Codecs.
    pub pairs: Vec<Pair>,
    /// What is kept at 8 bits.
    pub guard: Guard,
    /// Passages that are measured; one more calibrates.
    pub passages: u32,
    /// Tokens whose answers are compared, at the end of each passage.
    pub question_tokens: usize,
}

/// What a pair of codecs did.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The codecs.
    pub pair: Pair,
    /// Stored bits per value, keys and values, guarded parts and calibrations included.
    pub bits: f64,
    /// Mean Kullback-Leibler divergence of the next token's distribution, in nats.
    pub divergence: f64,
    /// The largest.
    pub divergence_max: f64,
    /// Share of tokens with the same likeliest next token.
    pub top1: f64,
    /// Growth of the mean negative log-likelihood of the real next token, in nats.
    pub loss: f64,
    /// Error of keys over their energy.
    pub key_nmse: f64,
    /// Error of values over their energy.
    pub value_nmse: f64,
    /// Layers and sides of spectral that fell back to tq.
    pub fallbacks: usize,
    /// Rows of logits compared.
    pub rows: usize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    bytes: f64,
    values: f64,
    error: [f64; 2],
    energy: [f64; 2],
    divergence: f64,
    divergence_max: f64,
    same: f64,
    loss: f64,
    rows: usize,
    fallbacks: usize,
}

struct Passage {
    state: KvState,
    question: Vec<Token>,
    /// Log-probabilities after each token of the question.
    answers: Vec<Vec<f32>>,
}

/// Measures codecs on a model. Passages are what the model itself writes, with dice of different seeds.
///
/// # Errors
/// What the session meets; `Unsupported` where the state cannot be taken apart; `Invalid` for codecs that do not fit.
pub fn measure(session: &mut Session, options: &GateOptions) -> Result<Vec<Verdict>> {
    let heads = session.model().kv_head_count();
    let tokens = session.context_tokens().saturating_sub(1);
    if tokens < options.question_tokens + 64 || options.question_tokens == 0 {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "a context of {tokens} tokens is too short for a question of {}",
                options.question_tokens
            ),
        ));
    }
    let sample = passage(session, tokens, options.question_tokens, 1)?;
    let mut sums = vec![Sums::default(); options.pairs.len()];
    for number in 0..options.passages {
        let passage = passage(session, tokens, options.question_tokens, 2 + number)?;
        check_control(session, &passage)?;
        for (pair, sums) in options.pairs.iter().zip(&mut sums) {
            let mut changed = passage.state.clone();
            for part in passage.state.parts() {
                code_part(
                    *pair,
                    part,
                    &passage.state,
                    &sample.state,
                    &mut changed,
                    heads,
                    options,
                    sums,
                )?;
            }
            session.restore_kv(changed.bytes())?;
            let answers = ask(session, &passage.question)?;
            compare_answers(&passage, &answers, sums);
        }
    }
    Ok(options
        .pairs
        .iter()
        .zip(sums)
        .map(|(pair, sums)| verdict(*pair, &sums))
        .collect())
}

/// The state as it was must give the answers that were: else whatever follows measures llama.cpp and not a codec.
fn check_control(session: &mut Session, passage: &Passage) -> Result<()> {
    session.restore_kv(passage.state.bytes())?;
    let mut sums = Sums::default();
    compare_answers(passage, &ask(session, &passage.question)?, &mut sums);
    if sums.divergence_max > CONTROL_MAX {
        return Err(Error::new(
            ErrorKind::Internal,
            format!(
                "keys and values that were taken out and put back unchanged alter the answers by {:.2e} nats",
                sums.divergence_max
            ),
        ));
    }
    Ok(())
}

fn verdict(pair: Pair, sums: &Sums) -> Verdict {
    let rows = sums.rows.max(1) as f64;
    let share = |side: usize| {
        if sums.energy[side] > 0.0 {
            sums.error[side] / sums.energy[side]
        } else {
            0.0
        }
    };
    Verdict {
        pair,
        bits: sums.bytes * 8.0 / sums.values.max(1.0),
        divergence: sums.divergence / rows,
        divergence_max: sums.divergence_max,
        top1: sums.same / rows,
        loss: sums.loss / rows,
        key_nmse: share(0),
        value_nmse: share(1),
        fallbacks: sums.fallbacks,
        rows: sums.rows,
    }
}

/// Lets the model write, keeps the state before the question and the answers to it.
fn passage(session: &mut Session, tokens: usize, question: usize, seed: u32) -> Result<Passage> {
    session.forget()?;
    let options = SampleOptions {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.95,
        seed,
        ignore_end: true,
    };
    let mut sampler = Sampler::new(session.model(), &options)?;
    let start: Vec<Token> = session.model().start_token().into_iter().collect();
    let limit = tokens - start.len();
    let written = session.generate(&start, Some(limit), &mut sampler, &mut |_: Step<'_>| Ok(()))?;
    if written.tokens.len() < limit {
        return Err(Error::new(ErrorKind::Canceled, "stopped"));
    }
    let mut all = start;
    all.extend(written.tokens);
    let question = all.split_off(tokens - question);
    session.forget()?;
    session.feed(&all)?;
    let state = KvState::parse(session.kv_state()?)?;
    let answers = ask(session, &question)?;
    Ok(Passage {
        state,
        question,
        answers,
    })
}

/// Log-probabilities after each token.
fn ask(session: &mut Session, question: &[Token]) -> Result<Vec<Vec<f32>>> {
    question
        .iter()
        .map(|token| {
            session.feed(&[*token])?;
            Ok(log_softmax(session.logits()?))
        })
        .collect()
}

fn log_softmax(row: &[f32]) -> Vec<f32> {
    let peak = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|value| f64::from(value - peak).exp()).sum();
    let log_sum = sum.ln() as f32 + peak;
    row.iter().map(|value| value - log_sum).collect()
}

fn likeliest(row: &[f32]) -> usize {
    row.iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map_or(0, |(index, _)| index)
}

fn compare_answers(passage: &Passage, answers: &[Vec<f32>], sums: &mut Sums) {
    for (index, (true_row, row)) in passage.answers.iter().zip(answers).enumerate() {
        let divergence: f64 = true_row
            .iter()
            .zip(row)
            .map(|(p, q)| f64::from(*p).exp() * f64::from(p - q))
            .filter(|term| term.is_finite())
            .sum();
        sums.divergence += divergence;
        sums.divergence_max = sums.divergence_max.max(divergence);
        sums.same += f64::from(u8::from(likeliest(true_row) == likeliest(row)));
        if let Some(next) = passage
            .question
            .get(index + 1)
            .and_then(|token| usize::try_from(*token).ok())
        {
            sums.loss += f64::from(true_row[next] - row[next]);
        }
        sums.rows += 1;
    }
}

/// The coder for a part, and the bytes of its calibration.
fn coder(choice: Choice, dim: usize, sample: &[f32], sums: &mut Sums) -> Result<(Coder, usize)> {
    let spec = Spec::new(choice.codec, choice.rate, dim)?;
    if choice.codec != Codec::Spectral {
        return Ok((Coder::new(spec)?, 0));
    }
    let (coder, calibration) = Coder::calibrated(spec, sample)?;
    sums.fallbacks += usize::from(calibration.is_none());
    Ok((
        coder,
        calibration.map_or(0, |calibration| calibration.to_bytes().len()),
    ))
}

#[expect(
    clippy::too_many_arguments,
    reason = "one call, and every argument is another thing"
)]
fn code_part(
    pair: Pair,
    part: &Part,
    state: &KvState,
    sample: &KvState,
    changed: &mut KvState,
    heads: usize,
    options: &GateOptions,
    sums: &mut Sums,
) -> Result<()> {
    if heads == 0 || !part.row.is_multiple_of(heads) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} values are no {heads} heads", part.row),
        ));
    }
    let dim = part.row / heads;
    let layers = state
        .parts()
        .iter()
        .filter(|other| other.side == part.side)
        .count();
    let guard = options.guard;
    let rows = state.rows(part);
    let eight = Choice {
        codec: if dim.is_multiple_of(32) {
            Codec::Q8_0
        } else {
            Codec::Tq
        },
        rate: Rate::bits(8),
    };
    let at_end = part.layer < guard.end_layers || part.layer + guard.end_layers >= layers;
    let choice = match part.side {
        _ if at_end => eight,
        Side::Key => pair.key,
        Side::Value => pair.value,
    };
    let sink = guard.sink_tokens.min(part.cells) * part.row;
    let recent = (part.cells.saturating_sub(guard.recent_tokens) * part.row).max(sink);
    let mut decoded = Vec::with_capacity(rows.len());
    for (range, choice) in [
        (0..sink, eight),
        (sink..recent, choice),
        (recent..rows.len(), eight),
    ] {
        if range.is_empty() {
            continue;
        }
        let learn = sample
            .parts()
            .iter()
            .find(|other| (other.side, other.layer) == (part.side, part.layer));
        let learn = learn.map_or_else(Vec::new, |part| sample.rows(part));
        let (coder, side_bytes) = coder(choice, dim, &learn, sums)?;
        let frame = coder.encode(Values::F32(&rows[range]))?;
        decoded.extend(coder.decode(&frame)?);
        // One calibration serves all passages.
        sums.bytes += frame.len() as f64 + side_bytes as f64 / f64::from(options.passages);
    }
    let side = usize::from(part.side == Side::Value);
    let energy: f64 = rows
        .iter()
        .map(|value| f64::from(*value) * f64::from(*value))
        .sum();
    sums.error[side] += compare(&rows, &decoded, dim).mse * rows.len() as f64;
    sums.energy[side] += energy;
    sums.values += rows.len() as f64;
    changed.set_rows(part, &decoded);
    Ok(())
}
