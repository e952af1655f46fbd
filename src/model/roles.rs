//! Tensor roles: from a tensor's name to its place in a pass and the order of its use inside its layer.
//!
//! The order decides which part of a layer may arrive last, so it errs on the early side: a name the tables do not know
//! counts as used first ([`ORDER_UNKNOWN`]). A wrong order costs a wait, never a wrong byte. The tables follow llama.cpp's
//! `LLM_TENSOR_NAMES` and the module names of Hugging Face's transformers; where graphs differ, attention comes before
//! feed-forward, gate and up before down, the router before its experts, routed experts before shared ones.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Role {
    /// One row per token of the vocabulary.
    TokenEmbedding,
    /// One row per position, token type and the like.
    OtherEmbedding,
    /// One row per token and layer.
    PerLayerEmbedding,
    /// Tables of the rotary position encoding.
    RopeTable,
    /// A normalisation or scale inside a layer.
    Norm,
    /// Attention's input side: query, key, value, their low-rank forms.
    Attention,
    /// Attention's output projection.
    AttentionOutput,
    /// A state-space, linear-attention, convolution or recurrent mixer.
    Mixer,
    /// Chooses the experts.
    Router,
    /// Feed-forward: gate and up.
    FeedForward,
    /// Feed-forward: down.
    FeedForwardDown,
    /// Gate and up of routed experts.
    Experts,
    /// Down of routed experts.
    ExpertsDown,
    /// Any part of a shared expert.
    SharedExpert,
    /// What mixes per-layer inputs or side streams in.
    Adapter,
    /// Only used to draft the token after the next.
    NextToken,
    /// The norm before the output head.
    OutputNorm,
    /// The output head.
    Output,
    /// None of these.
    Other,
}

impl Role {
    /// A word for tables.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::TokenEmbedding => "token rows",
            Self::OtherEmbedding => "rows",
            Self::PerLayerEmbedding => "per-layer rows",
            Self::RopeTable => "rope",
            Self::Norm => "norm",
            Self::Attention => "attention",
            Self::AttentionOutput => "attention out",
            Self::Mixer => "mixer",
            Self::Router => "router",
            Self::FeedForward => "ffn",
            Self::FeedForwardDown => "ffn down",
            Self::Experts => "experts",
            Self::ExpertsDown => "experts down",
            Self::SharedExpert => "shared expert",
            Self::Adapter => "adapter",
            Self::NextToken => "next token",
            Self::OutputNorm => "output norm",
            Self::Output => "output",
            Self::Other => "other",
        }
    }

    /// True for tables of which a pass needs single rows, chosen by the tokens.
    #[must_use]
    pub const fn is_row_table(self) -> bool {
        matches!(
            self,
            Self::TokenEmbedding | Self::OtherEmbedding | Self::PerLayerEmbedding
        )
    }

    /// True for routed experts, of which a pass needs only the chosen ones.
    #[must_use]
    pub const fn is_routed_expert(self) -> bool {
        matches!(self, Self::Experts | Self::ExpertsDown)
    }
}

/// Which vocabulary of tensor names a file uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// llama.cpp's (`blk.7.attn_q.weight`).
    Gguf,
    /// Hugging Face's (`model.layers.7.self_attn.q_proj.weight`).
    HuggingFace,
}

/// Where in a pass a tensor is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the block of this number.
    Block(u32),
    /// After the blocks.
    Head,
    /// Elsewhere: the host keeps it.
    Host,
}

/// What a tensor's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// Where in a pass it is used.
    pub place: Place,
    /// What it is for.
    pub role: Role,
    /// Its turn inside its layer: smaller is earlier.
    pub order: u16,
    /// The expert it belongs to, for files with one tensor per expert.
    pub expert_index: Option<u32>,
}

/// The order of a name no table knows: first, so that nothing is late.
pub const ORDER_UNKNOWN: u16 = 0;

