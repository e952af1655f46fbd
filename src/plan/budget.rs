//! The budget: from what the user grants to what the weights may take, and back to the smallest grant that works.
//!
//! One meaning everywhere: `total_bytes` is everything the process may hold, `host_bytes` what it holds besides weights
//! in flea's pools, and `weight_budget_bytes = total - host` covers resident pages, shared pages and the ring. An explicit
//! figure that cannot be had is refused, never lowered. Part of plan: file -> catalog -> **plan** -> reader -> pool ->
//! lease -> host.

use std::collections::BTreeMap;

use super::{Method, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, Tensor};
use crate::units::{HumanBytes, KIB, MIB, MemorySpec};

/// What `host_bytes` holds back for everything nobody counted: stacks, allocator slack, the reader's ring.
pub const HOST_RESERVE_BYTES: u64 = 32 * MIB;

/// How one process divides its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Everything the process may hold: `--memory`.
    pub total_bytes: u64,
    /// What it holds besides weights in flea's pools, [`HOST_RESERVE_BYTES`] included.
    pub host_bytes: u64,
    /// What is left for weights: resident pages, shared pages and the ring. `total_bytes - host_bytes`.
    pub weight_budget_bytes: u64,
}

/// The division that `spec` asks for. `available_bytes` is the most this process may hold altogether: memory that is free
/// under every limit above it, and what it holds already.
///
/// # Errors
/// `Refused`, with the arithmetic, when more is asked for than is available or when the host alone needs all of it;
/// `Invalid` for a percentage that is not a positive number.
pub fn resolve(
    spec: MemorySpec,
    available_bytes: u64,
    model_bytes: u64,
    host_bytes: u64,
) -> Result<Budget> {
    let total_bytes = match spec {
        MemorySpec::Auto => available_bytes,
        MemorySpec::Bytes(total_bytes) => total_bytes,
        MemorySpec::Percent(percent) => {
            percent_of(model_bytes, percent)?.saturating_add(host_bytes)
        }
    };
    if total_bytes > available_bytes {
        return Err(refused(format!(
            "{} of memory asked for ({total_bytes} bytes{}), but only {} ({available_bytes} bytes) can be had under the \
             limits of this machine and its cgroups; give less, or free some",
            HumanBytes(total_bytes),
            percent_text(spec, model_bytes, host_bytes),
            HumanBytes(available_bytes),
        )));
    }
    if host_bytes >= total_bytes {
        return Err(refused(format!(
            "{} of memory ({total_bytes} bytes) leave nothing for weights: {} ({host_bytes} bytes) are needed besides \
             them for the host's own memory, KV cache, compute and the weights it keeps",
            HumanBytes(total_bytes),
            HumanBytes(host_bytes),
        )));
    }
    Ok(Budget {
        total_bytes,
        host_bytes,
        weight_budget_bytes: total_bytes - host_bytes,
    })
}

/// The budget for `spec` and the plan within it: [`resolve`], then [`Method::plan`], with every refusal ending in the smallest
/// total that works.
///
/// # Errors
/// `Refused` when the grant is not there or too small, `Invalid` for options out of range.
pub fn resolve_and_plan(
    catalog: &Catalog,
    spec: MemorySpec,
    available_bytes: u64,
    host_bytes: u64,
    method: &Method,
) -> Result<(Budget, Plan)> {
    let smallest_bytes = method.smallest_budget_bytes(catalog)?;
    let with_smallest = |error: Error| {
        extend_refusal(
            &error,
            smallest_bytes,
            host_bytes,
            spec,
            catalog.model_bytes,
        )
    };
    let budget =
        resolve(spec, available_bytes, catalog.model_bytes, host_bytes).map_err(with_smallest)?;
    let plan = method
        .plan(catalog, budget.weight_budget_bytes)
        .map_err(with_smallest)?;
    Ok((budget, plan))
}

/// The smallest `--memory` that works: the smallest budget for weights, and the host.
#[must_use]
pub const fn smallest_total_bytes(smallest_budget_bytes: u64, host_bytes: u64) -> u64 {
    let total_bytes = smallest_budget_bytes.saturating_add(host_bytes);
    // Even a model without layers needs a total above what the host holds.
    if smallest_budget_bytes == 0 {
        total_bytes.saturating_add(1)
    } else {
        total_bytes
    }
}

