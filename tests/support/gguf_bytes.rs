//! A small GGUF writer for tests of the parser: headers only, and whatever lies about them.

#![allow(dead_code)] // Each test file uses its own part.

use flea::model::DType;

/// A GGUF header in the making.
#[derive(Clone, Debug)]
pub struct GgufBytes {
    pub version: u32,
    pub alignment: u64,
    pub keys: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<(String, Vec<u64>, DType)>,
}

/// The bytes of a text value or a name.
pub fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(value.as_bytes());
    bytes
}

/// A typed value: the type's number, then its bytes.
pub fn typed(number: u32, bytes: &[u8]) -> Vec<u8> {
    [&number.to_le_bytes(), bytes].concat()
}

impl GgufBytes {
    pub fn new(architecture: &str) -> Self {
        Self {
            version: 3,
            alignment: 32,
            keys: Vec::new(),
            tensors: Vec::new(),
        }
        .text("general.architecture", architecture)
    }

    pub fn raw(mut self, key: &str, value: Vec<u8>) -> Self {
        self.keys.push((key.to_owned(), value));
        self
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, typed(8, &text(value)))
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, typed(4, &value.to_le_bytes()))
    }

    pub fn u16(self, key: &str, value: u16) -> Self {
        self.raw(key, typed(2, &value.to_le_bytes()))
    }

    pub fn texts(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8_u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(&(values.len() as u64).to_le_bytes());
        for value in values {
            bytes.extend_from_slice(&text(value));
        }
        self.raw(key, typed(9, &bytes))
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = 5_u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(&(values.len() as u64).to_le_bytes());
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        self.raw(key, typed(9, &bytes))
    }

    pub fn align(mut self, alignment: u32) -> Self {
        self.alignment = u64::from(alignment);
        self.u32("general.alignment", alignment)
    }

    pub fn tensor(mut self, name: &str, shape: &[u64], dtype: DType) -> Self {
        self.tensors.push((name.to_owned(), shape.to_vec(), dtype));
        self
    }

    /// A llama-like stack of blocks, optionally with an output matrix of its own.
    pub fn llama(blocks: u32, embd: u64, ffn: u64, vocab: u64, untied: bool) -> Self {
        let f16 = DType::F16;
        let mut file = Self::new("llama")
            .text("general.name", "tiny")
            .u32("llama.block_count", blocks)
            .u32("llama.context_length", 2048)
            .u32("llama.embedding_length", embd as u32)
            .tensor("token_embd.weight", &[embd, vocab], f16);
        for block in 0..blocks {
            let name = |part: &str| format!("blk.{block}.{part}.weight");
            file = file
                .tensor(&name("attn_norm"), &[embd], DType::F32)
                .tensor(&name("attn_q"), &[embd, embd], f16)
                .tensor(&name("attn_k"), &[embd, embd], f16)
                .tensor(&name("attn_v"), &[embd, embd], f16)
                .tensor(&name("attn_output"), &[embd, embd], f16)
                .tensor(&name("ffn_norm"), &[embd], DType::F32)
                .tensor(&name("ffn_gate"), &[embd, ffn], f16)
                .tensor(&name("ffn_up"), &[embd, ffn], f16)
                .tensor(&name("ffn_down"), &[ffn, embd], f16);
        }
        file = file.tensor("output_norm.weight", &[embd], DType::F32);
        if untied {
            file = file.tensor("output.weight", &[embd, vocab], f16);
        }
        file
    }

    /// The header's bytes (to the end of the tensor infos), and the length the whole file would have.
    pub fn build(&self) -> (Vec<u8>, u64) {
        let mut offset = 0_u64;
        let offsets: Vec<u64> = self
            .tensors
            .iter()
            .map(|(_, shape, dtype)| {
                let here = offset.next_multiple_of(self.alignment);
                let mut full = [1; 4];
                full[..shape.len()].copy_from_slice(shape);
                offset = here + dtype.tensor_bytes(&full).unwrap();
                here
            })
            .collect();
        let bytes = self.build_with_offsets(&offsets);
        let data = (bytes.len() as u64).next_multiple_of(self.alignment);
        (bytes, data + offset)
    }

    /// The header's bytes with these data offsets.
    pub fn build_with_offsets(&self, offsets: &[u64]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend_from_slice(&text(key));
            out.extend_from_slice(value);
        }
        for ((name, shape, dtype), offset) in self.tensors.iter().zip(offsets) {
            out.extend_from_slice(&text(name));
            out.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            for extent in shape {
                out.extend_from_slice(&extent.to_le_bytes());
            }
            out.extend_from_slice(&dtype.ggml_number().unwrap().to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
        }
        out
    }
}
