//! The rates of the kernels on a GPU, each beside a copy within its memory in the same run, and unpacking beside the link.
//!
//! Every round measures all of them in turn, for a span each: work is asked for back to back and waited for once, so that
//! neither starting nor waiting counts. A rate of a kernel that gives wrong bytes says nothing: checksums and unpacked weights
//! are compared first. Place: beside the pipeline, as [`super::raw`] is for the drive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use half::bf16;

use super::synth::blocks::Random;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::cuda::rate::LinkTest;
use crate::mem::cuda::{
    Coded, Context, Kernels, NO_DAMAGE, Narrow, Quantised, Span, Stream, VramArea,
};
use crate::model::coded;
use crate::model::tiles::tile_count;
use crate::units::MIB;

/// Weights that are coded on the processor for the unpack kernel, at most: it takes a second.
const CODED_BYTES_MAX: u64 = 128 * MIB;
/// Asked for at once, at most.
const QUEUE_MAX: u32 = 1000;

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct KernelsOptions {
    /// Which GPU.
    pub gpu_index: u32,
    /// What the longest works on; twice as much VRAM is taken, and some.
    pub len_bytes: u64,
    /// How often each is measured.
    pub rounds: u32,
    /// For how long.
    pub span: Duration,
}

/// One kernel's rate.
#[derive(Debug, Clone)]
pub struct KernelRate {
    /// What it does.
    pub name: String,
    /// Bytes read and written per second, in 10^9.
    pub traffic_gb_per_second: f64,
    /// Bytes of its result per second; of a checksum, the bytes that are summed.
    pub result_gb_per_second: f64,
    /// Its traffic beside the copy's of the same round, as a part of it.
    pub of_copy: f64,
}

/// What was measured: medians of the rounds.
#[derive(Debug, Clone)]
pub struct KernelsReport {
    /// What the GPU is called.
    pub gpu: String,
    /// What the longest worked on.
    pub len_bytes: u64,
    /// Bytes read and written per second by a copy within VRAM.
    pub copy_gb_per_second: f64,
    /// Bytes per second out of pinned memory into VRAM.
    pub link_gb_per_second: f64,
    /// Each kernel.
    pub kernels: Vec<KernelRate>,
    /// Coded bytes per byte of weights, of those unpacked here.
    pub coded_ratio: f64,
    /// Weights unpacked per second beside the bytes of the link in the same round.
    pub unpack_of_link: f64,
}

/// What is asked for again and again.
#[derive(Debug, Clone, Copy)]
enum Work {
    Copy,
    Checksums,
    Dequantise(Quantised, Narrow),
    Unpack,
}

/// Memory and tools of a run.
struct Bench {
    stream: Stream,
    kernels: Kernels,
    link: LinkTest,
    from: Span,
    to: Span,
    sums: Span,
    damaged: Span,
    coded: Coded,
    // What the spans are in; goes last.
    _areas: Vec<VramArea>,
}

/// Measures.
///
/// # Errors
/// Those of [`Context::new`] and [`Kernels::load`]; `NoMemory`; `Checksum` for a kernel that gives wrong bytes; `Canceled`.
pub fn measure(options: &KernelsOptions, stop: &AtomicBool) -> Result<KernelsReport> {
    let context = Context::new(options.gpu_index)?;
    let bench = Bench::new(&context, options.len_bytes)?;
    bench.check()?;
    let works = works();
    let mut traffic = vec![Vec::new(); works.len()];
    let mut links = Vec::new();
    for _ in 0..options.rounds.max(1) {
        for (work, rates) in works.iter().zip(&mut traffic) {
            check_stop(stop)?;
            rates.push(bench.rate(*work, options.span)?);
        }
        check_stop(stop)?;
        links.push(bench.link.round(options.span)? / 1e9);
    }
    let copies = traffic[0].clone();
    let result =
        |work: Work, rate: f64| rate * bench.result_bytes(work) / bench.traffic_bytes(work);
    let kernels: Vec<KernelRate> = works
        .iter()
        .zip(&traffic)
        .skip(1)
        .map(|(work, rates)| KernelRate {
            name: work.name(),
            traffic_gb_per_second: median(rates),
            result_gb_per_second: result(*work, median(rates)),
            of_copy: median_of_ratios(rates, &copies),
        })
        .collect();
    let unpacked: Vec<f64> = traffic[works.len() - 1]
        .iter()
        .map(|rate| result(Work::Unpack, *rate))
        .collect();
    Ok(KernelsReport {
        gpu: context.name().to_owned(),
        len_bytes: options.len_bytes,
        copy_gb_per_second: median(&copies),
        link_gb_per_second: median(&links),
        kernels,
        coded_ratio: bench.coded.bytes.len_bytes() as f64 / (2 * bench.coded.elements) as f64,
        unpack_of_link: median_of_ratios(&unpacked, &links),
    })
}

