//! The ggml device asked for what no file can make it do: experts and rows that the model does not have.

#![cfg(feature = "run")]
#![allow(unsafe_code)]

mod common;

use flea::ffi::calls;
use flea::ffi::types::{
    FLEA_E_INVALID, FLEA_OPEN_DEFER_PLAN, FLEA_OPEN_EXPERTS, flea_model, flea_open_options,
    flea_stats_data,
};
use llama_cpp_sys_2 as llama;
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};

#[repr(C)]
struct Config {
    struct_size: u32,
    loader_skips_streamed: bool,
    whole_layers: bool,
    model: *mut flea_model,
    kv: *const std::ffi::c_void,
    guesses_experts: bool,
}

// ffi-examples/ggml-flea/ggml-flea.h
unsafe extern "C" {
    fn ggml_backend_flea_reg() -> llama::ggml_backend_reg_t;
    fn ggml_backend_flea_configure(config: *const Config) -> i32;
    fn ggml_backend_flea_pending_bytes() -> *const u64;
    fn ggml_backend_flea_last_failure(text: *mut *const c_char) -> i32;
}

const EMBD: i64 = 256;
const FFN: i64 = 1024;
const EXPERTS: i64 = 8;
const VOCAB: i64 = 70_000;

/// A mixture of 8 experts whose embeddings are long enough to be read by rows.
fn mixture() -> PathBuf {
    let arguments = "--arch qwen3moe --layers 4 --embd 256 --ffn 1024 --heads 4 --vocab 70000 --tied --type q8_0 --seed 3 \
                     --experts 8 --experts-used 2";
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    common::synth("device", &arguments)
}

/// The model on the device, until it is dropped.
struct Streamed(*mut flea_model);

impl Streamed {
    fn open(path: &Path) -> Self {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("no NUL");
        // SAFETY: as ggml-flea.h wants it: the model is open before it is given to the device, and closed in Drop.
        unsafe {
            let mut options: flea_open_options = std::mem::zeroed();
            options.struct_size = size_of::<flea_open_options>() as u32;
            options.flags = FLEA_OPEN_DEFER_PLAN | FLEA_OPEN_EXPERTS;
            // What every token uses, the head among it, and a part of the experts.
            options.memory = c"75%".as_ptr();
            options.host_pending_bytes = ggml_backend_flea_pending_bytes();
            let mut model = std::ptr::null_mut();
            let status = calls::flea_model_open(path.as_ptr(), &raw const options, &raw mut model);
            assert_eq!(status, 0);
            let config = Config {
                struct_size: size_of::<Config>() as u32,
                loader_skips_streamed: true,
                whole_layers: false,
                model,
                kv: std::ptr::null(),
                guesses_experts: false,
            };
            assert_eq!(ggml_backend_flea_configure(&raw const config), 0);
            Self(model)
        }
    }

    fn device(&self) -> llama::ggml_backend_dev_t {
        // SAFETY: one static registration with one device.
        unsafe { llama::ggml_backend_reg_dev_get(ggml_backend_flea_reg(), 0) }
    }

    fn stats(&self) -> flea_stats_data {
        // SAFETY: the model is open; all-zero is a valid structure to be filled.
        unsafe {
            let mut stats: flea_stats_data = std::mem::zeroed();
            stats.struct_size = size_of::<flea_stats_data>() as u32;
            assert_eq!(calls::flea_stats(self.0, &raw mut stats), 0);
            stats
        }
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        // SAFETY: NULL forgets the model, whose weights nobody has any more; it is closed once.
        unsafe {
            ggml_backend_flea_configure(std::ptr::null());
            calls::flea_model_close(self.0);
        }
    }
}

