//! The C ABI with weights on a GPU: addresses of VRAM, leases that come back behind an event of the host, figures, and what
//! cannot be had. On the fake GPU of tests/fake-cuda, whose memory the test can look into.
#![allow(unsafe_code)]

mod common;
#[cfg(feature = "cuda")]
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::ffi::{CStr, CString};
use std::path::Path;

use common::padded_model as model;
use flea::ffi::calls;
use flea::ffi::types::{FLEA_OPEN_DEFER_PLAN, flea_info, flea_model, flea_open_options};

struct Open(*mut flea_model);

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: opened by flea_model_open, closed once.
        unsafe { calls::flea_model_close(self.0) };
    }
}

/// Opens the model with `vram` on GPU `gpu_index` and 40 MiB of host memory; what else `change` wants.
fn open(
    vram: Option<&CStr>,
    gpu_index: u32,
    change: impl FnOnce(&mut flea_open_options),
) -> Result<Open, (i32, String)> {
    open_at(&model(), vram, gpu_index, change)
}

fn open_at(
    path: &Path,
    vram: Option<&CStr>,
    gpu_index: u32,
    change: impl FnOnce(&mut flea_open_options),
) -> Result<Open, (i32, String)> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("no NUL");
    // SAFETY: all-zero is a valid structure; pointers live over the call.
    unsafe {
        let mut options: flea_open_options = std::mem::zeroed();
        options.struct_size = size_of::<flea_open_options>() as u32;
        options.flags = FLEA_OPEN_DEFER_PLAN;
        options.pool_bytes = 40 << 20;
        options.vram = vram.map_or(std::ptr::null(), CStr::as_ptr);
        options.gpu_index = gpu_index;
        change(&mut options);
        let mut model = std::ptr::null_mut();
        match calls::flea_model_open(path.as_ptr(), &raw const options, &raw mut model) {
            0 => Ok(Open(model)),
            status => Err((status, last_error())),
        }
    }
}

fn last_error() -> String {
    // SAFETY: a text that lives until the next failing call, copied here.
    let text = unsafe { CStr::from_ptr(calls::flea_last_error()) };
    text.to_string_lossy().into_owned()
}

