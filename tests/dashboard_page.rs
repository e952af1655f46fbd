//! `flea dashboard` as people meet it: the page in a real browser, and a report without any server. Rates are never
//! asserted; the pictures stay in CARGO_TARGET_TMPDIR for people to look at.

#![cfg(feature = "cli")]

#[path = "common/browser.rs"]
mod browser;
mod common;
#[path = "common/daemon.rs"]
mod daemon;
#[path = "common/served.rs"]
mod served;

use std::path::{Path, PathBuf};
use std::time::Duration;

use browser::Browser;
use common::{flea, json, output, skip};
use daemon::Daemon;
use serde_json::{Value, json};
use served::{NOBODY, Page, small, stdout, vectors};

/// Where the pictures go, for people to look at.
fn picture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn a_browser_shows_real_figures_and_asks_nobody_else() {
    let Some(browser) = Browser::start(1280) else {
        skip("no chromium and chromedriver");
        return;
    };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let (keys, table) = (
        vectors(folder.path()),
        folder.path().to_str().expect("a name"),
    );
    let daemon = Daemon::start(&[]);
    let (path, socket) = (small(), daemon.socket.to_str().expect("a name").to_owned());
    let held = daemon.attach(&path);
    let page = Page::start(&[
        path.to_str().expect("a name"),
        "--socket",
        &socket,
        "--table",
        table,
        "--vectors",
        keys.to_str().expect("a name"),
        "--dim",
        "64",
    ]);
    let moment = Duration::from_secs(60);
    browser.open(&page.url());
    browser.until(
        moment,
        "return document.documentElement.dataset.ready === 'true'",
    );
    // Another model, by the keyboard's way: its figures stand in the tables and in the bars.
    let choose = "const form = document.getElementById('controls'); form.elements.model.value = 'gemma4-e2b'; form.elements['kv-type'].value = 'q8_0'; \
        form.elements.context.value = '32768'; form.dispatchEvent(new Event('change'));";
    browser.run(choose);
    browser.until(
        moment,
        "return document.getElementById('memory-lead').textContent.startsWith('gemma4-e2b')",
    );
    browser.until(moment, "return !document.body.classList.contains('asking')");
    let analysis = json(flea().env("FLEA_PROFILE", "none").args([
        "analyze",
        "gemma4-e2b",
        "--context=32768",
        "--kv-type=q8_0",
        "--device=laptop-8192",
        "--json",
    ]));
    let gib = |bytes: &Value| {
        format!(
            "{:.2} GiB",
            bytes.as_f64().expect("bytes") / 1_073_741_824.0
        )
    };
    let text = |id: &str| {
        browser
            .run(&format!("return document.getElementById('{id}').innerText"))
            .as_str()
            .expect("text")
            .to_owned()
    };
    let memory = text("memory-body");
    assert!(memory.contains(&gib(&analysis["total_bytes"])), "{memory}");
    let components = analysis["components"].as_array().expect("components").len();
    assert_eq!(
        browser.run("return document.querySelectorAll('#memory-body rect.part').length"),
        json!(components)
    );
    let devices = text("devices-body");
    for part in [
        "laptop-8192",
        "infeasible",
        "flea run gemma4-e2b.gguf --memory 8192MiB --ctx 32768 --kv-type q8_0",
    ] {
        assert!(devices.contains(part), "{part}: {devices}");
    }
    assert_eq!(
        browser.run("return document.querySelectorAll('#models-body tbody tr').length"),
        json!(10)
    );
    // flead, as it is.
    browser.until(
        moment,
        "return document.getElementById('live-body').innerText.includes('ready')",
    );
    let live = text("live-body");
    assert!(
        live.contains(path.file_name().and_then(|n| n.to_str()).expect("a name"))
            && live.contains("Resident"),
        "{live}"
    );
    // Measurements begin with a click.
    assert_eq!(
        browser.run("return document.querySelectorAll('.series').length"),
        json!(0)
    );
    browser.run("document.querySelector('#kv-form [name=dim]').value = '64'; document.querySelector('#kv-form [name=tokens]').value = '128'; document.querySelector('#kv-form [name=distribution]').value = 'gaussian'; document.querySelector('#rows-form [name=synth]').value = '64MiB'; \
        document.querySelector('#rows-form [name=seconds]').value = '200ms'; document.querySelector('#rows-form [name=budget]').value = '16MiB';");
    for (button, body) in [
        ("#kv-form button", "kv-body"),
        ("#compare-form button", "compare-body"),
        ("#rows-form button", "rows-body"),
    ] {
        browser.click(button);
        let done = format!(
            "return document.querySelectorAll('#{body} svg.plot .series').length > 4 && document.getElementById('progress').hidden"
        );
        browser.until(Duration::from_secs(300), &done);
    }
    assert!(
        text("kv-body").contains("dh013:4")
            && text("rows-body").contains("as many tokens/s as cold mmap")
    );
    browser.picture(&picture("dashboard.png"), 1280);
    browser.prefer("dark");
    browser.picture(&picture("dashboard-dark.png"), 1280);
    // A mistake is said, and leaves no figures of another question.
    browser.run("const form = document.getElementById('controls'); form.elements.context.value = '999999999'; form.dispatchEvent(new Event('change'));");
    browser.until(
        moment,
        "return !document.getElementById('analysis-error').hidden",
    );
    assert!(text("analysis-error").contains("out of range"));
    assert_eq!(text("memory-body"), "");
    // flead goes away: the page says so, and where it looked.
    drop((held, daemon));
    browser.until(moment, &format!("return document.getElementById('live-from').textContent === 'No flead answers at {socket}.'"));
    // Every label belongs to something, and every picture says what it shows.
    assert_eq!(browser.run("return [...document.querySelectorAll('input, select')].filter((field) => !field.labels.length).length"), json!(0));
    assert_eq!(browser.run("return [...document.querySelectorAll('svg')].filter((one) => !one.ariaLabel && one.ariaHidden !== 'true').length"), json!(0));
    let console = browser.console();
    let refusals = ["400 (Bad Request)", "503 (Service Unavailable)"];
    let worse: Vec<_> = console
        .iter()
        .filter(|line| !refusals.iter().any(|known| line.contains(known)))
        .collect();
    assert!(worse.is_empty(), "{worse:?}");
    let (urls, addresses) = browser.end();
    assert!(
        urls.iter().any(|url| url.ends_with("style.css")),
        "{urls:?}"
    );
    let strays: Vec<_> = urls
        .iter()
        .filter(|url| !url.starts_with(&page.url()) && !url.starts_with("data:"))
        .collect();
    assert!(strays.is_empty(), "{strays:?}");
    assert!(
        addresses.contains(&page.address.to_string()),
        "{addresses:?}"
    );
    let strays: Vec<_> = addresses
        .iter()
        .filter(|address| !address.starts_with("127.0.0.1:"))
        .collect();
    assert!(strays.is_empty(), "{strays:?}");
}

