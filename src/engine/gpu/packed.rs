//! A compressed model (docs/packed-format.md) as a GPU's weights come from it: coded tiles over the link, unpacked in VRAM.
//!
//! The catalog is that of the original, but for its offsets: they count in a file that nobody wrote, in which the decoded parts
//! lie in the order of the compressed file ([`Offsets::Stored`]). So a run of weights is a run of tiles, and what is planned
//! for the one can be read from the other. Invariant: every tensor is a part of its own. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: beside the catalog, below the two engines of a GPU.

use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::io::coded_file::{CodedFile, CodedPart, Offsets};
use crate::io::{ShardFile, packed};
use crate::model::{Catalog, Layer, Shard, Use, catalog, gguf};
use crate::units::Extent;

/// Opens the compressed model at `path`, and its file to read coded weights from; `None` where there is none, but perhaps a
/// model of another kind.
///
/// # Errors
/// `Format`, `Truncated`, `Checksum`: what is wrong with it; `Io`.
pub(super) fn open(path: &Path) -> Result<Option<(CodedFile, Catalog, ShardFile)>> {
    if path.is_dir() {
        return Ok(None);
    }
    let file = ShardFile::open(path)?;
    if !packed::is_packed(&file)? {
        return Ok(None);
    }
    let coded = CodedFile::open(ShardFile::open(path)?, Offsets::Stored)?;
    let catalog = catalog_of(&coded)?;
    Ok(Some((coded, catalog, file)))
}

/// The original's catalog, with every tensor where its part lies.
fn catalog_of(coded: &CodedFile) -> Result<Catalog> {
    let path = coded.path();
    let wrong = |what: String| {
        let context = format!("{}: {what}", path.display());
        Err(Error::new(ErrorKind::Format, context))
    };
    let original = coded.parts().iter().map(|part| &part.part);
    let original_bytes = original
        .map(|part| part.offset_bytes + part.len_bytes + part.zeros_bytes)
        .max();
    let mut bytes = Cursor::new(coded.header()?);
    let mut header = gguf::parse_shard(path, original_bytes.unwrap_or(0), &mut bytes)?;
    if header.split.is_some() {
        return wrong("it was made of one of several files".to_owned());
    }
    let named = coded.parts().iter();
    let by_name: HashMap<&str, &CodedPart> = named
        .filter_map(|part| Some((part.part.tensor.as_deref()?, part)))
        .collect();
    for tensor in header.tensors.iter_mut().filter(|one| one.len_bytes > 0) {
        let found = by_name.get(tensor.name.as_str()).filter(|part| {
            let part = &part.part;
            part.offset_bytes == tensor.offset_bytes && part.len_bytes == tensor.len_bytes
        });
        let Some(part) = found else {
            return wrong(format!("tensor '{}' is no part of its own", tensor.name));
        };
        tensor.offset_bytes = part.offset_bytes;
    }
    header.shard.len_bytes = coded.len_bytes();
    catalog::from_gguf(vec![header])
}

/// Layers of such a catalog as they lie in the compressed file.
///
/// # Errors
/// `Internal` for what is in no part.
pub(super) fn stored_catalog(coded: &CodedFile, catalog: &Catalog) -> Result<Catalog> {
    let layers = catalog.layers.iter().map(|layer| {
        let stored = |used: &Use| {
            Ok(Use {
                extent: coded.stored(&used.extent)?.extent,
                ..*used
            })
        };
        let mut uses = layer.uses.iter().map(stored).collect::<Result<Vec<_>>>()?;
        uses.sort_unstable_by_key(|used| used.extent);
        let extents = merged(&uses);
        Ok(Layer {
            kind: layer.kind,
            label: layer.label.clone(),
            bytes: extents.iter().map(|extent| extent.len_bytes).sum(),
            extents,
            uses,
        })
    });
    let shard = Shard {
        path: coded.path().to_path_buf(),
        len_bytes: coded.stored_bytes(),
    };
    Ok(catalog.of_layers(vec![shard], layers.collect::<Result<Vec<_>>>()?))
}

/// Sorted uses as disjoint extents: neighbours share the tile in which one ends and the other begins.
fn merged(uses: &[Use]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(uses.len());
    for used in uses {
        match extents.last_mut() {
            Some(last) if used.extent.offset_bytes <= last.end_bytes() => {
                let end = last.end_bytes().max(used.extent.end_bytes());
                last.len_bytes = end - last.offset_bytes;
            }
            _ => extents.push(used.extent),
        }
    }
    extents
}
