//! A connection that asks: connect, say hello, request after request.

use super::message::{self, Hello, Method, Welcome, encode_request, parse_reply};
use super::{PROTOCOL, Packet, Socket};
use crate::error::{Error, ErrorKind, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a connect may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take unless told otherwise. A load or a change of the budget fills gigabytes first.
const ANSWER: Duration = Duration::from_secs(120);

/// A connection to the daemon over which requests go, one after the other.
#[derive(Debug)]
pub struct Control {
    socket: Socket,
    path: PathBuf,
    welcome: Welcome,
}

impl Control {
    /// Connects to the daemon at `path` and says hello.
    ///
    /// # Errors
    /// `Connection` naming the path, `Permission`, `Unsupported` when the daemon speaks another version.
    pub fn connect(path: &Path) -> Result<Self> {
        Self::connect_as(path, concat!("flea/", env!("CARGO_PKG_VERSION")))
    }

    /// [`Control::connect`] under a name of the program's own.
    ///
    /// # Errors
    /// Those of [`Control::connect`].
    pub fn connect_as(path: &Path, client: &str) -> Result<Self> {
        let socket = Socket::connect(path, CONNECT)?;
        let mut control = Self {
            socket,
            path: path.to_owned(),
            welcome: Welcome {
                protocol: PROTOCOL,
                version: String::new(),
                pid: 0,
            },
        };
        let hello = Hello {
            protocol: PROTOCOL,
            client: client.to_owned(),
        };
        let answer = control.call(Method::Hello, &message::to_value(&hello)?)?;
        control.welcome = message::from_value(answer)?;
        Ok(control)
    }

    /// What the daemon said about itself.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The connection itself.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Asks, and gives the answer's parameters.
    ///
    /// # Errors
    /// What the daemon answers, under its own kind; `Connection`, naming the path, when it is gone; `Timeout`.
    pub fn request(&mut self, method: &str, parameters: Value) -> Result<Value> {
        let method = Method::ALL
            .into_iter()
            .find(|known| known.name() == method)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, format!("no method '{method}'")))?;
        self.call(method, &parameters)
    }

    /// [`Control::request`] by method.
    ///
    /// # Errors
    /// Those of [`Control::request`].
    pub fn call(&mut self, method: Method, parameters: &Value) -> Result<Value> {
        parse_reply(&self.exchange(method, parameters)?.bytes)
    }

    /// A method whose answer comes in pages: the list `key` of all of them together.
    ///
    /// # Errors
    /// Those of [`Control::request`].
    pub fn list(&mut self, method: Method, key: &str) -> Result<Vec<Value>> {
        let mut all = Vec::new();
        let mut from = 0;
        loop {
            let mut answer = self.call(method, &serde_json::json!({ "from": from }))?;
            match answer.get_mut(key).map(Value::take) {
                Some(Value::Array(items)) => all.extend(items),
                _ => return Err(self.lost(&format!("'{key}' is missing in an answer"))),
            }
            match answer.get("next").and_then(Value::as_u64) {
                Some(next) if next > from => from = next,
                _ => return Ok(all),
            }
        }
    }

    /// Sends a request and gives the packet that answers it, with its descriptors. An error reply is an error here.
    ///
    /// # Errors
    /// Those of [`Control::request`].
    pub fn exchange(&mut self, method: Method, parameters: &Value) -> Result<Packet> {
        let packet = encode_request(method, parameters)?;
        let deadline = Instant::now() + ANSWER;
        let mut answer = self
            .socket
            .send(&packet, &[], false)
            .and_then(|()| self.socket.receive_until(Some(deadline)));
        if matches!(&answer, Err(error) if error.kind() == ErrorKind::Connection) {
            // Who refuses us says why and hangs up: the hang-up is told before what was said.
            answer = self.socket.receive(true, true).or(answer);
        }
        match answer {
            Ok(Some(packet)) => Ok(packet),
            Ok(None) => Err(self.lost("it closed the connection")),
            Err(error) if error.kind() == ErrorKind::Timeout => Err(error),
            Err(error) => Err(self.lost(error.context())),
        }
    }

    fn lost(&self, why: &str) -> Error {
        Error::new(
            ErrorKind::Connection,
            format!("the daemon at {} is gone: {why}", self.path.display()),
        )
    }
}
