//! Geometries from configs and recipes: those of published models come out, wrong ones are refused, and nothing panics.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::config::from_config;
use super::recipe::Recipe;
use super::*;

fn qwen() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "sliding_window": 32768, "use_sliding_window": false,
        "max_window_layers": 70, "tie_word_embeddings": true, "rope_theta": 1000000.0
    })
}

fn gemma4() -> Value {
    let kind = |layer: u32| {
        if layer % 5 == 4 {
            "full_attention"
        } else {
            "sliding_attention"
        }
    };
    json!({
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
            "sliding_window": 512, "layer_types": (0..35).map(kind).collect::<Vec<_>>(), "num_kv_shared_layers": 20,
            "use_double_wide_mlp": true, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
            "hidden_size_per_layer_input": 256, "max_position_embeddings": 131072
        },
        "vision_config": {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 3072}
    })
}

/// Numbers of models that are not in the registry, from their published configs and sizes.
#[test]
fn published_configs_give_published_sizes() {
    let mixtral = json!({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": null
    });
    let deepseek = json!({
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128
    });
    let gpt2 = json!({
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024
    });
    for (config, billions, active) in [
        (qwen(), 3.0859, 2.775),
        (gemma4(), 4.6473, 1.882),
        (mixtral, 46.70, 12.62),
        (deepseek, 671.0, 35.7),
        // Without its table of positions.
        (gpt2, 0.1236, 0.085),
    ] {
        let model = from_config("m", &config).unwrap();
        let found = model.text_parameter_count() as f64 / 1e9;
        assert!((found / billions - 1.0).abs() < 0.002, "{config}: {found}");
        let found = model.active_parameter_count() as f64 / 1e9;
        assert!(
            (found / active - 1.0).abs() < 0.005,
            "{config}: {found} active"
        );
    }
}

#[test]
fn kinds_of_layers_are_told_apart() {
    let model = from_config("m", &gemma4()).unwrap();
    assert_eq!(model.kv_layer_counts(), (3, 12));
    assert!(model.tied_embeddings && model.encoders[0].name == "vision");
    let groups = model.kv_groups(4096);
    let full = KvGroup {
        kind: KvKind::Full,
        vector_count: 512,
        count: 3 * 2 * 4096,
    };
    let windowed = KvGroup {
        kind: KvKind::Windowed,
        vector_count: 256,
        count: 12 * 2 * 512,
    };
    assert_eq!(groups, [full, windowed]);
    // A window that is switched off is none.
    assert_eq!(
        from_config("m", &qwen()).unwrap().kv_layer_counts(),
        (36, 0)
    );

    let kinds: Vec<&str> = (0..48)
        .map(|layer| {
            if layer % 4 == 3 {
                "full_attention"
            } else {
                "linear_attention"
            }
        })
        .collect();
    let hybrid = json!({
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "layer_types": kinds,
        "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4
    });
    let model = from_config("m", &hybrid).unwrap();
    assert_eq!(model.kv_layer_counts(), (12, 0));
    assert_eq!(
        model
            .blocks
            .iter()
            .filter(|block| block.state_element_count > 0)
            .count(),
        36
    );
    let each = 32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128);
    assert_eq!(model.state_element_count(), 36 * each);
}

#[test]
fn latent_attention_keeps_one_vector_per_token() {
    let config = json!({
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
        "num_attention_heads": 16, "vocab_size": 102400, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128
    });
    let model = from_config("m", &config).unwrap();
    let only = KvGroup {
        kind: KvKind::Full,
        vector_count: 576,
        count: 27 * 100,
    };
    assert_eq!(model.kv_groups(100), [only]);
}

#[test]
fn what_cannot_be_is_named() {
    for (key, value, part) in [
        (
            "num_attention_heads",
            json!(17),
            "cannot be divided by 17 heads",
        ),
        ("num_key_value_heads", json!(3), "must be a multiple"),
        ("num_key_value_heads", json!(0), "kv_heads is 0"),
        ("hidden_size", Value::Null, "no 'hidden_size'"),
        (
            "hidden_size",
            json!("wide"),
            "'hidden_size' is \"wide\", not a count",
        ),
        ("hidden_size", json!(-1), "not a count"),
        ("hidden_size", json!(1.5), "not a count"),
        ("hidden_size", json!(u64::MAX), "hidden is"),
        ("vocab_size", json!(1_u64 << 40), "the vocabulary is"),
        ("num_hidden_layers", json!(0), "layers is 0"),
        ("num_hidden_layers", json!(u64::MAX), "at most 4096"),
        (
            "max_position_embeddings",
            json!(0),
            "the largest context is 0",
        ),
        (
            "layer_types",
            json!(["full_attention"]),
            "does not name 36 layers",
        ),
        ("layer_types", json!([1]), "does not name 36 layers"),
        ("num_kv_shared_layers", json!(36), "shared_kv_layers is 36"),
        ("num_experts", json!(4), "no 'num_experts_per_tok'"),
    ] {
        let mut config = qwen();
        config[key] = value.clone();
        let error = from_config("m", &config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains(part), "{key} {value}: {error}");
    }
    for value in [json!([]), json!(3), json!(null), json!({})] {
        assert!(from_config("m", &value).is_err());
    }
}

/// A small recipe with everything in it, to be made wrong.
const RECIPE: &str = r#"{"layers": 8, "hidden": 64, "vocabulary": 100, "heads": 4, "kv_heads": 2, "feed_forward": 128,
    "window": 16, "global_every": 4, "experts": {"count": 4, "used": 2, "feed_forward": 32, "dense_first": 1},
    "state": {"elements_per_layer": 10, "layers": [2]}, "per_layer_embeddings": {"width": 8}}"#;

