//! The messages: `{"method","parameters"}` one way, `{"parameters"}` or `{"error":{"status","message"}}` the other.
//!
//! The shape is varlink's, so that a switch stays cheap. Everything here is data: nothing is sent and nothing is
//! believed. Unknown fields of parameters are refused, so that a misspelt one is never overlooked.

use super::{PACKET_BYTES_MAX, PROTOCOL};
use crate::error::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Every method the daemon answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// First packet of a connection: which protocol, and who.
    Hello,
    /// The daemon in one object: see [`super::snapshot::Snapshot`].
    Status,
    /// The models it holds.
    Models,
    /// Opens a model before anybody asks for it.
    Load,
    /// Closes a model that nobody is attached to.
    Unload,
    /// Keeps a model loaded when memory is wanted for another.
    Pin,
    /// Takes that back.
    Unpin,
    /// Who holds which layer.
    Leases,
    /// Asks for the pool's size, or changes it.
    Budget,
    /// Counters of models and clients.
    Stats,
    /// The same as Prometheus text.
    Metrics,
    /// Attaches this connection to a model; comes with the descriptors of its shared words.
    Attach,
    /// One page of the model's catalog.
    Catalog,
    /// One page of the plan in force; comes with the pool's descriptor.
    Plan,
    /// What the last failed read of a layer said.
    Failure,
    /// Which layers the client will acquire next.
    Hint,
    /// Gives the model back; the connection stays.
    Detach,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 17] = [
        Self::Hello,
        Self::Status,
        Self::Models,
        Self::Load,
        Self::Unload,
        Self::Pin,
        Self::Unpin,
        Self::Leases,
        Self::Budget,
        Self::Stats,
        Self::Metrics,
        Self::Attach,
        Self::Catalog,
        Self::Plan,
        Self::Failure,
        Self::Hint,
        Self::Detach,
    ];

    /// As it stands in a packet.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Status => "status",
            Self::Models => "models",
            Self::Load => "load",
            Self::Unload => "unload",
            Self::Pin => "pin",
            Self::Unpin => "unpin",
            Self::Leases => "leases",
            Self::Budget => "budget",
            Self::Stats => "stats",
            Self::Metrics => "metrics",
            Self::Attach => "attach",
            Self::Catalog => "catalog",
            Self::Plan => "plan",
            Self::Failure => "failure",
            Self::Hint => "hint",
            Self::Detach => "detach",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// A request as it came in: a method that exists, and parameters that nobody has looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What is asked.
    pub method: Method,
    /// With what.
    pub parameters: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequest {
    method: String,
    #[serde(default)]
    parameters: Value,
}

impl Request {
    /// Reads one packet.
    ///
    /// # Errors
    /// `Invalid` for what is not a request, `Unsupported` for a method that does not exist.
    pub fn parse(packet: &[u8]) -> Result<Self> {
        let raw: RawRequest = serde_json::from_slice(packet)
            .map_err(|error| Error::new(ErrorKind::Invalid, format!("not a request: {error}")))?;
        let Some(method) = Method::parse(&raw.method) else {
            let name: String = raw.method.chars().take(40).collect();
            let context = format!("no method '{name}' in protocol {PROTOCOL}");
            return Err(Error::new(ErrorKind::Unsupported, context));
        };
        Ok(Self {
            method,
            parameters: raw.parameters,
        })
    }

    /// The parameters as what the method takes. Left out, they are an empty object.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn parameters<T: DeserializeOwned>(&self) -> Result<T> {
        let value = match &self.parameters {
            Value::Null => json!({}),
            value => value.clone(),
        };
        serde_json::from_value(value).map_err(|error| {
            let context = format!("parameters of '{}': {error}", self.method.name());
            Error::new(ErrorKind::Invalid, context)
        })
    }
}

/// The packet of a request.
///
/// # Errors
/// `Invalid` when it is longer than a packet may be.
pub fn encode_request(method: Method, parameters: &Value) -> Result<Vec<u8>> {
    bounded(&json!({ "method": method.name(), "parameters": parameters }))
}

/// The packet of a reply. One that would be too long becomes an error reply: every method pages what can grow.
#[must_use]
pub fn encode_reply(reply: &Result<Value>) -> Vec<u8> {
    let whole = match reply {
        Ok(parameters) => bounded(&json!({ "parameters": parameters })),
        Err(error) => bounded(&error_object(error)),
    };
    whole.unwrap_or_else(|error| error_object(&error).to_string().into_bytes())
}

fn error_object(error: &Error) -> Value {
    // A path may be long; the sentence around it is what matters.
    let message: String = error.context().chars().take(4096).collect();
    json!({ "error": { "status": error.kind().name(), "message": message } })
}

