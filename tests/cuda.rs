//! Weights in VRAM, on the fake GPU of tests/fake-cuda: every byte right whatever the tiers, every counter as planned, every
//! bad state a clear error, and a pool that another process sees.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{flea, json, number, output, padded_model as model, text};
use fake_cuda::{Driver, stream_on_gpu_0 as stream, with_gpu};
use flea::ErrorKind;
use flea::engine::gpu::{GpuModel, GpuOptions};
use flea::engine::{BudgetSpec, OpenOptions, read_catalog};
use flea::mem::cuda::pool::Place;
use flea::mem::cuda::{Context, Readback, Stream, VramPart, VramPool, VramView};
use flea::plan::VramPlan;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

#[test]
fn every_byte_arrives_whatever_the_tiers() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    for (vram, memory, what) in [
        ("48MiB", "40%", "all three tiers"),
        ("48MiB", "120%", "no drive"),
        ("33%", "35%", "little of either"),
        ("200MiB", "60%", "all in VRAM"),
    ] {
        let arguments = format!("--vram {vram} --memory {memory} --passes 3 --verify");
        let answer = json(&mut stream(&model, &arguments, &[]));
        let whole = catalog.layer_bytes();
        assert_eq!(answer["verified_bytes"], whole, "{what}: {answer}");
        let tiers = &answer["tiers"];
        let (in_vram, link) = (
            number(tiers, "vram_bytes"),
            number(&answer, "link_bytes_per_pass"),
        );
        assert_eq!(in_vram + link, whole as f64, "{what}");
        assert_eq!(
            number(tiers, "memory_bytes") + number(tiers, "drive_bytes"),
            link,
            "{what}"
        );
        assert_eq!(number(&answer, "h2d_resident_bytes"), in_vram, "{what}");
        // Three passes, and at most a ring read ahead.
        let streamed = number(&answer, "h2d_bytes") - in_vram;
        assert!(
            (3.0 * link..=4.0 * link).contains(&streamed),
            "{what}: {answer}"
        );
        assert_eq!(answer["passes"].as_array().map(Vec::len), Some(3));
        let held = number(&answer["vram"], "held_bytes");
        assert!(held <= number(&answer["vram"], "budget_bytes"), "{what}");
        assert!(number(&answer["vram"], "padding_bytes") > 0.0);
        let drive = number(tiers, "drive_bytes");
        let read = number(&answer["passes"][2], "bytes_read");
        match what {
            "all three tiers" | "little of either" => {
                assert!(
                    drive > 0.0 && link > drive && read >= drive * 0.5,
                    "{what}: {answer}"
                );
            }
            "no drive" => assert!(
                drive == 0.0 && read == 0.0 && link > 0.0,
                "{what}: {answer}"
            ),
            _ => assert!(link == 0.0 && answer["loads"] == 0, "{what}: {answer}"),
        }
        if link > 0.0 {
            assert!(
                number(&answer, "h2d_pinned_bytes") > 0.0 && number(&answer, "pinned_bytes") > 0.0
            );
            assert!(answer["not_pinned"].is_null());
        }
    }
}

/// The order of copies between streams is the fake GPU's choice: other choices, other delays, the same bytes.
#[test]
fn no_order_of_copies_gives_other_bytes() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    for (seed, delay, read) in [
        ("2", "0", "0"),
        ("3", "50", "50"),
        ("4", "1000", "0"),
        ("5", "0", "5000"),
    ] {
        let state = [
            ("FAKE_CUDA_SEED", seed),
            ("FAKE_CUDA_DELAY_US", delay),
            ("FAKE_CUDA_READ_US", read),
        ];
        let arguments = "--vram 40MiB --memory 40% --passes 1 --verify --reader pread";
        let answer = json(&mut stream(&model, arguments, &state));
        assert_eq!(answer["verified_bytes"], catalog.layer_bytes(), "{state:?}");
    }
}