#[test]
fn recipes_add_up() {
    let recipe: Recipe = serde_json::from_str(RECIPE).unwrap();
    let model = recipe.geometry().unwrap();
    let attention = 64 * (64 + 32 + 32 + 64);
    let rows = 2 * 64 * 8;
    let norms = 2 * 64;
    assert_eq!(
        model.blocks[0].parameter_count(),
        attention + 3 * 64 * 128 + rows + norms
    );
    assert_eq!(
        model.blocks[1].parameter_count(),
        attention + 4 * 3 * 64 * 32 + 64 * 4 + rows + norms
    );
    assert_eq!(
        model.blocks[1].active_parameter_count(),
        attention + 2 * 3 * 64 * 32 + 64 * 4 + rows + norms
    );
    assert!(model.blocks[2].attention.is_none());
    assert_eq!(model.kv_layer_counts(), (2, 5));
    assert_eq!(model.state_element_count(), 10);
    let sum: u128 = model.blocks.iter().map(Block::parameter_count).sum();
    assert_eq!(model.decoder_parameter_count(), sum + 64 * 8 * 8 + 64);
    assert_eq!(
        model.text_parameter_count(),
        model.decoder_parameter_count() + 2 * 6400 + 100 * 64
    );
}

#[test]
fn recipes_with_mistakes_are_refused() {
    for (key, value, part) in [
        ("layer", json!(3), "unknown field `layer`"),
        ("layers", json!(-1), "invalid value"),
        ("heads", json!(0), "heads is 0"),
        ("heads", json!(5), "cannot be divided by 5 heads"),
        ("kv_heads", json!(3), "must be a multiple"),
        ("feed_forward_matrices", json!(4), "2 to 3 are possible"),
        ("global_layers", json!([8]), "0 to 7 are possible"),
        (
            "state",
            json!({"elements_per_layer": 1, "layers": [99]}),
            "0 to 7 are possible",
        ),
        ("window", Value::Null, "mean nothing without a window"),
        (
            "experts",
            json!({"count": 2, "used": 3, "feed_forward": 1}),
            "experts.used is 3",
        ),
        ("hidden", json!(1_u64 << 40), "hidden is"),
        (
            "other_layer_parameters",
            json!(u64::MAX),
            "more parameters than can be counted",
        ),
        ("head_dim", json!(1 << 30), "the width of a head"),
    ] {
        let mut recipe: Value = serde_json::from_str(RECIPE).unwrap();
        recipe[key] = value.clone();
        let made = serde_json::from_value::<Recipe>(recipe).map_err(|error| error.to_string());
        let error = made
            .and_then(|recipe| recipe.geometry().map_err(|error| error.to_string()))
            .unwrap_err();
        assert!(error.contains(part), "{key} {value}: {error}");
    }
}

/// Any JSON, shallow but strange.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0_u64..200).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map("[a-z_]{1,12}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// The keys that mean something, so that the reader gets far.
fn any_key() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec![
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "global_head_dim",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
        "sliding_window_pattern",
        "layer_types",
        "num_kv_shared_layers",
        "hidden_size_per_layer_input",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "first_k_dense_replace",
        "decoder_sparse_step",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "attn_layer_period",
        "attn_layer_offset",
        "mamba_d_state",
        "mamba_expand",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "vision_config",
        "text_config",
        "use_sliding_window",
        "max_window_layers",
        "v_head_dim",
        "conv_L_cache",
    ])
}

proptest! {
    #[test]
    fn arbitrary_json_never_panics(value in any_json()) {
        let _ = from_config("m", &value);
        let _ = serde_json::from_value::<Recipe>(value).map(|recipe| recipe.geometry());
    }

    #[test]
    fn strange_numbers_in_real_configs_never_panic(
        base in proptest::bool::ANY, changes in proptest::collection::vec((any_key(), any_json()), 1..5),
        context in any::<u64>(),
    ) {
        let mut config = if base { qwen() } else { gemma4()["text_config"].clone() };
        for (key, value) in changes {
            config[key] = value;
        }
        if let Ok(model) = from_config("m", &config) {
            let parts = model.decoder_parameter_count() + model.embedding_parameter_count()
                + model.head_parameter_count() + model.row_table_parameter_count();
            prop_assert_eq!(model.text_parameter_count(), parts);
            prop_assert!(model.active_parameter_count() <= model.decoder_parameter_count());
            prop_assert!(model.kv_groups(context).iter().all(|group| group.count > 0 && group.vector_count > 0));
        }
    }

    #[test]
    fn strange_numbers_in_recipes_never_panic(numbers in proptest::collection::vec(any::<u64>(), 12), small in any::<bool>()) {
        let mut recipe: Recipe = serde_json::from_str(RECIPE).unwrap();
        let bound = |number: u64| if small { number % 300 } else { number };
        recipe.layers = bound(numbers[0]);
        recipe.hidden = bound(numbers[1]);
        recipe.heads = bound(numbers[2]);
        recipe.kv_heads = Some(bound(numbers[3]));
        recipe.head_dim = Some(bound(numbers[4]));
        recipe.feed_forward = bound(numbers[5]);
        recipe.window = Some(bound(numbers[6]));
        recipe.global_every = Some(bound(numbers[7]));
        recipe.shared_kv_layers = bound(numbers[8]);
        recipe.norms = bound(numbers[9]);
        recipe.state = None;
        if let Some(experts) = &mut recipe.experts {
            experts.every = bound(numbers[10]);
            experts.dense_first = bound(numbers[11]);
        }
        let _ = recipe.geometry();
    }
}
