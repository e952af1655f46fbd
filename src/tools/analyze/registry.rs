//! The models that are known by name, with corrected numbers and where they are from (`models.toml`).

use serde::Deserialize;

use super::dhurandhar::Belief;
use crate::error::{Error, ErrorKind, Result};
use crate::model::arch::Geometry;
use crate::model::arch::recipe::Recipe;

/// Names suggested for a mistyped one.
const SUGGESTION_COUNT: usize = 3;

/// One known model.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// What is right.
    pub recipe: Recipe,
    /// What dhurandhar 0.1.3 believes.
    pub belief: Belief,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: Vec<toml::Table>,
}

/// Every known model, in the order of the file.
///
/// # Errors
/// None; the file is part of the program and tested.
pub fn models() -> Result<Vec<Known>> {
    let bad =
        |error: toml::de::Error| Error::new(ErrorKind::Internal, format!("models.toml: {error}"));
    let file: File = toml::from_str(include_str!("models.toml")).map_err(bad)?;
    let known = |mut table: toml::Table| {
        let belief = table
            .remove("dhurandhar")
            .unwrap_or(toml::Value::Table(toml::Table::new()));
        Ok(Known {
            belief: belief.try_into().map_err(bad)?,
            recipe: toml::Value::Table(table).try_into().map_err(bad)?,
        })
    };
    file.model.into_iter().map(known).collect()
}

/// The model called `name`.
///
/// # Errors
/// `Invalid`, with the names that are near and those there are.
pub fn find(name: &str) -> Result<Known> {
    let models = models()?;
    let position = models
        .iter()
        .position(|known| known.recipe.name.eq_ignore_ascii_case(name));
    match position {
        Some(position) => Ok(models[position].clone()),
        None => {
            let names: Vec<&str> = models
                .iter()
                .map(|known| known.recipe.name.as_str())
                .collect();
            Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "'{name}' is no file, no directory, no URL and no known model{}; known are {}",
                    nearest(name, &names),
                    names.join(", ")
                ),
            ))
        }
    }
}

impl Known {
    /// Its geometry.
    ///
    /// # Errors
    /// None; every entry is tested.
    pub fn geometry(&self) -> Result<Geometry> {
        self.recipe.geometry()
    }
}

/// `; did you mean a or b?` for the names near `name`, or nothing.
pub(super) fn nearest(name: &str, names: &[&str]) -> String {
    let wanted: Vec<char> = name.to_lowercase().chars().take(64).collect();
    let mut near: Vec<(usize, &str)> = names
        .iter()
        .map(|known| {
            (
                distance(&wanted, &known.chars().collect::<Vec<_>>()),
                *known,
            )
        })
        // A third of the letters may be wrong; more is another name.
        .filter(|(distance, known)| {
            *distance * 3 <= known.len() || known.contains(&name.to_lowercase())
        })
        .collect();
    if near.is_empty() || name.is_empty() {
        return String::new();
    }
    near.sort_by_key(|(distance, _)| *distance);
    let names: Vec<&str> = near
        .iter()
        .take(SUGGESTION_COUNT)
        .map(|(_, name)| *name)
        .collect();
    format!("; did you mean {}?", names.join(" or "))
}

/// Letters to insert, remove or change to make one of the other (Levenshtein).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = before + usize::from(x != y);
            before = row[j + 1];
            row[j + 1] = changed.min(before + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
