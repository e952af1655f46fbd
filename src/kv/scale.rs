//! A 16-bit number for what scales a vector: an f16 that spends its sign on range. 10 bits of mantissa (0.05 % at most
//! off), values from 2^-31 to 2^32; code 0 is zero.

/// How far the exponent of a code lies below that of an f32.
const BIAS: u32 = 95;

/// The nearest code; `None` where `value` is not zero and not within the range (or negative, infinite, NaN).
#[must_use]
pub fn encode(value: f32) -> Option<u16> {
    if value == 0.0 {
        return Some(0);
    }
    let bits = value.to_bits();
    if value.is_nan() || bits >> 31 == 1 {
        return None;
    }
    // Round to nearest, ties to even, carry into the exponent.
    let rounded = (bits + 0xfff + ((bits >> 13) & 1)) >> 13;
    let exponent = (rounded >> 10).checked_sub(BIAS)?;
    (1..64)
        .contains(&exponent)
        .then_some(((exponent << 10) | (rounded & 0x3ff)) as u16)
}

/// The value of a code: finite and not negative, for every code. Codes below 1024 other than 0 are never written.
#[must_use]
pub const fn decode(code: u16) -> f32 {
    if code < 1024 {
        return 0.0;
    }
    let code = code as u32;
    f32::from_bits((((code >> 10) + BIAS) << 23) | ((code & 0x3ff) << 13))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_and_values_lie_close() {
        for code in 1024..=u16::MAX {
            assert_eq!(encode(decode(code)), Some(code));
        }
        for step in 0..100_000 {
            let value = 1e-6 * 1.000_3f32.powi(step);
            if value < 4e9 {
                let back = decode(encode(value).expect("within the range"));
                assert!((back / value - 1.0).abs() <= 0.000_49, "{value} {back}");
            }
        }
    }

    #[test]
    fn what_has_no_code_is_refused() {
        for value in [f32::NAN, f32::INFINITY, -1.0, f32::MAX, 1e-30, 8.59e9] {
            assert_eq!(encode(value), None, "{value}");
        }
        assert_eq!(encode(0.0), Some(0));
        assert_eq!(encode(-0.0), Some(0));
    }
}
