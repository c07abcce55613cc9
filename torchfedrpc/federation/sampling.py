"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STREAM = 0x5E1EC7
"""Keeps these draws apart from others made from the same seed."""


def sample_clients(client_ids: Sequence[str], num_selected: int, *, seed: int, round_num: int) -> list[str]:
    """Draw a cohort, uniformly and without replacement, from the seed and the round alone.

    No draw depends on an earlier one, so a run that resumes at round 7 selects what the first run selected
    then.

    Args:
        client_ids: all clients.
        num_selected: how many to draw, at most all.
        seed: the run's seed, not negative.
        round_num: the round, from 0.

    Returns:
        The cohort, in the order of ``client_ids``.
    """
    if num_selected == len(client_ids):
        return list(client_ids)
    generator = np.random.default_rng([_STREAM, seed, round_num])
    chosen = generator.choice(len(client_ids), size=num_selected, replace=False)
    return [client_ids[number] for number in np.sort(chosen)]
