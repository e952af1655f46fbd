//! HTTP for this machine: a listener on loopback, a few threads, one request for each connection.
//!
//! Invariants: an address that other machines can reach is refused; a request has two seconds to arrive, whatever is
//! sent; an answer that nobody takes for two is given up; a head is bounded and a body is never read. So whoever is on this machine can
//! slow the answers down, not the program behind them. httparse reads the heads; TLS, bodies and connections that stay
//! open have no use on loopback. Used by flead's metrics and by `flea dashboard`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// How long a request may take to arrive, and a part of its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest head of a request that is read.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Header lines of a request that are looked at; browsers send about twenty.
const HEADERS_MAX: usize = 64;

/// A request, as far as anybody here wants to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`, ...
    pub method: String,
    /// What is asked for, without the query.
    pub path: String,
    /// What stands behind the question mark; empty without one.
    pub query: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// Whether something is only asked for.
    #[must_use]
    pub fn is_get(&self) -> bool {
        matches!(self.method.as_str(), "GET" | "HEAD")
    }

    /// The value of a header, whatever the case of its name. `None` without it, and where it was sent twice.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self
            .headers
            .iter()
            .filter(|(own, _)| own.eq_ignore_ascii_case(name));
        match (found.next(), found.next()) {
            (Some((_, value)), None) => Some(value),
            _ => None,
        }
    }

    /// Whether a header was sent at all.
    #[must_use]
    pub fn has_header(&self, name: &str) -> bool {
        let mut names = self.headers.iter().map(|(own, _)| own);
        names.any(|own| own.eq_ignore_ascii_case(name))
    }
}

/// What is sent back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// `200 OK`.
    pub status: &'static str,
    /// Content-Type.
    pub content_type: &'static str,
    /// More header lines: name and value.
    pub headers: Vec<(&'static str, String)>,
    /// The body; left out of the answer to HEAD.
    pub body: Vec<u8>,
}

impl Answer {
    /// A line of text.
    #[must_use]
    pub fn text(status: &'static str, text: impl Into<String>) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            headers: Vec::new(),
            body: text.into().into_bytes(),
        }
    }

    fn write(&self, stream: &mut TcpStream, with_body: bool) -> std::io::Result<()> {
        let mut head = format!(
            "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n",
            self.status,
            self.content_type,
            self.body.len()
        );
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(head.as_bytes())?;
        stream.write_all(if with_body { &self.body } else { &[] })
    }
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl HttpServer {
    /// Listens on `address` with so many threads, of that name; `answer` is called for every request. `whose` begins the
    /// errors: the setting that the address is from.
    ///
    /// # Errors
    /// `Invalid` for an address that other machines can reach; what binding says.
    pub fn start(
        whose: &str,
        address: SocketAddr,
        (name, threads_count): (&str, usize),
        answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Result<Self> {
        if !address.ip().is_loopback() {
            let port = address.port();
            let context =
                format!("{whose}: {address} is not a loopback address; write 127.0.0.1:{port}");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let failed = |error: &std::io::Error| {
            Error::from_io(error, format_args!("{whose}: listen on {address}"))
        };
        let listener = TcpListener::bind(address).map_err(|error| failed(&error))?;
        let address = listener.local_addr().map_err(|error| failed(&error))?;
        let (listener, answer) = (Arc::new(listener), Arc::new(answer));
        // From here on dropping it ends the threads that there are already.
        let mut server = Self {
            address,
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        for _ in 0..threads_count {
            let (listener, answer) = (Arc::clone(&listener), Arc::clone(&answer));
            let stop = Arc::clone(&server.stop);
            let thread = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || listen(&listener, &stop, &*answer))
                .map_err(|error| failed(&error))?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    /// Where it listens; the port is the system's choice where 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for _ in &self.threads {
            // Wakes an accept; if it cannot be reached it has no more to wait for either.
            let _ = TcpStream::connect_timeout(&self.address, PATIENCE);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn listen(listener: &TcpListener, stop: &AtomicBool, answer: &impl Fn(&Request) -> Answer) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        match stream {
            // Who hangs up or is too slow gets no answer; that is all there is to do about it.
            Ok(stream) => drop(serve(stream, answer)),
            Err(error) => {
                // Out of descriptors, most likely: wait, rather than spin.
                log::warn!("accept a connection over HTTP: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve(mut stream: TcpStream, answer: &impl Fn(&Request) -> Answer) -> std::io::Result<()> {
    let head = read_head(&mut stream)?;
    let request = parse(&head);
    let with_body = request.as_ref().is_none_or(|r| r.method != "HEAD");
    let answer = match &request {
        Some(request) => answer(request),
        None => Answer::text("400 Bad Request", "this is no request of HTTP/1.1\n"),
    };
    answer.write(&mut stream, with_body)
}

/// Everything up to the empty line, or what came before the end, if that is short enough.
fn read_head(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let mut bytes = Vec::new();
    let mut part = [0u8; 1024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") && bytes.len() < HEAD_BYTES_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would mean "for ever".
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut part)? {
            0 => break,
            count => bytes.extend_from_slice(&part[..count]),
        }
        if Instant::now() >= deadline {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
    }
    Ok(bytes)
}

/// `None` for what is no head of a request, or a longer one than is read.
fn parse(head: &[u8]) -> Option<Request> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    if !parsed.parse(head).ok()?.is_complete() {
        return None;
    }
    let (path, query) = match parsed.path?.split_once('?') {
        Some((path, query)) => (path, query),
        None => (parsed.path?, ""),
    };
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    Some(Request {
        method: parsed.method?.to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        headers: parsed
            .headers
            .iter()
            .map(|header| (header.name.to_owned(), text(header.value)))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_parsed_or_refused() {
        let head = b"POST /a/b?c=d%20e HTTP/1.1\r\nhOST: localhost:1\r\nX: 1\r\nX: 2\r\n\r\nbody";
        let request = parse(head).expect("a request");
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("POST", "/a/b")
        );
        assert_eq!(request.query, "c=d%20e");
        assert_eq!(request.header("Host"), Some("localhost:1"));
        // Which of two would count is anybody's guess: neither.
        assert_eq!((request.header("x"), request.has_header("x")), (None, true));
        assert!(!request.is_get());
        for bad in [
            &b""[..],
            b"\r\n",
            b"GET / HTTP/1.1\r\n",
            b"GET /\r\n\r\n",
            b"\x16\x03\x01\r\n\r\n",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "A: b\r\n".repeat(HEADERS_MAX + 1)
        );
        assert_eq!(parse(many.as_bytes()), None);
    }

    #[test]
    fn who_says_nothing_holds_up_one_thread_and_no_other() {
        let server = HttpServer::start(
            "test",
            "127.0.0.1:0".parse().expect("an address"),
            ("flea-test", 2),
            |request| Answer::text("200 OK", request.path.clone()),
        )
        .expect("it listens");
        let silent = TcpStream::connect(server.address()).expect("connects");
        for _ in 0..3 {
            let mut stream = TcpStream::connect(server.address()).expect("connects");
            stream
                .write_all(b"GET /here HTTP/1.1\r\n\r\n")
                .expect("sent");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("an answer");
            assert!(text.ends_with("\r\n\r\n/here"), "{text}");
        }
        let mut endless = TcpStream::connect(server.address()).expect("connects");
        let line = [b'a'; 1024];
        // As many bytes as are read at most; the answer comes without an end of the head.
        for _ in 0..HEAD_BYTES_MAX / line.len() {
            endless.write_all(&line).expect("sent");
        }
        let mut text = String::new();
        endless.read_to_string(&mut text).expect("an answer");
        assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
        drop((silent, server));
    }
}