#[test]
fn the_second_gpu_is_one_too() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    let mut command = flea();
    command.args(["bench", "stream"]).arg(&model);
    let arguments = "--gpu 1 --vram 40MiB --memory 40% --passes 1 --verify --json";
    command.args(arguments.split(' '));
    let answer = json(with_gpu(&mut command, &[("FAKE_CUDA_DEVICES", "2")]));
    assert_eq!(
        (&answer["gpu"], &answer["gpu_index"]),
        (&"Fake GPU 1".into(), &1.into())
    );
    assert_eq!(answer["verified_bytes"], catalog.layer_bytes());
}

/// A lease that is given before the copies are done shows poison, or another layer: the suite notices.
#[cfg(feature = "faults")]
#[test]
fn a_lease_given_too_early_is_noticed() {
    let model = model();
    let state = [("FAKE_CUDA_DELAY_US", "3000"), ("FAKE_CUDA_READ_US", "0")];
    let arguments = "--vram 40MiB --memory 120% --passes 1 --verify";
    let mut command = stream(&model, arguments, &state);
    let said = output(command.env("FLEA_FAULT", "nowait"));
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
    let text = text(&said);
    assert!(text.contains("differs from VRAM"), "{text}");
}

/// Without the events of those who read a slot, what they read changes under them: the suite notices.
#[cfg(feature = "faults")]
#[test]
fn a_slot_written_while_it_is_read_is_noticed() {
    let model = model();
    let state = [("FAKE_CUDA_DELAY_US", "0"), ("FAKE_CUDA_READ_US", "5000")];
    let mut command = stream(
        &model,
        "--vram 40MiB --memory 120% --passes 1 --verify",
        &state,
    );
    let output = output(command.env("FLEA_FAULT", "noevent"));
    assert_eq!(output.status.code(), Some(5), "{}", text(&output));
    assert!(
        text(&output).contains("differs from VRAM"),
        "{}",
        text(&output)
    );
}

#[test]
fn memory_that_cannot_be_pinned_is_told_and_works_all_the_same() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    let state = [("FAKE_CUDA_PIN", "refuse")];
    let answer = json(&mut stream(
        &model,
        "--vram 48MiB --memory 40% --passes 1 --verify",
        &state,
    ));
    assert_eq!(answer["verified_bytes"], catalog.layer_bytes());
    assert_eq!(answer["h2d_pinned_bytes"], 0);
    let reason = answer["not_pinned"].as_str().expect("a reason");
    assert!(reason.contains("ulimit -l"), "{reason}");
}

/// Arguments, the state of the GPU, the exit code, and what the message says.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], i32, &'a [&'a str]);

#[test]
fn bad_states_are_clear_errors() {
    let model = model();
    let taken = (230u64 << 20).to_string();
    let cases: [Case<'_>; 6] = [
        (
            "--vram 48MiB",
            &[("FAKE_CUDA_DEVICES", "0")],
            1,
            &["no GPU is visible", "host memory"],
        ),
        (
            "--vram 48MiB",
            &[("FAKE_CUDA_DRIVER", "10010")],
            1,
            &["too old", "CUDA 10.1", "470"],
        ),
        (
            "--vram 48MiB",
            &[("FAKE_CUDA_TAKEN", &taken)],
            4,
            &["26.0 MiB free", "nvidia-smi"],
        ),
        (
            "--vram 8MiB",
            &[],
            4,
            &["VRAM:", "smallest budget that works"],
        ),
        (
            "--vram 48MiB",
            &[("FAKE_CUDA_LOST_AFTER", "40")],
            1,
            &["GPU is lost", "DEVICE_UNAVAILABLE"],
        ),
        (
            "--vram 48MiB",
            &[("FAKE_CUDA_LOST_AFTER", "1")],
            1,
            &["GPU is lost"],
        ),
    ];
    for (arguments, state, code, parts) in cases {
        let arguments = format!("{arguments} --memory 60%");
        let said = output(&mut stream(&model, &arguments, state));
        let text = text(&said);
        assert_eq!(said.status.code(), Some(code), "{state:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{state:?}: no '{part}' in {text}");
        }
        assert!(!text.contains("panicked"), "{text}");
    }
    let mut command = flea();
    command.args(["bench", "stream"]).arg(&model);
    command.args(["--gpu", "3", "--vram", "48MiB"]);
    let said = text(&output(with_gpu(&mut command, &[])));
    assert!(said.contains("GPU 3 does not exist: 1 are there"), "{said}");
}

