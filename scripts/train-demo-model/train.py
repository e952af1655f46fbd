"""Trains the demo model: stories -> tokenizer -> weights. Seeded from end to end; resumes from its last checkpoint.

Learning rate: a short warm-up, then constant, then a straight line to zero over the last quarter. So a run may be
cut short and resumed with fewer --steps as long as the last quarter has not begun: the result is the same as if it
had been started that way.
"""

import argparse
import pathlib
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np

import model
import stories
import tokenizer

SEED = 20
TRAIN_STORIES = 24000
HELD_OUT_STORIES = 200


def prepare(folder):
    """Writes the tokenizer and the token streams into `folder`, once."""
    spm, train_file, held_out_file = folder / "tokenizer.model", folder / "train.npy", folder / "held-out.npy"
    if not held_out_file.exists():
        texts = stories.corpus(SEED, TRAIN_STORIES + HELD_OUT_STORIES)
        tokenizer.train(texts[:6000], spm)
        sp = tokenizer.load(spm)
        streams = [np.array([t for ids in sp.encode(part) for t in [tokenizer.BEGIN, *ids, tokenizer.END]], np.int32)
                   for part in (texts[:TRAIN_STORIES], texts[TRAIN_STORIES:])]
        np.save(train_file, streams[0])
        np.save(held_out_file, streams[1])
        print(f"{sum(map(len, texts)) / 1e6:.1f} MB of text, {len(streams[0]) / 1e6:.2f} M tokens", flush=True)
    return tokenizer.load(spm), np.load(train_file), np.load(held_out_file)


def learning_rate(step, steps, peak):
    decay = steps // 4
    return peak * jnp.minimum(1.0, jnp.minimum((step + 1) / 100, (steps - step) / decay))


def make_step(shape, steps, peak):
    """One step of AdamW (0.9, 0.98), gradient clipped at 1, weight decay on matrices only."""
    def step(state, tokens):
        weights, first, second, count = state
        value, gradient = jax.value_and_grad(model.loss)(weights, tokens, shape)
        size = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g / jnp.maximum(1.0, size), gradient)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.98 * v + 0.02 * g * g, second, gradient)
        rate = learning_rate(count, steps, peak)
        n = count + 1

        def update(w, m, v):
            decay = 0.05 if w.ndim > 1 and w.shape[-2] > 8 else 0.0
            return w - rate * (m / (1 - 0.9 ** n) / (jnp.sqrt(v / (1 - 0.98 ** n)) + 1e-8) + decay * w)
        return (jax.tree.map(update, weights, first, second), first, second, n), value
    return jax.jit(step, donate_argnums=0)


def batch(stream, step, size, length):
    """The windows of one step: which ones depends on the seed and the step alone."""
    random = np.random.default_rng([SEED, step])
    starts = random.integers(0, len(stream) - length - 1, size)
    return np.stack([stream[s:s + length + 1] for s in starts])


def tell(weights, shape, sp, prompt, count):
    """Greedy continuation, the slow and simple way, to look at while training."""
    ids = [tokenizer.BEGIN, *sp.encode(prompt)]
    forward = jax.jit(lambda w, t: model.logits(w, t, shape))
    end = len(ids) + count
    while len(ids) < end and ids[-1] != tokenizer.END:
        padded = np.zeros((1, end), np.int32)
        padded[0, :len(ids)] = ids
        ids.append(int(forward(weights, padded)[0, len(ids) - 1].argmax()))
    return sp.decode(ids[1:])


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=pathlib.Path, help="where tokenizer, tokens and checkpoints lie")
    arguments.add_argument("--steps", type=int, default=800)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--rate", type=float, default=2.5e-3)
    a = arguments.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    sp, stream, held_out = prepare(a.folder)
    shape = model.Shape()
    checkpoint = a.folder / "checkpoint.pickle"
    if checkpoint.exists():
        state = pickle.loads(checkpoint.read_bytes())
    else:
        weights = model.new_weights(shape, SEED)
        zeros = {name: np.zeros_like(w) for name, w in weights.items()}
        state = (weights, zeros, {name: w.copy() for name, w in zeros.items()}, 0)
    first = int(state[3])
    print(f"{sum(w.size for w in state[0].values()) / 1e6:.2f} M weights, step {first} of {a.steps}", flush=True)
    step = make_step(shape, a.steps, a.rate)
    check = jax.jit(lambda w, t: model.loss(w, t, shape))
    length = len(held_out) // 8 // (a.length + 1) * (a.length + 1)
    tests = held_out[:length * 8].reshape(-1, a.length + 1)[:16]
    started, mean = time.time(), 0.0
    for i in range(first, a.steps):
        state, value = step(state, batch(stream, i, a.batch, a.length))
        mean = float(value) if i == first else 0.98 * mean + 0.02 * float(value)
        if (i + 1) % 50 == 0:
            print(f"step {i + 1}: loss {mean:.3f}, {(time.time() - started) / (i + 1 - first):.2f} s per step", flush=True)
        if (i + 1) % 200 == 0 or i + 1 == a.steps:
            saved = jax.tree.map(np.asarray, state)
            new = checkpoint.with_suffix(".new")
            new.write_bytes(pickle.dumps(saved))
            new.rename(checkpoint)
            print(f"step {i + 1}: held-out loss {float(check(state[0], tests)):.3f}", flush=True)
            print(tell(state[0], shape, sp, "Once upon a time", 120), flush=True)


if __name__ == "__main__":
    main()
