//! `flea analyze` of a URL: headers by HTTP range and no weights, and every way in which a server does otherwise. The
//! servers are threads of the test, on loopback.

#![cfg(feature = "cli")]

#[path = "common/analyzing.rs"]
mod analyzing;
mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use analyzing::{analyze, answer};
use common::{output, synth};

const CONFIG: &str = r#"{"model_type":"llama","num_hidden_layers":4,"hidden_size":256,"vocab_size":1000,
    "num_attention_heads":4,"intermediate_size":512,"max_position_embeddings":8192}"#;

/// How a test server answers.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Ranges,
    IgnoresRanges,
    SendsFromZero,
    Breaks,
    Missing,
}

/// A server on loopback for one file; counts the bytes of bodies it sent. Ends with the test.
fn serve(body: Vec<u8>, manner: Manner) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let bytes = reply(&mut stream, &body, manner).unwrap_or(0);
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    });
    (address, sent)
}

fn reply(stream: &mut TcpStream, body: &[u8], manner: Manner) -> std::io::Result<u64> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
        request.push(byte[0]);
    }
    let request = String::from_utf8_lossy(&request).to_lowercase();
    let range = request
        .lines()
        .find_map(|line| line.strip_prefix("range: bytes="));
    let (first, last) = match range.and_then(|range| range.trim().split_once('-')) {
        Some((first, last)) => (
            first.parse().unwrap(),
            last.parse::<usize>().unwrap().min(body.len() - 1),
        ),
        None => (0, body.len() - 1),
    };
    let part = &body[first..=last];
    let (status, range, part) = match manner {
        Manner::Missing => ("404 Not Found", String::new(), &body[..0]),
        Manner::IgnoresRanges => ("200 OK", String::new(), body),
        _ if range.is_none() => ("200 OK", String::new(), body),
        Manner::SendsFromZero if first > 0 => (
            "206 Partial Content",
            format!(
                "Content-Range: bytes 0-{}/{}\r\n",
                part.len() - 1,
                body.len()
            ),
            part,
        ),
        _ => (
            "206 Partial Content",
            format!("Content-Range: bytes {first}-{last}/{}\r\n", body.len()),
            part,
        ),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{range}Connection: close\r\n\r\n",
        part.len()
    );
    stream.write_all(head.as_bytes())?;
    let part = if manner == Manner::Breaks {
        &part[..part.len() / 2]
    } else {
        part
    };
    stream.write_all(part)?;
    Ok(part.len() as u64)
}

#[test]
fn a_url_costs_the_header_and_no_weights() {
    // A header of more than one piece, weights of many.
    let model = synth(
        "analyze-remote",
        &["--size", "24MiB", "--layers", "12", "--vocab", "16000"],
    );
    let body = std::fs::read(&model).unwrap();
    let len = body.len() as u64;
    let (address, sent) = serve(body, Manner::Ranges);
    let ask = ["--memory", "70MiB", "--drive-gbps", "2", "--ctx", "512"];
    let (remote, code) = answer(
        &[
            &[format!("{address}/big.gguf?download=true").as_str()],
            &ask[..],
        ]
        .concat(),
    );
    let (local, local_code) = answer(&[&[model.to_str().unwrap()], &ask[..]].concat());
    assert_eq!(code, local_code);
    for key in ["geometry", "components", "total_bytes", "verdict"] {
        assert_eq!(remote[key], local[key], "{key}");
    }
    assert_eq!(
        remote["devices"][0]["need_bytes"],
        local["devices"][0]["need_bytes"]
    );
    let sent = sent.load(Ordering::Relaxed);
    assert!(
        sent > 0 && sent < len / 8,
        "{sent} of {len} bytes were fetched"
    );
    assert!(
        remote["devices"][0]["command"]
            .as_str()
            .unwrap()
            .contains("big.gguf --memory")
    );

    let (address, _) = serve(CONFIG.as_bytes().to_vec(), Manner::Ranges);
    let (value, _) = answer(&[&format!("{address}/m/config.json")]);
    assert_eq!(value["geometry"]["hidden"], 256);
}

#[test]
fn servers_that_do_otherwise_are_named() {
    let body = std::fs::read(synth(
        "analyze-remote",
        &["--size", "24MiB", "--layers", "12", "--vocab", "16000"],
    ))
    .unwrap();
    for (manner, code, part) in [
        (
            Manner::IgnoresRanges,
            1,
            "the server ignores range requests",
        ),
        (Manner::SendsFromZero, 1, "the server sent from 0"),
        (Manner::Breaks, 1, "/m.gguf"),
        (Manner::Missing, 1, "404"),
    ] {
        let (address, _) = serve(body.clone(), manner);
        let output = output(&mut analyze(&[&format!("{address}/m.gguf")]));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(part), "no '{part}' in {text}");
    }
    let (address, _) = serve(
        b"this is no model at all, only text".to_vec(),
        Manner::Ranges,
    );
    let output = output(&mut analyze(&[&format!("{address}/m.gguf")]));
    assert_eq!(output.status.code(), Some(5));
    // Nobody listens on a port that was given back.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let output = common::output(&mut analyze(&[&format!("http://{free}/m.gguf")]));
    assert_eq!(output.status.code(), Some(1));
}
