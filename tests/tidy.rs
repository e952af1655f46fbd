//! Lints the tree where the compiler and clippy cannot: which room may use which, where `unsafe` may stand and that it
//! says why, how long a file may get, and that nothing unfinished is committed.

use std::fs;
use std::path::{Path, PathBuf};

/// The rooms of src/ and how far up they are: a room uses only rooms further down. Rooms of one level do not use each
/// other. `error` and `units` are single files at the bottom.
const ROOMS: [(&str, u32); 15] = [
    ("error", 0),
    ("units", 0),
    ("model", 1),
    ("kv", 1),
    ("plan", 2),
    ("mem", 3),
    ("io", 4),
    ("engine", 5),
    ("proto", 6),
    // The C ABI opens models in this process and in the daemon.
    ("ffi", 7),
    ("daemon", 7),
    // The ggml device of `flea run` calls the C ABI, so `host` stands above `ffi`.
    ("host", 8),
    ("tools", 8),
    ("cli", 9),
    ("bin", 10),
];
const UNSAFE_ROOMS: [&str; 5] = ["mem", "io", "proto", "ffi", "host"];
/// The stream keeps the promise that `Reader::submit` asks for, so that one call stands there and not behind a wrapper
/// that would only look safe.
const UNSAFE_FILE: &str = "src/engine/stream.rs";
/// Rooms that turn bytes into structs and structs into plans: no files, no clocks, no memory tricks.
const PURE_ROOMS: [&str; 3] = ["model", "plan", "kv"];
/// The system a pure room must not reach for. `std::path` is only names.
const IMPURE: [&str; 6] = [
    "std::fs",
    "std::io::stdin",
    "std::net",
    "std::process",
    "std::time",
    "libc::",
];
const LINES_MAX: usize = 600;
/// A file of tests is a list: it may be longer.
const TEST_LINES_MAX: usize = 800;
/// How far above an unsafe block its reason may start: long enough for a reason of several lines and a let binding.
const SAFETY_LINES: usize = 12;

struct Source {
    /// Relative to the repository.
    path: PathBuf,
    text: String,
}

impl Source {
    /// `src/mem/pool.rs` and `src/mem.rs` are both in the room `mem`; tests and benches are in none.
    fn room(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src").ok()?;
        let first = inside.components().next()?.as_os_str().to_str()?;
        Some(first.strip_suffix(".rs").unwrap_or(first))
    }

    /// Whether only the tests compile it: integration tests, and modules that follow a `#[cfg(test)]`.
    fn is_test(&self, all: &[Source]) -> bool {
        let name = self
            .path
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or_default();
        let declared = [
            format!("#[cfg(test)]\nmod {name};"),
            format!("#[cfg(test)]\npub(crate) mod {name};"),
        ];
        self.path.starts_with("tests")
            || name.ends_with("tests")
            || all.iter().any(|s| {
                s.room() == self.room() && declared.iter().any(|d| s.text.contains(d.as_str()))
            })
    }

    fn is_rust(&self) -> bool {
        self.path.extension().is_some_and(|e| e == "rs")
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What tools leave there and git ignores: nobody writes it.
const IGNORED: [&str; 5] = [
    "fuzz/Cargo.lock",
    "fuzz/target",
    "fuzz/corpus",
    "fuzz/artifacts",
    "fuzz/coverage",
];

fn collect(folder: &Path, sources: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(root().join(folder)) else {
        return;
    };
    for entry in entries {
        let entry = entry.expect("a directory entry");
        let path = folder.join(entry.file_name());
        if IGNORED.iter().any(|ignored| path == Path::new(ignored)) {
            continue;
        }
        if entry.file_type().expect("a file type").is_dir() {
            collect(&path, sources);
        } else if let Ok(text) = fs::read_to_string(root().join(&path)) {
            sources.push(Source { path, text });
        }
    }
}

/// Every file that people write: the sources and what surrounds them.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for folder in [
        "src",
        "tests",
        "benches",
        "ffi-examples",
        "kernels",
        "scripts",
        ".ci",
        "fuzz",
    ] {
        collect(Path::new(folder), &mut sources);
    }
    assert!(
        sources.iter().any(|s| s.path.ends_with("src/lib.rs")),
        "the sources were not found"
    );
    sources
}

/// The code of a Rust source: comments, strings and characters become spaces, line breaks stay.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut i = 0;
    while i < bytes.len() {
        let end = match bytes[i] {
            b'/' if bytes[i..].starts_with(b"//") => end_of_line(bytes, i),
            b'/' if bytes[i..].starts_with(b"/*") => end_of_comment(bytes, i),
            b'r' if is_raw_string(bytes, i) => end_of_raw_string(bytes, i),
            b'"' => end_of_string(bytes, i),
            b'\'' => end_of_character(bytes, i),
            _ => {
                i += 1;
                continue;
            }
        };
        code[i..end]
            .iter_mut()
            .filter(|b| **b != b'\n')
            .for_each(|b| *b = b' ');
        i = end;
    }
    String::from_utf8(code).expect("only whole literals were blanked")
}

