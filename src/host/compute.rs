//! How fast llama.cpp's CPU backend multiplies weights of a type with one token, weights coming from memory: what the
//! plan's prediction counts as compute. Measured with ggml itself, because types differ by a factor of three and no
//! formula says how. Invariant: everything allocated is freed, also after a failure. A tool beside the last step of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llama_cpp_sys_2 as llama;

use crate::error::{Error, ErrorKind, Result};
use crate::host::process;
use crate::io::profile::Compute;
use crate::mem::limits;
use crate::model::DType;
use crate::units::MIB;

/// The types that models are made of.
const DTYPES: [DType; 14] = [
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
];
/// Elements of a row and rows of a matrix: as in a model of 7 billion weights.
const SIDE_COUNT: u64 = 4096;
/// Weights walked through in one go, larger than most processors' caches.
const WEIGHTS_BYTES: u64 = 384 * MIB;
/// Every byte of the weights: as f16 it is a small, normal number, so that no scale is infinite or denormal.
const WEIGHT_BYTE: u8 = 0x2A;
/// Rounds over all types; the best of a type counts, for whatever else runs can only slow it down.
const ROUNDS: usize = 3;
/// The small graph that shows what an operation costs beside its bytes.
const SMALL_SIDE_COUNT: u64 = 256;
const SMALL_NODES_COUNT: usize = 500;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// By type.
    pub rates: Vec<Compute>,
    /// What one operation of a graph costs beside its bytes: threads that meet at its end.
    pub node_seconds: f64,
}

/// Measures every type for about `span`, with as many threads as `flea run` takes.
///
/// # Errors
/// `Refused` or `NoMemory` where the memory cannot be had; `Canceled` when `stop` is raised.
pub fn measure(span: Duration, stop: &AtomicBool) -> Result<Measured> {
    limits::check_free(WEIGHTS_BYTES + 64 * MIB, "measuring compute")?;
    let threads = u32::try_from(process::core_count()).unwrap_or(1);
    let mut best = [0.0f64; DTYPES.len()];
    let mut node_seconds = f64::INFINITY;
    for _ in 0..ROUNDS {
        for (dtype, best) in DTYPES.into_iter().zip(&mut best) {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Canceled, "interrupted"));
            }
            let matrix_bytes = dtype.row_bytes(SIDE_COUNT).unwrap_or(0) * SIDE_COUNT;
            let count = (WEIGHTS_BYTES / matrix_bytes.max(1)).max(1) as usize;
            let bench = Bench::new(dtype, SIDE_COUNT, count, threads)?;
            let seconds = bench.seconds_per_pass(span / ROUNDS as u32)?;
            *best = best.max(bench.weights_bytes as f64 / 1e9 / seconds);
        }
        let small = Bench::new(DType::F32, SMALL_SIDE_COUNT, SMALL_NODES_COUNT, threads)?;
        let seconds = small.seconds_per_pass(span / ROUNDS as u32)?;
        node_seconds = node_seconds.min(seconds / SMALL_NODES_COUNT as f64);
    }
    let rates = DTYPES.into_iter().zip(best);
    Ok(Measured {
        rates: rates
            .map(|(dtype, gb_per_second)| Compute {
                dtype: dtype.name().to_owned(),
                threads,
                gb_per_second,
            })
            .collect(),
        node_seconds,
    })
}

/// Matrices of one type, each multiplied with one vector.
struct Bench {
    backend: NonNull<llama::ggml_backend>,
    context: NonNull<llama::ggml_context>,
    /// NULL until it is allocated.
    memory: *mut llama::ggml_backend_buffer,
    graph: *mut llama::ggml_cgraph,
    weights_bytes: u64,
}