/// What the device said last.
fn last_failure() -> (i32, String) {
    let mut text = std::ptr::null();
    // SAFETY: the text is valid until this thread asks again, and copied here.
    unsafe {
        let status = ggml_backend_flea_last_failure(&raw mut text);
        (status, CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

/// A graph of one operation on one weight of the model.
struct Asked {
    weights: *mut llama::ggml_context,
    work: *mut llama::ggml_context,
    buffers: [llama::ggml_backend_buffer_t; 2],
    backend: llama::ggml_backend_t,
    ids: *mut llama::ggml_tensor,
    result: *mut llama::ggml_tensor,
    graph: *mut llama::ggml_cgraph,
}

/// Which operation.
#[derive(Clone, Copy)]
enum Op {
    Experts,
    Rows,
}

impl Asked {
    fn new(device: llama::ggml_backend_dev_t, op: Op, ids_count: i64) -> Self {
        let params = llama::ggml_init_params {
            mem_size: 1 << 20,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: every object is made here from objects made before it, freed in Drop, and large enough: two contexts of a
        // few tensors and one small graph.
        unsafe {
            let (weights, work) = (llama::ggml_init(params), llama::ggml_init(params));
            let (weight, name) = match op {
                Op::Experts => (
                    llama::ggml_new_tensor_3d(weights, llama::GGML_TYPE_Q8_0, EMBD, FFN, EXPERTS),
                    "blk.0.ffn_up_exps.weight",
                ),
                Op::Rows => (
                    llama::ggml_new_tensor_2d(weights, llama::GGML_TYPE_Q8_0, EMBD, VOCAB),
                    "token_embd.weight",
                ),
            };
            let name = CString::new(name).expect("no NUL");
            llama::ggml_set_name(weight, name.as_ptr());
            let (ids, result) = match op {
                Op::Experts => {
                    let input =
                        llama::ggml_new_tensor_3d(work, llama::GGML_TYPE_F32, EMBD, ids_count, 1);
                    let ids = llama::ggml_new_tensor_2d(work, llama::GGML_TYPE_I32, ids_count, 1);
                    (ids, llama::ggml_mul_mat_id(work, weight, input, ids))
                }
                Op::Rows => {
                    let ids = llama::ggml_new_tensor_1d(work, llama::GGML_TYPE_I32, ids_count);
                    (ids, llama::ggml_get_rows(work, weight, ids))
                }
            };
            let graph = llama::ggml_new_graph(work);
            llama::ggml_build_forward_expand(graph, result);
            let buft = llama::ggml_backend_dev_buffer_type(device);
            let buffers = [weights, work]
                .map(|ctx| llama::ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
            assert!(buffers.iter().all(|buffer| !buffer.is_null()));
            Self {
                weights,
                work,
                buffers,
                backend: llama::ggml_backend_dev_init(device, std::ptr::null()),
                ids,
                result,
                graph,
            }
        }
    }

    /// The result for these ids, or why there is none.
    fn compute(&self, ids: &[i32]) -> Result<Vec<f32>, (i32, String)> {
        // SAFETY: graph and backend are alive; the copies are as long as their tensors.
        unsafe {
            llama::ggml_backend_tensor_set(self.ids, ids.as_ptr().cast(), 0, size_of_val(ids));
            let status = llama::ggml_backend_graph_compute(self.backend, self.graph);
            if status != llama::GGML_STATUS_SUCCESS {
                return Err(last_failure());
            }
            let mut values = vec![0_f32; llama::ggml_nelements(self.result) as usize];
            let bytes = size_of_val(values.as_slice());
            llama::ggml_backend_tensor_get(self.result, values.as_mut_ptr().cast(), 0, bytes);
            Ok(values)
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // SAFETY: made in new, freed once, the users first.
        unsafe {
            llama::ggml_backend_free(self.backend);
            for buffer in self.buffers {
                llama::ggml_backend_buffer_free(buffer);
            }
            llama::ggml_free(self.work);
            llama::ggml_free(self.weights);
        }
    }
}

/// One test for all: a process streams one model at a time.
#[test]
fn experts_and_rows_that_the_model_does_not_have_are_named() {
    // SAFETY: no preconditions.
    unsafe { llama::llama_backend_init() };
    let streamed = Streamed::open(&mixture());
    let rows = Asked::new(streamed.device(), Op::Rows, 2);
    let last = VOCAB as i32 - 1;
    let values = rows.compute(&[0, last]).expect("rows");
    assert!(values.iter().all(|value| value.is_finite()) && values.iter().any(|v| *v != 0.0));
    for (id, said) in [
        (VOCAB as i32, "row 70000 of a table of 70000 rows"),
        (-1, "row -1"),
    ] {
        let (status, text) = rows.compute(&[0, id]).expect_err("no such row");
        assert_eq!(status, FLEA_E_INVALID, "{text}");
        assert!(text.contains(said), "{text}");
    }
    let swapped = rows.compute(&[last, 0]).expect("rows");
    assert_eq!(swapped[..EMBD as usize], values[EMBD as usize..]);

    let experts = Asked::new(streamed.device(), Op::Experts, 2);
    experts.compute(&[0, EXPERTS as i32 - 1]).expect("experts");
    for id in [EXPERTS as i32, -1, i32::MAX] {
        let (status, text) = experts.compute(&[0, id]).expect_err("no such expert");
        assert_eq!(status, FLEA_E_INVALID, "{text}");
        let said = format!("chose expert {id}, and 'blk.0.ffn_up_exps.weight' has 8");
        assert!(text.contains(&said), "{text}");
    }
    experts.compute(&[1, 2]).expect("experts");
    let stats = streamed.stats();
    assert!(stats.expert_misses >= 4 && stats.rows == 4, "{stats:?}");
}
