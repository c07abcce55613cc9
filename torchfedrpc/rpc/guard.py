"""What torch RPC may unpickle in a process of ours: its own messages for our entry points, and nothing else."""

from __future__ import annotations

import builtins
import io
import pickle
from typing import Any

from torchfedrpc.errors import SerializationError
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.wire.scan import check_depth, check_opcodes

_INTERNAL = "torch.distributed.rpc.internal"
_ENTRIES = {"torchfedrpc.rpc.endpoint": ("serve", "acknowledge", "rref")}
_PLAIN = {
    _INTERNAL: ("PythonUDF", "RemoteException", "_InternalRPCPickler"),
}
_RECEIVER = "_tensor_receiver"


class GuardedUnpickler(pickle.Unpickler):
    """Reads requests and responses of torch RPC; any global that they do not need is refused.

    It sets no attributes either: those of our entry points and of RPC's classes are for all calls. It stands where
    RPC looks its unpickler up at each message. RPC's builtin operators pass no unpickler at all, so they are out of
    its reach: only the network can keep strangers off the ports.
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
        """The object.

        Raises:
            pickle.UnpicklingError: whatever is wrong with the message.
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
        if name in _PLAIN.get(module, ()) or name in _ENTRIES.get(module, ()):
            return super().find_class(module, name)
        entry = getattr(builtins, name, None) if module == "builtins" else None
        if isinstance(entry, type) and issubclass(entry, Exception):  # the type of an RPC-level error
            return entry
        raise pickle.UnpicklingError(
            f"refused {module}.{name}: only torchfedrpc's own entry points may be invoked here"
        )


def _get_receiver(owner: Any, name: Any) -> Any:
    """RPC's pickles fetch the receiver of tensors by getattr from the pickler; they get no other attribute."""
    pickler = torch_rpc().internal._InternalRPCPickler
    if owner is not pickler or name != _RECEIVER:
        raise pickle.UnpicklingError("refused builtins.getattr on anything but RPC's receiver of tensors")
    return getattr(pickler, name)


def install() -> None:
    """Let this process read RPC messages by the guarded unpickler."""
    torch_rpc().internal._unpickler = GuardedUnpickler


def remove() -> None:
    """Undo `install`."""
    torch_rpc().internal._unpickler = pickle.Unpickler
