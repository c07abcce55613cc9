"""Unpickler of torch RPC that reads messages for our entry points only."""

from __future__ import annotations

import builtins
import io
import pickle
from typing import Any

from torchfedrpc.errors import SerializationError
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.wire.scan import check_depth, check_opcodes

_PLAIN = {
    "torchfedrpc.rpc.endpoint": ("serve", "acknowledge", "rref"),
    "torch.distributed.rpc.internal": ("PythonUDF", "RemoteException", "_InternalRPCPickler"),
}
_RECEIVER = "_tensor_receiver"


class GuardedUnpickler(pickle.Unpickler):
    """Reads requests and responses of torch RPC, and refuses any global that they do not need.

    It sets no attributes either, since attributes of our entry points and of RPC's classes would affect all calls.
    RPC looks its unpickler up for each message, and finds this one. Messages for torch's builtin operators pass no
    unpickler, so only the network can keep strangers off the ports.
    """

    def __init__(self, file: io.BytesIO) -> None:
        try:
            data = file.read()
            check_opcodes(data)
        except SerializationError as error:
            raise pickle.UnpicklingError(f"refused a message: {error}") from error
        super().__init__(io.BytesIO(data))
        self._data = data

    def load(self) -> Any:
        """Return the object.

        Raises:
            pickle.UnpicklingError: If the message is refused or malformed.
        """
        try:
            message = super().load()
            check_depth(self._data, message)
            return message
        except (pickle.UnpicklingError, MemoryError):
            raise
        except Exception as error:
            raise pickle.UnpicklingError(f"refused a message: {type(error).__name__}: {error}") from error

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _get_receiver
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        entry = getattr(builtins, name, None) if module == "builtins" else None
        if isinstance(entry, type) and issubclass(entry, Exception):  # the type of an RPC-level error
            return entry
        raise pickle.UnpicklingError(
            f"refused {module}.{name}: only torchfedrpc's own entry points may be invoked here"
        )


def _get_receiver(owner: Any, name: Any) -> Any:
    """Return the receiver of tensors, which RPC's pickles fetch by getattr. Other attributes are refused."""
    pickler = torch_rpc().internal._InternalRPCPickler
    if owner is not pickler or name != _RECEIVER:
        raise pickle.UnpicklingError("refused builtins.getattr on anything but RPC's receiver of tensors")
    return getattr(pickler, name)


def install() -> None:
    """Install the guarded unpickler for the RPC messages of this process."""
    torch_rpc().internal._unpickler = GuardedUnpickler


def remove() -> None:
    """Undo `install`."""
    torch_rpc().internal._unpickler = pickle.Unpickler
