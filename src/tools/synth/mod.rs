//! Synthetic models: GGUF files of any size with random weights, which stock llama.cpp loads and runs.
//!
//! `blocks` draws the weights, `vocab` makes the words, `arch` names what there is, `shape` decides the sizes, `tensors`
//! lists what to write, `file` writes it safely, `publish` gives it its name. The same seed and shape give the same bytes, on every machine. What the models say means nothing,
//! but it depends on the prompt, on every layer and on the order of all of them, which is what tests need.

mod arch;
pub mod blocks;
pub(super) mod file;
mod gemma3n;
mod publish;
mod roles;
pub mod router;
pub mod shape;
pub mod tensors;
mod vocab;

use std::collections::HashMap;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use blocks::{Kind, Pool, Random};
use file::OutputFile;
use shape::{Arch, Shape};
use tensors::{Fill, Tensor};

use super::gguf_write::{
    ALIGNMENT_BYTES, Metadata, TensorInfo, Value, Writer, place, write_header,
};
use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;

/// Pools are about this long: long enough that the rows of a matrix differ, short enough to be drawn in no time.
const POOL_BYTES: u64 = 4 * MIB;
/// The number in a shard's name has five digits, the key 16 bits.
const SHARDS_MAX: usize = 65_535;

/// What to write.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The model.
    pub shape: Shape,
    /// Where all randomness comes from.
    pub seed: u64,
    /// How unevenly the experts are used: 0 = alike, see [`router`].
    pub router_skew: f32,
    /// Cut into files of at most this size, where a single tensor is not larger.
    pub split_bytes: Option<u64>,
    /// Replace what is there.
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Report {
    /// The files, in order of the shards.
    pub files: Vec<PathBuf>,
    /// All of them together.
    pub bytes: u64,
    /// Tensors in the model.
    pub tensors_count: usize,
    /// Weights in the model.
    pub parameters: u64,
    /// From the first random number to the last byte on the drive.
    pub seconds: f64,
}

/// One file of the model, before it is written.
struct Shard {
    path: PathBuf,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    bytes: u64,
}

/// Writes a model to `path`, or to `NAME-00001-of-0000N.gguf` and its fellows when it is split. `stop` ends it early;
/// `progress` is told bytes written and bytes in all.
///
/// # Errors
/// `Invalid`: the output exists. `Refused`: the disk is too small. `Canceled`: `stop`. `Io`. Nothing is left behind.
pub fn generate(
    spec: &Spec,
    path: &Path,
    stop: &AtomicBool,
    mut progress: impl FnMut(u64, u64),
) -> Result<Report> {
    let began = Instant::now();
    let shards = plan_shards(spec, path)?;
    let total_bytes = shards.iter().map(|shard| shard.bytes).sum();
    for shard in &shards {
        file::check_target(&shard.path, spec.force)?;
    }
    file::check_space(path, total_bytes)?;
    let mut pools = Pools::new(spec.seed, &shards);
    let mut written = Vec::with_capacity(shards.len());
    let mut done_bytes = 0;
    for shard in &shards {
        let mut report = |bytes: u64| progress(done_bytes + bytes, total_bytes);
        written.push(write_shard(spec, shard, &mut pools, stop, &mut report)?);
        done_bytes += shard.bytes;
    }
    commit(written)?;
    Ok(Report {
        bytes: total_bytes,
        tensors_count: shards.iter().map(|shard| shard.tensors.len()).sum(),
        parameters: spec.shape.parameters(),
        files: shards.into_iter().map(|shard| shard.path).collect(),
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// All names at the very end, so that a split model never stands there in part.
fn commit(mut written: Vec<OutputFile>) -> Result<()> {
    for index in 0..written.len() {
        if let Err(error) = written[index].commit() {
            written[..=index].iter().for_each(OutputFile::withdraw);
            return Err(error);
        }
    }
    Ok(())
}

fn plan_shards(spec: &Spec, path: &Path) -> Result<Vec<Shard>> {
    let tensors = tensors::list(&spec.shape);
    let ranges = cut(&tensors, spec.split_bytes);
    let count = ranges.len();
    if count > SHARDS_MAX {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("--split-bytes makes {count} files; at most {SHARDS_MAX} are possible"),
        ));
    }
    let mut shards = Vec::with_capacity(count);
    for (index, range) in ranges.into_iter().enumerate() {
        let mut metadata = Metadata::new();
        if index == 0 {
            describe(&mut metadata, &spec.shape);
        }
        let mut shard_path = path.to_owned();
        if spec.split_bytes.is_some() {
            metadata.set("split.no", &Value::U16(index as u16));
            metadata.set("split.count", &Value::U16(count as u16));
            metadata.set("split.tensors.count", &Value::I32(tensors.len() as i32));
            shard_path = split_path(path, index, count);
        }
        let tensors = tensors[range].to_vec();
        let infos: Vec<TensorInfo> = tensors.iter().map(info).collect();
        let header_bytes = write_header(&metadata, &infos, ALIGNMENT_BYTES)?.len() as u64;
        let (_, data_bytes) = place(tensors.iter().map(Tensor::bytes), ALIGNMENT_BYTES)?;
        shards.push(Shard {
            path: shard_path,
            metadata,
            tensors,
            bytes: header_bytes + data_bytes,
        });
    }
    Ok(shards)
}

/// Consecutive tensors up to the limit go together, at least one to a file.
fn cut(tensors: &[Tensor], split_bytes: Option<u64>) -> Vec<Range<usize>> {
    let limit = split_bytes.unwrap_or(u64::MAX);
    let mut ranges = Vec::new();
    let (mut begin, mut sum) = (0, 0_u64);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes();
        if index > begin && sum + bytes > limit {
            ranges.push(begin..index);
            (begin, sum) = (index, 0);
        }
        sum += bytes;
    }
    ranges.push(begin..tensors.len());
    ranges
}

