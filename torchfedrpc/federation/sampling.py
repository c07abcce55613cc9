"""Sampling of the cohort of a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STREAM = 0x5E1EC7
"""Separates these draws from others with the same seed."""


def sample_clients(client_ids: Sequence[str], num_selected: int, *, seed: int, round_num: int) -> list[str]:
    """Draw a cohort uniformly and without replacement, as a function of seed and round only.

    No draw depends on an earlier one, so a run that resumes at round 7 selects the same cohort as the first run did.

    Args:
        client_ids: All clients.
        num_selected: Size of the cohort, at most the number of clients.
        seed: The run's seed, not negative.
        round_num: The round, from 0.

    Returns:
        The cohort, in the order of ``client_ids``.
    """
    if num_selected == len(client_ids):
        return list(client_ids)
    generator = np.random.default_rng([_STREAM, seed, round_num])
    chosen = generator.choice(len(client_ids), size=num_selected, replace=False)
    return [client_ids[number] for number in np.sort(chosen)]
