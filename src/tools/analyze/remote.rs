//! A model behind a URL: its headers by HTTP range requests, and not a byte of its weights.
//!
//! Reads go forward in pieces that grow, as headers are a few megabytes at most. A server that ignores ranges would send
//! the whole file: that is an error that says so, before the body is read. Nothing is kept, nothing is sent but the
//! requests; proxies come from the environment, as with other programs. Feeds **file -> catalog** as a file would.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, catalog, gguf, split_paths};

/// First piece, and what pieces grow to.
const PIECE_BYTES_MIN: u64 = 256 << 10;
/// See [`PIECE_BYTES_MIN`].
const PIECE_BYTES_MAX: u64 = 8 << 20;
/// Longest config.json that is fetched.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// A server that says nothing for so long has gone.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Whether the argument is a URL.
#[must_use]
pub fn is_url(text: &str) -> bool {
    ["http://", "https://"]
        .iter()
        .any(|scheme| text.starts_with(scheme))
}

fn agent() -> Agent {
    let config = Agent::config_builder()
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(TIMEOUT))
        .timeout_recv_body(Some(TIMEOUT))
        .http_status_as_error(false)
        .user_agent(concat!("flea/", env!("CARGO_PKG_VERSION")))
        .build();
    config.new_agent()
}

fn failed(url: &str, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Io, format!("{url}: {what}"))
}

fn refused(url: &str, status: StatusCode) -> Error {
    let remedy = match status {
        StatusCode::NOT_FOUND => "; is the name right?",
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "; fetch it with an account that may",
        _ => "",
    };
    let kind = match status {
        StatusCode::NOT_FOUND => ErrorKind::NotFound,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::Permission,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("{url}: the server answers {status}{remedy}"))
}

/// A short text, such as a config.json.
///
/// # Errors
/// What the server or the way to it says; `Invalid` for a text that is too long.
pub fn text(url: &str) -> Result<String> {
    let mut response = agent()
        .get(url)
        .call()
        .map_err(|error| failed(url, error))?;
    if !response.status().is_success() {
        return Err(refused(url, response.status()));
    }
    let body = response
        .body_mut()
        .with_config()
        .limit(TEXT_BYTES_MAX)
        .read_to_string();
    body.map_err(|error| Error::new(ErrorKind::Invalid, format!("{url}: {error}")))
}

/// The catalog of the GGUF at `url`, of a split one of all its parts.
///
/// # Errors
/// What the server says; `Unsupported` where it ignores ranges; what the headers say.
pub fn read_gguf(url: &str) -> Result<Catalog> {
    let agent = agent();
    let first = header_of(&agent, url)?;
    let parts = first.split.and_then(|_| sisters(url));
    let Some(parts) = parts else {
        return catalog::from_gguf(vec![first]);
    };
    let headers = parts
        .iter()
        .map(|part| header_of(&agent, part))
        .collect::<Result<Vec<_>>>()?;
    catalog::from_gguf(headers)
}

fn header_of(agent: &Agent, url: &str) -> Result<gguf::ShardHeader> {
    let mut reader = RangeReader::open(agent, url)?;
    let len_bytes = reader.len_bytes;
    let parsed = gguf::parse_shard(Path::new(url), len_bytes, &mut reader);
    // The parser sees only that reading failed; the reader knows why.
    match reader.failure.take() {
        Some(failure) => Err(failure),
        None => parsed,
    }
}

/// The URLs of all parts of a split model, by their names.
fn sisters(url: &str) -> Option<Vec<String>> {
    let (address, query) = url
        .split_once('?')
        .map_or((url, None), |(address, query)| (address, Some(query)));
    let (folder, name) = address.rsplit_once('/')?;
    let split = split_paths(&PathBuf::from(name))?;
    let whole = |path: &PathBuf| {
        let query = query.map_or(String::new(), |query| format!("?{query}"));
        format!("{folder}/{}{query}", path.display())
    };
    Some(split.paths.iter().map(whole).collect())
}

/// Reads a remote file from its first byte on, a piece at a time.
struct RangeReader<'a> {
    agent: &'a Agent,
    url: &'a str,
    len_bytes: u64,
    offset_bytes: u64,
    piece: Vec<u8>,
    used: usize,
    piece_bytes: u64,
    failure: Option<Error>,
}

