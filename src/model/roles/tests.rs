//! The order of use on the names of real architectures, and what is told apart by name alone.

use super::*;

fn block(naming: Naming, name: &str) -> (u32, Role, u16) {
    let meaning = classify(naming, name);
    match meaning.place {
        Place::Block(number) => (number, meaning.role, meaning.order),
        other => panic!("{name} is {other:?}"),
    }
}

/// The orders of these names must rise.
fn rises(naming: Naming, names: &[&str]) {
    let orders: Vec<u16> = names.iter().map(|name| block(naming, name).2).collect();
    assert!(
        orders.windows(2).all(|pair| pair[0] <= pair[1]),
        "{names:?} have the orders {orders:?}"
    );
    assert!(orders[0] > ORDER_UNKNOWN && orders[0] < orders[orders.len() - 1]);
}

#[test]
fn blocks_run_attention_first_and_down_last() {
    for names in [
        // llama, qwen2 (biases), qwen3 (norms of q and k).
        &[
            "attn_norm.weight",
            "attn_q.bias",
            "attn_k.weight",
            "attn_k_norm.weight",
            "attn_v.weight",
            "attn_output.weight",
            "ffn_norm.weight",
            "ffn_gate.weight",
            "ffn_up.weight",
            "ffn_down.weight",
        ][..],
        // gemma2, gemma3, gemma3n, gemma4.
        &[
            "altup_router.weight",
            "attn_norm.weight",
            "laurel_l.weight",
            "attn_q.weight",
            "attn_output.weight",
            "post_attention_norm.weight",
            "ffn_norm.weight",
            "ffn_up.weight",
            "ffn_down.weight",
            "post_ffw_norm.weight",
            "inp_gate.weight",
            "proj.weight",
            "post_norm.weight",
            "layer_output_scale.weight",
        ],
        // mixtral, qwen3moe, gpt-oss.
        &[
            "attn_q.weight",
            "attn_sinks.weight",
            "attn_output.bias",
            "ffn_gate_inp.weight",
            "ffn_gate_exps.weight",
            "ffn_up_exps.weight",
            "ffn_down_exps.weight",
        ],
        // deepseek2.
        &[
            "attn_q_a.weight",
            "attn_q_a_norm.weight",
            "attn_q_b.weight",
            "attn_kv_a_mqa.weight",
            "attn_kv_a_norm.weight",
            "attn_k_b.weight",
            "attn_v_b.weight",
            "attn_output.weight",
            "ffn_gate_inp.weight",
            "exp_probs_b.bias",
            "ffn_gate_exps.weight",
            "ffn_down_exps.weight",
            "ffn_gate_shexp.weight",
            "ffn_down_shexp.weight",
        ],
        // qwen3next's linear attention, mamba.
        &[
            "attn_norm.weight",
            "ssm_in.weight",
            "ssm_ba.weight",
            "ssm_conv1d.weight",
            "ssm_dt.bias",
            "ssm_a",
            "ssm_norm.weight",
            "ssm_out.weight",
            "post_attention_norm.weight",
            "ffn_gate_inp.weight",
            "ffn_down_exps.weight",
        ],
        // falcon, phi, starcoder: fused.
        &[
            "attn_norm.weight",
            "attn_norm_2.weight",
            "attn_qkv.weight",
            "attn_output.weight",
            "ffn_up.bias",
            "ffn_down.bias",
        ],
    ] {
        let full: Vec<String> = names.iter().map(|name| format!("blk.3.{name}")).collect();
        let full: Vec<&str> = full.iter().map(String::as_str).collect();
        rises(Naming::Gguf, &full);
    }
}

#[test]
fn hugging_face_blocks_run_in_the_same_order() {
    rises(
        Naming::HuggingFace,
        &[
            "model.layers.1.input_layernorm.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.1.self_attn.o_proj.weight",
            "model.layers.1.post_attention_layernorm.weight",
            "model.layers.1.mlp.gate_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.1.mlp.gate.weight",
            "model.layers.1.mlp.experts.17.gate_proj.weight_scale_inv",
            "model.layers.1.mlp.experts.17.down_proj.weight",
            "model.layers.1.mlp.shared_experts.down_proj.weight",
        ],
    );
    for (name, role) in [
        ("transformer.h.0.attn.c_attn.weight", Role::Attention),
        (
            "transformer.h.0.self_attention.dense.weight",
            Role::AttentionOutput,
        ),
        (
            "gpt_neox.layers.0.mlp.dense_4h_to_h.bias",
            Role::FeedForwardDown,
        ),
        ("backbone.layers.0.mixer.A_log", Role::Mixer),
        (
            "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            Role::ExpertsDown,
        ),
        (
            "model.layers.0.mlp.experts.gate_up_proj_blocks",
            Role::Experts,
        ),
        (
            "model.language_model.layers.0.linear_attn.in_proj_qkvz.weight",
            Role::Mixer,
        ),
    ] {
        assert_eq!(
            (
                block(Naming::HuggingFace, name).0,
                block(Naming::HuggingFace, name).1
            ),
            (0, role),
            "{name}"
        );
    }
}

