"""Simulated behaviour of clients: how fast they are, which drop out, and who is late."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from torchfedrpc.errors import ConfigError

_STREAM = 0x51C0DE  # separates these draws from others with the same seed
_EXCLUDED = {"seconds_per_epoch": (math.inf,), "dropout": (1.0,), "deadline_s": (0.0, math.inf)}
_TOLERANCE = 1e-9  # relative, for sums of seconds


@dataclass(frozen=True)
class SimulatedRound:
    """What simulated clients do in a round.

    Attributes:
        epochs: Client -> number of local epochs, of the clients whose results count.
        dropped: The other clients of the cohort: they drop out, or are late.
        seconds: Virtual duration of the round.
    """

    epochs: dict[str, int]
    dropped: list[str]
    seconds: float


@dataclass(frozen=True)
class SimulatedClients:
    """Durations and dropouts of clients, as a function of seed, client and round alone.

    Of an asynchronous pool it is the clock; of a synchronous round it tells who is late, and how long the round
    takes. A round with a deadline waits until then for clients that drop out; without one, these cost no time.

    Args:
        seconds_per_epoch: Virtual duration of a local epoch of a client that is not slow.
        slow_fraction: Fraction of ``clients`` that are slow, 0 to 1, rounded to a whole number. Which ones is drawn
            once.
        slow_factor: How many times as long slow clients take.
        spread: Standard deviation of the logarithm of a factor that is drawn for each call.
        dropout: Probability that a client drops out of a round, 0 to below 1.
        deadline_s: Virtual seconds after which a client of a synchronous round is late. Default: None is.
        partial: Whether a late client makes the whole epochs that it can until the deadline (FedProx, Li et al.
            2020), rather than none. One that cannot make a single one drops out.
        seed: Seed of all draws.
        clients: All clients. Default: Those of the trainer that gets it; without a trainer each client is slow with
            the probability ``slow_fraction``.

    Raises:
        ConfigError: If a value is out of range.
    """

    seconds_per_epoch: float = 1.0
    slow_fraction: float = 0.0
    slow_factor: float = 10.0
    spread: float = 0.0
    dropout: float = 0.0
    deadline_s: float | None = None
    partial: bool = False
    seed: int = 0
    clients: tuple[str, ...] | None = None
    _is_slow: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seconds_per_epoch", 0.0, math.inf),
            ("slow_fraction", 0.0, 1.0),
            ("slow_factor", 1.0, math.inf),
            ("spread", 0.0, math.inf),
            ("dropout", 0.0, 1.0),
            ("deadline_s", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if name == "deadline_s" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"simulation.{name} must be a number from {least:g} to {most:g}, not {value!r}")
            if value in _EXCLUDED.get(name, ()):
                raise ConfigError(f"simulation.{name} must not be {value:g}")
        if not isinstance(self.partial, bool):
            raise ConfigError(f"simulation.partial is true or false, not {self.partial!r}")

        if self.clients is not None:
            self._draw_slow(self.clients)

    def begin_run(self, clients: Sequence[str]) -> None:
        """Draw which of a trainer's clients are slow, unless ``clients`` was given."""
        if self.clients is None:
            self._draw_slow(clients)

    def _draw_slow(self, clients: Sequence[str]) -> None:
        num_slow = round(self.slow_fraction * len(clients))
        order = np.random.default_rng([_STREAM, self.seed, len(clients)]).permutation(len(clients))
        slow = {clients[number] for number in order[:num_slow]}
        self._is_slow.clear()
        self._is_slow.update({client_id: client_id in slow for client_id in clients})

    def seconds(self, client_id: str, number: int, num_epochs: float = 1) -> float:
        """Return the virtual duration of a client's call.

        Args:
            client_id: The client.
            number: Number of the round, or of the call in a pool.
            num_epochs: Number of local epochs of the call.
        """
        if client_id not in self._is_slow:
            self._is_slow[client_id] = self._generator(client_id).random() < self.slow_fraction
        factor = self.slow_factor if self._is_slow[client_id] else 1.0
        if self.spread:
            factor *= math.exp(self.spread * self._generator(client_id, number, 1).standard_normal())
        return self.seconds_per_epoch * num_epochs * factor

    def plan(self, cohort: Sequence[str], round_num: int, num_epochs: int) -> SimulatedRound:
        """Return what a cohort does in a synchronous round of so many local epochs."""
        epochs: dict[str, int] = {}
        dropped = []
        longest = 0.0
        for client_id in cohort:
            done, seconds = num_epochs, self.seconds(client_id, round_num, num_epochs)
            if self.dropout and self._generator(client_id, round_num, 2).random() < self.dropout:
                done = 0
                longest = max(longest, self.deadline_s or 0.0)
            elif self.deadline_s is not None and seconds > self.deadline_s * (1 + _TOLERANCE):
                in_time = num_epochs * self.deadline_s / seconds
                done = int(in_time * (1 + _TOLERANCE)) if self.partial else 0
                longest = self.deadline_s
            else:
                longest = max(longest, seconds)
            if done:
                epochs[client_id] = done
            else:
                dropped.append(client_id)
        return SimulatedRound(epochs, dropped, longest)

    def _generator(self, client_id: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([_STREAM, self.seed, zlib.crc32(client_id.encode()), *numbers])
