//! Who asks for metrics over HTTP, and gets them: this machine.
//!
//! One thread answers one request at a time, each within two seconds: it can be slowed down by whoever is on this
//! machine, the daemon cannot.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// How long one request may take, from its first byte to the last one of the answer.
const REQUEST: Duration = Duration::from_secs(2);
/// The longest request that is read.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// Answers `GET /metrics` on a loopback address until it is dropped.
#[derive(Debug)]
pub struct Responder {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    /// Listens on `address`; `metrics` is called for every request.
    ///
    /// # Errors
    /// `Invalid` for an address that other machines can reach; what binding says.
    pub fn start(
        address: SocketAddr,
        metrics: impl Fn() -> String + Send + 'static,
    ) -> Result<Self> {
        if !address.ip().is_loopback() {
            let context = format!(
                "metrics_listen: {address} is not a loopback address; write 127.0.0.1:9464"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let failed = |error: &std::io::Error| {
            Error::from_io(
                error,
                format_args!("listen for metrics on {address} (another flead, or an exporter?)"),
            )
        };
        let listener = TcpListener::bind(address).map_err(|error| failed(&error))?;
        let address = listener.local_addr().map_err(|error| failed(&error))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("flea-metrics".to_owned())
            .spawn(move || listen(&listener, &stopped, &metrics))
            .map_err(|error| failed(&error))?;
        Ok(Self {
            address,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens; the port is the system's choice where 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the accept; if it cannot be reached it has no more to wait for either.
        let _ = TcpStream::connect_timeout(&self.address, REQUEST);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(listener: &TcpListener, stop: &AtomicBool, metrics: &impl Fn() -> String) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        match stream {
            // Who hangs up or is too slow gets no answer; that is all there is to do about it.
            Ok(stream) => drop(answer(stream, metrics)),
            Err(error) => {
                // Out of descriptors, most likely: wait, rather than spin.
                log::warn!("accept a connection for metrics: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn answer(mut stream: TcpStream, metrics: &impl Fn() -> String) -> std::io::Result<()> {
    let request = read_request(&mut stream)?;
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = path.split('?').next().unwrap_or(path);
    let (status, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", metrics()),
        ("GET" | "HEAD", _) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let body = if method == "HEAD" { "" } else { body.as_str() };
    stream.set_write_timeout(Some(REQUEST))?;
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// The request's first line, once its head is complete.
fn read_request(stream: &mut TcpStream) -> std::io::Result<String> {
    let deadline = Instant::now() + REQUEST;
    let mut bytes = Vec::new();
    let mut part = [0u8; 1024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") && bytes.len() < REQUEST_BYTES_MAX {
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
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or(&[]);
    Ok(String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn it_answers_on_loopback_and_only_there() {
        let outside = "0.0.0.0:0".parse().unwrap();
        let error = Responder::start(outside, String::new).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let responder =
            Responder::start("127.0.0.1:0".parse().unwrap(), || "flea_up 1\n".to_owned()).unwrap();
        let address = responder.address();
        let good = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\nflea_up 1\n"),
            "{good}"
        );
        assert!(ask(address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        // Who connects and says nothing, or hangs up, is no harm to the next.
        let silent = TcpStream::connect(address).unwrap();
        drop(TcpStream::connect(address).unwrap());
        assert!(ask(address, "GET /metrics?x=1 HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
        drop(silent);
        drop(responder);
        assert!(
            TcpStream::connect(address).is_err(),
            "nobody listens any more"
        );
    }
}
