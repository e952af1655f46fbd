//! Layers over several GPUs, on two of tests/fake-cuda: every byte on the GPU that has it, each with a pool, a ring and counters of
//! its own, through the engine and the C ABI; and what cannot be had.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::ffi::{CStr, CString, c_void};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{json, number, output, padded_model as model};
use fake_cuda::{Driver, stream};
use flea::ErrorKind;
use flea::engine::gpu::{GpuOptions, Gpus};
use flea::engine::{BudgetSpec, OpenOptions, read_catalog};
use flea::ffi::calls;
use flea::ffi::types::{
    FLEA_E_INVALID, FLEA_E_NOTFOUND, FLEA_E_REFUSED, FLEA_OPEN_DEFER_PLAN, flea_gpu, flea_info,
    flea_model, flea_open_options, flea_tensor,
};
use serde_json::Value;

const TWO: (&str, &str) = ("FAKE_CUDA_DEVICES", "2");

fn gpus(answer: &Value) -> Vec<Value> {
    answer["gpus"].as_array().expect("GPUs").clone()
}

#[test]
fn every_byte_arrives_on_the_gpu_that_has_its_layer() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    for (vram, memory, what) in [
        ("24MiB", "65%", "all three tiers"),
        ("24MiB", "120%", "no drive"),
        ("48MiB,24MiB", "65%", "one GPU has twice as much"),
        ("200MiB", "65%", "all in VRAM"),
    ] {
        let arguments = format!("--gpu 0,1 --vram {vram} --memory {memory} --passes 3 --verify");
        let answer = json(&mut stream(&model, &arguments, &[TWO]));
        assert_eq!(
            answer["verified_bytes"],
            catalog.layer_bytes(),
            "{what}: {answer}"
        );
        let each = gpus(&answer);
        assert_eq!(each.len(), 2, "{what}");
        let mut layer = 0.0;
        for (index, gpu) in each.iter().enumerate() {
            assert_eq!(gpu["gpu_index"], index, "{what}: {answer}");
            assert_eq!(number(gpu, "first_layer"), layer, "{what}: {answer}");
            let count = number(gpu, "layers");
            layer += count;
            let held = number(gpu, "held_bytes");
            assert!(
                0.0 < held && held <= number(gpu, "budget_bytes"),
                "{what}: {answer}"
            );
            // Three passes, and one that is looked at.
            assert_eq!(number(gpu, "acquires"), 4.0 * count, "{what}: {answer}");
            let (link, resident) = (
                number(gpu, "link_bytes_per_pass"),
                number(gpu, "h2d_resident_bytes"),
            );
            assert_eq!(
                resident,
                number(&gpu["tiers"], "vram_bytes"),
                "{what}: {answer}"
            );
            // Of few layers one may have a slot to itself.
            let streamed = number(gpu, "h2d_bytes") - resident;
            assert!(
                (3.0 * link..=5.0 * link).contains(&streamed),
                "{what}: {answer}"
            );
            let tiers = &gpu["tiers"];
            let drive = number(tiers, "drive_bytes");
            assert_eq!(
                number(tiers, "memory_bytes") + drive,
                link,
                "{what}: {answer}"
            );
            match what {
                "all in VRAM" => assert_eq!(link, 0.0, "{answer}"),
                "no drive" => assert!(link > 0.0 && drive == 0.0, "{answer}"),
                _ => assert!(
                    link > 0.0 && (drive > 0.0 || what == "one GPU has twice as much"),
                    "{what}: {answer}"
                ),
            }
        }
        assert_eq!(layer as usize, catalog.layers.len(), "{what}");
        for field in ["link_bytes_per_pass", "h2d_resident_bytes"] {
            let sum: f64 = each.iter().map(|gpu| number(gpu, field)).sum();
            assert_eq!(number(&answer, field), sum, "{what}: {answer}");
        }
    }
    // The layers go by what each may hold.
    let counts = |vram: &str| {
        let arguments = format!("--gpu 1,0 --vram {vram} --memory 75% --passes 1");
        let each = gpus(&json(&mut stream(&model, &arguments, &[TWO])));
        assert_eq!(
            (&each[0]["gpu_index"], &each[1]["gpu_index"]),
            (&1.into(), &0.into())
        );
        each.iter()
            .map(|gpu| number(gpu, "layers"))
            .collect::<Vec<_>>()
    };
    assert_eq!(counts("48MiB,24MiB"), [7.0, 4.0]);
    assert_eq!(counts("40%"), [5.0, 6.0]);
}

