//! From a path to a catalog: opens every shard of a model and reads its headers, and nothing else.
//!
//! A path may name a GGUF file, any shard of a split GGUF, a safetensors file, a `model.safetensors.index.json`, or
//! a directory that holds one of those. A compressed model (`flea pack --compress`) is there as if it were the original.

use crate::error::{Error, ErrorKind, Result};
use crate::io::{ShardFile, packed};
use crate::model::{Catalog, catalog, gguf, safetensors, split_paths};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Longest safetensors index that is read. The largest published ones (over 100,000 tensors) are about 10 MB.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// Opens the model at `path`: its catalog, and its shards in the catalog's order.
///
/// # Errors
/// What is wrong with which file, at which offset: `NotFound`, `Permission`, `Io`, `Format`, `Truncated`,
/// `Unsupported`.
pub fn read_catalog(path: &Path) -> Result<(Catalog, Vec<ShardFile>)> {
    if path.is_dir() {
        return read_catalog(&model_in_directory(path)?);
    }
    if path
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        return read_safetensors_index(path);
    }
    let file = ShardFile::open(path)?;
    let mut magic = [0u8; 4];
    if file.len_bytes() >= 4 {
        file.read_exact_at(0, &mut magic)?;
    }
    let is_safetensors = path
        .extension()
        .is_some_and(|extension| extension == "safetensors");
    if is_safetensors && magic != *b"GGUF" {
        let header = safetensors::parse_shard(path, file.len_bytes(), &mut file.header_reader())?;
        let config = read_config(path)?;
        return Ok((
            catalog::from_safetensors(vec![header], None, config.as_ref())?,
            vec![file],
        ));
    }
    if packed::is_packed(&file)? {
        return read_gguf(path, ShardFile::open_decoded(path)?);
    }
    read_gguf(path, file)
}

/// Reads a GGUF file and, where it is one of several, all its sisters.
fn read_gguf(path: &Path, file: ShardFile) -> Result<(Catalog, Vec<ShardFile>)> {
    let header = gguf::parse_shard(path, file.len_bytes(), &mut file.header_reader())?;
    let Some(split) = split_paths(path).filter(|_| header.split.is_some()) else {
        return Ok((catalog::from_gguf(vec![header])?, vec![file]));
    };
    let mut headers = Vec::with_capacity(split.paths.len());
    let mut files = Vec::with_capacity(split.paths.len());
    for shard in &split.paths {
        let file = ShardFile::open(shard).map_err(|error| part_of(path, error))?;
        headers.push(gguf::parse_shard(
            shard,
            file.len_bytes(),
            &mut file.header_reader(),
        )?);
        files.push(file);
    }
    Ok((catalog::from_gguf(headers)?, files))
}

/// A part that cannot be opened: which model it belongs to, and what would mend it.
fn part_of(path: &Path, error: Error) -> Error {
    let remedy = if error.kind() == ErrorKind::NotFound {
        "; all parts of a split model lie in one directory"
    } else {
        ""
    };
    let context = format!("{error}: it is a part of {}{remedy}", path.display());
    error.with_context(context)
}

fn read_safetensors_index(path: &Path) -> Result<(Catalog, Vec<ShardFile>)> {
    let index = safetensors::parse_index(path, &read_whole(path)?)?;
    let mut headers = Vec::new();
    let mut files = Vec::new();
    for shard in index.shard_paths(path) {
        let file = ShardFile::open(&shard).map_err(|error| part_of(path, error))?;
        headers.push(safetensors::parse_shard(
            &shard,
            file.len_bytes(),
            &mut file.header_reader(),
        )?);
        files.push(file);
    }
    let config = read_config(path)?;
    Ok((
        catalog::from_safetensors(headers, Some(&index), config.as_ref())?,
        files,
    ))
}

/// The `config.json` beside a safetensors model, where there is one.
fn read_config(beside: &Path) -> Result<Option<safetensors::Config>> {
    let path = beside.with_file_name("config.json");
    match read_whole(&path) {
        Ok(json) => safetensors::parse_config(&path, &json).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A JSON file, if it has a length that JSON of a model can have.
fn read_whole(path: &Path) -> Result<Vec<u8>> {
    let file = ShardFile::open(path)?;
    if file.len_bytes() > JSON_BYTES_MAX {
        let context = format!(
            "{}: {} bytes are too many for JSON of a model",
            path.display(),
            file.len_bytes()
        );
        return Err(Error::new(ErrorKind::Format, context));
    }
    let mut json = Vec::new();
    file.header_reader()
        .read_to_end(&mut json)
        .map_err(|error| Error::from_io(&error, format_args!("read {}", path.display())))?;
    Ok(json)
}

/// Finds the one model in a directory.
fn model_in_directory(directory: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory)
        .map_err(|error| Error::from_io(&error, format_args!("list {}", directory.display())))?;
    let mut names: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    names.sort();
    let index = names
        .iter()
        .find(|name| name.ends_with("model.safetensors.index.json"));
    if let Some(index) = index {
        return Ok(index.clone());
    }
    names.retain(|name| {
        name.extension()
            .is_some_and(|extension| extension == "gguf" || extension == "safetensors")
    });
    // All shards of one split model count as one.
    let first = names.first().cloned();
    let sisters = first
        .as_deref()
        .and_then(split_paths)
        .map(|split| split.paths)
        .unwrap_or_default();
    names.retain(|name| Some(name) != first.as_ref() && !sisters.contains(name));
    match (first, names.first()) {
        (Some(model), None) => Ok(model),
        (None, _) => {
            let context = format!(
                "{}: no .gguf or .safetensors file in this directory",
                directory.display()
            );
            Err(Error::new(ErrorKind::NotFound, context))
        }
        (Some(one), Some(other)) => {
            let context = format!(
                "{}: more than one model in this directory ({} and {}); name one of them",
                directory.display(),
                one.display(),
                other.display()
            );
            Err(Error::new(ErrorKind::Invalid, context))
        }
    }
}