#[test]
fn without_a_driver_the_program_starts_and_says_so() {
    if Path::new("/proc/driver/nvidia/version").exists() {
        common::skip("this machine has an NVIDIA driver");
        return;
    }
    let mut command = flea();
    command.args(["bench", "stream"]).arg(model());
    command.args(["--gpu", "0", "--vram", "48MiB"]);
    let said = output(command.env_remove("LD_LIBRARY_PATH"));
    assert_eq!(said.status.code(), Some(1), "{}", text(&said));
    for part in ["no CUDA driver", "install NVIDIA's driver", "host memory"] {
        assert!(text(&said).contains(part), "{}", text(&said));
    }
    let doctor = json(
        flea()
            .args(["doctor", "--json"])
            .env_remove("LD_LIBRARY_PATH"),
    );
    assert_eq!(gpu_row(&doctor)["verdict"], "PASS");
    assert!(
        gpu_row(&doctor)["found"]
            .as_str()
            .is_some_and(|text| text.contains("no CUDA driver"))
    );
}

fn gpu_row(doctor: &serde_json::Value) -> &serde_json::Value {
    let findings = doctor["findings"].as_array().expect("findings");
    findings
        .iter()
        .find(|finding| finding["name"] == "GPU")
        .expect("a row for the GPU")
}

#[test]
fn doctor_and_probe_name_the_gpu() {
    let doctor = json(with_gpu(flea().args(["doctor", "--json"]), &[]));
    assert_eq!(gpu_row(&doctor)["verdict"], "PASS");
    let found = gpu_row(&doctor)["found"].as_str().expect("text");
    for part in ["Fake GPU 0", "256.0 MiB", "capability 8.9", "CUDA 13.0"] {
        assert!(found.contains(part), "{found}");
    }
    let old = json(with_gpu(
        flea().args(["doctor", "--json"]),
        &[("FAKE_CUDA_DRIVER", "11000")],
    ));
    assert_eq!(gpu_row(&old)["verdict"], "WARN");
    assert!(
        gpu_row(&old)["remedy"]
            .as_str()
            .is_some_and(|text| text.contains("470"))
    );

    // The rates of a probe are what `flea plan --vram` predicts from.
    let profiles = tempfile::tempdir().expect("a directory");
    let directory = model().parent().expect("a directory").to_path_buf();
    let mut command = flea();
    command.arg("probe").arg(&directory);
    command.args("--size 64MiB --seconds 20ms --sustain 50ms --max-spread 1000 --json".split(' '));
    command.env("FLEA_PROFILE", profiles.path());
    let probe = json(with_gpu(&mut command, &[("FAKE_CUDA_DELAY_US", "0")]));
    let link = &probe["profile"]["links"][0];
    assert_eq!(link["gpu"], "Fake GPU 0");
    assert!(number(link, "gb_per_second") > 0.0);
    assert!(
        probe["gpu"]
            .as_str()
            .is_some_and(|text| text.contains("Fake GPU 0")),
        "{probe}"
    );
    let mut command = flea();
    command.arg("plan").arg(model());
    command.args("--vram 48MiB --memory 60% --json".split(' '));
    let plan = json(command.env("FLEA_PROFILE", profiles.path()));
    assert_eq!(plan["vram"]["link_gb_per_second"], link["gb_per_second"]);
    assert!(number(&plan["vram"], "seconds_per_pass") > 0.0);
}

/// What `flea plan` says is what streaming then does.
#[test]
fn the_plan_is_what_is_streamed() {
    let model = model();
    let tiers = "--vram 48MiB --memory 50%";
    let mut command = flea();
    command.arg("plan").arg(&model).arg("--json");
    let plan = json(command.args(tiers.split(' ')));
    let streamed = json(&mut stream(&model, &format!("{tiers} --passes 1"), &[]));
    for (planned, done) in [
        (
            &plan["vram"]["link_bytes_per_pass"],
            &streamed["link_bytes_per_pass"],
        ),
        (
            &plan["vram"]["memory_bytes"],
            &streamed["tiers"]["memory_bytes"],
        ),
        (
            &plan["vram"]["drive_bytes_per_pass"],
            &streamed["tiers"]["drive_bytes"],
        ),
        (
            &plan["vram"]["image_bytes"],
            &streamed["vram"]["image_bytes"],
        ),
        (
            &plan["vram"]["resident_bytes"],
            &streamed["vram"]["resident_bytes"],
        ),
    ] {
        assert_eq!(planned, done, "{plan}\n{streamed}");
        assert!(planned.is_u64());
    }
}