/// Host memory is divided once: what both may hold together is what was given.
#[test]
fn host_memory_is_shared_and_not_given_twice() {
    let model = model();
    let arguments = "--gpu 0,1 --vram 40MiB,24MiB --memory 75% --passes 1 --verify";
    let answer = json(&mut stream(&model, arguments, &[TWO]));
    let each = gpus(&answer);
    // What is read once has memory of its own until it is in VRAM.
    let shares: Vec<f64> = each
        .iter()
        .map(|gpu| number(gpu, "host_budget_bytes"))
        .collect();
    let whole = number(&answer, "model_bytes") * 0.75;
    assert!(shares[0] + shares[1] <= whole, "{answer}");
    assert!(shares[0] + shares[1] > whole * 0.4, "{answer}");
    let per_link = |index: usize| shares[index] / number(&each[index], "link_bytes_per_pass");
    assert!(
        (0.7..1.4).contains(&(per_link(0) / per_link(1))),
        "{answer}"
    );
}

/// The order of copies between streams is the fake GPUs' choice: other choices, other delays, the same bytes.
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
            TWO,
            ("FAKE_CUDA_SEED", seed),
            ("FAKE_CUDA_DELAY_US", delay),
            ("FAKE_CUDA_READ_US", read),
        ];
        let arguments = "--gpu 0,1 --vram 24MiB --memory 65% --passes 1 --verify --reader pread";
        let answer = json(&mut stream(&model, arguments, &state));
        assert_eq!(answer["verified_bytes"], catalog.layer_bytes(), "{state:?}");
    }
}

/// Without the events of those who read a slot of either GPU, what they read changes under them: the suite notices.
#[cfg(feature = "faults")]
#[test]
fn a_slot_written_while_it_is_read_is_noticed() {
    let state = [
        TWO,
        ("FAKE_CUDA_DELAY_US", "0"),
        ("FAKE_CUDA_READ_US", "5000"),
    ];
    let arguments = "--gpu 0,1 --vram 24MiB --memory 120% --passes 1 --verify";
    let mut command = stream(&model(), arguments, &state);
    let said = output(command.env("FLEA_FAULT", "noevent"));
    assert_eq!(said.status.code(), Some(5), "{said:?}");
}

#[test]
fn what_cannot_be_had_names_the_gpu() {
    let model = model();
    let arguments = "--arch llama --layers 1 --embd 768 --ffn 2400 --heads 12 --kv-heads 4 --vocab 3000 --type q8_0";
    let one = common::synth("gpu-several-one", &arguments.split(' ').collect::<Vec<_>>());
    let three = [("FAKE_CUDA_DEVICES", "3")];
    for (path, arguments, exit, words) in [
        (&model, "--gpu 0,0 --vram 40MiB", 2, "GPU 0 is named twice"),
        (&model, "--gpu 0,x --vram 40MiB", 2, "names no GPUs"),
        (
            &model,
            "--gpu 0,3 --vram 40MiB",
            1,
            "GPU 3: GPU 3 does not exist",
        ),
        (
            &model,
            "--gpu 0,1 --vram 40MiB,40MiB,40MiB",
            2,
            "3 sizes of VRAM for 2 GPUs",
        ),
        (&model, "--gpu 0,1 --vram 40MiB,4MiB", 4, "GPU 1: VRAM:"),
        (
            &model,
            "--gpu 2,0,1 --vram 40MiB,2MiB,40MiB",
            4,
            "GPU 0: VRAM:",
        ),
        (
            &model,
            "--gpu 0,1 --vram 24MiB --memory 1MiB",
            4,
            "leave nothing for weights",
        ),
        (
            &model,
            "--gpu 0,1 --vram 24MiB --memory 0.01%",
            4,
            "the smallest total that works",
        ),
        (
            &one,
            "--gpu 0,1,2 --vram 40MiB",
            2,
            "3 GPUs for a model of 2 parts",
        ),
        (
            &model,
            "--gpu 0,1 --vram 40MiB --trace /dev/null",
            1,
            "trace one of them",
        ),
    ] {
        let said = output(&mut stream(path, arguments, &three));
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&said.stdout),
            String::from_utf8_lossy(&said.stderr)
        );
        assert_eq!(said.status.code(), Some(exit), "{arguments}: {text}");
        assert!(text.contains(words), "{arguments}: {text}");
    }
    let answer = json(&mut stream(
        &one,
        "--gpu 2,0 --vram 40MiB --passes 1 --verify",
        &three,
    ));
    assert_eq!(gpus(&answer).len(), 2);
}

// ---- in this process