/// Name stem, role, order. A stem matches a name whose dotted parts begin with it.
type Row = (&'static str, Role, u16);

/// Below `blk.N.`.
const GGUF_BLOCK: &[Row] = &[
    // Hyper-connections and side streams run before attention.
    ("hc_attn_norm", Role::Adapter, 4),
    ("hc_attn_fn", Role::Adapter, 5),
    ("hc_attn_base", Role::Adapter, 5),
    ("hc_attn_scale", Role::Adapter, 5),
    ("hc_attn_down", Role::Adapter, 5),
    ("hc_attn_up", Role::Adapter, 6),
    ("hc_attn_inject", Role::Adapter, 6),
    ("altup_router_norm", Role::Adapter, 4),
    ("altup_router", Role::Adapter, 5),
    ("altup_predict_coef", Role::Adapter, 6),
    ("attn_res_score", Role::Adapter, 7),
    ("attn_norm", Role::Norm, 10),
    ("attn_norm_2", Role::Norm, 11),
    ("laurel_l", Role::Adapter, 14),
    ("laurel_r", Role::Adapter, 15),
    ("laurel_post_norm", Role::Norm, 16),
    // Attention, plain, low-rank (MLA) and gated.
    ("attn_qkv", Role::Attention, 20),
    ("attn_q", Role::Attention, 20),
    ("attn_q_a", Role::Attention, 20),
    ("attn_gate", Role::Attention, 21),
    ("attn_q_a_norm", Role::Norm, 21),
    ("attn_q_b", Role::Attention, 22),
    ("attn_q_norm", Role::Norm, 23),
    ("attn_kv", Role::Attention, 24),
    ("attn_kv_a_mqa", Role::Attention, 24),
    ("attn_k", Role::Attention, 24),
    ("attn_kv_a_norm", Role::Norm, 25),
    ("attn_k_norm", Role::Norm, 25),
    ("attn_v", Role::Attention, 26),
    ("attn_conv_base", Role::Attention, 26),
    ("attn_conv_proj", Role::Attention, 26),
    ("attn_kv_b", Role::Attention, 27),
    ("attn_k_b", Role::Attention, 27),
    ("attn_rot_embd", Role::RopeTable, 28),
    ("rope_freqs", Role::RopeTable, 28),
    ("rope_factors_long", Role::RopeTable, 28),
    ("rope_factors_short", Role::RopeTable, 28),
    ("indexer", Role::Attention, 30),
    ("indexer_compressor_kv", Role::Attention, 31),
    ("indexer_compressor_gate", Role::Attention, 31),
    ("indexer_compressor_ape", Role::Attention, 31),
    ("indexer_compressor_norm", Role::Norm, 32),
    ("attn_compressor_kv", Role::Attention, 33),
    ("attn_compressor_gate", Role::Attention, 33),
    ("attn_compressor_ape", Role::Attention, 33),
    ("attn_compressor_norm", Role::Norm, 34),
    ("attn_sinks", Role::Attention, 35),
    ("attn_v_b", Role::Attention, 40),
    ("attn_sub_norm", Role::Norm, 45),
    ("attn_output_a", Role::AttentionOutput, 48),
    ("attn_output_b", Role::AttentionOutput, 49),
    ("attn_output", Role::AttentionOutput, 50),
    ("vis_attn_qkv", Role::Attention, 20),
    ("vis_attn_output", Role::AttentionOutput, 50),
    // State space, linear attention, short convolution.
    ("ssm_in", Role::Mixer, 20),
    ("ssm_ba", Role::Mixer, 22),
    ("ssm_alpha", Role::Mixer, 22),
    ("ssm_beta", Role::Mixer, 22),
    ("ssm_f_a", Role::Mixer, 24),
    ("ssm_f_b", Role::Mixer, 25),
    ("ssm_conv1d", Role::Mixer, 30),
    ("ssm_conv1d_q", Role::Mixer, 30),
    ("ssm_conv1d_k", Role::Mixer, 30),
    ("ssm_conv1d_v", Role::Mixer, 30),
    ("ssm_x", Role::Mixer, 32),
    ("ssm_dt_norm", Role::Norm, 33),
    ("ssm_b_norm", Role::Norm, 33),
    ("ssm_c_norm", Role::Norm, 33),
    ("ssm_dt", Role::Mixer, 34),
    ("ssm_a", Role::Mixer, 36),
    ("ssm_d", Role::Mixer, 38),
    ("ssm_g", Role::Mixer, 40),
    ("ssm_g_a", Role::Mixer, 40),
    ("ssm_g_b", Role::Mixer, 41),
    ("ssm_norm", Role::Norm, 42),
    ("ssm_out", Role::Mixer, 50),
    ("shortconv.in_proj", Role::Mixer, 20),
    ("shortconv.conv", Role::Mixer, 30),
    ("shortconv.out_proj", Role::Mixer, 50),
    // RWKV.
    ("time_mix_lerp_x", Role::Mixer, 18),
    ("time_mix_w1", Role::Mixer, 19),
    ("time_mix_w2", Role::Mixer, 19),
    ("time_mix_lerp_w", Role::Mixer, 20),
    ("time_mix_lerp_k", Role::Mixer, 20),
    ("time_mix_lerp_v", Role::Mixer, 20),
    ("time_mix_lerp_r", Role::Mixer, 20),
    ("time_mix_lerp_g", Role::Mixer, 20),
    ("time_mix_lerp_fused", Role::Mixer, 20),
    ("time_mix_receptance", Role::Mixer, 24),
    ("time_mix_w0", Role::Mixer, 25),
    ("time_mix_key", Role::Mixer, 26),
    ("time_mix_value", Role::Mixer, 27),
    ("time_mix_v0", Role::Mixer, 28),
    ("time_mix_v1", Role::Mixer, 28),
    ("time_mix_v2", Role::Mixer, 28),
    ("time_mix_gate", Role::Mixer, 29),
    ("time_mix_g1", Role::Mixer, 29),
    ("time_mix_g2", Role::Mixer, 29),
    ("time_mix_a0", Role::Mixer, 30),
    ("time_mix_a1", Role::Mixer, 30),
    ("time_mix_a2", Role::Mixer, 30),
    ("time_mix_k_k", Role::Mixer, 31),
    ("time_mix_k_a", Role::Mixer, 31),
    ("time_mix_decay_w1", Role::Mixer, 32),
    ("time_mix_decay_w2", Role::Mixer, 32),
    ("time_mix_decay", Role::Mixer, 32),
    ("time_mix_first", Role::Mixer, 34),
    ("time_mix_ln", Role::Norm, 42),
    ("time_mix_r_k", Role::Mixer, 43),
    ("time_mix_output", Role::Mixer, 50),
    // Between the halves.
    ("post_attention_norm", Role::Norm, 60),
    ("attn_output_norm", Role::Norm, 60),
    ("hc_ffn_norm", Role::Adapter, 64),
    ("hc_ffn_fn", Role::Adapter, 65),
    ("hc_ffn_base", Role::Adapter, 65),
    ("hc_ffn_scale", Role::Adapter, 65),
    ("hc_ffn_down", Role::Adapter, 65),
    ("hc_ffn_up", Role::Adapter, 66),
    ("hc_ffn_inject", Role::Adapter, 66),
    ("ffn_res_score", Role::Adapter, 67),
    // Feed-forward, dense.
    ("ffn_norm", Role::Norm, 70),
    ("channel_mix_lerp_k", Role::Mixer, 72),
    ("channel_mix_lerp_r", Role::Mixer, 72),
    ("channel_mix_receptance", Role::Mixer, 80),
    ("channel_mix_key", Role::Mixer, 81),
    ("channel_mix_value", Role::Mixer, 90),
    ("ffn_conv_base", Role::FeedForward, 78),
    ("ffn_conv_proj", Role::FeedForward, 78),
    ("ffn_gate", Role::FeedForward, 80),
    ("ffn_up", Role::FeedForward, 82),
    ("ffn.act", Role::FeedForward, 85),
    ("ffn_sub_norm", Role::Norm, 88),
    ("ffn_down", Role::FeedForwardDown, 90),
    ("vis_gate", Role::FeedForward, 80),
    ("vis_up", Role::FeedForward, 82),
    ("vis_down", Role::FeedForwardDown, 90),
    // Feed-forward, experts.
    ("post_ffw_norm_1", Role::Norm, 98),
    ("ffn_norm_exps", Role::Norm, 100),
    ("pre_ffw_norm_2", Role::Norm, 100),
    ("ffn_gate_inp", Role::Router, 110),
    ("ffn_gate_tid2eid", Role::Router, 111),
    ("exp_probs_b", Role::Router, 112),
    ("exp_probs_b_vl", Role::Router, 112),
    ("ffn_latent_down", Role::Experts, 115),
    ("ffn_routed_down", Role::Experts, 115),
    ("ffn_gate_exps", Role::Experts, 120),
    ("ffn_gate_up_exps", Role::Experts, 120),
    ("ffn_up_exps", Role::Experts, 122),
    ("ffn_gate_chexps", Role::Experts, 124),
    ("ffn_up_chexps", Role::Experts, 126),
    ("ffn_down_exps", Role::ExpertsDown, 130),
    ("ffn_down_chexps", Role::ExpertsDown, 132),
    ("ffn_routed_norm", Role::Norm, 134),
    ("ffn_latent_up", Role::ExpertsDown, 135),
    ("ffn_routed_up", Role::ExpertsDown, 135),
    ("ffn_gate_inp_shexp", Role::SharedExpert, 140),
    ("ffn_gate_shexp", Role::SharedExpert, 141),
    ("ffn_up_shexp", Role::SharedExpert, 142),
    ("ffn_down_shexp", Role::SharedExpert, 150),
    // The end of a layer.
    ("post_ffw_norm_2", Role::Norm, 158),
    ("post_ffw_norm", Role::Norm, 160),
    ("layer_output_norm", Role::Norm, 170),
    ("altup_correct_coef", Role::Adapter, 174),
    ("altup_correct_scale", Role::Adapter, 175),
    ("inp_gate", Role::Adapter, 180),
    ("proj", Role::Adapter, 182),
    ("post_norm", Role::Norm, 184),
    ("layer_output_scale", Role::Norm, 190),
    ("nextn", Role::NextToken, 200),
];

/// Outside the blocks, GGUF. What is not here is kept by the host, role [`Role::Other`].
const GGUF_ROWS: &[Row] = &[
    ("token_embd", Role::TokenEmbedding, 0),
    ("position_embd", Role::OtherEmbedding, 0),
    ("token_types", Role::OtherEmbedding, 0),
    ("per_layer_token_embd", Role::PerLayerEmbedding, 0),
    ("rope_freqs", Role::RopeTable, 0),
    ("rope_factors_long", Role::RopeTable, 0),
    ("rope_factors_short", Role::RopeTable, 0),
];

/// After the blocks, GGUF.
const GGUF_HEAD: &[Row] = &[
    ("output_norm", Role::OutputNorm, 0),
    ("output", Role::Output, 10),
];

/// Below `PREFIX.N.`, Hugging Face.
const HF_BLOCK: &[Row] = &[
    ("input_layernorm", Role::Norm, 10),
    ("ln_1", Role::Norm, 10),
    ("ln", Role::Norm, 10),
    ("ln_attn", Role::Norm, 10),
    ("ln_mlp", Role::Norm, 70),
    ("norm_1", Role::Norm, 10),
    ("norm", Role::Norm, 10),
    ("attention_norm", Role::Norm, 10),
    ("operator_norm", Role::Norm, 10),
    ("self_attn_layer_norm", Role::Norm, 10),
    ("pre_attention_layernorm", Role::Norm, 10),
    ("self_attn.q_proj", Role::Attention, 20),
    ("self_attn.q_a_proj", Role::Attention, 20),
    ("self_attn.qkv_proj", Role::Attention, 20),
    ("self_attn.query_key_value", Role::Attention, 20),
    ("self_attn.W_pack", Role::Attention, 20),
    ("self_attention.query_key_value", Role::Attention, 20),
    ("attention.query_key_value", Role::Attention, 20),
    ("attn.c_attn", Role::Attention, 20),
    ("attn.Wqkv", Role::Attention, 20),
    ("mixer.Wqkv", Role::Attention, 20),
    ("self_attn.q_a_layernorm", Role::Norm, 21),
    ("self_attn.q_b_proj", Role::Attention, 22),
    ("self_attn.q_norm", Role::Norm, 23),
    ("self_attn.q_layernorm", Role::Norm, 23),
    ("self_attn.k_proj", Role::Attention, 24),
    ("self_attn.kv_a_proj_with_mqa", Role::Attention, 24),
    ("self_attn.k_norm", Role::Norm, 25),
    ("self_attn.k_layernorm", Role::Norm, 25),
    ("self_attn.kv_a_layernorm", Role::Norm, 25),
    ("self_attn.v_proj", Role::Attention, 26),
    ("self_attn.kv_b_proj", Role::Attention, 27),
    ("self_attn.rotary_emb", Role::RopeTable, 28),
    ("attention.rotary_emb", Role::RopeTable, 28),
    ("self_attn.indexer", Role::Attention, 30),
    ("self_attn.sinks", Role::Attention, 35),
    ("self_attn.o_proj", Role::AttentionOutput, 50),
    ("self_attn.out_proj", Role::AttentionOutput, 50),
    ("self_attn.dense", Role::AttentionOutput, 50),
    ("self_attention.dense", Role::AttentionOutput, 50),
    ("attention.dense", Role::AttentionOutput, 50),
    ("attn.c_proj", Role::AttentionOutput, 50),
    ("attn.out_proj", Role::AttentionOutput, 50),
    // State space and linear attention.
    ("linear_attn.in_proj_qkvz", Role::Mixer, 20),
    ("linear_attn.in_proj_qkv", Role::Mixer, 20),
    ("linear_attn.in_proj_z", Role::Mixer, 21),
    ("linear_attn.in_proj_ba", Role::Mixer, 22),
    ("linear_attn.in_proj_b", Role::Mixer, 22),
    ("linear_attn.in_proj_a", Role::Mixer, 22),
    ("linear_attn.conv1d", Role::Mixer, 30),
    ("linear_attn.dt_bias", Role::Mixer, 34),
    ("linear_attn.A_log", Role::Mixer, 36),
    ("linear_attn.norm", Role::Norm, 42),
    ("linear_attn.out_proj", Role::Mixer, 50),
    ("mixer.in_proj", Role::Mixer, 20),
    ("mixer.conv1d", Role::Mixer, 30),
    ("mixer.x_proj", Role::Mixer, 32),
    ("mixer.dt_proj", Role::Mixer, 34),
    ("mixer.dt_bias", Role::Mixer, 34),
    ("mixer.A_log", Role::Mixer, 36),
    ("mixer.D", Role::Mixer, 38),
    ("mixer.norm", Role::Norm, 42),
    ("mixer.out_proj", Role::AttentionOutput, 50),
    ("conv.in_proj", Role::Mixer, 20),
    ("conv.conv", Role::Mixer, 30),
    ("conv.out_proj", Role::Mixer, 50),
    // Between the halves.
    ("post_attention_layernorm", Role::Norm, 60),
    ("ln_2", Role::Norm, 70),
    ("norm_2", Role::Norm, 70),
    ("ffn_norm", Role::Norm, 70),
    ("final_layer_norm", Role::Norm, 70),
    ("pre_feedforward_layernorm", Role::Norm, 70),
    ("pre_mlp_layernorm", Role::Norm, 70),
    // Feed-forward, dense.
    ("mlp.gate_up_proj", Role::FeedForward, 80),
    ("mlp.gate_proj", Role::FeedForward, 80),
    ("mlp.up_proj", Role::FeedForward, 82),
    ("mlp.c_fc", Role::FeedForward, 82),
    ("mlp.fc1", Role::FeedForward, 82),
    ("mlp.dense_h_to_4h", Role::FeedForward, 82),
    ("ffn.up_proj", Role::FeedForward, 82),
    ("fc1", Role::FeedForward, 82),
    ("mlp.down_proj", Role::FeedForwardDown, 90),
    ("mlp.c_proj", Role::FeedForwardDown, 90),
    ("mlp.fc2", Role::FeedForwardDown, 90),
    ("mlp.dense_4h_to_h", Role::FeedForwardDown, 90),
    ("ffn.down_proj", Role::FeedForwardDown, 90),
    ("fc2", Role::FeedForwardDown, 90),
    // Feed-forward, experts.
    ("post_feedforward_layernorm_1", Role::Norm, 98),
    ("pre_feedforward_layernorm_2", Role::Norm, 100),
    ("mlp.gate", Role::Router, 110),
    ("mlp.router", Role::Router, 110),
    ("block_sparse_moe.gate", Role::Router, 110),
    ("feed_forward.router", Role::Router, 110),
    ("mlp.experts.gate_up_proj", Role::Experts, 120),
    ("mlp.experts.gate_up_proj_blocks", Role::Experts, 120),
    ("mlp.experts.gate_up_proj_scales", Role::Experts, 120),
    ("mlp.experts.gate_up_proj_bias", Role::Experts, 120),
    ("mlp.experts.gate_proj", Role::Experts, 120),
    ("feed_forward.experts.gate_up_proj", Role::Experts, 120),
    ("block_sparse_moe.experts.w1", Role::Experts, 120),
    ("mlp.experts.up_proj", Role::Experts, 122),
    ("block_sparse_moe.experts.w3", Role::Experts, 122),
    ("mlp.experts.down_proj", Role::ExpertsDown, 130),
    ("mlp.experts.down_proj_blocks", Role::ExpertsDown, 130),
    ("mlp.experts.down_proj_scales", Role::ExpertsDown, 130),
    ("mlp.experts.down_proj_bias", Role::ExpertsDown, 130),
    ("feed_forward.experts.down_proj", Role::ExpertsDown, 130),
    ("block_sparse_moe.experts.w2", Role::ExpertsDown, 130),
    ("mlp.shared_expert_gate", Role::SharedExpert, 140),
    ("mlp.shared_expert.gate_proj", Role::SharedExpert, 141),
    ("mlp.shared_experts.gate_proj", Role::SharedExpert, 141),
    ("mlp.shared_expert.up_proj", Role::SharedExpert, 142),
    ("mlp.shared_experts.up_proj", Role::SharedExpert, 142),
    ("mlp.shared_expert.down_proj", Role::SharedExpert, 150),
    ("mlp.shared_experts.down_proj", Role::SharedExpert, 150),
    ("feed_forward.shared_expert", Role::SharedExpert, 140),
    // The end of a layer.
    ("post_feedforward_layernorm_2", Role::Norm, 158),
    ("post_feedforward_layernorm", Role::Norm, 160),
    ("per_layer_input_gate", Role::Adapter, 180),
    ("per_layer_projection", Role::Adapter, 182),
    ("post_per_layer_input_norm", Role::Norm, 184),
    ("layer_scalar", Role::Norm, 190),
];

/// Prefixes below which a language model's blocks are numbered. Vision and audio towers number theirs below others, and are
/// kept by the host.
const HF_BLOCKS: &[&str] = &[
    "model.layers.",
    "model.language_model.layers.",
    "language_model.model.layers.",
    "model.text_model.layers.",
    "model.decoder.layers.",
    "transformer.h.",
    "transformer.blocks.",
    "transformer.layers.",
    "gpt_neox.layers.",
    "backbone.layers.",
    "h.",
];

/// Row tables, Hugging Face.
const HF_ROWS: &[Row] = &[
    ("model.embed_tokens", Role::TokenEmbedding, 0),
    ("model.language_model.embed_tokens", Role::TokenEmbedding, 0),
    ("language_model.model.embed_tokens", Role::TokenEmbedding, 0),
    ("model.text_model.embed_tokens", Role::TokenEmbedding, 0),
    ("model.decoder.embed_tokens", Role::TokenEmbedding, 0),
    ("transformer.wte", Role::TokenEmbedding, 0),
    ("transformer.word_embeddings", Role::TokenEmbedding, 0),
    ("transformer.embd.wte", Role::TokenEmbedding, 0),
    ("gpt_neox.embed_in", Role::TokenEmbedding, 0),
    ("backbone.embeddings", Role::TokenEmbedding, 0),
    ("backbone.embedding", Role::TokenEmbedding, 0),
    ("wte", Role::TokenEmbedding, 0),
    ("transformer.wpe", Role::OtherEmbedding, 0),
    ("model.decoder.embed_positions", Role::OtherEmbedding, 0),
    ("wpe", Role::OtherEmbedding, 0),
    ("model.embed_tokens_per_layer", Role::PerLayerEmbedding, 0),
    (
        "model.language_model.embed_tokens_per_layer",
        Role::PerLayerEmbedding,
        0,
    ),
    (
        "language_model.model.embed_tokens_per_layer",
        Role::PerLayerEmbedding,
        0,
    ),
];

/// After the blocks, Hugging Face.
const HF_HEAD: &[Row] = &[
    ("model.norm", Role::OutputNorm, 0),
    ("model.language_model.norm", Role::OutputNorm, 0),
    ("language_model.model.norm", Role::OutputNorm, 0),
    ("model.text_model.norm", Role::OutputNorm, 0),
    ("model.final_layernorm", Role::OutputNorm, 0),
    ("model.embedding_norm", Role::OutputNorm, 0),
    ("model.decoder.final_layer_norm", Role::OutputNorm, 0),
    ("transformer.ln_f", Role::OutputNorm, 0),
    ("transformer.norm_f", Role::OutputNorm, 0),
    ("gpt_neox.final_layer_norm", Role::OutputNorm, 0),
    ("backbone.norm_f", Role::OutputNorm, 0),
    ("ln_f", Role::OutputNorm, 0),
    ("lm_head.ln", Role::OutputNorm, 0),
    ("lm_head", Role::Output, 10),
    ("lm_head.linear", Role::Output, 10),
    ("language_model.lm_head", Role::Output, 10),
    ("embed_out", Role::Output, 10),
];

/// What the name of a tensor says.
#[must_use]
pub fn classify(naming: Naming, name: &str) -> Meaning {
    let (block, rows, head) = match naming {
        Naming::Gguf => (split_block(name, &["blk."]), GGUF_ROWS, GGUF_HEAD),
        Naming::HuggingFace => (split_block(name, HF_BLOCKS), HF_ROWS, HF_HEAD),
    };
    if let Some((number, rest)) = block {
        return in_block(naming, number, rest);
    }
    let outside = |place, (role, order)| Meaning {
        place,
        role,
        order,
        expert_index: None,
    };
    if let Some(found) = lookup(head, name) {
        return outside(Place::Head, found);
    }
    outside(
        Place::Host,
        lookup(rows, name).unwrap_or((Role::Other, ORDER_UNKNOWN)),
    )
}

fn in_block(naming: Naming, number: u32, rest: &str) -> Meaning {
    let (stem, expert_index) = without_number(rest);
    let table = match naming {
        Naming::Gguf => GGUF_BLOCK,
        Naming::HuggingFace => HF_BLOCK,
    };
    let (role, order) = match (naming, expert_index, lookup(table, &stem)) {
        // blk.0.ffn_gate.3.weight, the first mixtral files: an expert under the dense name.
        (Naming::Gguf, Some(_), Some((Role::FeedForward, order))) => (Role::Experts, order + 40),
        (Naming::Gguf, Some(_), Some((Role::FeedForwardDown, order))) => {
            (Role::ExpertsDown, order + 40)
        }
        (_, _, found) => found.unwrap_or((Role::Other, ORDER_UNKNOWN)),
    };
    Meaning {
        place: Place::Block(number),
        role,
        order,
        expert_index: expert_index.filter(|_| role.is_routed_expert()),
    }
}

/// `blk.7.attn_q.weight` -> 7 and `attn_q.weight`.
fn split_block<'a>(name: &'a str, prefixes: &[&str]) -> Option<(u32, &'a str)> {
    let rest = prefixes
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    let (number, rest) = rest.split_once('.')?;
    Some((canonical_number(number)?, rest))
}

/// A number as programs write it: digits only, no leading zero. Anything else is part of a name.
fn canonical_number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}

/// Takes the first number out of a dotted name: `mlp.experts.3.up_proj` -> `mlp.experts.up_proj`, 3.
fn without_number(name: &str) -> (String, Option<u32>) {
    let mut number = None;
    let mut stem = String::with_capacity(name.len());
    for part in name.split('.') {
        if number.is_none() && canonical_number(part).is_some() {
            number = canonical_number(part);
            continue;
        }
        if !stem.is_empty() {
            stem.push('.');
        }
        stem.push_str(part);
    }
    (stem, number)
}

/// The row whose stem is the longest run of leading dotted parts of `name`.
fn lookup(table: &[Row], name: &str) -> Option<(Role, u16)> {
    let mut stem = name;
    loop {
        if let Some(&(_, role, order)) = table.iter().find(|row| row.0 == stem) {
            return Some((role, order));
        }
        stem = stem.rsplit_once('.')?.0;
    }
}

#[cfg(test)]
mod tests;