/// The copy first, unpacking last.
fn works() -> Vec<Work> {
    let kinds = Quantised::ALL.iter();
    let both = kinds.flat_map(|kind| [Narrow::F16, Narrow::BF16].map(|to| (*kind, to)));
    let mut works = vec![Work::Copy, Work::Checksums];
    works.extend(both.map(|(kind, to)| Work::Dequantise(kind, to)));
    works.push(Work::Unpack);
    works
}

impl Work {
    fn name(self) -> String {
        match self {
            Self::Copy => "copy".to_owned(),
            Self::Checksums => "verify (crc32c)".to_owned(),
            Self::Dequantise(kind, Narrow::F16) => format!("{} to f16", kind.name()),
            Self::Dequantise(kind, Narrow::BF16) => format!("{} to bf16", kind.name()),
            Self::Unpack => "unpack".to_owned(),
        }
    }
}

impl Bench {
    fn new(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        let stream = Stream::new(context)?;
        let kernels = Kernels::load(context)?;
        let link = LinkTest::new(context)?;
        let mut random = Random::new(&[len_bytes]);
        let weights: Vec<u8> = (0..len_bytes.min(CODED_BYTES_MAX) / 2)
            .flat_map(|_| bf16::from_f32(random.normal() * 0.02).to_le_bytes())
            .collect();
        let packed = coded::encode(&weights).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "too few bytes to measure kernels with")
        })?;
        let sums_bytes = 4 * len_bytes.div_ceil(MIB);
        let areas = [len_bytes, len_bytes, packed.len() as u64, sums_bytes + 16]
            .iter()
            .map(|len| VramArea::new(context, *len))
            .collect::<Result<Vec<_>>>()?;
        let bench = Self {
            stream,
            kernels,
            link,
            from: areas[0].span(0, len_bytes)?,
            to: areas[1].span(0, len_bytes)?,
            sums: areas[3].span(16, sums_bytes)?,
            damaged: areas[3].span(0, 4)?,
            coded: Coded {
                bytes: areas[2].span(0, packed.len() as u64)?,
                elements: weights.len() as u64 / 2,
            },
            _areas: areas,
        };
        bench
            .from
            .write(&bench.stream, &whole(&weights, len_bytes))?;
        bench.coded.bytes.write(&bench.stream, &packed)?;
        Ok(bench)
    }

    /// Sums and weights must be right before anybody is told how fast they came.
    fn check(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::new(ErrorKind::Checksum, what.to_owned()));
        self.reset()?;
        self.ask(Work::Checksums)?;
        let found = self.sums.read(&self.stream)?;
        let bytes = self.from.read(&self.stream)?;
        let expected: Vec<u8> = bytes
            .chunks(MIB as usize)
            .flat_map(|piece| crc32c::crc32c(piece).to_le_bytes())
            .collect();
        if found != expected {
            return wrong("the GPU's checksums are not those of the processor");
        }
        self.ask(Work::Unpack)?;
        let weights_bytes = 2 * self.coded.elements;
        let weights = self.to.first(weights_bytes)?.read(&self.stream)?;
        if self.damaged.read(&self.stream)? != NO_DAMAGE.to_le_bytes()
            || weights != bytes[..weights_bytes as usize]
        {
            return wrong("the GPU unpacks other weights than were packed");
        }
        Ok(())
    }

    /// Sums are zero, and no tile is damaged.
    fn reset(&self) -> Result<()> {
        self.sums
            .write(&self.stream, &vec![0; self.sums.len_bytes() as usize])?;
        self.damaged.write(&self.stream, &NO_DAMAGE.to_le_bytes())
    }

    fn ask(&self, work: Work) -> Result<()> {
        let stream = &self.stream;
        match work {
            Work::Copy => {
                let len = self.from.len_bytes() as usize;
                stream.copy_within(self.to.at(), self.from.at(), len)
            }
            Work::Checksums => self.kernels.checksums(stream, self.from, self.sums),
            Work::Dequantise(kind, to) => {
                let from = self.from.first(self.blocks(kind) * kind.block_bytes())?;
                self.kernels.dequantise(stream, (kind, to), from, self.to)
            }
            Work::Unpack => {
                let tiles = 0..tile_count(self.coded.elements);
                let (coded, to) = (self.coded, self.to);
                self.kernels.unpack(stream, coded, tiles, to, self.damaged)
            }
        }
    }

    /// As many as have room when they are 16-bit floats.
    fn blocks(&self, kind: Quantised) -> u64 {
        self.to.len_bytes() / (2 * kind.block_elements())
    }

    fn traffic_bytes(&self, work: Work) -> f64 {
        let read_bytes = match work {
            Work::Copy | Work::Checksums => self.from.len_bytes(),
            Work::Dequantise(kind, _) => self.blocks(kind) * kind.block_bytes(),
            Work::Unpack => self.coded.bytes.len_bytes(),
        };
        match work {
            Work::Checksums => read_bytes as f64,
            _ => read_bytes as f64 + self.result_bytes(work),
        }
    }

    fn result_bytes(&self, work: Work) -> f64 {
        let bytes = match work {
            Work::Copy | Work::Checksums => self.from.len_bytes(),
            Work::Dequantise(kind, _) => self.blocks(kind) * 2 * kind.block_elements(),
            Work::Unpack => 2 * self.coded.elements,
        };
        bytes as f64
    }

    /// 10^9 bytes of traffic per second over about `span`.
    fn rate(&self, work: Work, span: Duration) -> Result<f64> {
        // Twice to warm up and to know how often it fits.
        let first = self.timed(work, 1)?;
        let once = self.timed(work, 1)?.min(first).max(1e-7);
        let times = (span.as_secs_f64() / once)
            .ceil()
            .clamp(1.0, f64::from(QUEUE_MAX)) as u32;
        let seconds = self.timed(work, times)?;
        Ok(self.traffic_bytes(work) * f64::from(times) / seconds.max(1e-9) / 1e9)
    }

    fn timed(&self, work: Work, times: u32) -> Result<f64> {
        let began = Instant::now();
        for _ in 0..times {
            self.ask(work)?;
        }
        self.stream.record()?.wait()?;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// The weights, again and again, up to a length.
fn whole(weights: &[u8], len_bytes: u64) -> Vec<u8> {
    let all = weights.iter().copied().cycle();
    all.take(len_bytes as usize).collect()
}

fn check_stop(stop: &AtomicBool) -> Result<()> {
    match stop.load(Ordering::Relaxed) {
        true => Err(Error::new(ErrorKind::Canceled, "interrupted")),
        false => Ok(()),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn median_of_ratios(values: &[f64], beside: &[f64]) -> f64 {
    let ratios = values.iter().zip(beside).map(|(a, b)| a / b.max(1e-12));
    median(&ratios.collect::<Vec<f64>>())
}