impl Bench {
    /// `matrices_count` matrices of `side_count` squared elements.
    fn new(dtype: DType, side_count: u64, matrices_count: usize, threads: u32) -> Result<Self> {
        let no_memory = |what: &str| Error::new(ErrorKind::NoMemory, format!("ggml: no {what}"));
        let matrix_bytes = dtype.row_bytes(side_count).unwrap_or(0) * side_count;
        // SAFETY: no preconditions; NULL is checked.
        let backend = NonNull::new(unsafe { llama::ggml_backend_cpu_init() })
            .ok_or_else(|| no_memory("CPU backend"))?;
        // SAFETY: the backend is a CPU backend.
        unsafe { llama::ggml_backend_cpu_set_n_threads(backend.as_ptr(), threads as i32) };
        // SAFETY: no preconditions.
        let tensors = unsafe {
            (2 * matrices_count + 1) * llama::ggml_tensor_overhead()
                + llama::ggml_graph_overhead_custom(2 * matrices_count, false)
        };
        let parameters = llama::ggml_init_params {
            mem_size: tensors,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: ggml allocates its own memory here; NULL is checked.
        let Some(context) = NonNull::new(unsafe { llama::ggml_init(parameters) }) else {
            // SAFETY: ours, freed once.
            unsafe { llama::ggml_backend_free(backend.as_ptr()) };
            return Err(no_memory("context"));
        };
        let mut bench = Self {
            backend,
            context,
            memory: std::ptr::null_mut(),
            graph: std::ptr::null_mut(),
            weights_bytes: matrix_bytes * matrices_count as u64,
        };
        bench.build(dtype, side_count, matrices_count);
        // SAFETY: context and backend are live; all its tensors are without memory.
        bench.memory =
            unsafe { llama::ggml_backend_alloc_ctx_tensors(context.as_ptr(), backend.as_ptr()) };
        if bench.memory.is_null() {
            return Err(no_memory("memory for the weights"));
        }
        bench.fill();
        Ok(bench)
    }

    fn build(&mut self, dtype: DType, side_count: u64, matrices_count: usize) {
        let number = dtype.ggml_number().unwrap_or(0);
        let (context, side) = (self.context.as_ptr(), side_count as i64);
        // SAFETY: the context has room for one vector, these matrices, their products and the graph (see `new`).
        unsafe {
            self.graph = llama::ggml_new_graph_custom(context, 2 * matrices_count, false);
            let vector = llama::ggml_new_tensor_2d(context, llama::GGML_TYPE_F32, side, 1);
            for _ in 0..matrices_count {
                let matrix = llama::ggml_new_tensor_2d(context, number, side, side);
                let product = llama::ggml_mul_mat(context, matrix, vector);
                llama::ggml_build_forward_expand(self.graph, product);
            }
        }
    }

    /// On huge pages where the kernel grants them, as flea's pools are, and with numbers that are some.
    fn fill(&self) {
        // SAFETY: the memory is allocated; advice changes no contents, and a refusal only leaves small pages. The range
        // is cut to whole pages of the allocation.
        unsafe {
            let base = llama::ggml_backend_buffer_get_base(self.memory);
            let len = llama::ggml_backend_buffer_get_size(self.memory);
            let skipped = base.align_offset(4096);
            if skipped < len {
                let start = base.wrapping_byte_add(skipped);
                libc::madvise(start, (len - skipped) & !4095, libc::MADV_HUGEPAGE);
            }
            llama::ggml_backend_buffer_clear(self.memory, WEIGHT_BYTE);
        }
    }

    fn seconds_per_pass(&self, span: Duration) -> Result<f64> {
        // Touches everything once.
        self.pass()?;
        let began = Instant::now();
        let mut passes_count = 0u32;
        while passes_count == 0 || began.elapsed() < span {
            self.pass()?;
            passes_count += 1;
        }
        Ok((began.elapsed().as_secs_f64() / f64::from(passes_count)).max(1e-9))
    }

    fn pass(&self) -> Result<()> {
        // SAFETY: graph and backend are live, every tensor of the graph has memory.
        let status =
            unsafe { llama::ggml_backend_graph_compute(self.backend.as_ptr(), self.graph) };
        if status == llama::GGML_STATUS_SUCCESS {
            Ok(())
        } else {
            Err(Error::new(
                ErrorKind::NoMemory,
                format!("ggml could not compute: status {status}"),
            ))
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // SAFETY: ours, each freed once; NULL memory is allowed. The graph lives in the context.
        unsafe {
            llama::ggml_backend_buffer_free(self.memory);
            llama::ggml_free(self.context.as_ptr());
            llama::ggml_backend_free(self.backend.as_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_a_rate() {
        let measured = measure(Duration::from_millis(1), &AtomicBool::new(false)).unwrap();
        assert_eq!(measured.rates.len(), DTYPES.len());
        for rate in &measured.rates {
            assert!(DType::from_name(&rate.dtype).is_some(), "{rate:?}");
            assert!(
                rate.gb_per_second > 0.01 && rate.gb_per_second < 10_000.0,
                "{rate:?}"
            );
        }
        let node_seconds = measured.node_seconds;
        assert!(node_seconds > 1e-8 && node_seconds < 1.0, "{node_seconds}");
    }
}