// ---- another process --------------------------------------------------------------------------------------------

/// What the other process is told: `IMAGE_BYTES;FD:LEN:OFFSET+LEN,OFFSET+LEN;FD:...`, and where which bytes are.
const PARTS: &str = "FLEA_TEST_PARTS";
const EXPECTED: &str = "FLEA_TEST_EXPECTED";

#[test]
fn another_process_sees_the_pool_and_a_refusal_is_told() {
    Driver::load();
    let (catalog, _) = read_catalog(&model()).expect("a model");
    let vram = VramPlan::new(&catalog, 48 << 20, 3).expect("a plan");
    let context = Context::new(0).expect("the fake GPU");
    let pool = VramPool::new(&context, vram.image.len_bytes, &vram.plan).expect("a pool");
    let stream = Stream::new(&context).expect("a stream");
    let page = vram.plan.page_bytes;
    let run = vram.plan.layers[4].transient.expect("layer 4 is streamed");
    let twin = vram
        .plan
        .layers
        .iter()
        .enumerate()
        .find(|(index, layer)| *index != 4 && layer.slot_index == vram.plan.layers[4].slot_index)
        .and_then(|(_, layer)| layer.transient)
        .expect("another layer of the same slot");
    let pattern: Vec<u8> = (0..4096u32).map(|index| (index * 7 % 251) as u8).collect();
    let at = run.first_page * page + 1024;
    #[allow(unsafe_code)]
    // SAFETY: pageable memory is read before the call returns.
    unsafe {
        stream
            .copy_in(pool.base() + at, pattern.as_ptr(), pattern.len())
            .expect("copy");
    }
    stream
        .record()
        .and_then(|event| event.wait())
        .expect("done");
    let parts = pool.export().expect("exported");
    let mut told = vram.image.len_bytes.to_string();
    for part in &parts {
        fcntl(&part.fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherited");
        let places: Vec<String> = part
            .places
            .iter()
            .map(|place| format!("{}+{}", place.offset_bytes, place.len_bytes))
            .collect();
        told += &format!(
            ";{}:{}:{}",
            part.fd.as_raw_fd(),
            part.len_bytes,
            places.join(",")
        );
    }
    let expected = format!("{at},{}", twin.first_page * page + 1024);
    let child = |state: &[(&str, &str)]| {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "the_other_process", "--ignored", "--nocapture"]);
        command.env(PARTS, &told).env(EXPECTED, &expected);
        output(with_gpu(&mut command, state))
    };
    let fine = child(&[]);
    assert!(
        fine.status.success() && text(&fine).contains("2 places are right"),
        "{}",
        text(&fine)
    );
    let refused = child(&[("FAKE_CUDA_IMPORT", "refuse")]);
    assert!(
        refused.status.success() && text(&refused).contains("refused as it should"),
        "{}",
        text(&refused)
    );
}

