//! Who asks for metrics over HTTP, and gets them: this machine.
//!
//! One thread answers one request at a time, each within the time that [`crate::daemon::http`] gives it: it can be
//! slowed down by whoever is on this machine, the daemon cannot.

use std::net::SocketAddr;

use crate::daemon::http::{Answer, HttpServer, Request};
use crate::error::{Error, ErrorKind, Result};

/// Answers `GET /metrics` on a loopback address until it is dropped.
#[derive(Debug)]
pub struct Responder(HttpServer);

impl Responder {
    /// Listens on `address`; `metrics` is called for every request.
    ///
    /// # Errors
    /// `Invalid` for an address that other machines can reach; what binding says.
    pub fn start(
        address: SocketAddr,
        metrics: impl Fn() -> String + Send + Sync + 'static,
    ) -> Result<Self> {
        let answer = move |request: &Request| answer(request, &metrics);
        HttpServer::start("metrics_listen", address, ("flea-metrics", 1), answer)
            .map(Self)
            .map_err(|error| match error.kind() {
                ErrorKind::Invalid => error,
                kind => Error::new(kind, format!("{error} (another flead, or an exporter?)")),
            })
    }

    /// Where it listens; the port is the system's choice where 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.0.address()
    }
}

fn answer(request: &Request, metrics: &impl Fn() -> String) -> Answer {
    match request.path.as_str() {
        _ if !request.is_get() => Answer::text("405 Method Not Allowed", "only GET\n"),
        "/metrics" => Answer {
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            ..Answer::text("200 OK", metrics())
        },
        _ => Answer::text("404 Not Found", "metrics are at /metrics\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

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
