//! Shapes: the sizes asked for are met, and numbers that do not fit together are refused.

use super::*;

#[test]
fn every_architecture_reaches_every_size() {
    for arch in Arch::ALL {
        for quant in Quant::ALL {
            for size_bytes in [16 * MIB, 64 * MIB, 300 * MIB, GIB, 4 * GIB, 40 * GIB] {
                let wish = Wish {
                    size_bytes: Some(size_bytes),
                    ..Wish::default()
                };
                let shape = Shape::choose(arch, quant, &wish).unwrap();
                assert!(
                    miss(shape.tensor_bytes(), size_bytes) <= SIZE_SLACK,
                    "{arch} {quant} {size_bytes}: {shape:?}"
                );
            }
        }
    }
}

#[test]
fn what_is_given_stays_given() {
    let wish = Wish {
        size_bytes: Some(GIB),
        layers: Some(22),
        vocab: Some(5000),
        ..Wish::default()
    };
    let shape = Shape::choose(Arch::Llama, Quant::Q8_0, &wish).unwrap();
    assert_eq!((shape.layers, shape.vocab), (22, 5000));
    assert!(miss(shape.tensor_bytes(), GIB) <= SIZE_SLACK);
}

#[test]
fn numbers_that_do_not_go_together_are_refused() {
    let refused = |arch, wish: Wish| {
        let error = Shape::choose(arch, Quant::Q4K, &wish).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    let base = Wish::default();
    let odd = Wish {
        embd: Some(320),
        ..base
    };
    assert!(refused(Arch::Llama, odd).contains("multiples of 256"));
    let heads = Wish {
        heads: Some(8),
        kv_heads: Some(3),
        ..base
    };
    assert!(refused(Arch::Llama, heads).contains("--kv-heads"));
    let experts = Wish {
        experts: Some(8),
        ..base
    };
    assert!(refused(Arch::Llama, experts).contains("no experts"));
    let used = Wish {
        experts_used: Some(9),
        ..base
    };
    assert!(refused(Arch::Mixtral, used).contains("out of range"));
    let fixed = Wish {
        size_bytes: Some(GIB),
        layers: Some(2),
        embd: Some(256),
        ffn: Some(256),
        ..base
    };
    assert!(refused(Arch::Llama, fixed).contains("leave --layers"));
    let huge = Wish {
        vocab: Some(u64::MAX),
        embd: Some(u64::MAX),
        ..base
    };
    refused(Arch::Llama, huge);
}
