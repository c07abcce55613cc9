"""Client evaluation: scores of the clients' own samples, as metrics of a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchfedrpc.errors import ConfigError, GroupCallError
from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.callbacks import Callback, Run

logger = logging.getLogger(__name__)

_LOWER_IS_WORSE = {"accuracy": True, "loss": False}


class ClientEvaluation(Callback):
    """Lets all clients score the trainer's ``weights`` by `evaluate`, after the first, each ``every``-th and the last
    round.

    Of ``accuracy`` and ``loss`` of their results, as far as they have them, it adds these metrics to the round, for
    callbacks after it: ``client_accuracy`` (mean over the clients), ``client_accuracy_weighted`` (by their numbers of
    samples), ``client_accuracy_worst_decile`` (mean of the worst tenth of the clients, at least one) and
    ``client_accuracy_spread`` (standard deviation over the clients); likewise ``client_loss``. Clients whose
    ``num_samples`` is 0 do not count. Learners with personal models score these. If the trainer has no ``weights``,
    learners score their own, by ``evaluate()``.

    A call waits for those of its client before it, also for one in flight of an asynchronous trainer, as a checkpoint
    does. If the trainer's ``on_failure`` is ``drop``, clients that fail are left out, with a warning.

    Args:
        every: Number of rounds, at least 1.

    Raises:
        ConfigError: If ``every`` is invalid; in a round, if a result has neither accuracy nor loss, or not the same
            of them as another, or no ``num_samples``, or no client has samples.
        GroupCallError: In a round, if a client failed; with ``on_failure`` of ``drop``, if all did.
    """

    def __init__(self, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"evaluate_every must be a whole number of rounds of at least 1, not {every!r}")
        self._every = every

    async def on_round_end(self, run: Run, ended: RoundEnded) -> dict[str, float]:
        """Return the metrics of the clients; none if it is not their round."""
        number = ended.round_num + 1
        if number not in (1, ended.num_rounds) and number % self._every:
            return {}
        weights = getattr(run.trainer, "weights", None)
        arguments = {} if weights is None else {"model_weights": weights}
        is_dropping = getattr(run.trainer.config, "on_failure", "raise") == "drop"
        clients = run.proxy.clients().options(on_error="collect" if is_dropping else "raise")
        results = await clients.call("evaluate", **arguments)
        if not results:
            raise GroupCallError(f"evaluate failed for all of {', '.join(results.failures)}", results.failures, {})
        for client_id, error in results.failures.items():
            logger.warning("%s is left out of the evaluation: %s: %s", client_id, type(error).__name__, error)
        return client_metrics(results)


def client_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return mean, weighted mean, worst decile and spread of the clients' scores, as `ClientEvaluation` names them.

    Args:
        results: Client id -> the result of its learner's ``evaluate``, with ``num_samples`` and at least one of
            ``accuracy`` and ``loss``.

    Raises:
        ConfigError: If a result lacks one of these, or all have no samples.
    """
    for client_id, result in results.items():
        if not isinstance(result, Mapping) or "num_samples" not in result:
            raise ConfigError(
                f"{client_id}: evaluate returned {result!r:.200}: it must return a mapping with num_samples"
            )
    scored = {client_id: result for client_id, result in results.items() if result["num_samples"] > 0}
    if not scored:
        raise ConfigError("no client has samples to score: raise held_out, or have fewer clients")
    names = [name for name in _LOWER_IS_WORSE if any(name in result for result in scored.values())]
    for client_id, result in scored.items():
        if not names or any(name not in result for name in names):
            expected = " and ".join(names) or "accuracy or loss"
            raise ConfigError(f"{client_id}: evaluate returned {result!r:.200}: it must have {expected}")
    num_samples = [float(result["num_samples"]) for result in scored.values()]
    metrics: dict[str, float] = {}
    for name in names:
        values = [float(result[name]) for result in scored.values()]
        metrics |= _summary(f"client_{name}", values, num_samples, reverse=not _LOWER_IS_WORSE[name])
    return metrics


def _summary(name: str, values: Sequence[float], weights: Sequence[float], *, reverse: bool) -> dict[str, float]:
    mean = sum(values) / len(values)
    worst = sorted(values, reverse=reverse)[: max(1, len(values) // 10)]
    if any(map(math.isnan, values)):
        worst = [math.nan]  # a sort would put it anywhere
    return {
        name: mean,
        f"{name}_weighted": sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights),
        f"{name}_worst_decile": sum(worst) / len(worst),
        f"{name}_spread": math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)),
    }
