"""Compression as a trainer has it: what its learners are asked for, the decoding of their results, and the bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import StateDict
from torchfedrpc.federation.compression import check_codec, decode, tensor_bytes
from torchfedrpc.federation.trainer import AbstractFederationTrainer


class UpdateCompression:
    """The ``compression`` and ``compression_ratio`` of a trainer's config; without compression it changes nothing.

    Args:
        trainer: The trainer.
        weights: Its initial weights.

    Attributes:
        codec: One of `torchfedrpc.federation.compression`; None without compression.

    Raises:
        ConfigError: If a setting is invalid, if there are no initial weights, or if stateless learners would lose
            what ``top_k`` leaves out.
    """

    def __init__(self, trainer: AbstractFederationTrainer, weights: StateDict | None) -> None:
        self.codec: str | None = trainer.setting("compression")
        self._ratio: float = trainer.setting("compression_ratio")
        self._num_bytes = self._num_uncompressed = 0
        check_codec(self.codec, self._ratio)
        if self.codec is not None and weights is None:
            raise ConfigError(
                f"{type(trainer).__qualname__} decodes changes of the global weights: give it initial_weights=, or "
                f"set the trainer's compression to null"
            )
        if self.codec == "top_k" and trainer.learner_proxy.are_stateless:
            raise ConfigError(
                "learners keep what top_k leaves out of an update for their next one, and these are stateless: set "
                "learner.keep_weights=true, or the trainer's compression to int8"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``train_epoch`` that ask for compression."""
        if self.codec is None:
            return {}
        ratio = {"compression_ratio": self._ratio} if self.codec == "top_k" else {}
        return {"compression": self.codec, **ratio}

    def begin_round(self) -> None:
        """Count bytes from zero."""
        self._num_bytes = self._num_uncompressed = 0

    def metrics(self) -> dict[str, float]:
        """Return ``update_bytes`` and ``uncompressed_bytes`` of the round; empty without compression."""
        if self.codec is None:
            return {}
        return {"update_bytes": self._num_bytes, "uncompressed_bytes": self._num_uncompressed}

    async def decoded(
        self, client_id: str, result: Mapping[str, Any], weights: StateDict | None
    ) -> Mapping[str, Any]:
        """Return a learner's result with ``model_weights``, and count its bytes.

        Args:
            client_id: The client.
            result: The result.
            weights: The weights from which it trained.

        Raises:
            ConfigError: If the learner does not compress.
            ValueError: If the update does not match the weights.
        """
        if self.codec is None or weights is None:
            return result
        if "update" not in result:
            raise ConfigError(
                f"the result of train_epoch of {client_id} has no update, although the trainer's compression is "
                f"{self.codec}: let the learner return one by torchfedrpc.federation.compression.encode, or set it "
                f"to null"
            )
        rest = {name: value for name, value in result.items() if name != "update"}
        try:
            model = await asyncio.to_thread(decode, result["update"], weights, self.codec)
        except ValueError as error:
            raise ValueError(f"{client_id}: {error}") from error
        decoded = {"model_weights": model, **rest}
        self._num_bytes += tensor_bytes(result)
        self._num_uncompressed += tensor_bytes(decoded)
        return decoded