fn extend_refusal(
    error: &Error,
    smallest_bytes: u64,
    host_bytes: u64,
    spec: MemorySpec,
    model_bytes: u64,
) -> Error {
    if error.kind() != ErrorKind::Refused {
        return error.clone();
    }
    let total_bytes = smallest_total_bytes(smallest_bytes, host_bytes);
    let percent = match spec {
        MemorySpec::Percent(_) => smallest_percent(smallest_bytes, model_bytes)
            .map_or_else(String::new, |percent| {
                format!(", as a percentage {percent:.2}%")
            }),
        _ => String::new(),
    };
    refused(format!(
        "{}; the smallest total that works is {} ({total_bytes} bytes{percent}): {} for weights and {} for the host",
        error.context(),
        HumanBytes(total_bytes),
        HumanBytes(smallest_bytes),
        HumanBytes(host_bytes),
    ))
}

/// The smallest percentage with two places that gives `smallest_bytes`, as it would be typed in; `None` for a model of no
/// bytes.
fn smallest_percent(smallest_bytes: u64, model_bytes: u64) -> Option<f64> {
    if model_bytes == 0 {
        return None;
    }
    // Even a model without layers needs a total above what the host holds.
    let smallest_bytes = smallest_bytes.max(1);
    let exact = smallest_bytes as f64 / model_bytes as f64 * 10_000.0;
    // Rounding may leave the first figure a byte short; the second is a hundredth of a percent larger.
    let candidates = [exact.ceil() / 100.0, (exact.ceil() + 1.0) / 100.0];
    let works = |percent: &f64| {
        percent_of(model_bytes, *percent).is_ok_and(|bytes| bytes >= smallest_bytes)
    };
    candidates.into_iter().find(works)
}

fn refused(context: String) -> Error {
    Error::new(ErrorKind::Refused, context)
}

/// `percent` of `model_bytes`, rounded down.
fn percent_of(model_bytes: u64, percent: f64) -> Result<u64> {
    if !(percent > 0.0 && percent.is_finite()) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{percent}% of the model is not a budget; give a percentage above 0"),
        ));
    }
    // A float-to-integer cast saturates; above 2^53 bytes the result is off by less than a page.
    Ok((model_bytes as f64 * (percent / 100.0)) as u64)
}

fn percent_text(spec: MemorySpec, model_bytes: u64, host_bytes: u64) -> String {
    match spec {
        MemorySpec::Percent(percent) => format!(
            ": {percent}% of the model's {} and {} for the host",
            HumanBytes(model_bytes),
            HumanBytes(host_bytes)
        ),
        _ => String::new(),
    }
}

/// What a llama.cpp host holds besides the weights, in the numbers an estimate needs. For `flea plan`, which has no host
/// to ask; `flea run` measures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostShape {
    /// Weights the host keeps itself.
    pub host_tensor_bytes: u64,
    /// Tokens of context.
    pub context_count: u64,
    /// Elements that all layers together keep in the KV cache per token: their K rows and their V rows.
    pub kv_elements_per_token_count: u64,
    /// The most that one of the layers keeps.
    pub kv_layer_elements_count: u64,
    /// Layers that keep any.
    pub kv_layers_count: u64,
    /// Layers whose keys and values have memory at a time while a drive holds all of them; 0 = memory holds all.
    pub kv_slots_count: u64,
    /// Bytes of [`KV_BLOCK_COUNT`] elements: 64 for f16.
    pub kv_block_bytes: u64,
    /// Width of the hidden state.
    pub embedding_count: u64,
    /// Width of the feed-forward layer; with experts, of all that one token uses.
    pub feed_forward_count: u64,
    /// Tokens in the vocabulary.
    pub vocabulary_count: u64,
    /// Tokens of one ubatch.
    pub ubatch_count: u64,
}

/// Elements in a block of every type that llama.cpp's cache takes, or a multiple of that.
pub const KV_BLOCK_COUNT: u64 = 32;

/// The program and llama.cpp's own structures, without any model: anonymous memory, as a budget counts it. `flea run` of
/// three models (7 MB, 300 MiB of experts, a split one) held 28.9 to 32.5 MiB less than an estimate with 32 MiB here.
const HOST_PROGRAM_BYTES: u64 = 3 * MIB;
/// A token of the vocabulary as llama.cpp holds it: its text, two hash entries, score and attributes.
const VOCABULARY_ENTRY_BYTES: u64 = 256;
/// Bytes of an f32, in which ggml computes.
const F32_BYTES: u64 = 4;
/// Bytes of the attention mask for one token of the ubatch and one of the context.
const MASK_BYTES: u64 = 2;

