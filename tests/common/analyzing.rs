//! `flea analyze`, asked by a test.

use std::process::Command;

use serde_json::Value;

use crate::common::{flea, output};

/// `flea analyze` with these arguments, which must not find a proxy.
pub fn analyze(arguments: &[&str]) -> Command {
    let mut command = flea();
    command.arg("analyze").args(arguments);
    for name in [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    command
}

/// Its JSON, whatever the verdict, and its exit code.
pub fn answer(arguments: &[&str]) -> (Value, i32) {
    let output = output(analyze(arguments).arg("--json"));
    let text = String::from_utf8(output.stdout).unwrap();
    let value = serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{error}: {text}"));
    (value, output.status.code().unwrap())
}
