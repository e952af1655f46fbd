//! A dashboard of the test's own, and HTTP by hand.

#![allow(dead_code, unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{flea, output, synth};

/// A socket that nobody listens on.
pub const NOBODY: &str = "/nowhere/flea.sock";

/// A dashboard that serves; killed when it is dropped.
pub struct Page {
    pub child: Child,
    pub address: SocketAddr,
    /// `/SECRET/`
    pub base: String,
}

impl Page {
    pub fn start(arguments: &[&str]) -> Self {
        let mut child = spawn(
            flea()
                .args(["dashboard", "--json"])
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::piped()),
        );
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let told: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let url = told["url"].as_str().expect("a URL");
        let rest = url.strip_prefix("http://").expect("HTTP");
        let (address, secret) = rest.split_once('/').expect("a path");
        assert_eq!(secret.len(), 33, "{url}");
        Self {
            child,
            address: address.parse().expect("an address"),
            base: format!("/{secret}"),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}{}", self.address, self.base)
    }

    /// A request with the right host and secret.
    pub fn ask(&self, method: &str, path: &str) -> Answer {
        let target = format!("{}{path}", self.base);
        self.send(method, &target, &[&format!("Host: {}", self.address)])
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path)
    }

    pub fn send(&self, method: &str, target: &str, headers: &[&str]) -> Answer {
        let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        exchange(
            self.address,
            &format!("{method} {target} HTTP/1.1\r\n{lines}\r\n"),
        )
    }

    /// Begins a measurement and waits for its end. Gives what failed.
    pub fn measure(&self, path: &str) -> Value {
        let begun = self.ask("POST", &format!("api/measure/{path}"));
        assert_eq!(begun.status, 200, "{begun:?}");
        let began = Instant::now();
        loop {
            let state = self.get("api/measure").json();
            if state["running"].is_null() {
                return state["failed"].clone();
            }
            assert!(began.elapsed() < Duration::from_secs(300), "{state}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer of a server: status, head, body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(self.body.trim()).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends a request as it stands here, and reads as much as is announced, or to the end of the connection.
pub fn exchange(address: SocketAddr, request: &str) -> Answer {
    let mut stream = TcpStream::connect(address).expect("a connection");
    let patience = Some(Duration::from_secs(120));
    stream.set_read_timeout(patience).expect("a timeout");
    stream.write_all(request.as_bytes()).expect("sent");
    let (mut bytes, mut part) = (Vec::new(), [0u8; 1 << 16]);
    while !is_whole(&bytes) {
        match stream.read(&mut part).expect("an answer") {
            0 => break,
            count => bytes.extend_from_slice(&part[..count]),
        }
    }
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no status: {head}")),
        head: head.to_owned(),
        body: body.to_owned(),
    }
}

/// Not every server closes a connection when it is asked to.
fn is_whole(bytes: &[u8]) -> bool {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return false;
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let announced = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    announced.is_some_and(|count| count.trim().parse() == Ok(bytes.len() - end - 4))
}

/// A child that dies with the test.
pub fn spawn(command: &mut Command) -> Child {
    // SAFETY: prctl and setpgid are safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::setpgid(0, 0);
            Ok(())
        });
    }
    command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// What a command prints, whatever its exit code.
pub fn stdout(command: &mut Command) -> String {
    String::from_utf8(output(command).stdout).expect("UTF-8")
}

pub fn small() -> PathBuf {
    synth(
        "dashboard",
        &["--size", "24MiB", "--layers", "12", "--type", "q8_0"],
    )
}

/// Vectors for `flea kv compare`, and the arguments that name them.
pub fn vectors(folder: &Path) -> PathBuf {
    let file = folder.join("keys.f32");
    let value = |index: u32| ((index.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6).sin();
    let bytes: Vec<u8> = (0..64 * 256)
        .flat_map(|index| value(index).to_le_bytes())
        .collect();
    std::fs::write(&file, bytes).expect("written");
    file
}
