//! Tensor types: the geometry of every type a ggml or safetensors file can hold, also those flea never computes with.
//!
//! A type is a row of blocks: `block_elements` elements share `block_bytes` bytes. The numbers are ggml's file format
//! (`enum ggml_type`, `ggml-common.h`): they never change, removed ones are never reused and are unknown here.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

macro_rules! types {
    ($($variant:ident, $number:expr, $name:literal, $elements:literal, $bytes:literal, $doc:literal;)*) => {
        /// The type of a tensor's elements.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(non_camel_case_types)] // The names of the formats, as everybody writes them.
        #[non_exhaustive]
        pub enum DType {
            $(#[doc = $doc] $variant,)*
        }

        impl DType {
            /// Every known type.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            const fn row(self) -> (Option<u32>, &'static str, u64, u64) {
                match self {
                    $(Self::$variant => ($number, $name, $elements, $bytes),)*
                }
            }
        }
    };
}

// Type, ggml's number, ggml's name, elements and bytes of a block.
types! {
    F32, Some(0), "f32", 1, 4, "IEEE single precision.";
    F16, Some(1), "f16", 1, 2, "IEEE half precision.";
    Q4_0, Some(2), "q4_0", 32, 18, "4 bits, one scale per 32.";
    Q4_1, Some(3), "q4_1", 32, 20, "4 bits, scale and minimum per 32.";
    Q5_0, Some(6), "q5_0", 32, 22, "5 bits, one scale per 32.";
    Q5_1, Some(7), "q5_1", 32, 24, "5 bits, scale and minimum per 32.";
    Q8_0, Some(8), "q8_0", 32, 34, "8 bits, one scale per 32.";
    Q8_1, Some(9), "q8_1", 32, 36, "8 bits, scale and sum per 32.";
    Q2_K, Some(10), "q2_K", 256, 84, "2 bits, scales in a super-block of 256.";
    Q3_K, Some(11), "q3_K", 256, 110, "3 bits, scales in a super-block of 256.";
    Q4_K, Some(12), "q4_K", 256, 144, "4 bits, scales in a super-block of 256.";
    Q5_K, Some(13), "q5_K", 256, 176, "5 bits, scales in a super-block of 256.";
    Q6_K, Some(14), "q6_K", 256, 210, "6 bits, scales in a super-block of 256.";
    Q8_K, Some(15), "q8_K", 256, 292, "8 bits, sums in a super-block of 256.";
    IQ2_XXS, Some(16), "iq2_xxs", 256, 66, "2.06 bits, lattice.";
    IQ2_XS, Some(17), "iq2_xs", 256, 74, "2.31 bits, lattice.";
    IQ3_XXS, Some(18), "iq3_xxs", 256, 98, "3.06 bits, lattice.";
    IQ1_S, Some(19), "iq1_s", 256, 50, "1.56 bits, lattice.";
    IQ4_NL, Some(20), "iq4_nl", 32, 18, "4 bits, non-linear.";
    IQ3_S, Some(21), "iq3_s", 256, 110, "3.44 bits, lattice.";
    IQ2_S, Some(22), "iq2_s", 256, 82, "2.56 bits, lattice.";
    IQ4_XS, Some(23), "iq4_xs", 256, 136, "4.25 bits, non-linear.";
    I8, Some(24), "i8", 1, 1, "Signed byte.";
    I16, Some(25), "i16", 1, 2, "Signed 16 bits.";
    I32, Some(26), "i32", 1, 4, "Signed 32 bits.";
    I64, Some(27), "i64", 1, 8, "Signed 64 bits.";
    F64, Some(28), "f64", 1, 8, "IEEE double precision.";
    IQ1_M, Some(29), "iq1_m", 256, 56, "1.75 bits, lattice.";
    BF16, Some(30), "bf16", 1, 2, "The upper half of a single.";
    TQ1_0, Some(34), "tq1_0", 256, 54, "Ternary, 1.69 bits.";
    TQ2_0, Some(35), "tq2_0", 256, 66, "Ternary, 2.06 bits.";
    MXFP4, Some(39), "mxfp4", 32, 17, "4-bit floats, one shared exponent per 32.";
    NVFP4, Some(40), "nvfp4", 64, 36, "4-bit floats, one E4M3 scale per 16.";
    Q1_0, Some(41), "q1_0", 128, 18, "1 bit, one scale per 128.";
    Q2_0, Some(42), "q2_0", 64, 18, "2 bits, one scale per 64.";
    BOOL, None, "bool", 1, 1, "One truth value per byte (safetensors).";
    U8, None, "u8", 1, 1, "Unsigned byte (safetensors).";
    U16, None, "u16", 1, 2, "Unsigned 16 bits (safetensors).";
    U32, None, "u32", 1, 4, "Unsigned 32 bits (safetensors).";
    U64, None, "u64", 1, 8, "Unsigned 64 bits (safetensors).";
    C64, None, "c64", 1, 8, "A complex number of two singles (safetensors).";
    F4, None, "f4", 2, 1, "4-bit floats, packed (safetensors).";
    F6_E2M3, None, "f6_e2m3", 4, 3, "6-bit floats, packed (safetensors).";
    F6_E3M2, None, "f6_e3m2", 4, 3, "6-bit floats, packed (safetensors).";
    F8_E4M3, None, "f8_e4m3", 1, 1, "8-bit floats (safetensors).";
    F8_E5M2, None, "f8_e5m2", 1, 1, "8-bit floats (safetensors).";
    F8_E8M0, None, "f8_e8m0", 1, 1, "8-bit exponents (safetensors).";
    F8_E4M3FNUZ, None, "f8_e4m3fnuz", 1, 1, "8-bit floats without negative zero (safetensors).";
    F8_E5M2FNUZ, None, "f8_e5m2fnuz", 1, 1, "8-bit floats without negative zero (safetensors).";
}

