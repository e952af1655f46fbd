//! The files the suite reads: synthetic models of three types, and safetensors for loaders that take nothing else.
//!
//! Invariants: made once and kept under a name that tells what is in them; never a half file under that name; a full
//! disk is refused before anything is written.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::child;
use super::lab::{Lab, Options};
use crate::error::{Error, ErrorKind, Result};
use crate::tools::synth::file::check_space;
use crate::units::MIB;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// Writing 7 GB to a slow drive.
const SYNTH_LIMIT: Duration = Duration::from_secs(1800);
/// The width of a 7B model; 13B has the same in more layers.
const LARGE: [&str; 12] = [
    "--arch",
    "llama",
    "--embd",
    "4096",
    "--ffn",
    "11008",
    "--heads",
    "32",
    "--kv-heads",
    "32",
    "--vocab",
    "32000",
];
/// About 7 GB each.
const LARGE_MODELS: [(&str, &str); 3] = [("q8_0", "32"), ("q4_k_m", "56"), ("f16", "16")];

/// A model and what to call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Where it is.
    pub path: PathBuf,
    /// Its type, or its name.
    pub slug: String,
}

impl Model {
    /// A model that somebody brings.
    #[must_use]
    pub fn given(path: &Path) -> Self {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        Self {
            path: path.to_owned(),
            slug: stem.into_owned(),
        }
    }
}

/// The models of a run without `--models`: three of about 7 GB, or one of 2 GiB when it has to be quick.
///
/// # Errors
/// No space, no permission, interrupted.
pub fn synthesise(
    options: &Options,
    directory: &Path,
    quick: bool,
    stop: &AtomicBool,
    say: &dyn Fn(&str),
) -> Result<Vec<Model>> {
    fs::create_dir_all(directory)
        .map_err(|error| Error::from_io(&error, format_args!("make {}", directory.display())))?;
    let wanted: Vec<(&str, Vec<&str>)> = if quick {
        vec![("q8_0", vec!["--size", "2GiB"])]
    } else {
        LARGE_MODELS
            .iter()
            .map(|(kind, layers)| (*kind, [&LARGE[..], &["--layers", layers]].concat()))
            .collect()
    };
    let mut models = Vec::new();
    for (kind, shape) in wanted {
        let size = if quick { "2g" } else { "7g" };
        let path = directory.join(format!("suite-{size}-{kind}.gguf"));
        if !path.exists() {
            say(&format!("writing {}", path.display()));
            // flea synth writes under a temporary name and refuses a disk that is too full.
            let mut command = Command::new(&options.flea);
            command
                .arg("synth")
                .args(&shape)
                .args(["--type", kind, "-o"])
                .arg(&path);
            let done = child::run(&mut command, SYNTH_LIMIT, stop)?;
            if !done.status.success() {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("flea synth: {}", done.last_words()),
                ));
            }
        }
        models.push(Model {
            path,
            slug: kind.to_owned(),
        });
    }
    Ok(models)
}

/// Bytes of one tensor of [`safetensors`].
const TENSOR_BYTES: u64 = 32 * MIB;
const TENSORS_PER_LAYER: u64 = 7;

/// A safetensors file of about `bytes` of F16, in layers of 7 tensors, made once.
///
/// # Errors
/// No space, no permission, interrupted.
pub fn safetensors(lab: &Lab<'_>, directory: &Path, bytes: u64) -> Result<PathBuf> {
    let count = (bytes / TENSOR_BYTES).max(1);
    let path = directory.join(format!("suite-{}m.safetensors", count * TENSOR_BYTES / MIB));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(directory)
        .map_err(|error| Error::from_io(&error, format_args!("make {}", directory.display())))?;
    (lab.say)(&format!("writing {}", path.display()));
    check_space(&path, count * TENSOR_BYTES + MIB)?;
    let temporary = path.with_extension("part");
    let written = write_safetensors(&temporary, count, lab.stop);
    let renamed = written.and_then(|()| {
        fs::rename(&temporary, &path)
            .map_err(|error| Error::from_io(&error, format_args!("rename {}", temporary.display())))
    });
    if renamed.is_err() {
        // What is there is half a file; that it cannot be removed is not the failure to report.
        let _ = fs::remove_file(&temporary);
    }
    renamed.map(|()| path)
}

fn header(count: u64) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    for index in 0..count {
        let name = format!(
            "model.layers.{}.mlp.part{}.weight",
            index / TENSORS_PER_LAYER,
            index % TENSORS_PER_LAYER
        );
        let start = index * TENSOR_BYTES;
        header.insert(
            name,
            serde_json::json!({"dtype": "F16", "shape": [TENSOR_BYTES / 2 / 4096, 4096], "data_offsets": [start, start + TENSOR_BYTES]}),
        );
    }
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    // The data begins on a page, as writers that care for direct I/O do it.
    let padded = (text.len() + 8).next_multiple_of(4096) - 8;
    text.resize(padded, b' ');
    text
}

/// Writes `count` tensors of 32 MiB, 7 to a layer.
///
/// # Errors
/// No space, no permission, interrupted; half a file may be left.
pub fn write_safetensors(path: &Path, count: u64, stop: &AtomicBool) -> Result<()> {
    let failed =
        |error: std::io::Error| Error::from_io(&error, format_args!("write {}", path.display()));
    let mut file = BufWriter::with_capacity(8 << 20, File::create(path).map_err(failed)?);
    let header = header(count);
    file.write_all(&(header.len() as u64).to_le_bytes())
        .map_err(failed)?;
    file.write_all(&header).map_err(failed)?;
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut tensor = vec![0_u8; TENSOR_BYTES as usize];
    for word in tensor.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Exponents that keep every half a small number.
        *word = (state & 0xBFFF_BFFF_BFFF_BFFF).to_le_bytes();
    }
    for index in 0..count {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "interrupted"));
        }
        // Tensors differ in their beginning: no drive or filesystem takes them for copies of each other.
        tensor[..8].copy_from_slice(&index.to_le_bytes());
        tensor.rotate_left(4096);
        file.write_all(&tensor).map_err(failed)?;
    }
    let file = file
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::read_catalog;

    #[test]
    fn the_safetensors_file_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        write_safetensors(&path, 8, &AtomicBool::new(false)).unwrap();
        let (catalog, _) = read_catalog(&path).unwrap();
        assert_eq!(catalog.layers.len(), 2);
        assert_eq!(catalog.model_bytes, 8 * TENSOR_BYTES);
        let stopped = write_safetensors(&path, 8, &AtomicBool::new(true)).unwrap_err();
        assert_eq!(stopped.kind(), ErrorKind::Canceled);
    }
}