#[test]
fn experts_know_their_number() {
    let merged = classify(Naming::Gguf, "blk.2.ffn_up_exps.weight");
    assert_eq!((merged.role, merged.expert_index), (Role::Experts, None));
    let single = classify(Naming::Gguf, "blk.2.ffn_down.5.weight");
    assert_eq!(
        (single.role, single.expert_index),
        (Role::ExpertsDown, Some(5))
    );
    assert_eq!(
        single.order,
        classify(Naming::Gguf, "blk.2.ffn_down_exps.weight").order
    );
    let hf = classify(
        Naming::HuggingFace,
        "model.layers.2.mlp.experts.5.up_proj.weight",
    );
    assert_eq!((hf.role, hf.expert_index), (Role::Experts, Some(5)));
}

#[test]
fn heads_and_rows_are_told_apart() {
    for (naming, name, place, role) in [
        (Naming::Gguf, "output.weight", Place::Head, Role::Output),
        (Naming::Gguf, "output.bias", Place::Head, Role::Output),
        (
            Naming::Gguf,
            "output_norm.weight",
            Place::Head,
            Role::OutputNorm,
        ),
        (
            Naming::Gguf,
            "output_hc_fn.weight",
            Place::Host,
            Role::Other,
        ),
        (
            Naming::Gguf,
            "token_embd.weight",
            Place::Host,
            Role::TokenEmbedding,
        ),
        (
            Naming::Gguf,
            "token_embd_norm.weight",
            Place::Host,
            Role::Other,
        ),
        (
            Naming::Gguf,
            "per_layer_token_embd.weight",
            Place::Host,
            Role::PerLayerEmbedding,
        ),
        (
            Naming::Gguf,
            "position_embd.weight",
            Place::Host,
            Role::OtherEmbedding,
        ),
        (
            Naming::Gguf,
            "rope_freqs.weight",
            Place::Host,
            Role::RopeTable,
        ),
        (
            Naming::Gguf,
            "enc.blk.0.attn_q.weight",
            Place::Host,
            Role::Other,
        ),
        (
            Naming::Gguf,
            "blk.07.attn_q.weight",
            Place::Host,
            Role::Other,
        ),
        (
            Naming::Gguf,
            "blk.99999999999.attn_q.weight",
            Place::Host,
            Role::Other,
        ),
        (Naming::Gguf, "blk.", Place::Host, Role::Other),
        (
            Naming::HuggingFace,
            "lm_head.weight",
            Place::Head,
            Role::Output,
        ),
        (
            Naming::HuggingFace,
            "model.norm.weight",
            Place::Head,
            Role::OutputNorm,
        ),
        (
            Naming::HuggingFace,
            "model.embed_tokens.weight",
            Place::Host,
            Role::TokenEmbedding,
        ),
        (
            Naming::HuggingFace,
            "vision_tower.layers.0.attn.q.weight",
            Place::Host,
            Role::Other,
        ),
        (
            Naming::HuggingFace,
            "mtp.layers.0.mlp.up_proj.weight",
            Place::Host,
            Role::Other,
        ),
    ] {
        let meaning = classify(naming, name);
        assert_eq!((meaning.place, meaning.role), (place, role), "{name}");
    }
}

/// A name nobody knows must not be planned late.
#[test]
fn unknown_names_come_first() {
    assert_eq!(
        block(Naming::Gguf, "blk.4.something_new.weight"),
        (4, Role::Other, ORDER_UNKNOWN)
    );
    assert_eq!(
        block(Naming::HuggingFace, "model.layers.4.novel.weight"),
        (4, Role::Other, ORDER_UNKNOWN)
    );
}

#[test]
fn tables_hold_no_stem_twice() {
    for table in [GGUF_BLOCK, GGUF_ROWS, GGUF_HEAD, HF_BLOCK, HF_ROWS, HF_HEAD] {
        let mut stems: Vec<&str> = table.iter().map(|row| row.0).collect();
        stems.sort_unstable();
        assert!(stems.windows(2).all(|pair| pair[0] != pair[1]), "{stems:?}");
    }
}
