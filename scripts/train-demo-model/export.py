"""Writes the trained model as a GGUF: matrices in F16, norms in F32, the tokenizer as llama.cpp's "llama" kind."""

import argparse
import pathlib
import pickle

import gguf
import numpy as np

import model
import tokenizer

NAME = "Fable"


def add_tokenizer(writer, sp):
    kinds = gguf.TokenType
    pieces, scores, types = [], [], []
    for i in range(sp.get_piece_size()):
        pieces.append(sp.id_to_piece(i).encode())
        scores.append(sp.get_score(i))
        types.append(kinds.UNKNOWN if sp.is_unknown(i) else kinds.CONTROL if sp.is_control(i) else
                     kinds.BYTE if sp.is_byte(i) else kinds.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.BEGIN)
    writer.add_eos_token_id(tokenizer.END)
    writer.add_unk_token_id(tokenizer.UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def add_tensors(writer, weights, shape):
    def add(name, array):
        kept = np.float32 if array.ndim == 1 else np.float16
        writer.add_tensor(name + ".weight", np.ascontiguousarray(array.astype(kept)))

    add("token_embd", weights["token_embd"])
    for i in range(shape.layers):
        for name in model.IN_LAYER:
            add(f"blk.{i}.{name}", weights[name][i])
    add("output_norm", weights["output_norm"])
    add("output", weights["output"])


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=pathlib.Path, help="where train.py left tokenizer and checkpoint")
    arguments.add_argument("output", type=pathlib.Path)
    a = arguments.parse_args()
    shape = model.Shape()
    weights = pickle.loads((a.folder / "checkpoint.pickle").read_bytes())[0]
    writer = gguf.GGUFWriter(a.output, "llama")
    writer.add_name(NAME)
    writer.add_description("A tiny story teller, trained by scripts/train-demo-model on text from its own grammar")
    writer.add_license("MIT OR Apache-2.0")
    writer.add_languages(["en"])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(model.ROPE_BASE)
    writer.add_layer_norm_rms_eps(model.RMS_EPSILON)
    writer.add_vocab_size(shape.pieces)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, tokenizer.load(a.folder / "tokenizer.model"))
    add_tensors(writer, weights, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{a.output}: {a.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
