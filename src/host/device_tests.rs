//! The ggml device asked for what no file can make it do: experts and rows that the model does not have.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use llama_cpp_sys_2 as llama;

use super::*;
use crate::tools::synth::shape::{Arch, Quant, Shape, Wish};
use crate::tools::synth::{Spec, generate};

const EMBD: i64 = 256;
const FFN: i64 = 1024;
const EXPERTS: i64 = 8;
const VOCAB: i64 = 70_000;

/// A mixture of 8 experts whose embeddings are long enough to be read by rows.
fn mixture(directory: &Path) -> PathBuf {
    let wish = Wish {
        layers: Some(4),
        embd: Some(EMBD as u64),
        ffn: Some(FFN as u64),
        vocab: Some(VOCAB as u64),
        experts: Some(EXPERTS as u64),
        experts_used: Some(2),
        tied: true,
        ..Wish::default()
    };
    let spec = Spec {
        shape: Shape::choose(Arch::Qwen3Moe, Quant::Q8_0, &wish).expect("a shape"),
        seed: 3,
        router_skew: 0.0,
        split_bytes: None,
        force: false,
    };
    let report = generate(
        &spec,
        &directory.join("m.gguf"),
        &AtomicBool::new(false),
        |_, _| {},
    );
    report.expect("a model").files[0].clone()
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
    fn compute(&self, ids: &[i32]) -> Result<Vec<f32>> {
        // SAFETY: graph and backend are alive; the copies are as long as their tensors.
        unsafe {
            llama::ggml_backend_tensor_set(self.ids, ids.as_ptr().cast(), 0, size_of_val(ids));
            let status = llama::ggml_backend_graph_compute(self.backend, self.graph);
            if status != llama::GGML_STATUS_SUCCESS {
                return Err(last_failure().expect("a reason"));
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
    let directory = tempfile::tempdir().expect("a directory");
    let path = mixture(directory.path());
    let options = StreamOptions {
        // What every token uses, the head among it, and a part of the experts.
        memory: Some("75%".to_owned()),
        ..StreamOptions::default()
    };
    crate::host::context::start_backend();
    let streamed = Streamed::open(&path, &options).expect("a model");
    assert_eq!(streamed.row_tables(), ["token_embd.weight"]);

    let rows = Asked::new(streamed.device(), Op::Rows, 2);
    let values = rows.compute(&[0, VOCAB as i32 - 1]).expect("rows");
    assert!(values.iter().all(|value| value.is_finite()) && values.iter().any(|v| *v != 0.0));
    for (id, said) in [
        (VOCAB as i32, "row 70000 of a table of 70000 rows"),
        (-1, "row -1"),
    ] {
        let error = rows.compute(&[0, id]).expect_err("no such row");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
    let swapped = rows.compute(&[VOCAB as i32 - 1, 0]).expect("rows");
    assert_eq!(swapped[..EMBD as usize], values[EMBD as usize..]);

    let experts = Asked::new(streamed.device(), Op::Experts, 2);
    experts.compute(&[0, EXPERTS as i32 - 1]).expect("experts");
    for id in [EXPERTS as i32, -1, i32::MAX] {
        let error = experts.compute(&[0, id]).expect_err("no such expert");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let said = format!("chose expert {id}, and 'blk.0.ffn_up_exps.weight' has 8");
        assert!(error.to_string().contains(&said), "{error}");
    }
    experts.compute(&[1, 2]).expect("experts");
    let stats = streamed.handle().stats().expect("counters");
    assert!(stats.expert_misses >= 4 && stats.rows == 4, "{stats:?}");
}
