//! Plain aligned tables for people. Columns are as wide as their widest cell, numbers stand right, two spaces between.
//!
//! No colours, no frames: the output stays readable in a log and easy to cut up.

use std::fmt;

/// Where a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table: a head line and rows. Printed by `Display`, every line ended.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns. All titles empty: no head line.
    #[must_use]
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            columns: columns
                .iter()
                .map(|(title, align)| ((*title).to_owned(), *align))
                .collect(),
            rows: Vec::new(),
        }
    }

    /// Names on the left, values on the right of them.
    #[must_use]
    pub fn fields() -> Self {
        Self::new(&[("", Align::Left), ("", Align::Left)])
    }

    /// Adds a row. Cells beyond the columns are dropped, missing ones stay empty.
    pub fn row<T: fmt::Display>(&mut self, cells: impl IntoIterator<Item = T>) -> &mut Self {
        let row = cells
            .into_iter()
            .take(self.columns.len())
            .map(|cell| cell.to_string())
            .collect();
        self.rows.push(row);
        self
    }

    /// Adds a row of a name and a value of different types.
    pub fn field(&mut self, name: &str, value: impl fmt::Display) -> &mut Self {
        self.row([name.to_owned(), value.to_string()])
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.columns.iter().map(|(title, _)| width(title)).collect();
        for row in &self.rows {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = (*widest).max(width(cell));
            }
        }
        widths
    }
}

/// Characters, not bytes: labels may hold any letter.
fn width(text: &str) -> usize {
    text.chars().count()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let line = |f: &mut fmt::Formatter<'_>, cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for ((cell, (_, align)), width) in cells.zip(&self.columns).zip(&widths) {
                match align {
                    Align::Left => text.push_str(&format!("{cell:<width$}")),
                    Align::Right => text.push_str(&format!("{cell:>width$}")),
                }
                text.push_str("  ");
            }
            writeln!(f, "{}", text.trim_end())
        };
        if self.columns.iter().any(|(title, _)| !title.is_empty()) {
            line(f, &mut self.columns.iter().map(|(title, _)| title.as_str()))?;
        }
        for row in &self.rows {
            line(f, &mut row.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("layer", Align::Left), ("bytes", Align::Right)]);
        table.row(["blk.0", "7"]).row(["blk.10", "1234567"]);
        assert_eq!(
            table.to_string(),
            "layer     bytes\nblk.0         7\nblk.10  1234567\n"
        );
    }

    #[test]
    fn fields_have_no_head_line() {
        let mut table = Table::fields();
        table.field("model", "m.gguf").field("layers", 22);
        assert_eq!(table.to_string(), "model   m.gguf\nlayers  22\n");
    }
}