/// The rules of leases, with weights in VRAM.
#[test]
fn leases_on_a_gpu_keep_the_rules() {
    Driver::load();
    let path = model();
    let gpu = GpuOptions {
        index: 0,
        vram_bytes: 40 << 20,
        slots_count: 3,
    };
    let options = OpenOptions {
        budget: BudgetSpec::Pool(40 << 20),
        ..OpenOptions::default()
    };
    let model = GpuModel::open(&path, &gpu, options).expect("a model on the fake GPU");
    let kind = |result: flea::Result<()>| result.expect_err("an error").kind();
    assert_eq!(kind(model.acquire(99, None, None)), ErrorKind::Invalid);
    assert_eq!(kind(model.release(0)), ErrorKind::Invalid);
    let tensor = |layer: usize| model.catalog().layers[layer].uses[3].extent;
    let at = |layer: usize| {
        let extent = tensor(layer);
        let address = model.address(extent.shard_index, extent.offset_bytes + 5);
        address.expect("a place in VRAM")
    };
    assert_eq!(model.layer_of(at(4)), Some(4));
    assert_eq!(model.layer_of(model.pool().base() - 1), None);
    assert_eq!(model.address(0, 0), None, "the header is not in VRAM");
    let other = Some((at(4), 16));
    assert_eq!(kind(model.acquire(3, other, None)), ErrorKind::Invalid);
    // A part is enough, and it is the file's.
    model.acquire(4, other, None).expect("a part of layer 4");
    let mut readback = Readback::new(model.context()).expect("memory");
    let read = readback.begin(at(4), 16).expect("read");
    let file = std::fs::read(&path).expect("the model");
    let from = tensor(4).offset_bytes as usize + 5;
    assert_eq!(readback.finish().expect("bytes"), &file[from..from + 16]);
    model.release_after(4, read).expect("released");
    // Who holds the slot of what it wants is told at once.
    let slot = |layer: usize| model.vram().plan.layers[layer].slot_index;
    let twin = (1..10)
        .find(|layer| slot(*layer) == slot(0))
        .expect("a layer of one slot") as u32;
    model.acquire(0, None, None).expect("layer 0");
    assert_eq!(kind(model.acquire(twin, None, None)), ErrorKind::Busy);
    model.release(0).expect("released");
    let long = Some(Duration::from_secs(60));
    model.acquire(twin, None, long).expect("its slot is free");
    // Who does not wait may try again.
    while let Err(error) = model.acquire(0, None, Some(Duration::ZERO)) {
        assert!(
            matches!(error.kind(), ErrorKind::Again | ErrorKind::Busy),
            "{error}"
        );
        if error.kind() == ErrorKind::Busy {
            model.release(twin).expect("released");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    model.release(0).expect("released");
    let stats = model.stats();
    assert_eq!((stats.acquires, stats.releases), (4, 4));
    assert!(stats.h2d_bytes > 0 && stats.bytes_read > 0);
    // Closing with copies under way waits for them and frees the VRAM.
    drop(readback);
    drop(model);
}

/// Not a test of its own: what the test above starts.
#[test]
#[ignore = "the other side of another_process_sees_the_pool"]
fn the_other_process() {
    let told = std::env::var(PARTS).expect("parts");
    let mut words = told.split(';');
    let image_bytes: u64 = words
        .next()
        .and_then(|word| word.parse().ok())
        .expect("a length");
    let parts: Vec<VramPart> = words.map(part_of).collect();
    let context = Context::new(0).expect("the fake GPU");
    let view = match VramView::import(&context, image_bytes, &parts) {
        Ok(view) => view,
        Err(error) => {
            assert_eq!(
                std::env::var("FAKE_CUDA_IMPORT").as_deref(),
                Ok("refuse"),
                "{error}"
            );
            assert_eq!(error.kind(), ErrorKind::Permission);
            assert!(error.context().contains("NOT_PERMITTED"), "{error}");
            println!("refused as it should");
            return;
        }
    };
    let mut readback = Readback::new(&context).expect("memory");
    let mut right = 0;
    for place in std::env::var(EXPECTED).expect("places").split(',') {
        let at: u64 = place.parse().expect("an offset");
        readback.begin(view.base() + at, 4096).expect("read");
        let bytes = readback.finish().expect("bytes");
        right += usize::from(
            bytes
                .iter()
                .zip(0u32..)
                .all(|(byte, index)| u32::from(*byte) == index * 7 % 251),
        );
    }
    println!("{right} places are right");
}

#[allow(unsafe_code)]
fn part_of(word: &str) -> VramPart {
    let fields: Vec<&str> = word.split(':').collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let place = |text: &str| {
        let (offset, len) = text.split_once('+').expect("a place");
        Place {
            offset_bytes: number(offset),
            len_bytes: number(len),
        }
    };
    VramPart {
        // SAFETY: a descriptor that this process has inherited for this and nothing else.
        fd: unsafe { OwnedFd::from_raw_fd(number(fields[0]) as i32) },
        len_bytes: number(fields[1]),
        places: fields[2].split(',').map(place).collect(),
    }
}
