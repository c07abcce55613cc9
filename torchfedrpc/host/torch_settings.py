"""Global settings of torch and Python: read when a proxy opens, set in workers, restored after each call."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.backends import mha, quantized
from torch.distributions import Distribution

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""Name of a setting -> its value, as plain data that JSON can carry to another process."""

_torch: Any = torch
_C: Any = torch._C
_invariants: Any = torch.sparse.check_sparse_tensor_invariants
_opt_einsum: Any = importlib.import_module("torch.backends.opt_einsum")  # torch 2.6 imports it when it is used
_device_context = _torch._GLOBAL_DEVICE_CONTEXT
_TINY = sys.float_info.min
_HALF = 0.5  # a name, since the compiler would fold a product of two literals
_COMPILER = "torch._inductor.config"
_DEFAULT_DEVICE = "torch.set_default_device"
_NUM_THREADS = "torch.set_num_threads"


class _Setting(NamedTuple):
    """One setting.

    Attributes:
        name: Its name in torch's documentation.
        get: Returns its value; raises RuntimeError if torch cannot tell.
        set: Sets it; raises if it cannot be set. A tuple is passed as several arguments.
        is_of_thread: Whether each thread has a separate value.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[..., object]
    is_of_thread: bool = False


def read_settings() -> dict[str, Any]:
    """Return all settings of this process and of the calling thread; None for those that torch cannot tell."""
    return {setting.name: _plain(_read(setting)) for setting in _SETTINGS}


def adopt_settings(settings: Settings, *, of_thread_only: bool = False) -> list[str]:
    """Set the settings that differ here.

    Args:
        settings: From `read_settings`, of this process or another. Those that this torch does not know are skipped.
        of_thread_only: Whether to set only settings of the thread.

    Returns:
        The settings that could not be set, and why; another build of torch may lack them.
    """
    problems = []
    for setting in _SETTINGS:
        wanted = settings.get(setting.name)
        if wanted is None and setting.name != _DEFAULT_DEVICE:
            continue
        if (of_thread_only and not setting.is_of_thread) or _plain(present := _read(setting)) == wanted:
            continue
        try:
            value = _unplain(wanted, present)
            setting.set(*value) if isinstance(value, tuple) else setting.set(value)
            why = "" if (found := _plain(_read(setting))) == wanted else f"it stays {found!r}"
        except Exception as error:
            why = str(error) or type(error).__name__
        if why:
            problems.append(f"{setting.name} is {wanted!r} at the driver, and cannot be set so here: {why}")
    return problems


def put_back(settings: Settings) -> None:
    """Restore the settings that differ here.

    Raises:
        RuntimeError: If a setting cannot be restored, which would affect later calls.
    """
    if problems := adopt_settings(settings):
        raise RuntimeError(f"a call has changed a setting for good: {problems[0]}")


def warn_of_default_device() -> None:
    """Warn that torch's default device belongs to this thread, and reaches learners in no mode."""
    if (device := _default_device()) is not None:
        logger.warning(
            "torch.set_default_device(%r) holds for this thread alone, not for learners: put their tensors on "
            "torchfedrpc.current_call().device",
            device,
        )


@dataclass(frozen=True)
class OpenedSettings:
    """The settings with which calls begin.

    Attributes:
        values: From `read_settings`.
        glance: From `glance`.
    """

    values: Settings
    glance: tuple[Any, ...]

    @classmethod
    def of_this_process(cls, num_threads: int) -> OpenedSettings:
        """Return the settings of this process, for threads with ``num_threads`` and without a default device."""
        values = read_settings() | {_DEFAULT_DEVICE: None, _NUM_THREADS: num_threads}
        return cls(values, (*glance()[:-2], num_threads, None))


def glance() -> tuple[Any, ...]:
    """Return the settings that methods change most often, and all settings of the thread, in a microsecond."""
    return (
        _get_default_dtype(),
        _get_deterministic(),
        _get_warn_only(),
        _get_cudnn_deterministic(),
        _get_cudnn_benchmark(),
        _get_mkldnn_enabled(),
        _is_anomaly_enabled(),
        _get_matmul_precision(*_MATMUL),
        _TINY * _HALF == 0.0,  # a denormal number is equal to 0 while they are flushed
        Distribution._validate_args,
        _get_num_threads(),
        getattr(_device_context, "device_context", None),
    )