type Host = extern "C" fn(*mut c_void);
type Make = unsafe extern "C" fn(*mut *mut c_void, u32) -> i32;
type Retain = unsafe extern "C" fn(*mut *mut c_void, i32) -> i32;
type One = unsafe extern "C" fn(*mut c_void) -> i32;
type Two = unsafe extern "C" fn(*mut c_void, *mut c_void) -> i32;
type Launch = unsafe extern "C" fn(*mut c_void, Host, *mut c_void) -> i32;

/// The fake driver with two GPUs.
fn two_gpus() -> Driver {
    static TWO_GPUS: Once = Once::new();
    // SAFETY: before the driver is loaded, and nobody else in this process changes or reads this variable meanwhile.
    TWO_GPUS.call_once(|| unsafe { std::env::set_var(TWO.0, TWO.1) });
    Driver::load()
}

#[test]
fn layers_addresses_and_errors_are_those_of_the_whole_model() {
    let _driver = two_gpus();
    let path = model();
    let gpu = |index, vram_bytes| GpuOptions {
        index,
        vram_bytes,
        slots_count: 3,
    };
    let options = OpenOptions {
        budget: BudgetSpec::Pool(60 << 20),
        defer_plan: true,
        ..OpenOptions::default()
    };
    let model =
        Gpus::open(&path, &[gpu(0, 32 << 20), gpu(1, 24 << 20)], options).expect("two GPUs");
    assert!(!model.is_started());
    let count = model.catalog().layers.len() as u32;
    let first = model.parts()[1].layers().start;
    assert!(0 < first && first < count);
    for tensor in &model.catalog().tensors {
        let address = model.address(tensor.extent.shard_index, tensor.extent.offset_bytes);
        match &tensor.layers {
            Some(span) => {
                let address = address.expect("an address");
                assert_eq!(model.layer_of(address), Some(span.first), "{}", tensor.name);
                let part = model.part_of(span.first).expect("a GPU");
                assert_eq!(
                    part.model().context().index(),
                    u32::from(span.first >= first)
                );
                assert!(part.model().layer_of(address).is_some());
            }
            None => assert_eq!(address, None, "{}", tensor.name),
        }
    }
    let patience = Some(Duration::from_secs(60));
    // Against every order that the GPUs have seen.
    model.hint(&[count - 1, 0, first]).expect("a hint");
    assert!(model.is_started() && model.host_budget().is_some());
    for layer in [count - 1, 0, first, first - 1, 1] {
        model.acquire(layer, None, patience).expect("a layer");
        model.release(layer).expect("a lease");
    }
    let twice = model.release(first).expect_err("no lease");
    assert_eq!(twice.kind(), ErrorKind::Invalid);
    assert!(
        twice
            .context()
            .contains(&format!("layer {first}, on GPU 1")),
        "{twice}"
    );
    for wrong in [count, u32::MAX] {
        for error in [
            model.acquire(wrong, None, patience).expect_err("no layer"),
            model.release(wrong).expect_err("no layer"),
            model.hint(&[0, wrong]).expect_err("no layer"),
        ] {
            assert!(error.context().contains("does not exist"), "{error}");
        }
    }
    let stats = model.stats();
    let each: Vec<_> = model
        .parts()
        .iter()
        .map(|part| part.model().stats())
        .collect();
    assert_eq!(
        (stats.acquires, each[0].acquires, each[1].acquires),
        (5, 3, 2)
    );
    assert!(0 < stats.h2d_bytes && stats.h2d_bytes <= each[0].h2d_bytes + each[1].h2d_bytes);
    assert!(
        each.iter()
            .all(|gpu| gpu.h2d_bytes > 0 && gpu.bytes_read > 0)
    );
}

struct Open(*mut flea_model);

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: opened by flea_model_open, closed once.
        unsafe { calls::flea_model_close(self.0) };
    }
}

fn last_error() -> String {
    // SAFETY: a text that lives until the next failing call, copied here.
    let text = unsafe { CStr::from_ptr(calls::flea_last_error()) };
    text.to_string_lossy().into_owned()
}

fn open(
    gpus: &CStr,
    vram: Option<&CStr>,
    change: impl FnOnce(&mut flea_open_options),
) -> Result<Open, (i32, String)> {
    let path = CString::new(model().as_os_str().as_encoded_bytes()).expect("no NUL");
    // SAFETY: all-zero is a valid structure; pointers live over the call.
    unsafe {
        let mut options: flea_open_options = std::mem::zeroed();
        options.struct_size = size_of::<flea_open_options>() as u32;
        options.flags = FLEA_OPEN_DEFER_PLAN;
        options.pool_bytes = 60 << 20;
        options.vram = vram.map_or(std::ptr::null(), CStr::as_ptr);
        options.gpus = gpus.as_ptr();
        change(&mut options);
        let mut model = std::ptr::null_mut();
        match calls::flea_model_open(path.as_ptr(), &raw const options, &raw mut model) {
            0 => Ok(Open(model)),
            status => Err((status, last_error())),
        }
    }
}

