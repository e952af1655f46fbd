"""The tokenizer: a byte-pair model of 2048 pieces with byte fallback, trained by sentencepiece on our own stories."""

import io

import sentencepiece

PIECES = 2048
UNKNOWN, BEGIN, END = 0, 1, 2


def train(stories, path):
    """Trains the tokenizer on the stories and writes it to `path`; the same stories give the same file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        # Text must come back byte for byte: no Unicode folding, no squeezing of spaces, newlines are characters.
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, max_sentence_length=1 << 16,
        unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END, pad_id=-1, num_threads=1, minloglevel=1)
    path.write_bytes(model.getvalue())


def load(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