/// `m.gguf` becomes `m-00001-of-00003.gguf`, the form llama.cpp follows.
fn split_path(path: &Path, index: usize, count: usize) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", index + 1))
}

fn info(tensor: &Tensor) -> TensorInfo {
    TensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        ggml_type: tensor.kind.ggml_type(),
        offset_bytes: 0,
    }
}

/// The keys llama.cpp needs for the architecture, and those people look at.
fn describe(metadata: &mut Metadata, shape: &Shape) {
    let arch = shape.arch.gguf_name();
    let text = |value: &str| Value::Text(value.to_owned());
    metadata.set("general.architecture", &text(arch));
    metadata.set("general.type", &text("model"));
    let name = format!("flea synth {} {}", shape.arch, shape.quant);
    metadata.set("general.name", &text(&name));
    metadata.set("general.file_type", &Value::U32(shape.quant.file_type()));
    metadata.set("general.quantization_version", &Value::U32(2));
    let mut set = |key: &str, value: u64| {
        metadata.set(format!("{arch}.{key}"), &Value::U32(value as u32));
    };
    set("context_length", shape.ctx);
    set("embedding_length", shape.embd);
    set("block_count", shape.layers);
    set("attention.head_count", shape.heads);
    set("attention.head_count_kv", shape.kv_heads);
    set("attention.key_length", shape.head_dim);
    set("attention.value_length", shape.head_dim);
    set("rope.dimension_count", shape.head_dim);
    set("vocab_size", shape.vocab);
    match shape.arch {
        Arch::Qwen3Moe | Arch::GptOss => {
            set("feed_forward_length", shape.ffn * shape.experts_used);
            set("expert_feed_forward_length", shape.ffn);
        }
        _ => set("feed_forward_length", shape.ffn),
    }
    if shape.experts > 0 {
        set("expert_count", shape.experts);
        set("expert_used_count", shape.experts_used);
    }
    match shape.arch {
        Arch::Gemma3 => set("attention.sliding_window", shape.ctx.min(1024)),
        Arch::Gemma3n => {
            set("attention.sliding_window", shape.ctx.min(512));
            set("embedding_length_per_layer_input", gemma3n::PER_LAYER_WIDTH);
            set("altup.active_idx", 0);
            set("altup.num_inputs", gemma3n::STREAMS);
        }
        Arch::GptOss => set("attention.sliding_window", shape.ctx.min(128)),
        _ => {}
    }
    let base = match shape.arch {
        Arch::Llama => 10_000.0,
        _ => 1_000_000.0,
    };
    metadata.set(format!("{arch}.rope.freq_base"), &Value::F32(base));
    metadata.set(
        format!("{arch}.attention.layer_norm_rms_epsilon"),
        &Value::F32(1e-6),
    );
    vocab::set_vocabulary(metadata, shape.arch.tokenizer(), shape.vocab);
}

