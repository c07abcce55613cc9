"""Held-out samples of clients: a part of each client's share, on which its learner is scored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_STREAM = 0x4E1D  # separates these draws from others with the same seed


def split_held_out(
    shares: Mapping[str, Indices], fraction: float, seed: int
) -> tuple[dict[str, Indices], dict[str, Indices]]:
    """Divide the share of each client into a part to train on and a held-out part, by the seed.

    A client keeps at least one sample to train on, so a small share may have no held-out samples.

    Args:
        shares: Client id -> indices of its samples, [num_samples].
        fraction: Fraction of each share to hold out, at least 0 and below 1; rounded to whole samples.
        seed: Seed of the draw, not negative.

    Returns:
        For each of the two parts: client id -> indices, in the order of the share.
    """
    training: dict[str, Indices] = {}
    held_out: dict[str, Indices] = {}
    for number, (client_id, share) in enumerate(shares.items()):
        num_held_out = max(0, min(int(fraction * len(share) + 0.5), len(share) - 1))
        drawn = np.random.default_rng([_STREAM, seed, number]).permutation(len(share))[:num_held_out]
        is_held_out = np.zeros(len(share), dtype=bool)
        is_held_out[drawn] = True
        training[client_id], held_out[client_id] = share[~is_held_out], share[is_held_out]
    return training, held_out