/// Fills a structure of the C ABI.
fn filled<T>(set_size: fn(&mut T, u32), call: impl FnOnce(*mut T) -> i32) -> Result<T, i32> {
    // SAFETY: structures of numbers and pointers, for which zero is a value.
    let mut data: T = unsafe { std::mem::zeroed() };
    set_size(&mut data, size_of::<T>() as u32);
    match call(&raw mut data) {
        0 => Ok(data),
        status => Err(status),
    }
}

fn gpu(model: &Open, place: u32) -> Result<flea_gpu, i32> {
    // SAFETY: the model is open, the structure is ours.
    filled(
        |gpu: &mut flea_gpu, size| gpu.struct_size = size,
        |out| unsafe { calls::flea_model_gpu(model.0, place, out) },
    )
}

fn tensor(model: &Open, name: &str) -> flea_tensor {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: as above.
    let tensor = filled(
        |tensor: &mut flea_tensor, size| tensor.struct_size = size,
        |out| unsafe { calls::flea_model_tensor(model.0, name.as_ptr(), out) },
    );
    tensor.expect("a tensor")
}

fn acquire(model: &Open, layer: u32) -> i32 {
    // SAFETY: the model is open.
    unsafe { calls::flea_acquire(model.0, layer, std::ptr::null(), 0, 60_000_000_000) }
}

/// What stands for a kernel: it takes long, and then reads what it was given.
struct Kernel {
    at: *const u8,
    expected: Vec<u8>,
    is_right: AtomicBool,
    is_done: AtomicBool,
}

extern "C" fn read_slowly(kernel: *mut c_void) {
    // SAFETY: the test keeps the kernel until it is done.
    let kernel = unsafe { &*kernel.cast::<Kernel>() };
    std::thread::sleep(Duration::from_secs(1));
    // SAFETY: leased memory of the fake GPU, which is mapped in this process.
    let bytes = unsafe { std::slice::from_raw_parts(kernel.at, kernel.expected.len()) };
    kernel
        .is_right
        .store(bytes == kernel.expected, Ordering::SeqCst);
    kernel.is_done.store(true, Ordering::SeqCst);
}

