//! The figures of the analysis against those computed apart from it (tests/data), and its rules for any input.

use proptest::prelude::*;
use serde_json::Value;

use super::dhurandhar::Ask;
use super::verdict::{judge, largest};
use super::*;
use crate::error::ErrorKind;
use crate::model::arch::Geometry;
use crate::units::{GIB, MIB};

const CORRECTED: &str = include_str!("../../../tests/data/corrected-models.json");
const OLD: &str = include_str!("../../../tests/data/dhurandhar-0.1.3.json");

fn known(name: &str) -> Geometry {
    registry::find(name).unwrap().geometry().unwrap()
}

fn question(context_count: u64, weight_bits: f64, kv: &str) -> Question {
    Question {
        context_count,
        weight_bits,
        kv: kv.parse().unwrap(),
        kv_slots_count: None,
        strip: Strip::new(&[Strip::ALL.to_owned()]),
    }
}

fn corrected() -> Vec<Value> {
    let file: Value = serde_json::from_str(CORRECTED).unwrap();
    file["models"].as_array().unwrap().clone()
}

fn old(part: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(OLD).unwrap();
    file[part].as_array().unwrap().clone()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

#[test]
fn every_known_model_has_the_corrected_parameters() {
    let rows = corrected();
    assert_eq!(rows.len(), registry::models().unwrap().len());
    for row in rows {
        let name = row["model"].as_str().unwrap();
        let model = known(name);
        let number = |key: &str| u128::from(row[key].as_u64().unwrap());
        assert_eq!(model.blocks.len() as u128, number("n_layers"), "{name}");
        assert_eq!(u128::from(model.hidden_count), number("hidden"), "{name}");
        assert_eq!(
            u128::from(model.vocabulary_count),
            number("vocab"),
            "{name}"
        );
        assert_eq!(model.context_max_count, row["max_ctx"].as_u64(), "{name}");
        let (full, windowed) = model.kv_layer_counts();
        assert_eq!(
            (full + windowed) as u128,
            number("fresh_kv_layers"),
            "{name}"
        );
        assert_eq!(
            model.decoder_parameter_count(),
            number("decoder_params"),
            "{name}"
        );
        assert_eq!(
            model.embedding_parameter_count(),
            number("token_embedding_params"),
            "{name}"
        );
        assert_eq!(
            model.row_table_parameter_count(),
            number("ple_params"),
            "{name}"
        );
        assert_eq!(
            model.text_parameter_count(),
            number("text_params_total"),
            "{name}"
        );
        assert_eq!(
            model.active_parameter_count(),
            number("active_params_excl_tables"),
            "{name}"
        );
        assert_eq!(
            model.largest_layer_parameter_count(),
            number("largest_layer_params"),
            "{name}"
        );
    }
}

#[test]
fn every_cell_of_the_corrected_kv_table_is_met() {
    let mut cells = 0;
    for row in corrected() {
        let model = known(row["model"].as_str().unwrap());
        for (context, widths) in row["kv_mib"].as_object().unwrap() {
            for (width, expected) in widths.as_object().unwrap() {
                let kv = match width.as_str() {
                    "4.5(q4_0)" => "q4_0",
                    "8.5(q8_0)" => "q8_0",
                    "16" => "f16",
                    bits => bits,
                };
                let question = question(context.parse().unwrap(), 4.0, kv);
                let kv = breakdown::KvBytes::new(&model, &question).unwrap();
                assert_eq!(
                    mib(kv.full_bytes + kv.windowed_bytes),
                    expected.as_f64().unwrap(),
                    "{} {context} {width}",
                    model.name
                );
                cells += 1;
            }
        }
        let state = row["recurrent_state_mib_fp32"].as_f64().unwrap();
        assert_eq!(model.state_element_count() as f64 * 4.0 / MIB as f64, state);
    }
    assert_eq!(cells, 9 * 3 * 4);
}

/// The figures that a reader of the errata looks for first.
#[test]
fn the_published_figures_come_out() {
    let model = known("gemma4-e2b");
    for (context, expected) in [(4096, 7.5), (32_768, 49.5), (131_072, 193.5)] {
        let bytes = Breakdown::new(&model, &question(context, 4.0, "4")).unwrap();
        assert_eq!(mib(bytes.kv_bytes()), expected);
        assert_eq!(mib(bytes.row_table_bytes), 1120.0, "the published 1.12 GB");
    }
}

#[test]
fn every_cell_of_the_verdict_table_is_met() {
    let devices = device::built_in().unwrap();
    let (mut cells, mut streamed) = (0, 0);
    for row in corrected() {
        let model = known(row["model"].as_str().unwrap());
        for (place, expected) in row["devices_4bpw_kv4_textonly"].as_object().unwrap() {
            let (alias, context) = place.split_once('@').unwrap();
            let device = device::find(&devices, alias).unwrap();
            let bytes = Breakdown::new(&model, &question(context.parse().unwrap(), 4.0, "4"));
            cells += 1;
            let wanted = expected["verdict"].as_str().unwrap();
            if wanted == "context_exceeds_model_max" {
                assert_eq!(
                    bytes.unwrap_err().kind(),
                    ErrorKind::Invalid,
                    "{} {place}",
                    model.name
                );
                continue;
            }
            let found = judge(&bytes.unwrap(), device);
            let wanted = if wanted == "table_mmap" {
                "rows"
            } else {
                wanted
            };
            assert_eq!(
                found.verdict.name(),
                wanted,
                "{} {place}: {found:?}",
                model.name
            );
            // Figures of the table are rounded to two places.
            let near = |what: &str, bytes: u64| {
                if let Some(value) = expected[what].as_f64() {
                    assert!(
                        (mib(bytes) - value).abs() < 0.011,
                        "{} {place} {what}: {} {value}",
                        model.name,
                        mib(bytes)
                    );
                }
            };
            near("need_mib", found.need_bytes);
            near("headroom", found.headroom_bytes);
            near("min_ram_mib", found.smallest_bytes);
            near("short", found.missing_bytes);
            // The reference reads layers with all their experts.
            let whole = found.whole_bytes_per_token;
            near(
                "bytes_streamed_per_token_mib",
                whole.unwrap_or(found.streamed_bytes_per_token),
            );
            if let Some(bound) = expected["tok_s_bound"].as_f64() {
                streamed += 1;
                let rate = found.whole_tokens_per_second.or(found.tokens_per_second);
                let rate = rate.unwrap();
                assert!(
                    (rate - bound).abs() <= 0.0051 + bound * 1e-3,
                    "{} {place}: {rate} {bound}",
                    model.name
                );
            }
        }
    }
    assert_eq!(cells, 9 * 15);
    assert!(streamed > 30, "{streamed} cells stream");
}

/// 350 MiB a token instead of gigabytes: an order of magnitude, as the reference has it.
#[test]
fn chosen_experts_need_a_tenth_of_the_reads() {
    let devices = device::built_in().unwrap();
    let bytes = Breakdown::new(&known("zaya1-8b"), &question(4096, 4.0, "4")).unwrap();
    assert!(
        (mib(bytes.active_expert_bytes + bytes.decoder_bytes - bytes.expert_bytes) - 350.2).abs()
            < 1.0
    );
    let found = judge(&bytes, device::find(&devices, "emmc-1024").unwrap());
    let (all, chosen) = (
        found.whole_tokens_per_second.unwrap(),
        found.tokens_per_second.unwrap(),
    );
    assert!(chosen > 8.0 * all && chosen < 25.0 * all, "{all} {chosen}");
}

#[test]
fn compat_repeats_every_constant() {
    for row in old("constants") {
        let belief = registry::find(row["model"].as_str().unwrap())
            .unwrap()
            .belief;
        assert_eq!(
            belief.decoder_params(),
            row["decoder_params"].as_u64().unwrap()
        );
        assert_eq!(
            belief.embedding_params(),
            row["embedding_params"].as_u64().unwrap()
        );
        assert_eq!(
            belief.ple_table_params(),
            row["ple_table_params"].as_u64().unwrap()
        );
        for (context, widths) in row["kv_bytes"].as_object().unwrap() {
            for (bits, bytes) in widths.as_object().unwrap() {
                let found = belief.kv_bytes(context.parse().unwrap(), bits.parse().unwrap());
                assert_eq!(
                    found,
                    bytes.as_u64().unwrap(),
                    "{} {context} {bits}",
                    row["model"]
                );
            }
        }
    }
}

#[test]
fn compat_repeats_every_cell_and_every_word() {
    let devices = device::built_in().unwrap();
    let rows = old("breakdown");
    assert_eq!(rows.len(), 2 * 6 + 7 * 3);
    for row in rows {
        let belief = registry::find(row["model"].as_str().unwrap())
            .unwrap()
            .belief;
        let ask = Ask {
            context: row["context"].as_u64().unwrap(),
            quant_bits: 4,
            kv_bits: 4,
            strip_audio: row["strip_audio"].as_bool().unwrap(),
        };
        let answer = serde_json::to_value(belief.answer(&ask, &devices).unwrap()).unwrap();
        for (key, expected) in row.as_object().unwrap() {
            if key != "model" && key != "devices" {
                assert_eq!(&answer[key], expected, "{} {ask:?} {key}", row["model"]);
            }
        }
        for (found, expected) in answer["devices"]
            .as_array()
            .unwrap()
            .iter()
            .zip(row["devices"].as_array().unwrap())
        {
            let found = [
                &found["device"],
                &found["mode"],
                &found["headroom_mb"],
                &found["flash_tps"],
                &found["notes"],
            ];
            for (place, found) in found.into_iter().enumerate() {
                assert_eq!(found, &expected[place], "{} {ask:?}", row["model"]);
            }
        }
    }
}

#[test]
fn compat_repeats_the_sweep_of_widths() {
    let rows = old("sweep");
    assert_eq!(rows.len(), 45);
    for row in rows {
        let belief = registry::find(row["model"].as_str().unwrap())
            .unwrap()
            .belief;
        let ask = Ask {
            context: row["context"].as_u64().unwrap(),
            quant_bits: row["quant_bits"].as_u64().unwrap() as u32,
            kv_bits: 4,
            strip_audio: true,
        };
        let answer = serde_json::to_value(belief.answer(&ask, &[]).unwrap()).unwrap();
        for (key, expected) in row
            .as_object()
            .unwrap()
            .iter()
            .filter(|(key, _)| *key != "model")
        {
            assert_eq!(&answer[key], expected, "{} {ask:?} {key}", row["model"]);
        }
    }
}

/// The verdicts of the summary, one letter a cell (- runs nowhere): five devices, three contexts.
#[test]
fn compat_gives_the_published_verdicts() {
    let devices = device::built_in().unwrap();
    for (name, expected) in [
        ("gemma4-e2b", "MM-RR MM-RR M--RR"),
        ("gemma4-e4b", "M--MR M--MR ---MR"),
        ("zaya1-8b", "----R ----R -----"),
        ("qwen2.5-3b", "R--RR ---RR ----R"),
        ("llama-3.2-3b", "R--RR ---RR ----R"),
    ] {
        let belief = registry::find(name).unwrap().belief;
        let letters = [4096, 32_768, 131_072].map(|context| {
            let ask = Ask {
                context,
                quant_bits: 4,
                kv_bits: 4,
                strip_audio: true,
            };
            let answer = belief.answer(&ask, &devices).unwrap();
            let modes = answer.devices.iter().map(|device| device.mode);
            modes
                .map(|mode| match mode {
                    "resident" => 'R',
                    "mmap" => 'M',
                    _ => '-',
                })
                .collect::<String>()
        });
        assert_eq!(letters.join(" "), expected, "{name}");
    }
}

#[test]
fn kv_types_count_stored_bytes() {
    for (kv, dim, bits) in [
        ("f32", 128, 32.0),
        ("bf16", 128, 16.0),
        ("q8_0", 128, 8.5),
        ("q4_0", 128, 4.5),
        ("q5_1", 64, 6.0),
        ("tq:4", 128, 4.125),
        ("tq:4", 256, 4.0625),
        ("dh013:4", 256, 5.125),
        ("4", 128, 4.0),
        ("3.5", 128, 3.5),
    ] {
        let store: KvStore = kv.parse().unwrap();
        assert_eq!(
            store.vector_bytes(dim).unwrap() * 8.0 / dim as f64,
            bits,
            "{kv}"
        );
        assert_eq!(store.to_string(), kv);
    }
    // An entropy coder spends what it is asked for, and a few bits on the scale.
    let entropy: KvStore = "tq-ec:3".parse().unwrap();
    let bits = entropy.vector_bytes(128).unwrap() * 8.0 / 128.0;
    assert!((2.95..3.2).contains(&bits), "{bits}");
    for kv in [
        "", "0", "33", "nan", "-1", "tq", "tq:9", "q4_K", "f17", "1e9",
    ] {
        assert!(kv.parse::<KvStore>().is_err(), "{kv}");
    }
    assert_eq!(weight_bits("q4_K"), Ok(4.5));
    assert_eq!(weight_bits("Q8_0"), Ok(8.5));
    for bits in ["0", "0.5", "33", "inf", "nan", "q9_K", ""] {
        assert!(weight_bits(bits).is_err(), "{bits}");
    }
    let odd: KvStore = "q4_0".parse().unwrap();
    assert_eq!(odd.vector_bytes(48).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn near_names_are_suggested() {
    let text = |name: &str| registry::find(name).unwrap_err().to_string();
    assert!(text("gemma4-e2").contains("did you mean gemma4-e2b"));
    assert!(text("llama-3.2").contains("llama-3.2-1b or llama-3.2-3b"));
    assert!(text("qwen-2.5-3b").contains("qwen2.5-3b"));
    let far = text("mistral-large");
    assert!(
        !far.contains("did you mean") && far.contains("granite-3.3-2b"),
        "{far}"
    );
    let devices = device::built_in().unwrap();
    assert!(
        device::find(&devices, "laptop")
            .unwrap_err()
            .to_string()
            .contains("did you mean laptop-8192")
    );
    assert!(device::find(&devices, "LAPTOP_NVME").is_ok());
}

#[test]
fn devices_of_a_file_are_checked() {
    let parse = |text: &str| device::parse("my.toml".as_ref(), text);
    let good =
        "[[device]]\nname = 'box'\nmemory = '16GiB'\ndrive_gb_per_second = 3.5\nprice = 400.0\n";
    let devices = parse(good).unwrap();
    assert_eq!(
        (devices[0].memory_bytes, devices[0].label.as_str()),
        (16 * GIB, "box")
    );
    for (text, part) in [
        ("", "missing field"),
        ("device = []", "0 devices"),
        (
            "[[device]]\nname = 'a'\nmemory = '1GiB'\ndrive_gb_per_second = 1.0\nram = 3",
            "unknown field `ram`",
        ),
        (
            "[[device]]\nname = 'a'\nmemory = 'much'\ndrive_gb_per_second = 1.0",
            "not a size",
        ),
        (
            "[[device]]\nname = 'a'\nmemory = '0'\ndrive_gb_per_second = 1.0",
            "larger than zero",
        ),
        (
            "[[device]]\nname = 'a'\nmemory = '1GiB'\ndrive_gb_per_second = -1.0",
            "no rate",
        ),
        (
            "[[device]]\nname = 'a'\nmemory = '1GiB'\ndrive_gb_per_second = nan",
            "no rate",
        ),
        ("[[device]\n", "line 1"),
    ] {
        let error = parse(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains(part), "{text}: {error}");
    }
}

#[test]
fn costs_are_prices_over_tokens() {
    let price = Price {
        machine: 1000.0,
        watts: 100.0,
        per_kwh: 0.30,
        life_years: 2.0,
        use_share: 0.5,
    };
    let cost = Cost::per_million(&price, 10.0).unwrap();
    // 100,000 seconds: 2.78 kWh, and a 631st of the year in which it computes.
    assert!((cost.kwh - 2.777_78).abs() < 1e-4);
    assert!((cost.electricity - 0.833_33).abs() < 1e-4);
    assert!((cost.machine - 1000.0 * 1e5 / (365.25 * 86_400.0)).abs() < 1e-9);
    assert_eq!(cost.total(), cost.machine + cost.electricity);
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(
            Cost::per_million(&price, rate).unwrap_err().kind(),
            ErrorKind::Invalid
        );
    }
    for price in [
        Price {
            machine: -1.0,
            ..price
        },
        Price {
            life_years: 0.0,
            ..price
        },
        Price {
            use_share: 1.5,
            ..price
        },
        Price {
            watts: f64::NAN,
            ..price
        },
        Price {
            machine: f64::MAX,
            life_years: 1e-300,
            ..price
        },
    ] {
        assert!(Cost::per_million(&price, 1.0).is_err(), "{price:?}");
    }
}

#[test]
fn the_largest_is_found() {
    for limit in [1, 2, 3, 7, 100, 4095, 4096] {
        assert_eq!(largest(4096, |n| n <= limit), Some(limit.min(4096)));
    }
    assert_eq!(largest(4096, |_| false), None);
    assert_eq!(largest(0, |_| true), None);
}

fn any_device() -> impl Strategy<Value = Device> {
    (1_u64..64 * GIB, 0.01_f64..50.0).prop_map(|(memory_bytes, drive_gb_per_second)| Device {
        name: "d".to_owned(),
        alias: None,
        label: String::new(),
        memory_bytes,
        drive_gb_per_second: Some(drive_gb_per_second),
        memory_gb_per_second: None,
        price: None,
        watts: None,
        profile: None,
    })
}

fn any_model() -> impl Strategy<Value = Geometry> {
    (0..9_usize).prop_map(|index| registry::models().unwrap()[index].geometry().unwrap())
}

proptest! {
    #[test]
    fn more_context_and_more_bits_never_need_less(
        model in any_model(), contexts in (1_u64..=32_768, 1_u64..=32_768), bits in (1.0_f64..32.0, 1.0_f64..32.0),
        kv in (1.0_f64..32.0, 1.0_f64..32.0), device in any_device(),
    ) {
        let ask = |context_count, weight_bits, kv| Question {
            context_count, weight_bits, kv: KvStore::Bits(kv), kv_slots_count: None, strip: Strip::default(),
        };
        let less = ask(contexts.0.min(contexts.1), bits.0.min(bits.1), kv.0.min(kv.1));
        let more = ask(contexts.0.max(contexts.1), bits.0.max(bits.1), kv.0.max(kv.1));
        let (less, more) = (Breakdown::new(&model, &less).unwrap(), Breakdown::new(&model, &more).unwrap());
        prop_assert!(less.total_bytes() <= more.total_bytes());
        let (easy, hard) = (judge(&less, &device), judge(&more, &device));
        prop_assert!(easy.verdict <= hard.verdict, "{:?} {:?}", easy, hard);
        prop_assert!(easy.streamed_bytes_per_token <= hard.streamed_bytes_per_token || hard.verdict == Verdict::Infeasible);
        let more_memory = Device { memory_bytes: device.memory_bytes * 2, ..device.clone() };
        prop_assert!(judge(&more, &more_memory).verdict <= hard.verdict);
    }

    #[test]
    fn totals_are_sums_and_verdicts_add_up(
        model in any_model(), context in 1_u64..=32_768, bits in 1.0_f64..32.0, device in any_device(),
        kv_slots_count in proptest::option::of(2_u32..=64),
    ) {
        let ask = Question { context_count: context, weight_bits: bits, kv: KvStore::default(), kv_slots_count, strip: Strip::default() };
        let bytes = Breakdown::new(&model, &ask).unwrap();
        let in_memory = Breakdown::new(&model, &Question { kv_slots_count: None, ..ask }).unwrap().kv_bytes();
        prop_assert!(bytes.kv_bytes() <= in_memory);
        prop_assert_eq!(bytes.kv_drive_bytes, kv_slots_count.map_or(0, |_| in_memory));
        let sum = bytes.held_bytes() + bytes.streamable_bytes() + bytes.row_table_bytes;
        prop_assert_eq!(bytes.total_bytes(), sum);
        prop_assert!(bytes.expert_bytes <= bytes.decoder_bytes && bytes.active_expert_bytes <= bytes.expert_bytes);
        let found = judge(&bytes, &device);
        prop_assert_eq!(found.need_bytes + found.headroom_bytes, device.memory_bytes + found.missing_bytes);
        prop_assert_eq!(found.missing_bytes > 0, found.verdict == Verdict::Infeasible);
        prop_assert_eq!(found.streamed_bytes_per_token > 0, found.verdict == Verdict::Streamed);
        prop_assert!(found.streamed_bytes_per_token <= bytes.streamable_bytes());
        if let Some(whole) = found.whole_bytes_per_token {
            prop_assert!(found.streamed_bytes_per_token <= whole + 1);
        }
        // With the missing bytes it runs, with one fewer it does not.
        if found.missing_bytes > 0 {
            let with = |memory_bytes| judge(&bytes, &Device { memory_bytes, ..device.clone() }).verdict;
            prop_assert!(with(device.memory_bytes + found.missing_bytes) != Verdict::Infeasible);
            prop_assert!(with(device.memory_bytes + found.missing_bytes - 1) == Verdict::Infeasible);
        }
    }

    #[test]
    fn any_text_is_a_description_or_an_error(text in ".{0,200}", number in any::<i64>(), language in 0..3_usize) {
        let language = ["toml", "yaml", "json"][language];
        let _ = Source::of_text("m", language, &text);
        let _ = device::parse("d.toml".as_ref(), &text);
        let lines = format!("layers: {number}\nhidden: 64\nvocabulary: 9\nheads: 4\nfeed_forward: {number}\n{text}");
        let _ = Source::of_text("m", "yaml", &lines);
        let _ = Source::of_text("m", "toml", &lines.replace(": ", " = "));
    }
}
