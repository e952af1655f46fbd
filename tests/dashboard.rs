//! `flea dashboard` as programs meet it: the figures of the commands, who may ask, reports, and what cannot be. Rates are
//! never asserted.

#![cfg(feature = "cli")]

mod common;
#[path = "common/daemon.rs"]
mod daemon;
#[path = "common/served.rs"]
mod served;

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{flea, json, output};
use daemon::Daemon;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use served::{NOBODY, Page, small, stdout, vectors};

fn flea_ctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea-ctl"));
    command.env_remove("FLEA_ENDPOINT");
    command
}

/// Without what is another figure each time: rates and times.
fn steady(value: &Value) -> Value {
    let moves = |key: &str| {
        [
            "_per_second",
            "seconds",
            "uptime",
            "pressure",
            "connections",
        ]
        .iter()
        .any(|part| key.contains(part))
    };
    match value {
        Value::Object(fields) => fields
            .iter()
            .filter(|(key, _)| !moves(key))
            .map(|(key, value)| (key.clone(), steady(value)))
            .collect(),
        Value::Array(list) => list.iter().map(steady).collect(),
        other => other.clone(),
    }
}

#[test]
fn analyses_are_those_of_flea_analyze_byte_for_byte() {
    let model = small();
    let model = model.to_str().expect("a name");
    let page = Page::start(&[model, "--socket", NOBODY]);
    for (query, arguments) in [
        (
            "model=gemma4-e2b&context=32768&weight-bits=4&kv-type=q8_0&device=all",
            vec![
                "gemma4-e2b",
                "--context",
                "32768",
                "--weight-bits",
                "4",
                "--kv-type",
                "q8_0",
            ],
        ),
        (
            "model=gemma4-e2b&context=&weight-bits=&kv-type=tq%3A4&device=laptop-8192&strip=encoders",
            vec![
                "gemma4-e2b",
                "--kv-type",
                "tq:4",
                "--device",
                "laptop-8192",
                "--strip",
                "encoders",
            ],
        ),
        (
            &format!("model={model}&device=emmc-1024&context=512"),
            vec![model, "--device", "emmc-1024", "--context", "512"],
        ),
    ] {
        let answer = page.get(&format!("api/analyze?{query}"));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.head.contains("application/json"), "{}", answer.head);
        let printed = stdout(flea().arg("analyze").args(&arguments).arg("--json"));
        assert_eq!(answer.body, printed, "{query}");
        assert!(
            answer.json()["total_bytes"]
                .as_u64()
                .is_some_and(|bytes| bytes > 0)
        );
    }
    let told = page.get("api/page").json();
    let listed = json(flea().args(["analyze", "--list", "--json"]));
    assert_eq!(told["known"], listed);
    let names: Vec<&str> = told["models"]
        .as_array()
        .expect("models")
        .iter()
        .filter_map(|m| m["name"].as_str())
        .collect();
    assert_eq!((names.len(), names[0]), (10, model));
    // Errors too: the sentence, and the kind.
    for (query, arguments) in [
        (
            "model=gemma4-e2b&context=999999999",
            vec!["gemma4-e2b", "--context", "999999999"],
        ),
        (
            "model=gemma4-e2b&context=0",
            vec!["gemma4-e2b", "--context=0"],
        ),
        (
            "model=gemma4-e2b&weight-bits=99",
            vec!["gemma4-e2b", "--weight-bits=99"],
        ),
    ] {
        let answer = page.get(&format!("api/analyze?{query}"));
        let printed = stdout(flea().arg("analyze").args(&arguments).arg("--json"));
        assert_eq!((answer.status, &answer.body), (400, &printed), "{query}");
    }
    // Files that were not named on the command line are not read, devices of files neither.
    for query in [
        "model=/etc/passwd",
        "model=",
        "model=gemma4-e2b&device=/etc/x.toml",
        "model=gemma4-e2b&json=1",
    ] {
        let answer = page.get(&format!("api/analyze?{query}"));
        assert_eq!(answer.status, 400, "{query}: {answer:?}");
        assert!(
            answer.json()["error"]["message"]
                .as_str()
                .expect("a message")
                .contains("there are "),
            "{answer:?}"
        );
    }
}