impl<'a> RangeReader<'a> {
    fn open(agent: &'a Agent, url: &'a str) -> Result<Self> {
        let mut reader = Self {
            agent,
            url,
            len_bytes: u64::MAX,
            offset_bytes: 0,
            piece: Vec::new(),
            used: 0,
            piece_bytes: PIECE_BYTES_MIN,
            failure: None,
        };
        reader.fetch()?;
        Ok(reader)
    }

    /// The next piece; empty at the end of the file.
    fn fetch(&mut self) -> Result<()> {
        let first = self.offset_bytes;
        self.piece.clear();
        self.used = 0;
        if first >= self.len_bytes {
            return Ok(());
        }
        let last = first
            .saturating_add(self.piece_bytes - 1)
            .min(self.len_bytes - 1);
        let request = self
            .agent
            .get(self.url)
            .header(header::RANGE, format!("bytes={first}-{last}"));
        // A compressed answer would be another file.
        let request = request.header(header::ACCEPT_ENCODING, "identity");
        let mut response = request.call().map_err(|error| failed(self.url, error))?;
        let (begins, total) = self.range_of(&response)?;
        if begins != first || (self.len_bytes != u64::MAX && total != self.len_bytes) {
            let what = format!(
                "asked for bytes from {first} of {}, the server sent from {begins} of {total}; the file changed",
                self.len_bytes
            );
            return Err(failed(self.url, what));
        }
        self.len_bytes = total;
        let wanted = last.min(total.saturating_sub(1)) - first + 1;
        let body = response
            .body_mut()
            .with_config()
            // The limit is an error when it is reached.
            .limit(wanted + 1)
            .read_to_vec();
        self.piece = body.map_err(|error| failed(self.url, error))?;
        if self.piece.len() as u64 != wanted {
            return Err(failed(
                self.url,
                format_args!(
                    "{wanted} bytes from {first} were promised, {} came",
                    self.piece.len()
                ),
            ));
        }
        self.offset_bytes += wanted;
        self.piece_bytes = (self.piece_bytes * 2).min(PIECE_BYTES_MAX);
        Ok(())
    }

    /// Where the answer begins, and how long the file is.
    fn range_of<T>(&self, response: &Response<T>) -> Result<(u64, u64)> {
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::OK => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{}: the server ignores range requests and would send the whole file; download it, or ask a server that serves ranges",
                        self.url
                    ),
                ));
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(Error::new(
                    ErrorKind::Truncated,
                    format!("{}: the file is empty", self.url),
                ));
            }
            status => return Err(refused(self.url, status)),
        }
        let text = response
            .headers()
            .get(header::CONTENT_RANGE)
            .and_then(|value| value.to_str().ok());
        text.and_then(content_range).ok_or_else(|| {
            failed(
                self.url,
                format_args!(
                    "the server sends a part of the file but not which: Content-Range is '{}'",
                    text.unwrap_or("")
                ),
            )
        })
    }
}

/// `bytes 0-1023/146515`: 0 and 146515.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total) = (
        first.parse().ok()?,
        last.parse::<u64>().ok()?,
        total.parse().ok()?,
    );
    (first <= last && last < total).then_some((first, total))
}

impl Read for RangeReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.used == self.piece.len()
            && let Err(error) = self.fetch()
        {
            let shown = std::io::Error::other(error.to_string());
            self.failure = Some(error);
            return Err(shown);
        }
        let rest = &self.piece[self.used..];
        let count = rest.len().min(out.len());
        out[..count].copy_from_slice(&rest[..count]);
        self.used += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_or_refused() {
        assert_eq!(content_range("bytes 0-1023/146515"), Some((0, 146_515)));
        for text in [
            "bytes */5",
            "bytes 0-9/*",
            "0-9/10",
            "bytes 9-0/10",
            "bytes 0-10/10",
            "bytes 0-9/99999999999999999999",
            "",
        ] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    #[test]
    fn parts_of_a_split_model_are_beside_each_other() {
        let parts = sisters("https://host/m/big-00001-of-00002.gguf?download=true").unwrap();
        assert_eq!(
            parts[1],
            "https://host/m/big-00002-of-00002.gguf?download=true"
        );
        assert_eq!(sisters("https://host/m/small.gguf"), None);
    }
}