# "high" and "medium" set the value of the legacy API and those of the backends.
_MATMUL = (
    ("cuda" if torch.cuda.is_available() else "mkldnn", "matmul") if hasattr(_C, "_get_fp32_precision_getter") else ()
)
_get_matmul_precision = _C._get_fp32_precision_getter if _MATMUL else _C._get_float32_matmul_precision
_get_default_dtype = torch.get_default_dtype
_get_deterministic = _C._get_deterministic_algorithms
_get_warn_only = _C._get_deterministic_algorithms_warn_only
_get_cudnn_deterministic = _C._get_cudnn_deterministic
_get_cudnn_benchmark = _C._get_cudnn_benchmark
_get_mkldnn_enabled = _C._get_mkldnn_enabled
_is_anomaly_enabled = torch.is_anomaly_enabled
_get_num_threads = torch.get_num_threads


# Values in JSON and in torch.


def _read(setting: _Setting) -> Any:
    try:
        return setting.get()
    except RuntimeError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.name if hasattr(value, "name") else value  # of an enum of torch._C


def _unplain(plain: Any, present: Any) -> Any:
    """Convert a plain value to the type of the present one."""
    if isinstance(plain, list) and not isinstance(present, list):
        return tuple(plain)
    if isinstance(present, torch.dtype):
        return getattr(torch, plain)
    return getattr(type(present), plain) if hasattr(present, "name") else plain


# Settings that take several functions of torch.


def _refuse_optimize(value: int) -> None:
    raise RuntimeError("start this worker's Python with the same -O")


def _default_device() -> str | None:
    context = getattr(_device_context, "device_context", None)
    return None if context is None else str(context.device)


def _deterministic() -> tuple[bool, bool, bool]:
    """Return whether algorithms are deterministic, whether others only warn, and the setting of torch's compiler."""
    compiler = sys.modules.get(_COMPILER)
    return _get_deterministic(), _get_warn_only(), bool(getattr(compiler, "deterministic", False))


def _set_deterministic(mode: bool, warn_only: bool, in_compiler: bool) -> None:
    """Do as ``torch.use_deterministic_algorithms``, but import the compiler, which takes seconds, only if needed."""
    compiler: Any = importlib.import_module(_COMPILER) if in_compiler else sys.modules.get(_COMPILER)
    if hasattr(compiler, "deterministic"):
        compiler.deterministic = in_compiler
    _C._set_deterministic_algorithms(mode, warn_only=warn_only)


# Backend and operator of torch's ``fp32_precision``. General ones come first, since the others inherit from them.
_PRECISIONS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]
_PRECISIONS += [(backend, operator) for backend in ("cuda", "mkldnn") for operator in ("matmul", "conv", "rnn")]


def _precisions() -> tuple[str, ...]:
    return tuple(_C._get_fp32_precision_getter(*which) for which in _PRECISIONS)


def _set_precisions(*values: str) -> None:
    for which, value in zip(_PRECISIONS, values, strict=True):
        if _C._get_fp32_precision_getter(*which) != value:
            _C._set_fp32_precision_setter(*which, value)


# All settings, in the order in which they are set.

