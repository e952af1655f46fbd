//! Faults on demand, for the tests: `FLEA_FAULT=delay_ms=20,eio_every=7` in a build with feature `faults`.
//!
//! Invariant: in a build without the feature nothing here can fire; [`Faults::from_env`] answers with none and the
//! hooks compile away. Besides the reader, `mem` looks at `poison` (a slot is overwritten when it moves) and the engine
//! at `nowait` (its wait for the bytes is left out) and `noevent` (that for a GPU's readers); the suite has to notice.
//! Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// The environment variable.
pub const VARIABLE: &str = "FLEA_FAULT";

/// What is to go wrong.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Faults {
    /// Each completion is held back this long (`delay_ms=N`).
    pub delay: Option<Duration>,
    /// Bytes inverted after they were read (`flip=SHARD:OFFSET`, may be given several times).
    pub flips: Vec<(u32, u64)>,
    /// Every Nth read fails with EIO, which a retry mends (`eio_every=N`; 1 fails every retry too).
    pub eio_every: Option<u64>,
    /// Every read of these files fails with EIO, retries and all (`dead=SHARD`, may be given several times).
    pub dead: Vec<u32>,
    /// Every Nth read asks for about half (`short_every=N`).
    pub short_every: Option<u64>,
    /// The Nth read, counted from 1, never comes back (`stuck` = the first, or `stuck=N`).
    pub stuck: Option<u64>,
    /// No read of these files comes back (`hung=SHARD`, may be given several times).
    pub hung: Vec<u32>,
    /// The Nth read, counted from 1, makes the thread panic that asks for it (`panic=N`).
    pub panic: Option<u64>,
    /// For `mem`: a slot is overwritten when it moves (`poison`).
    pub poison: bool,
    /// For the engine: acquire does not wait for the bytes (`nowait`).
    pub nowait: bool,
    /// For the engine: slots of VRAM are written again while a GPU reads them (`noevent`).
    pub noevent: bool,
}

impl Faults {
    /// What [`VARIABLE`] asks for; none in a build without feature `faults`.
    ///
    /// # Errors
    /// `Invalid` for a word that is not a fault: a fault that silently does not happen makes a test that cannot fail.
    pub fn from_env() -> Result<Self> {
        if !cfg!(feature = "faults") {
            return Ok(Self::default());
        }
        match std::env::var(VARIABLE) {
            Ok(text) => Self::parse(&text),
            Err(_) => Ok(Self::default()),
        }
    }

    /// Parses `delay_ms=20,flip=0:4096,stuck`.
    ///
    /// # Errors
    /// `Invalid`, naming the word.
    pub fn parse(text: &str) -> Result<Self> {
        let mut faults = Self::default();
        for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            match (name, value) {
                ("delay_ms", Some(v)) => {
                    faults.delay = Some(Duration::from_millis(number(word, v)?));
                }
                ("flip", Some(v)) => faults.flips.push(place(word, v)?),
                ("eio_every", Some(v)) => faults.eio_every = Some(nonzero(word, v)?),
                ("dead", Some(v)) => faults.dead.push(shard(word, v)?),
                ("short_every", Some(v)) => faults.short_every = Some(nonzero(word, v)?),
                ("stuck", None) => faults.stuck = Some(1),
                ("stuck", Some(v)) => faults.stuck = Some(nonzero(word, v)?),
                ("hung", Some(v)) => faults.hung.push(shard(word, v)?),
                ("panic", Some(v)) => faults.panic = Some(nonzero(word, v)?),
                ("poison", None) => faults.poison = true,
                ("nowait", None) => faults.nowait = true,
                ("noevent", None) => faults.noevent = true,
                _ => return Err(unknown(word)),
            }
        }
        Ok(faults)
    }
}

fn unknown(word: &str) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!(
            "{VARIABLE}: '{word}' is not a fault; known: delay_ms=N flip=SHARD:OFFSET eio_every=N dead=SHARD short_every=N stuck[=N] hung=SHARD panic=N poison nowait noevent"
        ),
    )
}

fn number(word: &str, value: &str) -> Result<u64> {
    value.parse().map_err(|_| unknown(word))
}

fn nonzero(word: &str, value: &str) -> Result<u64> {
    match number(word, value)? {
        0 => Err(unknown(word)),
        n => Ok(n),
    }
}

fn place(word: &str, value: &str) -> Result<(u32, u64)> {
    let (shard, offset) = value.split_once(':').ok_or_else(|| unknown(word))?;
    let offset = offset.parse().map_err(|_| unknown(word))?;
    Ok((self::shard(word, shard)?, offset))
}

fn shard(word: &str, value: &str) -> Result<u32> {
    value.parse().map_err(|_| unknown(word))
}

/// What befalls one read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Fate {
    pub(super) eio: bool,
    pub(super) short: bool,
    pub(super) stuck: bool,
}

/// The reader's view: the faults, and how many reads there were.
#[derive(Debug, Default)]
pub(super) struct Injector {
    faults: Faults,
    reads: AtomicU64,
}

impl Injector {
    pub(super) fn new(faults: Faults) -> Self {
        Self {
            faults,
            reads: AtomicU64::new(0),
        }
    }

    /// Draws the fate of the next read, which is of this file.
    pub(super) fn next_read(&self, shard_index: u32) -> Fate {
        if !cfg!(feature = "faults") {
            return Fate::default();
        }
        let ordinal = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(self.faults.panic != Some(ordinal), "{VARIABLE}: panic");
        let every = |n: Option<u64>| n.is_some_and(|n| ordinal.is_multiple_of(n));
        Fate {
            eio: every(self.faults.eio_every) || self.faults.dead.contains(&shard_index),
            short: every(self.faults.short_every),
            stuck: self.faults.stuck == Some(ordinal) || self.faults.hung.contains(&shard_index),
        }
    }

    pub(super) fn delay(&self) -> Option<Duration> {
        if cfg!(feature = "faults") {
            self.faults.delay
        } else {
            None
        }
    }

    pub(super) fn flips(&self) -> &[(u32, u64)] {
        if cfg!(feature = "faults") {
            &self.faults.flips
        } else {
            &[]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_parses_and_any_other_is_named() {
        let faults = Faults::parse(
            "delay_ms=20, flip=1:4097,flip=0:0,eio_every=3,dead=2,short_every=2,stuck,hung=4,panic=9,poison,nowait,noevent",
        )
        .unwrap();
        assert_eq!(
            faults,
            Faults {
                delay: Some(Duration::from_millis(20)),
                flips: vec![(1, 4097), (0, 0)],
                eio_every: Some(3),
                dead: vec![2],
                short_every: Some(2),
                stuck: Some(1),
                hung: vec![4],
                panic: Some(9),
                poison: true,
                nowait: true,
                noevent: true,
            }
        );
        assert_eq!(Faults::parse("").unwrap(), Faults::default());
        for bad in [
            "flip=7",
            "delay_ms",
            "eio_every=0",
            "dead=first",
            "no_such_fault",
            "poison=1",
            "delay_ms=-1",
        ] {
            let error = Faults::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(bad), "{error}");
        }
    }
}
