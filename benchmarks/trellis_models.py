"""How the models of `methods._trellis` were found: paths of numbers, and frequencies on them.

Numbers are Gaussian, with tails a little heavier. The path for given costs, and the costs that the
frequencies on it give, are found in turn (cf. Chou, Lookabaugh and Gray, 1989). Of each rate the
step and weight were taken that lose least; prints what they come to.
"""

import numpy as np

from personae import kernels
from personae.methods._trellis import MODELS

COUNT, ROUNDS, MOST = 30_000, 14, 15
NEXT = ((0, 2), (2, 0), (1, 3), (3, 1))


def numbers() -> np.ndarray:
    """With a variance that varies."""
    draw = np.random.default_rng(0)
    found = draw.standard_normal(COUNT) * np.exp(0.12 * draw.standard_normal(COUNT))
    return (found / found.std()).astype(np.float32)


def counted(path: np.ndarray) -> np.ndarray:
    """How often each k occurs: (quantiser, k)."""
    found, state = np.zeros((2, MOST + 1)), 0
    for size in np.abs(path.astype(int)).tolist():
        k = (size + (state >> 1)) >> 1
        found[state >> 1, k] += 1
        state = NEXT[state][k & 1]
    return found


def main() -> None:
    """Print each model's share kept, its rate, and its frequencies of 4096."""
    values = numbers()
    for model in MODELS:
        bits = np.tile(np.r_[0.5, 1.5 + 0.7 * np.arange(1, MOST + 1)], (2, 1))
        path, counts, rate = np.empty(COUNT, np.int8), np.zeros_like(bits), 0.0
        for _ in range(ROUNDS):
            kernels.follow(values, model.step, model.weight, bits, path)
            counts = counted(path)
            share = np.maximum(counts / counts.sum(axis=1, keepdims=True), 1e-5)
            bits = -np.log2(share / share.sum(axis=1, keepdims=True))
            bits[:, 1:] += 1  # the sign
            rate = (counts * bits).sum() / COUNT
        integers = path.astype(float)
        kept = (integers @ values) ** 2 / (integers @ integers * (values.astype(float) @ values))
        shares = 4096 * counts / counts.sum(axis=1, keepdims=True)
        shares[:, 1:] /= 2
        print(model.step, model.weight, f"{kept:.3f} {rate:.2f}", shares.round(1).tolist())


if __name__ == "__main__":
    main()