#[test]
fn a_report_opens_from_a_file_without_any_server() {
    let Some(browser) = Browser::start(1100) else {
        skip("no chromium and chromedriver");
        return;
    };
    let folder = tempfile::tempdir().expect("a directory");
    let report = folder.path().join("report.html");
    let bench = folder.path().join("bench.json");
    let measured = stdout(flea().args([
        "kv",
        "bench",
        "--dim=64",
        "--tokens=64",
        "--codec=tq:3",
        "--codec=tq:4",
        "--codec=dh013:3",
        "--json",
    ]));
    std::fs::write(&bench, measured).expect("written");
    let made = output(
        flea()
            .args(["dashboard", "--socket", NOBODY, "--export"])
            .arg(&report)
            .arg("--kv-bench")
            .arg(&bench),
    );
    assert!(made.status.success(), "{made:?}");
    browser.open(&format!("file://{}", report.display()));
    browser.until(
        Duration::from_secs(60),
        "return document.documentElement.dataset.ready === 'true'",
    );
    assert_eq!(
        browser.run("return document.querySelectorAll('#models-body tbody tr').length"),
        json!(9)
    );
    // The model can be chosen, what would have to be asked cannot.
    browser.run("const form = document.getElementById('controls'); form.elements.model.value = 'llama-3.2-3b'; form.dispatchEvent(new Event('change'));");
    browser.until(
        Duration::from_secs(60),
        "return document.getElementById('memory-lead').textContent.startsWith('llama-3.2-3b')",
    );
    assert_eq!(browser.run("return [...document.getElementById('controls').elements].filter((field) => !field.disabled).map((field) => field.name)"), json!(["model"]));
    assert_eq!(
        browser.run("return document.querySelectorAll('button:not(#stop)').length"),
        json!(0)
    );
    assert_eq!(browser.run("return document.querySelectorAll('#kv-body svg.plot circle, #kv-body svg.plot path.line').length > 2"), json!(true));
    browser.click("#kv-body input[value=spectral]");
    let spectral = "return document.getElementById('kv-body').innerText.includes('spectral, 256 vectors of 64')";
    browser.until(Duration::from_secs(60), spectral);
    let live = browser.run("return document.getElementById('live').innerText");
    assert!(
        live.as_str().is_some_and(|text| text.contains(NOBODY)),
        "{live}"
    );
    browser.picture(&picture("dashboard-report.png"), 1100);
    assert_eq!(browser.console(), [""; 0]);
    let (urls, addresses) = browser.end();
    assert!(urls.iter().all(|url| url.starts_with("data:")), "{urls:?}");
    assert!(
        addresses
            .iter()
            .all(|address| address.starts_with("127.0.0.1:")),
        "{addresses:?}"
    );
}
