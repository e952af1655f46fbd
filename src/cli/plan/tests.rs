//! What `flea plan` answers, for a catalog made by hand.

use clap::Parser;

use super::*;
use crate::error::ErrorKind;
use crate::plan::testing::even_catalog;
use crate::units::{GIB, MIB, PAGE_2M, PAGE_4K};

#[derive(Debug, Parser)]
struct Program {
    #[command(flatten)]
    args: Args,
}

fn parse(line: &str) -> std::result::Result<Args, clap::Error> {
    let words = ["plan", "m.gguf"]
        .into_iter()
        .chain(line.split_whitespace());
    Program::try_parse_from(words).map(|program| program.args)
}

/// Twenty layers of 64 MiB, attention before feed-forward.
fn catalog() -> Catalog {
    even_catalog(20, &[(1, 16 * MIB), (5, 48 * MIB)])
}

fn report(line: &str) -> Result<Report> {
    let catalog = catalog();
    Report::new(
        &parse(line).unwrap(),
        (&catalog, None),
        16 * GIB,
        &Found::Nothing,
    )
}

#[test]
fn the_arithmetic_adds_up() {
    let report = report("--memory 1GiB --host-bytes 256MiB").unwrap();
    assert_eq!(report.page_bytes, PAGE_2M);
    assert_eq!(
        report.total_bytes,
        report.host_bytes + report.weight_budget_bytes
    );
    assert_eq!(
        report.ring_bytes,
        u64::from(report.slots_count) * report.slot_bytes
    );
    assert!(report.resident_bytes + report.ring_bytes <= report.weight_budget_bytes);
    // 20 x 32 pages, 384 pages of budget: 20 x (32 - 16) + 3 x 16 = 368 fit, 20 x 17 + 3 x 15 = 385 do not.
    assert_eq!(report.slot_bytes, 16 * PAGE_2M);
    // The 16 pages left over are given back.
    assert_eq!(report.streamed_bytes_per_pass, (20 * 16 - 16) * PAGE_2M);
    assert_eq!(report.smallest_total_bytes, 256 * MIB + 3 * 64 * MIB);
    assert_eq!(report.transient_layers_count, 20);
}

#[test]
fn json_has_the_agreed_fields() {
    let line = "--memory 50% --host-bytes 64MiB --drive-gbps 2 --compute-seconds 0.1 --layers";
    let value = serde_json::to_value(report(line).unwrap()).unwrap();
    for field in [
        "model_bytes",
        "total_bytes",
        "host_bytes",
        "weight_budget_bytes",
        "resident_bytes",
        "ring_bytes",
        "streamed_bytes_per_pass",
        "smallest_total_bytes",
        "page_bytes",
        "slots_count",
    ] {
        assert!(value[field].is_u64(), "{field}");
    }
    assert_eq!(value["weight_budget_bytes"], 640 * MIB);
    assert_eq!(value["layers"].as_array().unwrap().len(), 20);
    let prediction = &value["prediction"];
    let read_seconds = value["streamed_bytes_per_pass"].as_f64().unwrap() / 2e9;
    assert!((prediction["read_seconds"].as_f64().unwrap() - read_seconds).abs() < 1e-9);
    assert!(prediction["tokens_per_second"].as_f64().unwrap() <= 1.0 / read_seconds + 1e-9);
    let bare = serde_json::to_value(report("--memory 50% --host-bytes 64MiB").unwrap()).unwrap();
    assert!(bare["prediction"].is_null() && bare.get("layers").is_none());
}