impl HostShape {
    /// The shape of a host of `catalog` for `context_count` tokens, read from the shapes of the tensors: what no metadata
    /// key says for every architecture, the rows of the K and V projections do. Quantities that the names do not reveal
    /// (a recurrent state, say) count as 0.
    #[must_use]
    pub fn of_catalog(catalog: &Catalog, context_count: u64, ubatch_count: u64) -> Self {
        let mut shape = Self {
            host_tensor_bytes: catalog.host_tensor_bytes,
            context_count,
            kv_block_bytes: 2 * KV_BLOCK_COUNT,
            ubatch_count,
            ..Self::default()
        };
        let mut kv_elements: BTreeMap<_, u64> = BTreeMap::new();
        for tensor in &catalog.tensors {
            shape.take(tensor);
            let layer = kv_elements
                .entry(tensor.layers.map(|span| span.first))
                .or_default();
            *layer = layer.saturating_add(kv_elements_of(tensor));
        }
        for &count in kv_elements.values().filter(|count| **count > 0) {
            shape.kv_layers_count += 1;
            shape.kv_layer_elements_count = shape.kv_layer_elements_count.max(count);
            shape.kv_elements_per_token_count =
                shape.kv_elements_per_token_count.saturating_add(count);
        }
        let is_routed = catalog
            .tensors
            .iter()
            .any(|tensor| tensor.experts.is_some());
        if is_routed && let Some(used_count) = catalog.experts_used_count {
            shape.feed_forward_count = shape.feed_forward_count.saturating_mul(used_count);
        }
        shape
    }

    fn take(&mut self, tensor: &Tensor) {
        let [columns, rows, ..] = tensor.shape;
        let name = tensor.name.as_str();
        let is = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        if is(&[".ffn_up.weight", ".ffn_up_exps.weight", ".up_proj.weight"]) {
            self.feed_forward_count = self.feed_forward_count.max(rows);
        }
        if is(&["token_embd.weight", "embed_tokens.weight"]) {
            self.embedding_count = columns;
            self.vocabulary_count = rows;
        }
    }

    /// The KV cache, all of it: llama.cpp allocates the whole context at the start.
    #[must_use]
    pub fn kv_cache_bytes(&self) -> u64 {
        self.kv_bytes_of(self.kv_elements_per_token_count)
    }

    /// What memory holds of it: all, or its slots.
    #[must_use]
    pub fn kv_bytes(&self) -> u64 {
        if self.kv_slots_count == 0 {
            return self.kv_cache_bytes();
        }
        let slots_count = self.kv_slots_count;
        let ring = self.kv_bytes_of(self.kv_layer_elements_count.saturating_mul(slots_count));
        ring.min(self.kv_cache_bytes())
    }

    fn kv_bytes_of(&self, elements_per_token_count: u64) -> u64 {
        self.context_count
            .saturating_mul(elements_per_token_count)
            .div_ceil(KV_BLOCK_COUNT)
            .saturating_mul(self.kv_block_bytes)
    }

    /// ggml's compute memory for one ubatch: the widest stage of a layer, and the attention mask in f16. Logits are one
    /// row: `flea run` asks for no more. The factors are fitted to what five synthetic models (llama, qwen3, gemma3,
    /// qwen3moe; Q8_0, Q4_0, Q4_K_M) reserved per token of the ubatch, within 6 % of each: gate, up, their product and its
    /// quantised copy beside two hidden states.
    #[must_use]
    pub fn compute_bytes(&self) -> u64 {
        let layer_count = self
            .feed_forward_count
            .saturating_mul(4)
            .saturating_add(self.embedding_count.saturating_mul(2));
        let token_bytes = layer_count
            .saturating_mul(F32_BYTES)
            .saturating_add(self.context_count.saturating_mul(MASK_BYTES));
        let logits_bytes = self.vocabulary_count.saturating_mul(F32_BYTES);
        self.ubatch_count
            .saturating_mul(token_bytes)
            .saturating_add(logits_bytes)
    }

    /// The estimate of `host_bytes`: kept weights, KV cache, compute, the program with its vocabulary, and
    /// [`HOST_RESERVE_BYTES`].
    #[must_use]
    pub fn host_bytes(&self) -> u64 {
        let vocabulary_bytes = self.vocabulary_count.saturating_mul(VOCABULARY_ENTRY_BYTES);
        let sum = self
            .host_tensor_bytes
            .saturating_add(self.kv_bytes())
            .saturating_add(self.compute_bytes())
            .saturating_add(vocabulary_bytes)
            .saturating_add(HOST_PROGRAM_BYTES + HOST_RESERVE_BYTES);
        // Whole 64 KiB: an estimate should not look like a measurement.
        sum.div_ceil(64 * KIB).saturating_mul(64 * KIB)
    }
}

