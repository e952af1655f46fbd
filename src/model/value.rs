//! GGUF metadata: typed values read from a header, and what is kept of them.
//!
//! Invariants: a count allocates nothing until its elements have been read; token arrays are walked and only counted, so
//! what is kept stays small whatever the tokenizer's size; nesting is bounded by [`ARRAY_DEPTH_MAX`].
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::bad_format;
use super::cursor::Cursor;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Arrays inside arrays. The format allows any depth, files use one.
pub const ARRAY_DEPTH_MAX: u32 = 4;
/// A longer text (a chat template, a licence) is skipped and only its length is kept.
pub const TEXT_KEPT_BYTES_MAX: u64 = 4096;
/// An array of integers up to this long is kept (values per layer); token arrays are longer.
pub const INTEGERS_KEPT_MAX: u64 = 1024;

/// One metadata value, as far as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer, and signed ones that are not negative.
    Unsigned(u64),
    /// A negative integer.
    Signed(i64),
    /// A floating point number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text short enough to keep.
    Text(String),
    /// A text too long to keep.
    LongText {
        /// Its length.
        len_bytes: u64,
    },
    /// A short array of integers or truth values (one per layer, for example).
    Integers(Vec<i64>),
    /// Any other array: what it holds, not the elements.
    Array {
        /// Name of the element type.
        element: &'static str,
        /// Number of elements.
        count: u64,
    },
}

/// The kept metadata of one shard, by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: BTreeMap<String, Value>,
}

impl Metadata {
    /// Adds a value; false when the key is there already (and the old value stays).
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        match self.entries.entry(key) {
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(value);
                true
            }
            std::collections::btree_map::Entry::Occupied(_) => false,
        }
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// The value of a key that holds an unsigned integer.
    #[must_use]
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Unsigned(value) => Some(*value),
            _ => None,
        }
    }

    /// The value of a key that holds a kept text.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The number of elements of a key that holds an array.
    #[must_use]
    pub fn array_count(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Array { count, .. } => Some(*count),
            Value::Integers(values) => Some(values.len() as u64),
            _ => None,
        }
    }

    /// All entries in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }
}

/// The scalar types of a value, by the format's numbers. Strings (8) and arrays (9) are handled apart.
#[derive(Clone, Copy)]
enum Scalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

impl Scalar {
    const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    const fn len_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }

    const fn is_integer(self) -> bool {
        !matches!(self, Self::F32 | Self::F64)
    }

    fn read(self, cursor: &mut Cursor<'_>, key: &str) -> Result<Value> {
        let mut bytes = [0_u8; 8];
        let used = self.len_bytes() as usize;
        cursor.fill(&mut bytes[..used], format_args!("the value of key '{key}'"))?;
        let wide = u64::from_le_bytes(bytes);
        // Sign extension: shift the value's own top bit up to bit 63 and back.
        let shift = 64 - 8 * used as u32;
        let signed = ((wide << shift) as i64) >> shift;
        Ok(match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Unsigned(wide),
            Self::I8 | Self::I16 | Self::I32 | Self::I64 => {
                u64::try_from(signed).map_or(Value::Signed(signed), Value::Unsigned)
            }
            Self::F32 => Value::Float(f64::from(f32::from_bits(wide as u32))),
            Self::F64 => Value::Float(f64::from_bits(wide)),
            Self::Bool => Value::Bool(wide != 0),
        })
    }
}

/// Reads the value of `key`, whose type has this number, and keeps what is worth keeping.
pub(crate) fn read_value(cursor: &mut Cursor<'_>, number: u32, key: &str) -> Result<Value> {
    match number {
        TYPE_STRING => {
            let len_bytes = cursor.text_len(format_args!("the text of key '{key}'"))?;
            if len_bytes > TEXT_KEPT_BYTES_MAX {
                cursor.skip(len_bytes, format_args!("the text of key '{key}'"))?;
                return Ok(Value::LongText { len_bytes });
            }
            let bytes = cursor.bytes(len_bytes, format_args!("the text of key '{key}'"))?;
            // People write anything into a description: show what is text, never refuse the model for it.
            Ok(Value::Text(String::from_utf8_lossy(&bytes).into_owned()))
        }
        TYPE_ARRAY => read_array(cursor, key, 1),
        _ => match Scalar::from_number(number) {
            Some(scalar) => scalar.read(cursor, key),
            None => Err(unknown_type(cursor, number, key)),
        },
    }
}

fn unknown_type(cursor: &Cursor<'_>, number: u32, key: &str) -> Error {
    bad_format(
        cursor.path,
        format_args!(
            "key '{key}' has the unknown value type {number} (before offset {})",
            cursor.offset_bytes
        ),
    )
}

fn read_array(cursor: &mut Cursor<'_>, key: &str, depth: u32) -> Result<Value> {
    if depth > ARRAY_DEPTH_MAX {
        return Err(bad_format(
            cursor.path,
            format_args!(
                "key '{key}' nests arrays deeper than {ARRAY_DEPTH_MAX} (offset {})",
                cursor.offset_bytes
            ),
        ));
    }
    let number = cursor.u32(format_args!("the element type of key '{key}'"))?;
    let count = cursor.u64(format_args!("the element count of key '{key}'"))?;
    match number {
        TYPE_STRING => {
            cursor.bound_elements(count, 8, key)?;
            for _ in 0..count {
                let len_bytes = cursor.text_len(format_args!("an element of key '{key}'"))?;
                cursor.skip(len_bytes, format_args!("an element of key '{key}'"))?;
            }
            Ok(Value::Array {
                element: "string",
                count,
            })
        }
        TYPE_ARRAY => {
            cursor.bound_elements(count, 12, key)?;
            for _ in 0..count {
                read_array(cursor, key, depth + 1)?;
            }
            Ok(Value::Array {
                element: "array",
                count,
            })
        }
        _ => match Scalar::from_number(number) {
            Some(scalar) => read_scalars(cursor, key, scalar, count),
            None => Err(unknown_type(cursor, number, key)),
        },
    }
}

fn read_scalars(cursor: &mut Cursor<'_>, key: &str, scalar: Scalar, count: u64) -> Result<Value> {
    let bytes = cursor.bound_elements(count, scalar.len_bytes(), key)?;
    if !scalar.is_integer() || count > INTEGERS_KEPT_MAX {
        cursor.skip(bytes, format_args!("the elements of key '{key}'"))?;
        return Ok(Value::Array {
            element: scalar.name(),
            count,
        });
    }
    let mut values = Vec::new();
    for _ in 0..count {
        values.push(match scalar.read(cursor, key)? {
            Value::Unsigned(value) => i64::try_from(value).unwrap_or(i64::MAX),
            Value::Signed(value) => value,
            Value::Bool(value) => i64::from(value),
            _ => 0,
        });
    }
    Ok(Value::Integers(values))
}