#[test]
fn the_text_names_every_term() {
    let text = report("--memory 1GiB --host-bytes 256MiB --drive-gbps 2 --layers")
        .unwrap()
        .text();
    for part in [
        "total memory       1.00 GiB",
        "- host             256.0 MiB (as given)",
        "= weight budget    768.0 MiB",
        "3 slots x 16 pages of 2.0 MiB",
        "608.0 MiB in 20 of 20 layers",
        "tokens/s",
        "blk.19",
    ] {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    let resident = report("--memory 200% --host-bytes 1M").unwrap().text();
    assert!(resident.contains("none: everything is resident"));
}

#[test]
fn too_little_is_refused_with_exit_code_4_and_the_named_total_works() {
    let error = report("--memory 300MiB --host-bytes 256MiB").unwrap_err();
    assert_eq!(
        (error.kind(), error.kind().exit_code()),
        (ErrorKind::Refused, 4)
    );
    let named = format!("{} bytes", 448 * MIB);
    assert!(error.context().contains(&named), "{error}");
    assert!(report(&format!("--memory {} --host-bytes 256MiB", 448 * MIB)).is_ok());
    assert!(report("--memory 17GiB").is_err(), "more than is available");
}

#[test]
fn three_tiers_add_up_and_name_what_holds_the_pass_up() {
    // Of 64 MiB a layer, 32 stay in VRAM; of the other 32, 24 stay in memory: (20 + 3) x 32, 20 x 24 + 3 x 8.
    let line = "--vram 736MiB --memory 760MiB --host-bytes 256MiB --link-gbps 10 --drive-gbps 2.5 --layers";
    let report = report(line).unwrap();
    let value = serde_json::to_value(&report).unwrap();
    let vram = &value["vram"];
    assert_eq!(vram["resident_bytes"], 20 * 32 * MIB);
    assert_eq!(vram["ring_bytes"], 3 * 32 * MIB);
    assert_eq!(vram["link_bytes_per_pass"], 20 * 32 * MIB);
    assert_eq!(vram["drive_bytes_per_pass"], 20 * 8 * MIB);
    assert_eq!(value["streamed_bytes_per_pass"], 20 * 8 * MIB);
    assert_eq!(vram["balanced_total_bytes"], 760 * MIB);
    assert_eq!(vram["bound"], "link");
    let link = vram["link_seconds"].as_f64().unwrap();
    assert!((link - vram["drive_seconds"].as_f64().unwrap()).abs() < 1e-12);
    assert!((link - (20 * 32 * MIB) as f64 / 1e10).abs() < 1e-12);
    assert_eq!(vram["layers"].as_array().unwrap().len(), 20);
    assert_eq!(vram["layers"][3]["memory_bytes"], 24 * MIB);
    assert!(value["prediction"].is_null());
    let text = report.text();
    for part in [
        "VRAM",
        "640.0 MiB over the link",
        "link and drive balance at 760.0 MiB",
    ] {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    let bare = report_text("--vram 50% --memory 760MiB --host-bytes 256MiB");
    assert!(bare.contains("--link-gbps"), "{bare}");
    assert_eq!(refused("--vram 1MiB --memory 1GiB"), ErrorKind::Refused);
}

fn refused(line: &str) -> ErrorKind {
    report(line).unwrap_err().kind()
}

fn report_text(line: &str) -> String {
    report(line).unwrap().text()
}

#[test]
fn without_host_bytes_an_estimate_is_used() {
    let report = report("--memory 1GiB").unwrap();
    assert!(report.host_bytes_estimated);
    assert_eq!(report.host_bytes, estimate(&parse("").unwrap(), &catalog()));
    assert!(report.host_bytes >= crate::plan::budget::HOST_RESERVE_BYTES);
}

#[test]
fn arguments_are_bounded() {
    for line in [
        "--slots 1",
        "--slots 65",
        "--page-bytes 8192",
        "--drive-gbps 0",
        "--drive-gbps inf",
        "--drive-gbps 1 --compute-seconds -1",
        "--ctx 0",
        "--ubatch 0",
        "--memory 0%",
        "--memory much",
        "--kv-slots 4",
        "--kv-disk . --kv-slots 1",
        "--kv-type int3",
        "--vram auto",
        "--vram 0",
        "--link-gbps 25",
        "--vram 1GiB --link-gbps 0",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
    let args = parse("--memory 50% --page-bytes 4096 --slots 2").unwrap();
    assert_eq!((args.page_bytes, args.slots), (Some(PAGE_4K), 2));
    assert_eq!(args.memory, MemorySpec::Percent(50.0));
}
