//! The dashboard's requests and their answers: who may ask, what there is, and errors as `--json` prints them.
//!
//! Invariants: a request has to name this program as its host (a foreign name that was made to lead to the loopback does
//! not) and know the secret in the path; one that begins or ends something has to be a POST from this page. Answers are
//! the JSON of the commands, byte for byte, and no browser may keep, frame or run anything else with them.

use serde::Serialize;
use serde_json::Value;

use super::board::{Board, Settings};
use super::export;
use super::measure::What;
use super::page;
use crate::cli::failure;
use crate::daemon::http::{Answer, Request};
use crate::error::{Error, ErrorKind, Result};

/// What the page may load: its own parts from this program, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Answers a request.
pub(super) fn answer(board: &Board, request: &Request) -> Answer {
    let mut answer = admit(board, request).unwrap_or_else(|refusal| refusal);
    for (name, value) in [
        ("Content-Security-Policy", POLICY),
        ("Cache-Control", "no-store"),
        ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
    ] {
        answer.headers.push((name, value.to_owned()));
    }
    answer
}

/// Lets in who names the right host and the secret. What it refuses says nothing about what there is.
fn admit(board: &Board, request: &Request) -> std::result::Result<Answer, Answer> {
    let forbidden = |why: &str| Answer::text("403 Forbidden", format!("{why}\n"));
    let host = request.header("Host").unwrap_or_default();
    if !board.is_host(host) {
        return Err(forbidden("this host name is not flea's"));
    }
    let path = request.path.strip_prefix('/').unwrap_or_default();
    let (secret, rest) = path.split_once('/').unwrap_or((path, ""));
    if !board.is_secret(secret) {
        return Err(forbidden(
            "open the whole address that `flea dashboard` printed: it ends with a secret",
        ));
    }
    if !path.contains('/') {
        // The page names its parts beside itself.
        let mut moved = Answer::text("308 Permanent Redirect", "");
        moved.headers.push(("Location", format!("/{secret}/")));
        return Ok(moved);
    }
    if request.is_get() {
        return Ok(get(board, rest, &settings(&request.query)).unwrap_or_else(|e| refused(&e)));
    }
    if request.method != "POST" {
        return Err(Answer::text(
            "405 Method Not Allowed",
            "only GET and POST\n",
        ));
    }
    let is_own = request.header("Origin") == Some(&format!("http://{host}"));
    if request.has_header("Origin") && !is_own {
        return Err(forbidden("this was asked by another page"));
    }
    Ok(post(board, rest, &settings(&request.query)).unwrap_or_else(|e| refused(&e)))
}

fn settings(query: &str) -> Settings {
    form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect()
}

fn get(board: &Board, path: &str, settings: &Settings) -> Result<Answer> {
    if let Some((content_type, text)) = page::part(path) {
        return Ok(Answer {
            content_type,
            ..Answer::text("200 OK", text)
        });
    }
    match path {
        "api/page" => json(&board.describe()?),
        "api/analyze" => json(&board.analyze(settings)?),
        "api/status" => json(&board.status()?),
        "api/stats" => json(&board.stats()?),
        "api/measure" => json(&board.measurer.describe()),
        "report.html" => report(board, settings),
        _ => match measured(path.strip_prefix("api/")) {
            Some(what) => json(&result(board, what)?),
            None => Err(nothing(path)),
        },
    }
}

fn post(board: &Board, path: &str, settings: &Settings) -> Result<Answer> {
    match path.strip_prefix("api/measure/") {
        Some("stop") => board.measurer.stop(),
        name => match measured(name) {
            Some(what) => board.measure(what, settings)?,
            None => return Err(nothing(path)),
        },
    }
    json(&board.measurer.describe())
}

fn measured(name: Option<&str>) -> Option<What> {
    What::ALL.into_iter().find(|what| Some(what.name()) == name)
}

/// The JSON of a measurement, as its command prints it.
fn result(board: &Board, what: What) -> Result<Value> {
    board
        .measurer
        .result(what)
        .map(|(value, _)| value)
        .ok_or_else(|| {
            let said = format!("`{}` has not been run from this page yet", what.verb());
            Error::new(ErrorKind::NotFound, said)
        })
}

fn report(board: &Board, settings: &Settings) -> Result<Answer> {
    let settings = if settings.is_empty() {
        board.first()
    } else {
        settings.clone()
    };
    let mut answer = Answer::text("200 OK", export::report(board, &settings)?);
    answer.content_type = page::HTML;
    let name = "attachment; filename=\"flea-report.html\"".to_owned();
    answer.headers.push(("Content-Disposition", name));
    Ok(answer)
}

fn nothing(path: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("/{path} is no part of this page"),
    )
}

/// One line, as `print_json` writes it.
fn json(value: &impl Serialize) -> Result<Answer> {
    let mut line = serde_json::to_string(value)
        .map_err(|error| Error::new(ErrorKind::Internal, format!("encode JSON: {error}")))?;
    line.push('\n');
    Ok(Answer {
        content_type: "application/json",
        ..Answer::text("200 OK", line)
    })
}

fn refused(error: &Error) -> Answer {
    let status = match error.kind() {
        ErrorKind::Invalid => "400 Bad Request",
        ErrorKind::NotFound => "404 Not Found",
        ErrorKind::Busy => "409 Conflict",
        ErrorKind::Connection => "503 Service Unavailable",
        _ => "500 Internal Server Error",
    };
    Answer {
        content_type: "application/json",
        ..Answer::text(status, format!("{}\n", failure(error)))
    }
}