/// Elements of a K or V row, or of both, that a token leaves in the cache through this tensor.
fn kv_elements_of(tensor: &Tensor) -> u64 {
    let [columns, rows, ..] = tensor.shape;
    let is = |suffixes: &[&str]| suffixes.iter().any(|suffix| tensor.name.ends_with(suffix));
    if is(&[".attn_k.weight", ".attn_v.weight", ".attn_kv_a_mqa.weight"])
        || is(&[".k_proj.weight", ".v_proj.weight"])
    {
        rows
    } else if is(&[".attn_qkv.weight"]) {
        // Q is as wide as the hidden state in the architectures that fuse; K and V are the rest.
        rows.saturating_sub(columns)
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::PlanOptions;
    use crate::plan::testing::{NASTY, any_case, even_catalog};
    use crate::units::{GIB, PAGE_4K};

    #[test]
    fn an_explicit_total_is_taken_as_it_is_or_refused() {
        let budget = resolve(MemorySpec::Bytes(4 * GIB), 8 * GIB, 20 * GIB, GIB).unwrap();
        assert_eq!(
            (budget.total_bytes, budget.weight_budget_bytes),
            (4 * GIB, 3 * GIB)
        );
        let error = resolve(MemorySpec::Bytes(9 * GIB), 8 * GIB, 20 * GIB, GIB).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        for figure in [9 * GIB, 8 * GIB] {
            assert!(
                error.context().contains(&format!("{figure} bytes")),
                "{error}"
            );
        }
    }

    #[test]
    fn automatic_takes_what_is_available() {
        let budget = resolve(MemorySpec::Auto, 8 * GIB, 20 * GIB, GIB).unwrap();
        assert_eq!(
            (budget.total_bytes, budget.weight_budget_bytes),
            (8 * GIB, 7 * GIB)
        );
    }

    #[test]
    fn a_percentage_is_of_the_model_and_the_host_comes_on_top() {
        let budget = resolve(MemorySpec::Percent(40.0), 16 * GIB, 10 * GIB, GIB).unwrap();
        assert_eq!(
            (budget.total_bytes, budget.weight_budget_bytes),
            (5 * GIB, 4 * GIB)
        );
        let error = resolve(MemorySpec::Percent(40.0), 4 * GIB, 10 * GIB, GIB).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(
            error.context().contains("40% of the model's 10.00 GiB"),
            "{error}"
        );
        for nonsense in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = resolve(MemorySpec::Percent(nonsense), GIB, GIB, 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        assert!(
            resolve(
                MemorySpec::Percent(1000.0),
                u64::MAX - 1,
                u64::MAX,
                u64::MAX
            )
            .is_err()
        );
    }

    #[test]
    fn a_host_that_needs_everything_is_refused() {
        for spec in [MemorySpec::Auto, MemorySpec::Bytes(2 * GIB)] {
            for host_bytes in [2 * GIB, 3 * GIB] {
                let error = resolve(spec, 2 * GIB, GIB, host_bytes).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Refused);
                assert!(
                    error.context().contains(&format!("{host_bytes} bytes")),
                    "{error}"
                );
            }
        }
    }

    /// The number in `text` between `before` and `after`.
    fn figure<T: std::str::FromStr>(text: &str, before: &str, after: &str) -> Option<T> {
        let (_, rest) = text.split_once(before)?;
        rest.split_once(after)?.0.parse().ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever is refused for being too little, the message names a total that works, and one byte less does not.
        #[test]
        fn the_total_named_in_a_refusal_works((catalog, options) in any_case(NASTY), host_bytes in 0..GIB) {
            let available = u64::MAX;
            let options = Method::Layers(options);
            let smallest = options.smallest_budget_bytes(&catalog).unwrap();
            for total in [0, host_bytes, host_bytes + smallest / 2] {
                let given = resolve_and_plan(&catalog, MemorySpec::Bytes(total), available, host_bytes, &options);
                let Err(error) = given else {
                    prop_assert!(smallest <= total.saturating_sub(host_bytes));
                    continue;
                };
                prop_assert_eq!(error.kind(), ErrorKind::Refused);
                let (_, tail) = error.context().split_once("smallest total that works").unwrap();
                let named: u64 = figure(tail, "(", " bytes").unwrap();
                let (budget, _) =
                    resolve_and_plan(&catalog, MemorySpec::Bytes(named), available, host_bytes, &options).unwrap();
                prop_assert_eq!(budget.total_bytes, budget.host_bytes + budget.weight_budget_bytes);
                prop_assert!(
                    resolve_and_plan(&catalog, MemorySpec::Bytes(named - 1), available, host_bytes, &options).is_err()
                );
            }
        }

        #[test]
        fn the_percentage_named_in_a_refusal_works((catalog, options) in any_case(NASTY), host_bytes in 0..GIB) {
            let options = Method::Layers(options);
            let tiny = MemorySpec::Percent(0.0001);
            let Err(error) = resolve_and_plan(&catalog, tiny, u64::MAX, host_bytes, &options) else {
                return Ok(());
            };
            if error.kind() == ErrorKind::Refused && catalog.model_bytes > 0 {
                let percent: f64 = figure(error.context(), "as a percentage ", "%").unwrap();
                let spec = MemorySpec::Percent(percent);
                prop_assert!(resolve_and_plan(&catalog, spec, u64::MAX, host_bytes, &options).is_ok(), "{}", error);
            }
        }
    }

    #[test]
    fn a_refusal_for_want_of_memory_names_the_smallest_total_too() {
        let catalog = even_catalog(10, &[(1, 10 * PAGE_4K)]);
        let options = Method::Layers(PlanOptions {
            slots_count: 3,
            page_bytes: PAGE_4K,
        });
        let asked = MemorySpec::Bytes(4 * GIB);
        let error = resolve_and_plan(&catalog, asked, 2 * GIB, MIB, &options).unwrap_err();
        let smallest = smallest_total_bytes(30 * PAGE_4K, MIB);
        let named = format!(
            "smallest total that works is {} ({smallest} bytes)",
            HumanBytes(smallest)
        );
        assert!(error.context().contains(&named), "{error}");
    }

    /// Llama 3 8B at 4096 tokens: 32 layers of 8 KV heads of 128 make 512 MiB of cache.
    #[test]
    fn the_estimate_grows_with_context_and_ubatch() {
        let shape = HostShape {
            host_tensor_bytes: 0,
            context_count: 4096,
            kv_elements_per_token_count: 32 * 2 * 8 * 128,
            kv_layer_elements_count: 2 * 8 * 128,
            kv_layers_count: 32,
            kv_slots_count: 0,
            kv_block_bytes: 2 * KV_BLOCK_COUNT,
            embedding_count: 4096,
            feed_forward_count: 14336,
            vocabulary_count: 128_256,
            ubatch_count: 512,
        };
        assert_eq!(shape.kv_bytes(), 512 * MIB);
        let on_drive = HostShape {
            kv_slots_count: 3,
            ..shape
        };
        assert_eq!(
            (on_drive.kv_bytes(), on_drive.kv_cache_bytes()),
            (48 * MIB, 512 * MIB)
        );
        assert_eq!(shape.host_bytes() - on_drive.host_bytes(), 464 * MIB);
        let in_q8_0 = HostShape {
            kv_block_bytes: 34,
            ..shape
        };
        assert_eq!(in_q8_0.kv_bytes(), 272 * MIB);
        let token_bytes = (4 * 14336 + 2 * 4096) * 4 + 2 * 4096;
        assert_eq!(shape.compute_bytes(), 512 * token_bytes + 128_256 * 4);
        let host_bytes = shape.host_bytes();
        assert!(host_bytes > 512 * MIB + shape.compute_bytes() + HOST_RESERVE_BYTES);
        let huge = HostShape {
            context_count: u64::MAX,
            ..shape
        };
        assert!(huge.host_bytes() >= u64::MAX - 64 * KIB);
    }

    /// Reserved by `flea run` of a synthetic llama (35 layers of 1536, feed-forward 4352, 3 KV heads of 128), with a ubatch
    /// of 64 and of 256 tokens: the estimate is within 5 % of the whole.
    #[test]
    fn the_estimate_is_near_measured_hosts() {
        let shape = |context_count, ubatch_count| HostShape {
            host_tensor_bytes: 32_000 * 1536 * 34 / 32,
            context_count,
            kv_elements_per_token_count: 35 * 2 * 3 * 128,
            kv_block_bytes: 2 * KV_BLOCK_COUNT,
            embedding_count: 1536,
            feed_forward_count: 4352,
            vocabulary_count: 32_000,
            ubatch_count,
            ..HostShape::default()
        };
        for (context_count, ubatch_count, measured_mib) in [
            (256, 64, 111.1),
            (256, 256, 126.4),
            (4096, 64, 308.7),
            (4096, 512, 346.7),
        ] {
            let estimate = shape(context_count, ubatch_count).host_bytes() as f64 / MIB as f64;
            let off = estimate / measured_mib - 1.0;
            assert!(
                off.abs() < 0.05,
                "{estimate:.1} MiB, measured {measured_mib}"
            );
        }
    }
}
