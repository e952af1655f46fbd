//! A Chromium without a window, driven through chromedriver: the WebDriver protocol, JSON over HTTP.

#![allow(dead_code, unsafe_code)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::served::{exchange, spawn};

/// A browser with one page.
pub struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
    directory: tempfile::TempDir,
}

impl Browser {
    /// `None` where chromium or chromedriver is missing.
    pub fn start(width: u32) -> Option<Self> {
        let chromium = program("chromium")?;
        let chromedriver = program("chromedriver")?;
        let directory = tempfile::tempdir().expect("a directory");
        // Free a moment ago: chromedriver cannot be asked which port it took.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.expect("a free port");
        let driver = spawn(
            Command::new(chromedriver)
                .arg(format!("--port={}", address.port()))
                .arg("--silent")
                .env("HOME", directory.path())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        let mut browser = Self {
            driver,
            address,
            session: String::new(),
            directory,
        };
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "chromedriver does not answer"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            // Names other than the loopback's lead nowhere.
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
        ];
        let mut arguments: Vec<String> = arguments.map(str::to_owned).to_vec();
        arguments.push(format!(
            "--user-data-dir={}",
            browser.inside("profile").display()
        ));
        arguments.push(format!("--log-net-log={}", browser.net_log().display()));
        arguments.push(format!("--window-size={width},1000"));
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
        }}});
        let session = browser.call("POST", "/session", &wanted);
        browser.session = session["sessionId"].as_str().expect("a session").to_owned();
        Some(browser)
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Everything that the browser asked of the network; whole once it has ended.
    fn net_log(&self) -> PathBuf {
        self.inside("net-log.json")
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if method == "GET" {
            String::new()
        } else {
            body.to_string()
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.address,
            body.len()
        );
        let mut answer = exchange(self.address, &request).json();
        assert!(
            answer["value"]["error"].is_null(),
            "{method} {path}: {answer}"
        );
        answer["value"].take()
    }

    fn ask(&self, path: &str, body: &Value) -> Value {
        self.call("POST", &format!("/session/{}{path}", self.session), body)
    }

    /// Goes to an address.
    pub fn open(&self, url: &str) {
        self.ask("/url", &json!({ "url": url }));
    }

    /// What a function's body returns in the page.
    pub fn run(&self, script: &str) -> Value {
        self.ask("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Clicks as a person does: it has to be visible.
    pub fn click(&self, selector: &str) {
        let found = self.ask(
            "/element",
            &json!({"using": "css selector", "value": selector}),
        );
        let id = found
            .as_object()
            .and_then(|ids| ids.values().next()?.as_str());
        let id = id.unwrap_or_else(|| panic!("{selector}: {found}"));
        self.ask(&format!("/element/{id}/click"), &json!({}));
    }

    /// Waits until a function's body returns true.
    pub fn until(&self, within: Duration, script: &str) {
        let began = Instant::now();
        while self.run(script) != true {
            let page = || self.run("return document.body.innerText");
            assert!(began.elapsed() < within, "never: {script}\n{}", page());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What `(prefers-color-scheme)` says from now on.
    pub fn prefer(&self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.developer(
            "Emulation.setEmulatedMedia",
            &json!({ "features": features }),
        );
    }

    fn developer(&self, command: &str, parameters: &Value) {
        self.ask(
            "/goog/cdp/execute",
            &json!({"cmd": command, "params": parameters}),
        );
    }

    /// A picture of the whole page, as PNG.
    pub fn picture(&self, path: &Path, width: u32) {
        let height = self.run("return document.documentElement.scrollHeight");
        let size =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.developer("Emulation.setDeviceMetricsOverride", &size);
        let text = self.call(
            "GET",
            &format!("/session/{}/screenshot", self.session),
            &Value::Null,
        );
        let bytes = from_base64(text.as_str().expect("a picture"));
        assert!(bytes.starts_with(b"\x89PNG"), "no PNG");
        std::fs::write(path, bytes).expect("written");
    }

    /// What the page wrote to its console, errors among it.
    pub fn console(&self) -> Vec<String> {
        let entries = self.ask("/se/log", &json!({"type": "browser"}));
        let text = |entry: &Value| entry["message"].as_str().map(str::to_owned);
        entries
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(text)
            .collect()
    }

    /// Ends the browser. Gives every URL that a page asked for, and every address that was connected
    /// or sent to.
    pub fn end(self) -> (Vec<String>, Vec<String>) {
        self.call("DELETE", &format!("/session/{}", self.session), &json!({}));
        let text = std::fs::read_to_string(self.net_log()).expect("the log of the network");
        let log: Value = serde_json::from_str(&text).expect("the log of the network, whole");
        let (mut urls, mut addresses) = (Vec::new(), Vec::new());
        let kind = |name: &str| &log["constants"]["logEventTypes"][name];
        assert!(kind("TCP_CONNECT_ATTEMPT").is_number() && kind("UDP_BYTES_SENT").is_number());
        for event in log["events"].as_array().expect("events") {
            let parameters = &event["params"];
            // What the browser asks for on its own account has no page behind it.
            let by_a_page = parameters["initiator"]
                .as_str()
                .is_some_and(|initiator| initiator != "not an origin");
            if let (true, Some(url)) = (by_a_page, parameters["url"].as_str()) {
                urls.push(url.to_owned());
            }
            // To see whether there is IPv6, Chromium names an address to a UDP socket and sends nothing.
            if &event["type"] == kind("UDP_BYTES_SENT") {
                addresses.push(format!("UDP: {parameters}"));
            }
            if &event["type"] == kind("TCP_CONNECT_ATTEMPT") {
                addresses.extend(parameters["address"].as_str().map(str::to_owned));
            }
        }
        (urls, addresses)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser is in the driver's group.
        // SAFETY: kill takes numbers only.
        unsafe { libc::kill(-(self.driver.id() as i32), libc::SIGKILL) };
        let _ = self.driver.wait();
    }
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

fn from_base64(text: &str) -> Vec<u8> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut held, mut bits) = (0u32, 0);
    for letter in text.bytes().filter(|letter| *letter != b'=') {
        let value = LETTERS
            .iter()
            .position(|own| *own == letter)
            .expect("base64");
        (held, bits) = (held << 6 | value as u32, bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits & 0xff) as u8);
        }
    }
    bytes
}