# torch._C has a getter _get_NAME and a setter _set_NAME for each of these.
_PAIRS = {
    "torch.backends.cudnn.enabled": "cudnn_enabled",
    "torch.backends.cudnn.benchmark": "cudnn_benchmark",
    "torch.backends.cudnn.benchmark_limit": "_cuda_get_cudnn_benchmark_limit _cuda_set_cudnn_benchmark_limit",
    "torch.backends.cudnn.deterministic": "cudnn_deterministic",
    "torch.backends.cudnn.depthwise_kernel": "cudnn_depthwise_kernel",
    "torch.backends.mkldnn.enabled": "mkldnn_enabled",
    "torch.backends.mkldnn.deterministic": "mkldnn_deterministic",
    "torch.backends.nnpack enabled": "nnpack_enabled",
    "torch.backends.cpu fp16 reductions": "cpu_allow_fp16_reduced_precision_reduction",
    "torch.backends.cuda.matmul.allow_fp16_accumulation": "cublas_allow_fp16_accumulation",
    **{
        f"torch.backends.cuda.matmul.allow_{dtype}_reduced_precision_reduction": (
            f"cublas_allow_{dtype}_reduced_precision_reduction"
        )
        for dtype in ("fp16", "bf16")
    },
    **{
        f"torch.backends.cuda.preferred_{name}_library": f"{name}_preferred_backend"
        for name in ("linalg", "blas", "rocm_fa")
    },
    **{
        f"torch.backends.cuda.enable_{name}_sdp": f"_get_{name}_sdp_enabled _set_sdp_use_{name}"
        for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable", "fa3")
    },
    "torch.backends.cuda.sdp_priority_order": "sdp_priority_order",
    "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp": "math_sdp_allow_fp16_bf16_reduction",
    "torch.utils.deterministic.fill_uninitialized_memory": "deterministic_fill_uninitialized_memory",
    "torch.set_warn_always": "warnAlways",
    # Legacy switches. torch cannot tell their values if the new ``fp32_precision``, which they set, was set too.
    "torch.set_float32_matmul_precision": "float32_matmul_precision",
    "torch.backends.cuda.matmul.allow_tf32": "cublas_allow_tf32",
    "torch.backends.cudnn.allow_tf32": "cudnn_allow_tf32",
    "torch.backends.mkldnn.allow_tf32": "onednn_allow_tf32",
}


def _all_settings() -> Iterator[_Setting]:
    yield _Setting("python -O", lambda: sys.flags.optimize, _refuse_optimize)
    yield _Setting("sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit)
    yield _Setting("sys.set_int_max_str_digits", sys.get_int_max_str_digits, sys.set_int_max_str_digits)
    yield _Setting("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield _Setting(_DEFAULT_DEVICE, _default_device, torch.set_default_device, is_of_thread=True)
    yield _Setting(_NUM_THREADS, torch.get_num_threads, torch.set_num_threads, is_of_thread=True)
    yield _Setting(
        "torch.set_flush_denormal", lambda: _TINY * _HALF == 0.0, torch.set_flush_denormal, is_of_thread=True
    )
    yield _Setting("torch.use_deterministic_algorithms", _deterministic, _set_deterministic)
    yield _Setting(
        "torch.autograd.set_detect_anomaly",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        torch.set_anomaly_enabled,
    )
    yield _Setting(
        "torch.distributions.Distribution.set_default_validate_args",
        lambda: Distribution._validate_args,
        Distribution.set_default_validate_args,
    )
    yield _Setting(
        "torch.sparse.check_sparse_tensor_invariants",
        _invariants.is_enabled,
        lambda enabled: _invariants.enable() if enabled else _invariants.disable(),
    )
    yield _Setting("torch.backends.mha fast path", mha.get_fastpath_enabled, mha.set_fastpath_enabled)
    yield _Setting(
        "torch.backends.quantized.engine",
        lambda: quantized.engine,
        lambda engine: setattr(quantized, "engine", engine),
    )
    yield _Setting(
        "torch.backends.opt_einsum", lambda: (_opt_einsum.enabled, _opt_einsum.strategy), _opt_einsum.set_flags
    )
    for name in ("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"):
        future = torch.__future__
        yield _Setting(f"torch.__future__.set_{name}", getattr(future, f"get_{name}"), getattr(future, f"set_{name}"))
    for name, pair in _PAIRS.items():
        getter, setter = pair.split() if " " in pair else (f"_get_{pair}", f"_set_{pair}")
        if hasattr(_C, setter):  # not in every version and build of torch
            yield _Setting(name, getattr(_C, getter), getattr(_C, setter))
    if hasattr(_C, "_get_fp32_precision_getter"):  # it reads values that the legacy switches set
        yield _Setting("torch.backends fp32_precision", _precisions, _set_precisions)


_SETTINGS = tuple(_all_settings())