#[test]
fn a_host_is_told_which_gpu_and_gives_events_of_it() {
    let driver = two_gpus();
    let open = open(c"0,1", Some(c"32MiB,24MiB"), |_| {}).expect("two GPUs");
    // SAFETY: the model is open, the structure is ours.
    let info = filled(
        |info: &mut flea_info, size| info.struct_size = size,
        |out| unsafe { calls::flea_model_info(open.0, out) },
    );
    let info = info.expect("information");
    let (one, two) = (gpu(&open, 0).expect("a GPU"), gpu(&open, 1).expect("a GPU"));
    assert_eq!((info.gpu_count, info.gpu_index, info.planned), (2, 0, 0));
    assert_eq!((one.gpu_index, two.gpu_index), (0, 1));
    assert_eq!((one.first_layer, two.first_layer), (0, one.layer_count));
    assert_eq!(one.layer_count + two.layer_count, info.layer_count);
    assert_eq!(
        (one.vram_budget_bytes, two.vram_budget_bytes),
        (32 << 20, 24 << 20)
    );
    assert_eq!(info.vram_budget_bytes, 56 << 20);
    assert_eq!(
        info.link_bytes_per_pass,
        one.link_bytes_per_pass + two.link_bytes_per_pass
    );
    assert_eq!(
        gpu(&open, 2).err(),
        Some(FLEA_E_NOTFOUND),
        "{}",
        last_error()
    );

    let file = std::fs::read(model()).expect("the model");
    for layer in 0..10 {
        let weight = tensor(&open, &format!("blk.{layer}.ffn_down.weight"));
        assert_eq!(
            weight.gpu_index,
            i32::from(layer >= two.first_layer),
            "layer {layer}"
        );
        // SAFETY: the address is only compared.
        let found = unsafe { calls::flea_layer_of(open.0, weight.data) };
        assert_eq!(found, layer as i32);
        assert_eq!(acquire(&open, layer), 0, "{}", last_error());
        // SAFETY: leased memory of the fake GPU, mapped in this process.
        let there =
            unsafe { std::slice::from_raw_parts(weight.data.cast::<u8>(), weight.bytes as usize) };
        assert!(
            there == &file[weight.file_offset as usize..][..there.len()],
            "layer {layer}"
        );
        // SAFETY: the model is open.
        assert_eq!(unsafe { calls::flea_release(open.0, layer) }, 0);
    }
    assert_eq!(tensor(&open, "token_embd.weight").gpu_index, -1);

    // A kernel on the second GPU, which others of its layers wait for.
    let weight = tensor(&open, &format!("blk.{}.ffn_down.weight", two.first_layer));
    assert_eq!(acquire(&open, two.first_layer), 0, "{}", last_error());
    let kernel = Kernel {
        at: weight.data.cast(),
        expected: file[weight.file_offset as usize..][..weight.bytes as usize].to_vec(),
        is_right: AtomicBool::new(false),
        is_done: AtomicBool::new(false),
    };
    let (mut context, mut stream, mut event) = (
        std::ptr::null_mut(),
        std::ptr::null_mut(),
        std::ptr::null_mut(),
    );
    // SAFETY: functions of the fake driver with these signatures, and the kernel outlives its call.
    unsafe {
        let retain: Retain = std::mem::transmute(driver.find(c"cuDevicePrimaryCtxRetain"));
        let set: One = std::mem::transmute(driver.find(c"cuCtxSetCurrent"));
        let make_stream: Make = std::mem::transmute(driver.find(c"cuStreamCreate"));
        let make_event: Make = std::mem::transmute(driver.find(c"cuEventCreate"));
        let record: Two = std::mem::transmute(driver.find(c"cuEventRecord"));
        let launch: Launch = std::mem::transmute(driver.find(c"cuLaunchHostFunc"));
        assert_eq!(retain(&raw mut context, 1), 0);
        assert_eq!(set(context), 0);
        assert_eq!(make_stream(&raw mut stream, 1), 0);
        assert_eq!(make_event(&raw mut event, 2), 0);
        assert_eq!(
            launch(stream, read_slowly, (&raw const kernel).cast_mut().cast()),
            0
        );
        assert_eq!(record(event, stream), 0);
        assert_eq!(
            calls::flea_release_after(open.0, two.first_layer, event),
            0,
            "{}",
            last_error()
        );
    }
    for layer in two.first_layer + 1..info.layer_count {
        assert_eq!(acquire(&open, layer), 0, "{}", last_error());
        // SAFETY: the model is open.
        assert_eq!(unsafe { calls::flea_release(open.0, layer) }, 0);
    }
    assert!(
        kernel.is_done.load(Ordering::SeqCst),
        "its slot was not needed?"
    );
    assert!(
        kernel.is_right.load(Ordering::SeqCst),
        "refilled under the kernel"
    );
    let (one, two) = (gpu(&open, 0).expect("a GPU"), gpu(&open, 1).expect("a GPU"));
    assert!(one.h2d_bytes > 0 && two.h2d_bytes > two.h2d_resident_bytes && two.h2d_copies > 0);
}

#[test]
fn what_a_host_asks_for_wrongly_is_said() {
    let _driver = two_gpus();
    let size = Some(c"32MiB");
    for (gpus, vram, status, words) in [
        (c"0,0", size, FLEA_E_INVALID, "twice"),
        (c"", size, FLEA_E_INVALID, "names no GPUs"),
        (c"0,1", None, FLEA_E_INVALID, "vram is not"),
        (c"0,1", Some(c"1GiB,2GiB,3GiB"), FLEA_E_INVALID, "3 sizes"),
        (c"0,5", size, FLEA_E_NOTFOUND, "GPU 5"),
        (c"0,1", Some(c"32MiB,2MiB"), FLEA_E_REFUSED, "GPU 1: VRAM:"),
    ] {
        let (got, text) = open(gpus, vram, |_| {}).err().expect("an error");
        assert_eq!(got, status, "{text}");
        assert!(text.contains(words), "{text}");
    }
    let both = open(c"0,1", size, |options| options.gpu_index = 1);
    assert!(
        both.err()
            .expect("an error")
            .1
            .contains("leave gpu_index 0")
    );
    // Memory is looked at with the first lease, and may be refused then, and again.
    let little = open(c"0,1", size, |options| options.pool_bytes = 4096).expect("VRAM");
    for layer in [0, 9] {
        assert_eq!(acquire(&little, layer), FLEA_E_REFUSED, "{}", last_error());
        assert!(last_error().contains("the GPUs need"), "{}", last_error());
    }
}