fn end_of_line(bytes: &[u8], start: usize) -> usize {
    bytes[start..]
        .iter()
        .position(|b| *b == b'\n')
        .map_or(bytes.len(), |n| start + n)
}

/// Block comments nest.
fn end_of_comment(bytes: &[u8], start: usize) -> usize {
    let (mut i, mut depth) = (start, 0);
    while i < bytes.len() {
        if bytes[i..].starts_with(b"/*") {
            (depth, i) = (depth + 1, i + 2);
        } else if bytes[i..].starts_with(b"*/") {
            (depth, i) = (depth - 1, i + 2);
            if depth == 0 {
                return i;
            }
        } else {
            i += 1;
        }
    }
    bytes.len()
}

fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut i = start + 1;
    while i < bytes.len() && bytes[i] != b'"' {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(bytes.len())
}

fn is_raw_string(bytes: &[u8], start: usize) -> bool {
    let in_a_word = start > 0
        && (bytes[start - 1].is_ascii_alphanumeric() || bytes[start - 1] == b'_')
        && bytes[start - 1] != b'b';
    let hashes = bytes[start + 1..]
        .iter()
        .take_while(|b| **b == b'#')
        .count();
    !in_a_word && bytes.get(start + 1 + hashes) == Some(&b'"')
}

fn end_of_raw_string(bytes: &[u8], start: usize) -> usize {
    let hashes = bytes[start + 1..]
        .iter()
        .take_while(|b| **b == b'#')
        .count();
    let mut close = vec![b'"'];
    close.extend(std::iter::repeat_n(b'#', hashes));
    let body = start + 2 + hashes;
    bytes[body..]
        .windows(close.len())
        .position(|w| w == close)
        .map_or(bytes.len(), |n| body + n + close.len())
}

/// `'a'` and `'\n'` are characters, `'a` alone is a lifetime: then only the quote is skipped.
fn end_of_character(bytes: &[u8], start: usize) -> usize {
    let mut i = start + 1;
    if bytes.get(i) == Some(&b'\\') {
        i += 2;
        while i < bytes.len() && bytes[i] != b'\'' {
            i += 1;
        }
        return (i + 1).min(bytes.len());
    }
    let width = std::str::from_utf8(&bytes[i..])
        .ok()
        .and_then(|s| s.chars().next())
        .map_or(1, char::len_utf8);
    if bytes.get(i + width) == Some(&b'\'') {
        i + width + 1
    } else {
        i
    }
}

fn is_word(byte: Option<&u8>) -> bool {
    byte.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_')
}

/// Line numbers (from 1) at which `word` stands as a whole word.
fn lines_with<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.lines().enumerate().filter_map(move |(index, line)| {
        let found = line.match_indices(word).any(|(at, _)| {
            let bytes = line.as_bytes();
            let begins_inside = at > 0 && is_word(bytes.get(at - 1));
            let ends_inside =
                is_word(word.as_bytes().last()) && is_word(bytes.get(at + word.len()));
            !begins_inside && !ends_inside
        });
        found.then_some(index + 1)
    })
}

/// The rooms that a line names: `crate::mem`, `flea::cli`, `use crate::{error::Error, plan}`.
fn rooms_named(code: &str) -> Vec<&'static str> {
    let flat: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut named = Vec::new();
    for (at, prefix) in flat
        .match_indices("crate::")
        .chain(flat.match_indices("flea::"))
    {
        if at > 0 && is_word(flat.as_bytes().get(at - 1)) {
            continue;
        }
        let rest = &flat[at + prefix.len()..];
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(group) => top_level_names(group),
            None => vec![rest],
        };
        for name in names {
            let word = name
                .trim_start()
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
                .unwrap_or_default();
            named.extend(
                ROOMS
                    .iter()
                    .filter(|(room, _)| *room == word)
                    .map(|(room, _)| *room),
            );
        }
    }
    named
}