/// The pools in use, one for each kind, mean and spread.
struct Pools {
    seed: u64,
    len_bytes: u64,
    pools: HashMap<(Kind, u32, u32), Pool>,
}

impl Pools {
    fn new(seed: u64, shards: &[Shard]) -> Self {
        let tensors = shards.iter().flat_map(|shard| &shard.tensors);
        let largest = tensors.map(Tensor::bytes).max().unwrap_or(0);
        Self {
            seed,
            len_bytes: largest.min(POOL_BYTES),
            pools: HashMap::new(),
        }
    }

    fn get(&mut self, kind: Kind, fill: Fill) -> &Pool {
        let (seed, mut len_bytes) = (self.seed, self.len_bytes);
        if kind == Kind::F32 {
            // Norms, biases and routers: small, many of them, and no two with the same strength need a large pool.
            len_bytes = len_bytes.min(MIB);
        }
        self.pools
            .entry((kind, fill.mean.to_bits(), fill.std.to_bits()))
            .or_insert_with(|| Pool::new(kind, fill.mean, fill.std, len_bytes, seed))
    }
}

fn write_shard(
    spec: &Spec,
    shard: &Shard,
    pools: &mut Pools,
    stop: &AtomicBool,
    progress: &mut impl FnMut(u64),
) -> Result<OutputFile> {
    let context = |error: Error| {
        let text = format!("{}: {error}", shard.path.display());
        match error.errno() {
            Some(libc::ENOSPC) => {
                Error::os(libc::ENOSPC, shard.path.display()).with_kind(ErrorKind::Refused)
            }
            _ => error.with_context(text),
        }
    };
    let output = OutputFile::create(&shard.path, shard.bytes, spec.force)?;
    let announced = shard
        .tensors
        .iter()
        .map(|tensor| (info(tensor), tensor.bytes()))
        .collect();
    let mut writer =
        Writer::new(output, &shard.metadata, announced, ALIGNMENT_BYTES).map_err(context)?;
    let mut done_bytes = 0;
    for tensor in &shard.tensors {
        let mut report = |bytes| {
            done_bytes += bytes;
            progress(done_bytes);
        };
        let profile = router::Profile::of(spec, tensor);
        match profile {
            Some(profile) => write_router(&profile, tensor, pools, &mut writer, &mut report),
            None => write_tensor(spec.seed, tensor, pools, &mut writer, stop, &mut report),
        }
        .map_err(context)?;
    }
    let mut output = writer.finish().map_err(context)?;
    output.sync().map_err(context)?;
    Ok(output)
}

fn write_tensor<W: Write>(
    seed: u64,
    tensor: &Tensor,
    pools: &mut Pools,
    writer: &mut Writer<W>,
    stop: &AtomicBool,
    progress: &mut impl FnMut(u64),
) -> Result<()> {
    let mut random = Random::new(&[seed, name_hash(&tensor.name)]);
    let row = tensor.shape[0];
    let quiet_bytes = tensor.kind.bytes(row * tensor.fill.quiet_rows);
    for (bytes, fill) in [
        (quiet_bytes, tensor.fill.quiet()),
        (tensor.bytes() - quiet_bytes, tensor.fill),
    ] {
        let mut left_bytes = bytes;
        while left_bytes > 0 {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(
                    ErrorKind::Canceled,
                    "interrupted; nothing was kept",
                ));
            }
            let piece = pools.get(tensor.kind, fill).piece(&mut random, left_bytes);
            writer.write(piece)?;
            left_bytes -= piece.len() as u64;
            progress(piece.len() as u64);
        }
    }
    Ok(())
}