impl DType {
    /// The type with ggml's number; `None` for numbers ggml never gave or has taken back.
    #[must_use]
    pub fn from_ggml(number: u32) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.ggml_number() == Some(number))
    }

    /// The type with ggml's name (`q4_K`), in any case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.name().eq_ignore_ascii_case(name))
    }

    /// ggml's number; `None` for types only safetensors has.
    #[must_use]
    pub const fn ggml_number(&self) -> Option<u32> {
        self.row().0
    }

    /// ggml's name, or the safetensors name in lower case.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.row().1
    }

    /// Elements that share one block.
    #[must_use]
    pub const fn block_elements(&self) -> u64 {
        self.row().2
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(&self) -> u64 {
        self.row().3
    }

    /// Bytes of a row; `None` when `elements` is no whole number of blocks, or the product does not fit.
    #[must_use]
    pub const fn row_bytes(&self, elements: u64) -> Option<u64> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor of this shape (ggml's order, unused dimensions 1), without padding.
    #[must_use]
    pub fn tensor_bytes(&self, shape: &[u64; 4]) -> Option<u64> {
        shape[1..]
            .iter()
            .try_fold(self.row_bytes(shape[0])?, |bytes, &rows| {
                bytes.checked_mul(rows)
            })
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The name of the mix a GGUF was quantised to (`general.file_type`, llama.cpp's `enum llama_ftype`).
#[must_use]
pub const fn file_type_name(number: u64) -> Option<&'static str> {
    Some(match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4_MOE",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spot checks against the struct sizes that ggml-common.h asserts.
    #[test]
    fn geometry_is_ggmls() {
        for (number, name, elements, bytes) in [
            (0, "f32", 1, 4),
            (2, "q4_0", 32, 2 + 16),
            (7, "q5_1", 32, 4 + 4 + 16),
            (10, "q2_K", 256, 4 + 16 + 64),
            (11, "q3_K", 256, 2 + 64 + 32 + 12),
            (13, "q5_K", 256, 4 + 12 + 128 + 32),
            (14, "q6_K", 256, 2 + 16 + 192),
            (15, "q8_K", 256, 4 + 256 + 32),
            (17, "iq2_xs", 256, 2 + 64 + 8),
            (18, "iq3_xxs", 256, 2 + 96),
            (19, "iq1_s", 256, 2 + 32 + 16),
            (21, "iq3_s", 256, 2 + 104 + 4),
            (22, "iq2_s", 256, 2 + 64 + 16),
            (23, "iq4_xs", 256, 2 + 2 + 4 + 128),
            (29, "iq1_m", 256, 32 + 16 + 8),
            (34, "tq1_0", 256, 2 + 4 + 48),
            (35, "tq2_0", 256, 2 + 64),
            (39, "mxfp4", 32, 1 + 16),
            (40, "nvfp4", 64, 4 + 32),
            (41, "q1_0", 128, 2 + 16),
            (42, "q2_0", 64, 2 + 16),
        ] {
            let dtype = DType::from_ggml(number).unwrap();
            assert_eq!(
                (dtype.name(), dtype.block_elements(), dtype.block_bytes()),
                (name, elements, bytes)
            );
        }
    }

    #[test]
    fn removed_and_future_numbers_are_unknown() {
        for number in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(DType::from_ggml(number), None, "{number}");
        }
        let known = (0..43).filter(|&n| DType::from_ggml(n).is_some()).count();
        assert_eq!(known, 35);
    }

    #[test]
    fn names_and_numbers_go_both_ways() {
        for &dtype in DType::ALL {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
            if let Some(number) = dtype.ggml_number() {
                assert_eq!(DType::from_ggml(number), Some(dtype));
            }
        }
        assert_eq!(DType::from_name("Q4_K"), Some(DType::Q4_K));
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(DType::Q4_K.row_bytes(4096), Some(2304));
        assert_eq!(DType::Q4_K.row_bytes(4097), None);
        assert_eq!(DType::F32.row_bytes(u64::MAX), None);
        assert_eq!(DType::F16.tensor_bytes(&[64, 3, 2, 1]), Some(768));
        assert_eq!(DType::F16.tensor_bytes(&[1 << 40, 1 << 40, 1, 1]), None);
        assert_eq!(DType::Q8_0.tensor_bytes(&[0, 3, 1, 1]), Some(0));
    }
}