#[test]
fn a_running_flead_is_shown_and_a_missing_one_named() {
    let page = Page::start(&["--socket", NOBODY]);
    let answer = page.get("api/status");
    let printed = stdout(flea_ctl().args(["status", "--json", "--socket", NOBODY]));
    assert_eq!((answer.status, &answer.body), (503, &printed));
    assert!(answer.body.contains(NOBODY), "{answer:?}");
    assert_eq!(page.get("api/page").json()["socket"], NOBODY);
    let daemon = Daemon::start(&[]);
    let model = daemon.attach(&small());
    let socket = daemon.socket.to_str().expect("a name");
    let page = Page::start(&["--socket", &format!("unix:{socket}")]);
    for verb in ["status", "stats"] {
        // Counters grow until the resident part is in: what is the same before and after is also the page's.
        let printed = || steady(&json(flea_ctl().args([verb, "--json", "--socket", socket])));
        let began = Instant::now();
        let answer = loop {
            let (before, answer, after) = (printed(), page.get(&format!("api/{verb}")), printed());
            assert_eq!(answer.status, 200, "{answer:?}");
            if before == after {
                assert_eq!(steady(&answer.json()), after, "{verb}");
                break answer;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{after}");
        };
        assert_eq!(answer.json()["models"][0]["clients"], 1);
    }
    drop(model);
}

#[test]
fn measurements_are_those_of_the_commands() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let keys = vectors(folder.path());
    let (keys, table) = (
        keys.to_str().expect("a name"),
        folder.path().to_str().expect("a name"),
    );
    let page = Page::start(&[
        "--socket",
        NOBODY,
        "--vectors",
        keys,
        "--dim",
        "64",
        "--table",
        table,
    ]);
    for what in ["kv-bench", "kv-compare", "rows"] {
        assert_eq!(page.get(&format!("api/{what}")).status, 404);
    }
    let failed = page.measure("kv-compare?codecs=q8_0+tq%3A4,dh013:3");
    assert_eq!(failed, Value::Null);
    let printed = json(flea().args([
        "kv", "compare", keys, "--dim", "64", "--json", "q8_0", "tq:4", "dh013:3",
    ]));
    let shown = page.get("api/kv-compare").json();
    assert_eq!(steady(&shown), steady(&printed));
    assert_eq!(shown["cells"].as_array().map(Vec::len), Some(3));

    let settings = [
        "--dim=64",
        "--tokens=64",
        "--distribution=spectral",
        "--seed=7",
    ];
    let query = settings.map(|setting| &setting[2..]).join("&");
    assert_eq!(page.measure(&format!("kv-bench?{query}")), Value::Null);
    let printed = json(flea().args(["kv", "bench", "--json"]).args(settings));
    let shown = page.get("api/kv-bench").json();
    assert_eq!(steady(&shown), steady(&printed));
    assert!(
        shown["distributions"][0]["cells"][0]["decode_gb_per_second"]
            .as_f64()
            .is_some_and(|rate| rate > 0.0)
    );

    let failed = page.measure("rows?synth=16MiB&seconds=20ms&budget=16MiB");
    assert_eq!(failed, Value::Null);
    let printed = json(flea().args([
        "probe",
        "rows",
        table,
        "--synth=16MiB",
        "--seconds=20ms",
        "--budget=16MiB",
        "--target=0.001",
        "--json",
    ]));
    let shown = page.get("api/rows").json();
    let keys = |value: &Value| -> Vec<String> {
        value
            .as_object()
            .expect("an object")
            .keys()
            .cloned()
            .collect()
    };
    assert_eq!(keys(&shown), keys(&printed));
    assert_eq!(shown["cases"].as_array().map(Vec::len), Some(15));
    assert_eq!(shown["path"], table);
    let state = page.get("api/measure").json();
    assert_eq!(keys(&state["results"]), ["kv-bench", "kv-compare", "rows"]);
}