/// A router whose rows are not alike. It is small, so it is made in memory.
fn write_router<W: Write>(
    profile: &router::Profile,
    tensor: &Tensor,
    pools: &mut Pools,
    writer: &mut Writer<W>,
    progress: &mut impl FnMut(u64),
) -> Result<()> {
    let mut random = Random::new(&[pools.seed, name_hash(&tensor.name)]);
    let mut bytes = Vec::with_capacity(tensor.bytes() as usize);
    while (bytes.len() as u64) < tensor.bytes() {
        let left_bytes = tensor.bytes() - bytes.len() as u64;
        let pool = pools.get(tensor.kind, tensor.fill);
        bytes.extend_from_slice(pool.piece(&mut random, left_bytes));
    }
    profile.apply(&mut bytes);
    writer.write(&bytes)?;
    progress(tensor.bytes());
    Ok(())
}

/// FNV-1a: a tensor's place in the pools follows from its name alone, so a split changes no weight.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::shape::{Quant, Wish};
    use super::*;

    fn spec(arch: Arch, quant: Quant, seed: u64) -> Spec {
        let wish = Wish {
            layers: Some(2),
            embd: Some(256),
            ffn: Some(256),
            vocab: Some(512),
            ..Wish::default()
        };
        Spec {
            shape: Shape::choose(arch, quant, &wish).unwrap(),
            seed,
            router_skew: 0.0,
            split_bytes: None,
            force: false,
        }
    }

    fn write(spec: &Spec, path: &Path) -> Report {
        generate(spec, path, &AtomicBool::new(false), |_, _| {}).unwrap()
    }

    #[test]
    fn the_same_seed_gives_the_same_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, seed| {
            let path = directory.path().join(name);
            let report = write(&spec(Arch::Qwen3Moe, Quant::Q4KM, seed), &path);
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(bytes.len() as u64, report.bytes);
            bytes
        };
        let first = file("a", 1);
        assert!(first == file("b", 1), "a seed must decide every byte");
        assert!(
            first != file("c", 2),
            "another seed must give other weights"
        );
    }

    #[test]
    fn splits_hold_the_same_weights() {
        let directory = tempfile::tempdir().unwrap();
        let whole = spec(Arch::Llama, Quant::Q8_0, 7);
        let path = directory.path().join("m.gguf");
        write(&whole, &path);
        let split = Spec {
            split_bytes: Some(300_000),
            ..whole
        };
        let report = write(&split, &path);
        assert!(report.files.len() > 2);
        assert!(report.files[0].ends_with(format!("m-00001-of-{:05}.gguf", report.files.len())));
        // The last tensor, the head, ends both files.
        let one = std::fs::read(&path).unwrap();
        let last = std::fs::read(report.files.last().unwrap()).unwrap();
        let head_bytes = 256 * 512 / 32 * 34;
        assert!(one[one.len() - head_bytes..] == last[last.len() - head_bytes..]);
    }

    #[test]
    fn a_stop_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let stop = AtomicBool::new(true);
        let spec = spec(Arch::Llama, Quant::F16, 1);
        let error = generate(&spec, &path, &stop, |_, _| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Canceled);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_two_layers_are_alike() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let spec = spec(Arch::Llama, Quant::Q8_0, 3);
        write(&spec, &path);
        let bytes = std::fs::read(&path).unwrap();
        let mut seen = std::collections::HashSet::new();
        let data = &bytes[bytes.len() - 1_000_000..];
        let pages = data.chunks_exact(4096);
        let count = pages.len();
        seen.extend(pages);
        assert_eq!(seen.len(), count, "pages repeat");
    }
}