/// The first words inside a `{...}` of a use declaration, split at commas of the outermost level.
fn top_level_names(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut names) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.push(&group[start..at]);
                return names;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(&group[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    names
}

fn level(room: &str) -> Option<u32> {
    ROOMS
        .iter()
        .find(|(name, _)| *name == room)
        .map(|(_, level)| *level)
}

/// Complaints about one file of src/.
fn complaints(source: &Source, is_test: bool) -> Vec<String> {
    let mut found = Vec::new();
    let path = source.path.display();
    let code = code_only(&source.text);
    let Some(room) = source.room() else {
        return found;
    };
    if room == "lib" {
        return found;
    }
    match level(room) {
        None => found.push(format!("{path}: no room of this name in the design")),
        Some(own) => {
            for used in rooms_named(&code) {
                if used != room && level(used).is_some_and(|other| other >= own) {
                    found.push(format!("{path}: {room} must not use {used}"));
                }
            }
        }
    }
    if PURE_ROOMS.contains(&room) && !is_test {
        for word in IMPURE {
            found.extend(
                lines_with(&code, word).map(|line| format!("{path}:{line}: {word} in a pure room")),
            );
        }
    }
    let lines: Vec<&str> = source.text.lines().collect();
    for line in lines_with(&code, "unsafe") {
        let rest = &code.lines().nth(line - 1).unwrap_or_default();
        if !UNSAFE_ROOMS.contains(&room) && path.to_string() != UNSAFE_FILE {
            found.push(format!("{path}:{line}: unsafe outside of its rooms"));
        } else if rest.contains("unsafe {") || rest.contains("unsafe impl") {
            let above = &lines[line.saturating_sub(SAFETY_LINES)..line];
            if !above.iter().any(|l| l.contains("SAFETY:")) {
                found.push(format!("{path}:{line}: unsafe without a SAFETY comment"));
            }
        }
    }
    if !source.text.starts_with("//!") {
        found.push(format!(
            "{path}: does not start with its module documentation"
        ));
    }
    found
}

#[test]
fn rooms_keep_to_the_design() {
    let all = sources();
    let found: Vec<String> = all
        .iter()
        .filter(|s| s.is_rust())
        .flat_map(|s| complaints(s, s.is_test(&all)))
        .collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn files_stay_short_enough_to_read() {
    let (all, mut long) = (sources(), Vec::new());
    for source in &all {
        let lines = source.text.lines().count();
        let limit = if source.is_test(&all) {
            TEST_LINES_MAX
        } else {
            LINES_MAX
        };
        if lines >= limit {
            long.push(format!(
                "{}: {lines} lines, the limit is {limit}",
                source.path.display()
            ));
        }
    }
    assert!(long.is_empty(), "\n{}", long.join("\n"));
}

#[test]
fn nothing_unfinished_is_committed() {
    // Put together here, so that this file does not complain about itself.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("unimple", "mented!"),
        concat!("to", "do!"),
        concat!("dbg", "!("),
    ];
    let mut found = Vec::new();
    for source in sources() {
        for word in words {
            found.extend(
                lines_with(&source.text, word)
                    .map(|line| format!("{}:{line}: {word}", source.path.display())),
            );
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn scripts_stop_at_the_first_error() {
    let careless: Vec<String> = sources()
        .iter()
        .filter(|s| {
            s.text.starts_with("#!/usr/bin/env bash") && !s.text.contains("\nset -euo pipefail\n")
        })
        .map(|s| s.path.display().to_string())
        .collect();
    assert!(
        careless.is_empty(),
        "without set -euo pipefail: {careless:?}"
    );
}

/// The lint itself: each kind of complaint is raised by a source that deserves it, and by no innocent one.
#[test]
fn the_lint_finds_what_it_looks_for() {
    let check = |path: &str, text: &str| {
        let source = Source {
            path: path.into(),
            text: text.into(),
        };
        complaints(&source, false)
    };
    let good = "//! Doc.\nuse crate::{error::Error, units::Extent};\n// crate::engine, unsafe {\nlet s = \"crate::cli unsafe {\";\n";
    assert_eq!(check("src/model/a.rs", good), [""; 0]);
    assert_eq!(
        check(
            "src/engine/a.rs",
            "//! Doc.\nuse crate::mem::Pool;\nuse crate::engine::x;\n"
        ),
        [""; 0]
    );
    assert_eq!(
        check(
            "src/plan/a.rs",
            "//! Doc.\nuse crate::{error::Error,\n  mem::{Pool, Slot}};\n"
        ),
        ["src/plan/a.rs: plan must not use mem"]
    );
    assert_eq!(
        check(
            "src/host/a.rs",
            "//! Doc.\nfn f() { crate::tools::synth(); }\n"
        ),
        ["src/host/a.rs: host must not use tools"]
    );
    assert_eq!(
        check("src/attic/a.rs", "//! Doc.\n"),
        ["src/attic/a.rs: no room of this name in the design"]
    );
    assert_eq!(
        check("src/model/a.rs", "//! Doc.\nuse std::fs::File;\n"),
        ["src/model/a.rs:2: std::fs in a pure room"]
    );
    assert_eq!(
        check("src/plan/a.rs", "//! Doc.\nunsafe fn f() {}\n"),
        ["src/plan/a.rs:2: unsafe outside of its rooms"]
    );
    assert_eq!(
        check("src/mem/a.rs", "//! Doc.\nlet c = '\"';\nunsafe { f() }\n"),
        ["src/mem/a.rs:3: unsafe without a SAFETY comment"]
    );
    assert_eq!(
        check(
            "src/mem/a.rs",
            "//! Doc.\n// SAFETY: because.\nunsafe { f() }\n"
        ),
        [""; 0]
    );
    assert_eq!(
        check("src/mem/a.rs", "use std::ptr;\n"),
        ["src/mem/a.rs: does not start with its module documentation"]
    );
    assert_eq!(code_only("a /* b /* c */ d */ e"), "a                   e");
    assert_eq!(
        code_only("x(r#\"un\"safe\"#, 'q', &'a y, b\"z\\\"\")"),
        "x(            ,    , & a y, b     )"
    );
}