#[test]
fn one_measurement_at_a_time_and_it_can_be_stopped() {
    let page = Page::start(&["--socket", NOBODY]);
    for (path, said) in [
        ("kv-bench?dim=0", "at least 1"),
        ("kv-bench?svg=/tmp/x", "no setting is called 'svg'"),
        ("kv-compare?codecs=q8_0", "no vectors"),
        ("rows?synth=-1", "invalid value"),
        ("nothing", "no part of this page"),
    ] {
        let answer = page.ask("POST", &format!("api/measure/{path}"));
        assert!(
            matches!(answer.status, 400 | 404) && answer.body.contains(said),
            "{path}: {answer:?}"
        );
    }
    assert_eq!(
        page.ask("POST", "api/measure/kv-bench?tokens=512").status,
        200
    );
    let second = page.ask("POST", "api/measure/kv-bench?tokens=64");
    assert_eq!(second.status, 409, "{second:?}");
    assert_eq!(second.json()["error"]["status"], "BUSY");
    let began = Instant::now();
    page.ask("POST", "api/measure/stop");
    let state = loop {
        let state = page.get("api/measure").json();
        if state["running"].is_null() {
            break state;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{state}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(
        state["failed"],
        json!({"what": "kv-bench", "message": "stopped on request"})
    );
    assert_eq!(state["results"], json!({}));
}

#[test]
fn who_does_not_know_the_secret_or_comes_by_another_name_gets_nothing() {
    let page = Page::start(&["--socket", NOBODY]);
    let (own, port) = (format!("Host: {}", page.address), page.address.port());
    let status = |method: &str, path: &str, headers: &[&str]| {
        let answer = page.send(method, path, headers);
        for line in [
            "Content-Security-Policy: default-src 'none'",
            "frame-ancestors 'none'",
            "X-Content-Type-Options: nosniff",
            "Cache-Control: no-store",
        ] {
            assert!(
                answer.head.contains(line),
                "{line} is missing in {}",
                answer.head
            );
        }
        if answer.status == 403 {
            assert!(
                !answer.body.contains("gemma") && !answer.body.contains("html"),
                "{answer:?}"
            );
        }
        answer.status
    };
    let api = format!("{}api/page", page.base);
    // Names of this machine, and names that a foreign page could have made to lead here.
    assert_eq!(status("GET", &api, &[&own]), 200);
    assert_eq!(
        status("GET", &api, &[&format!("Host: localhost:{port}")]),
        200
    );
    for host in [
        "evil.example".to_owned(),
        format!("evil.example:{port}"),
        "127.0.0.1".to_owned(),
        "localhost:1".to_owned(),
        String::new(),
    ] {
        assert_eq!(
            status("GET", &api, &[&format!("Host: {host}")]),
            403,
            "{host}"
        );
    }
    assert_eq!(status("GET", &api, &[]), 403);
    assert_eq!(status("GET", &api, &[&own, &own]), 403);
    // The secret: none, half of it, another, one behind which more stands.
    let secret = page.base.trim_matches('/');
    let other = secret.replace(|letter: char| letter.is_ascii_hexdigit(), "0");
    for path in [
        "/".to_owned(),
        "/api/page".to_owned(),
        format!("/{}/api/page", &secret[..16]),
        format!("/{other}/api/page"),
        format!("/{secret}0/api/page"),
    ] {
        assert_eq!(status("GET", &path, &[&own]), 403, "{path}");
    }
    assert_eq!(status("GET", &format!("/{secret}"), &[&own]), 308);
    assert_eq!(
        status("GET", &format!("{}../etc/passwd", page.base), &[&own]),
        404
    );
    // What begins something: no GET, no other page, no other secret.
    let begin = format!("{}api/measure/kv-bench", page.base);
    assert_eq!(status("GET", &begin, &[&own]), 404);
    assert_eq!(
        status("POST", &begin, &[&own, "Origin: https://evil.example"]),
        403
    );
    assert_eq!(status("POST", &begin, &[&own, "Origin: null"]), 403);
    assert_eq!(status("POST", "/api/measure/kv-bench", &[&own]), 403);
    assert_eq!(status("PUT", &begin, &[&own]), 405);
    assert_eq!(
        page.get("api/measure").json(),
        json!({"running": null, "failed": null, "results": {}})
    );
    let origin = format!("Origin: http://{}", page.address);
    assert_eq!(
        status(
            "POST",
            &format!("{}api/measure/stop", page.base),
            &[&own, &origin]
        ),
        200
    );
}

/// Nothing in it leads a browser anywhere: no address in an attribute or a style.
fn assert_leads_nowhere(html: &str) {
    for word in [
        "src=",
        "@import",
        "url(",
        "https://",
        "//cdn",
        "<link rel=\"style",
        "<iframe",
        "<base",
        "WebSocket",
        "importScripts",
        "sendBeacon",
    ] {
        assert!(!html.contains(word), "{word} is in the report");
    }
    // The namespace of SVG is a name and no address; the data tell of no other.
    let addresses: Vec<_> = html
        .match_indices("http://")
        .map(|(at, _)| &html[at..(at + 40).min(html.len())])
        .collect();
    assert!(
        addresses
            .iter()
            .all(|text| text.starts_with("http://www.w3.org/2000/svg")),
        "{addresses:?}"
    );
    assert!(html.contains(
        "http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'nonce-"
    ));
}

fn data_of(html: &str) -> Value {
    let (_, rest) = html.split_once("id=\"data\">").expect("data");
    let (text, _) = rest.split_once("</script>").expect("an end");
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn a_report_holds_the_figures_and_leads_nowhere() {
    let folder = tempfile::tempdir().expect("a directory");
    let inside = |name: &str| {
        folder
            .path()
            .join(name)
            .to_str()
            .expect("a name")
            .to_owned()
    };
    let bench = json(flea().args([
        "kv",
        "bench",
        "--dim=64",
        "--tokens=64",
        "--codec=tq:4",
        "--codec=dh013:4",
        "--json",
    ]));
    std::fs::write(inside("bench.json"), bench.to_string()).expect("written");
    // What is in a file must stay text, whatever it is.
    let compared = json!({"file": "</script><script>alert(1)</script>", "dim": 64, "vectors": 1, "cells": [], "iso_bit": []});
    std::fs::write(inside("compare.json"), compared.to_string()).expect("written");
    let (report, bench_file, compare_file) = (
        inside("report.html"),
        inside("bench.json"),
        inside("compare.json"),
    );
    let told = json(
        flea()
            .args([
                "dashboard",
                "--socket",
                NOBODY,
                "--context",
                "8192",
                "--kv-type",
                "q8_0",
                "--export",
                &report,
                "--json",
            ])
            .args(["--kv-bench", &bench_file, "--kv-compare", &compare_file]),
    );
    let html = std::fs::read_to_string(&report).expect("a report");
    assert_eq!(told, json!({"export": report, "bytes": html.len()}));
    assert_leads_nowhere(&html);
    assert!(!html.contains("<script>alert"));
    let data = data_of(&html);
    assert_eq!(data["measured"]["kv-bench"]["value"], bench);
    assert_eq!(data["measured"]["kv-compare"]["value"], compared);
    assert_eq!(data["measured"]["rows"], Value::Null);
    assert_eq!(data["status"]["error"]["status"], "CONN");
    let analyses = data["analyses"].as_object().expect("analyses");
    assert_eq!(analyses.len(), 9);
    for (model, shown) in analyses {
        let printed = stdout(flea().args([
            "analyze",
            model,
            "--context=8192",
            "--kv-type=q8_0",
            "--json",
        ]));
        assert_eq!(format!("{shown}\n"), printed, "{model}");
    }
    // The same from the page.
    let page = Page::start(&["--socket", NOBODY, "--kv-bench", &bench_file]);
    let saved = page.get("report.html?model=gemma4-e2b&device=laptop-8192&kv-type=q4_0");
    assert!(saved.head.contains("attachment"), "{}", saved.head);
    assert_leads_nowhere(&saved.body);
    let data = data_of(&saved.body);
    assert_eq!(data["analyses"]["gemma4-e2b"]["kv_type"], "q4_0");
    assert_eq!(data["measured"]["kv-bench"]["value"], bench);
    assert_eq!(
        page.get("report.html?model=gemma4-e2b&context=x").status,
        400
    );
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().expect("a directory");
    let wrong = folder.path().join("wrong.json");
    std::fs::write(&wrong, "{\"cells\": []}").expect("written");
    let torn = folder.path().join("torn.json");
    std::fs::write(&torn, "{\"cells\": [").expect("written");
    let (wrong, torn) = (
        wrong.to_str().expect("a name"),
        torn.to_str().expect("a name"),
    );
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    for (arguments, code, said) in [
        (
            vec!["--listen", "0.0.0.0:8417"],
            2,
            "can be reached by other machines",
        ),
        (vec!["--listen", "192.168.1.2:80"], 2, "write 127.0.0.1:80"),
        (
            vec!["--listen", "[::]:1"],
            2,
            "can be reached by other machines",
        ),
        (vec!["--listen", "65536"], 2, "no address and no port"),
        (vec!["--listen", "localhost"], 2, "no address and no port"),
        (vec!["--listen", &taken], 1, "name another port"),
        (vec!["gemma4-e3b"], 2, "did you mean gemma4-e2b"),
        (vec!["/nowhere/m.gguf"], 1, "/nowhere/m.gguf"),
        (
            vec!["qwen2.5-0.5b", "--context", "999999999"],
            2,
            "out of range",
        ),
        (vec!["--context", "none"], 2, "not a number of tokens"),
        (vec!["--kv-type", "q9"], 2, "q9"),
        (
            vec!["--device", "latop-8192"],
            2,
            "did you mean laptop-8192",
        ),
        (vec!["--kv-bench", wrong], 2, "no list of distributions"),
        (vec!["--kv-compare", torn], 2, "no JSON"),
        (
            vec!["--rows", "/nowhere/rows.json"],
            1,
            "/nowhere/rows.json",
        ),
        (vec!["--vectors", wrong], 2, "--dim"),
        (
            vec!["--vectors", "/nowhere/keys", "--dim", "64"],
            1,
            "/nowhere/keys",
        ),
        (vec!["--table", "/nowhere/table"], 1, "/nowhere/table"),
        (
            vec!["--export", "/nowhere/report.html"],
            1,
            "/nowhere/report.html",
        ),
    ] {
        let ended = output(
            flea()
                .arg("dashboard")
                .args(&arguments)
                .args(["--socket", NOBODY]),
        );
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(said), "{arguments:?}: {stderr}");
    }
}

#[test]
fn it_ends_by_ctrl_c_and_that_is_no_failure() {
    let mut page = Page::start(&["--socket", NOBODY]);
    assert_eq!(page.ask("POST", "api/measure/kv-bench").status, 200);
    let pid = Pid::from_raw(page.child.id() as i32);
    kill(pid, Signal::SIGINT).expect("a signal");
    let began = Instant::now();
    let status = loop {
        if let Some(status) = page.child.try_wait().expect("wait") {
            break status;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "it goes on");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(0));
}
