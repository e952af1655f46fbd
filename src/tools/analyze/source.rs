//! From what a person typed to a geometry: a URL, a file, a directory, or the name of a known model.
//!
//! A GGUF or safetensors weights file gives a catalog as well, and with it the plan that `flea run` would make; the other
//! sources describe a model whose weights are elsewhere. Files are bounded before they are read, and what they hold is
//! checked by [`crate::model::arch`]. A mistake in a description is the user's (exit code 2), one in a model file the
//! file's (5).

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::device::FILE_BYTES_MAX;
use super::{registry, remote};
use crate::engine::read_catalog;
use crate::error::{Error, ErrorKind, Result};
use crate::io::coded_file::CodedFile;
use crate::io::profile::Device as Drive;
use crate::model::arch::recipe::Recipe;
use crate::model::arch::{Geometry, config, gguf};
use crate::model::{Catalog, Format};

/// A model, as far as it is known.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its geometry.
    pub geometry: Geometry,
    /// What is in its files, where they were looked at.
    pub catalog: Option<Box<Catalog>>,
    /// The file they are compressed in.
    pub coded: Option<Arc<CodedFile>>,
    /// The drive that they lie on.
    pub drive: Option<Drive>,
    /// Where the numbers are from, for people.
    pub origin: String,
}

impl Source {
    /// Looks `argument` up.
    ///
    /// # Errors
    /// `Invalid` for what is no model and for descriptions with mistakes, and what reading files or a server gives.
    pub fn find(argument: &str) -> Result<Self> {
        if remote::is_url(argument) {
            return Self::at_url(argument);
        }
        let path = Path::new(argument);
        let Ok(metadata) = std::fs::metadata(path) else {
            return Self::missing(argument);
        };
        if metadata.is_dir() {
            return Self::in_directory(path);
        }
        match extension(path).as_deref() {
            Some("toml" | "yaml" | "yml") => Self::described(path, &read_text(path)?),
            Some("json") if !argument.ends_with(".index.json") => {
                Self::described(path, &read_text(path)?)
            }
            _ => Self::in_files(path),
        }
    }

    /// A known model, unless the argument looks like a path.
    fn missing(argument: &str) -> Result<Self> {
        let is_path = argument.contains('/')
            || extension(Path::new(argument)).is_some_and(|extension| {
                matches!(
                    extension.as_str(),
                    "gguf" | "json" | "toml" | "yaml" | "yml" | "safetensors"
                )
            });
        if is_path {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{argument}: no such file or directory"),
            ));
        }
        let known = registry::find(argument)?;
        Ok(Self {
            geometry: known.geometry()?,
            catalog: None,
            coded: None,
            drive: None,
            origin: format!("known: {}", known.recipe.sources.join("; ")),
        })
    }

    fn at_url(url: &str) -> Result<Self> {
        let address = url.split(['?', '#']).next().unwrap_or(url);
        if address.ends_with(".json") {
            let text = remote::text(url)?;
            let source = Self::of_text(url, "json", &text)?;
            return Ok(Self {
                origin: format!("{url}, {} bytes fetched", text.len()),
                ..source
            });
        }
        let catalog = remote::read_gguf(url)?;
        let origin = format!("headers of {url}");
        Self::of_catalog(catalog, None, origin)
    }

    /// The directory of a model: its config.json if it has one, even before its weights are there; else its files.
    fn in_directory(path: &Path) -> Result<Self> {
        let config = path.join("config.json");
        if config.is_file() {
            return Self::described(&config, &read_text(&config)?);
        }
        Self::in_files(path)
    }

    fn in_files(path: &Path) -> Result<Self> {
        let (catalog, files) = read_catalog(path)?;
        let drive = files.first().map(Drive::of_shard);
        if catalog.format == Format::Safetensors {
            // Its names are not those of ggml; the config beside it says what it is.
            let config = path.with_file_name("config.json");
            return Self::described(&config, &read_text(&config)?);
        }
        let coded = files.first().and_then(|file| file.coded().cloned());
        let source = Self::of_catalog(catalog, drive, path.display().to_string())?;
        Ok(Self { coded, ..source })
    }

    fn of_catalog(catalog: Catalog, drive: Option<Drive>, origin: String) -> Result<Self> {
        Ok(Self {
            geometry: gguf::from_catalog(&catalog)?,
            catalog: Some(Box::new(catalog)),
            coded: None,
            drive,
            origin,
        })
    }

    fn described(path: &Path, text: &str) -> Result<Self> {
        let shown = path.display().to_string();
        let source = Self::of_text(&shown, &extension(path).unwrap_or_default(), text)?;
        Ok(Self {
            origin: shown,
            ..source
        })
    }

    /// The geometry that a text describes. `language`: `json`, `toml` or `yaml`.
    ///
    /// # Errors
    /// `Invalid`: what is wrong with it, and where.
    pub fn of_text(name: &str, language: &str, text: &str) -> Result<Self> {
        let invalid = |what: String| Error::new(ErrorKind::Invalid, format!("{name}: {what}"));
        let geometry = match language {
            "toml" => toml::from_str::<Recipe>(text)
                .map_err(|error| invalid(error.to_string()))?
                .geometry(),
            "yaml" | "yml" => yaml_serde::from_str::<Recipe>(text)
                .map_err(|error| invalid(error.to_string()))?
                .geometry(),
            _ => {
                let value: Value =
                    serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
                config::from_config(name, &value)
            }
        };
        let mut geometry = geometry.map_err(|error| {
            if error.context().starts_with(name) {
                error
            } else {
                invalid(error.context().to_owned())
            }
        })?;
        if geometry.name.is_empty() {
            geometry.name = name.to_owned();
        }
        Ok(Self {
            geometry,
            catalog: None,
            coded: None,
            drive: None,
            origin: name.to_owned(),
        })
    }
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_lowercase())
}

/// A text file, if it has a length that a description can have.
///
/// # Errors
/// What opening and reading it gives; `Invalid` for more than a mebibyte, or what is no UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let failed =
        |error: std::io::Error| Error::from_io(&error, format_args!("read {}", path.display()));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let invalid =
        |what: &str| Error::new(ErrorKind::Invalid, format!("{}: {what}", path.display()));
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(invalid("more than a mebibyte is no description of a model"));
    }
    String::from_utf8(bytes).map_err(|_| invalid("it is not UTF-8 text"))
}