fn info(model: &Open) -> flea_info {
    // SAFETY: the model is open; all-zero is a valid structure to be filled.
    unsafe {
        let mut info: flea_info = std::mem::zeroed();
        info.struct_size = size_of::<flea_info>() as u32;
        assert_eq!(calls::flea_model_info(model.0, &raw mut info), 0);
        info
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_so() {
    use flea::ffi::types::{FLEA_E_INVALID, FLEA_E_UNSUPPORTED};
    let (status, text) = open(Some(c"25%"), 0, |_| {}).err().expect("no CUDA");
    assert_eq!(status, FLEA_E_UNSUPPORTED);
    assert!(
        text.contains("--features cuda") && text.contains("host memory"),
        "{text}"
    );
    let in_memory = open(None, 0, |_| {}).expect("host memory");
    assert_eq!(info(&in_memory).vram_budget_bytes, 0);
    // SAFETY: the model is open, and the event is not looked at.
    let status = unsafe { calls::flea_release_after(in_memory.0, 0, std::ptr::null_mut()) };
    assert_eq!(status, FLEA_E_INVALID);
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use super::*;
    use crate::fake_cuda::Driver;
    use flea::ffi::types::{
        FLEA_E_INVALID, FLEA_E_NOTFOUND, FLEA_E_REFUSED, flea_stats_data, flea_tensor,
    };
    use std::ffi::c_void;
    use std::sync::atomic::{AtomicBool, Ordering};

    type Host = extern "C" fn(*mut c_void);
    type Make = unsafe extern "C" fn(*mut *mut c_void, u32) -> i32;
    type Two = unsafe extern "C" fn(*mut c_void, *mut c_void) -> i32;
    type Launch = unsafe extern "C" fn(*mut c_void, Host, *mut c_void) -> i32;

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
        std::thread::sleep(std::time::Duration::from_secs(1));
        // SAFETY: leased memory of the fake GPU, which is mapped in this process.
        let bytes = unsafe { std::slice::from_raw_parts(kernel.at, kernel.expected.len()) };
        kernel
            .is_right
            .store(bytes == kernel.expected, Ordering::SeqCst);
        kernel.is_done.store(true, Ordering::SeqCst);
    }

    fn tensor(model: &Open, name: &CStr) -> flea_tensor {
        // SAFETY: the model is open; all-zero is a valid structure to be filled.
        unsafe {
            let mut tensor: flea_tensor = std::mem::zeroed();
            tensor.struct_size = size_of::<flea_tensor>() as u32;
            assert_eq!(
                calls::flea_model_tensor(model.0, name.as_ptr(), &raw mut tensor),
                0
            );
            tensor
        }
    }

    fn stats(model: &Open) -> flea_stats_data {
        // SAFETY: as above.
        unsafe {
            let mut stats: flea_stats_data = std::mem::zeroed();
            stats.struct_size = size_of::<flea_stats_data>() as u32;
            assert_eq!(calls::flea_stats(model.0, &raw mut stats), 0);
            stats
        }
    }

    fn acquire(model: &Open, layer: u32) -> i32 {
        // SAFETY: the model is open.
        unsafe { calls::flea_acquire(model.0, layer, std::ptr::null(), 0, 60_000_000_000) }
    }

    fn bytes_in_file(tensor: &flea_tensor) -> Vec<u8> {
        bytes_of(&model(), tensor)
    }

    fn bytes_of(path: &Path, tensor: &flea_tensor) -> Vec<u8> {
        let file = std::fs::read(path).expect("the model");
        file[tensor.file_offset as usize..][..tensor.bytes as usize].to_vec()
    }

    /// Hosts see the original: its offsets, and its bytes under a lease.
    #[test]
    fn a_compressed_model_is_its_original() {
        let _driver = Driver::load();
        let arguments = "--arch llama --layers 8 --embd 576 --ffn 1600 --heads 9 --kv-heads 3 --vocab 2000 --type bf16";
        let original = common::synth("cuda-packed", &arguments.split(' ').collect::<Vec<_>>());
        let directory = tempfile::tempdir().expect("a directory");
        let packed = directory.path().join("model.fleapack");
        let mut command = common::flea();
        command.args(["pack", "--compress"]).arg(&original);
        let said = common::output(command.arg("-o").arg(&packed));
        assert!(said.status.success(), "{said:?}");
        let open = open_at(&packed, Some(c"64MiB"), 0, |_| {}).expect("a model");
        let plain = open_at(&original, None, 0, |_| {}).expect("its original");
        let (there, whole) = (info(&open), info(&plain));
        assert_eq!(there.layer_count, whole.layer_count);
        assert_eq!(there.tensor_count, whole.tensor_count);
        let at = |model: &Open, index: u32| {
            // SAFETY: the model is open; all-zero is a valid structure to be filled.
            unsafe {
                let mut tensor: flea_tensor = std::mem::zeroed();
                tensor.struct_size = size_of::<flea_tensor>() as u32;
                assert_eq!(
                    calls::flea_model_tensor_at(model.0, index, &raw mut tensor),
                    0
                );
                tensor
            }
        };
        let mut compared = 0;
        for index in 0..there.tensor_count {
            let one = at(&open, index);
            // SAFETY: a name that lives as long as the model.
            let other = tensor(&plain, unsafe { CStr::from_ptr(one.name) });
            assert_eq!(one.file_offset, other.file_offset);
            assert_eq!((one.layer, one.bytes), (other.layer, other.bytes));
            if one.layer < 0 {
                continue;
            }
            for layer in one.layer..=one.layer_last {
                assert_eq!(acquire(&open, layer as u32), 0, "{}", last_error());
            }
            // SAFETY: leased memory of the fake GPU, which is mapped in this process.
            let weights =
                unsafe { std::slice::from_raw_parts(one.data.cast::<u8>(), one.bytes as usize) };
            assert!(weights == bytes_of(&original, &other), "tensor {index}");
            for layer in one.layer..=one.layer_last {
                // SAFETY: the model is open.
                assert_eq!(unsafe { calls::flea_release(open.0, layer as u32) }, 0);
            }
            compared += 1;
        }
        assert!(compared > 40, "{compared}");
    }

    #[test]
    fn a_slot_is_filled_anew_behind_the_hosts_event_and_not_before() {
        let driver = Driver::load();
        let open = open(Some(c"40MiB"), 0, |_| {}).expect("a model on the fake GPU");
        let before = info(&open);
        assert_eq!(
            (before.planned, before.gpu_index, before.slots_count),
            (0, 0, 3)
        );
        assert_eq!(before.vram_budget_bytes, 40 << 20);
        assert!(before.vram_resident_bytes + before.vram_ring_bytes <= 40 << 20);
        assert!(before.link_bytes_per_pass > 0);
        assert_eq!(
            stats(&open).h2d_bytes,
            0,
            "nothing begins before the first lease"
        );

        // The part of a layer that is streamed is the one that is used last.
        let name =
            |layer: u32| CString::new(format!("blk.{layer}.ffn_down.weight")).expect("no NUL");
        let weight = tensor(&open, &name(4));
        assert_eq!(weight.data as usize % 128, 0);
        // SAFETY: the model is open.
        assert_eq!(unsafe { calls::flea_layer_of(open.0, weight.data) }, 4);
        assert_eq!(acquire(&open, 4), 0, "{}", last_error());
        let after = info(&open);
        assert!(after.planned == 1 && after.weight_budget_bytes > 0);
        let expected = bytes_in_file(&weight);
        let short = 512 - weight.shape[0] % 512;
        let padded = expected.len() + (short / 32 * 34) as usize;
        // SAFETY: leased memory of the fake GPU, mapped in this process, with zeros behind the tensor.
        let there = unsafe { std::slice::from_raw_parts(weight.data.cast::<u8>(), padded) };
        assert!(there[..expected.len()] == expected[..], "the file's bytes");
        assert!(
            there[expected.len()..].iter().all(|byte| *byte == 0),
            "zeros behind them"
        );

        let kernel = Kernel {
            at: weight.data.cast(),
            expected,
            is_right: AtomicBool::new(false),
            is_done: AtomicBool::new(false),
        };
        let (mut stream, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: functions of the fake driver with these signatures, a context is current (flea has made it so on this
        // thread), and the kernel outlives its call.
        unsafe {
            let make_stream: Make = std::mem::transmute(driver.find(c"cuStreamCreate"));
            let make_event: Make = std::mem::transmute(driver.find(c"cuEventCreate"));
            let record: Two = std::mem::transmute(driver.find(c"cuEventRecord"));
            let launch: Launch = std::mem::transmute(driver.find(c"cuLaunchHostFunc"));
            assert_eq!(make_stream(&raw mut stream, 1), 0);
            assert_eq!(make_event(&raw mut event, 2), 0);
            assert_eq!(
                launch(stream, read_slowly, (&raw const kernel).cast_mut().cast()),
                0
            );
            assert_eq!(record(event, stream), 0);
            let none = calls::flea_release_after(open.0, 4, std::ptr::null_mut());
            assert_eq!(none, FLEA_E_INVALID, "{}", last_error());
            assert_eq!(
                calls::flea_release_after(open.0, 4, event),
                0,
                "{}",
                last_error()
            );
            assert_eq!(calls::flea_release_after(open.0, 4, event), FLEA_E_INVALID);
        }
        assert!(
            !kernel.is_done.load(Ordering::SeqCst),
            "the release does not wait"
        );
        // Every layer in turn: the slot of layer 4 serves others.
        for layer in (0..10).filter(|layer| *layer != 4) {
            assert_eq!(acquire(&open, layer), 0, "{}", last_error());
            // SAFETY: the model is open.
            assert_eq!(unsafe { calls::flea_release(open.0, layer) }, 0);
        }
        assert!(
            kernel.is_done.load(Ordering::SeqCst),
            "layer 4's slot was not needed?"
        );
        assert!(
            kernel.is_right.load(Ordering::SeqCst),
            "refilled under the kernel"
        );
        let stats = stats(&open);
        assert_eq!((stats.acquires, stats.releases), (10, 10));
        assert!(
            stats.loads >= 10 && stats.h2d_copies > 0 && stats.bytes_read > 0,
            "{stats:?}"
        );
        assert!(stats.h2d_pinned_bytes > 0 && stats.h2d_bytes > stats.h2d_resident_bytes);
        assert!(
            stats.h2d_resident_bytes > 0 && stats.pinned_bytes > 0,
            "{stats:?}"
        );
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        let _driver = Driver::load();
        for (vram, gpu_index, status, words) in [
            (c"much", 0, FLEA_E_INVALID, "much"),
            (c"auto", 0, FLEA_E_INVALID, "8GiB"),
            (c"1MiB", 0, FLEA_E_REFUSED, "VRAM:"),
            (c"10GiB", 7, FLEA_E_NOTFOUND, "GPU 7 does not exist"),
        ] {
            let (got, text) = open(Some(vram), gpu_index, |_| {}).err().expect("an error");
            assert_eq!(got, status, "{text}");
            assert!(text.contains(words), "{text}");
        }
        let through_daemon = open(Some(c"40MiB"), 0, |options| {
            options.pool_bytes = 0;
            options.endpoint = c"unix:/nonexistent".as_ptr();
        });
        let (status, text) = through_daemon.err().expect("an error");
        assert!(status == FLEA_E_INVALID && text.contains("vram"), "{text}");
        let in_memory = open(None, 0, |_| {}).expect("host memory");
        // SAFETY: the model is open, and the event is not looked at.
        let status = unsafe { calls::flea_release_after(in_memory.0, 0, std::ptr::null_mut()) };
        assert!(status == FLEA_E_INVALID && last_error().contains("host memory"));
        // Host memory is looked at with the first lease, and may be refused then, and again.
        let little = open(Some(c"40MiB"), 0, |options| options.pool_bytes = 4096).expect("VRAM");
        for _ in 0..2 {
            assert_eq!(acquire(&little, 0), FLEA_E_REFUSED, "{}", last_error());
            assert_eq!(info(&little).planned, 0);
        }
    }
}