fn bounded(value: &Value) -> Result<Vec<u8>> {
    let bytes = value.to_string().into_bytes();
    if bytes.len() > PACKET_BYTES_MAX {
        let context = format!(
            "a packet of {} bytes, {PACKET_BYTES_MAX} are allowed",
            bytes.len()
        );
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(bytes)
}

#[derive(Deserialize)]
struct RawReply {
    parameters: Option<Value>,
    error: Option<RawError>,
}

#[derive(Deserialize)]
struct RawError {
    status: String,
    #[serde(default)]
    message: String,
}

/// Reads a reply.
///
/// # Errors
/// What the other side answered, under its own kind; `Connection` for what is not a reply.
pub fn parse_reply(packet: &[u8]) -> Result<Value> {
    let broken = |what: &str| {
        Error::new(
            ErrorKind::Connection,
            format!("the daemon's answer cannot be read: {what}"),
        )
    };
    let raw: RawReply =
        serde_json::from_slice(packet).map_err(|error| broken(&error.to_string()))?;
    match (raw.parameters, raw.error) {
        (Some(parameters), None) => Ok(parameters),
        (None, Some(error)) => Err(Error::new(kind_of(&error.status), error.message)),
        _ => Err(broken("neither parameters nor an error")),
    }
}

fn kind_of(name: &str) -> ErrorKind {
    ErrorKind::ALL
        .into_iter()
        .find(|kind| kind.name() == name)
        .unwrap_or(ErrorKind::Internal)
}

/// A structure of the wire as JSON.
///
/// # Errors
/// `Internal`: a structure that JSON cannot hold is a defect.
pub fn to_value(value: &impl Serialize) -> Result<Value> {
    serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::Internal, format!("encode a message: {error}")))
}

/// An answer as the structure it should be.
///
/// # Errors
/// `Connection`: the other side speaks another language.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| {
        let context = format!("the daemon's answer cannot be read: {error}");
        Error::new(ErrorKind::Connection, context)
    })
}

/// Parameters of `hello`, from the client.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`PROTOCOL`] of the client.
    pub protocol: u32,
    /// Program and version, for people.
    #[serde(default)]
    pub client: String,
}

/// The daemon's answer to `hello`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROTOCOL`] of the daemon.
    pub protocol: u32,
    /// Version of flead.
    pub version: String,
    /// Its process.
    pub pid: u32,
}

/// Parameters of `load`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Absolute path of the model, as [`crate::engine::read_catalog`] takes it.
    pub path: String,
    /// Also pin it.
    #[serde(default)]
    pub pin: bool,
}

/// Parameters of `unload`, `pin` and `unpin`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// The model's number, or its path.
    pub model: String,
}

/// Parameters of `budget`: none to ask, one to set.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// The new size of the pool; memory that it gives up is back with the system when the answer comes.
    #[serde(default)]
    pub bytes: Option<u64>,
}

/// Parameters of what comes in pages: `catalog`, `plan`, `leases`, `metrics`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    /// The `next` of the page before; 0 for the first.
    #[serde(default)]
    pub from: u64,
}

/// Parameters of `attach`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Absolute path of the model.
    pub path: String,
}

/// Parameters of `failure`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// The layer whose read failed.
    pub layer: u32,
}

/// Parameters of `hint`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hint {
    /// The layers, in order.
    pub layers: Vec<u32>,
}

/// Parameters of methods that take none.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_a_name_of_its_own_and_is_found_by_it() {
        for method in Method::ALL {
            let packet = encode_request(method, &json!({"a": 1})).unwrap();
            let request = Request::parse(&packet).unwrap();
            assert_eq!(request.method, method);
            assert_eq!(request.parameters, json!({"a": 1}));
        }
    }

    #[test]
    fn what_is_not_a_request_is_an_error_that_says_so() {
        for (packet, kind) in [
            (&b""[..], ErrorKind::Invalid),
            (b"\xff\xfe", ErrorKind::Invalid),
            (b"[]", ErrorKind::Invalid),
            (b"{\"method\":7}", ErrorKind::Invalid),
            (b"{\"method\":\"status\",\"extra\":1}", ErrorKind::Invalid),
            (b"{\"method\":\"format_disk\"}", ErrorKind::Unsupported),
        ] {
            assert_eq!(Request::parse(packet).unwrap_err().kind(), kind);
        }
        let request = Request::parse(b"{\"method\":\"load\",\"parameters\":{}}").unwrap();
        let error = request.parameters::<Load>().unwrap_err();
        assert!(error.context().contains("path"), "{error}");
        let request = Request::parse(b"{\"method\":\"budget\"}").unwrap();
        assert_eq!(request.parameters::<Budget>().unwrap().bytes, None);
    }

    #[test]
    fn errors_keep_their_kind_over_the_wire() {
        for kind in ErrorKind::ALL {
            let error = Error::new(kind, "why");
            let packet = encode_reply(&Err(error));
            let back = parse_reply(&packet).unwrap_err();
            assert_eq!((back.kind(), back.context()), (kind, "why"));
        }
        assert_eq!(
            parse_reply(b"{}").unwrap_err().kind(),
            ErrorKind::Connection
        );
    }

    #[test]
    fn no_packet_is_longer_than_allowed() {
        let long = "x".repeat(PACKET_BYTES_MAX);
        assert!(encode_request(Method::Load, &json!({ "path": long })).is_err());
        let reply = encode_reply(&Ok(json!(long)));
        assert!(reply.len() <= PACKET_BYTES_MAX);
        assert_eq!(parse_reply(&reply).unwrap_err().kind(), ErrorKind::Invalid);
        let reply = encode_reply(&Err(Error::new(ErrorKind::Io, long)));
        assert!(reply.len() <= PACKET_BYTES_MAX);
    }
}
