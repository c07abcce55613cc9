"""torch's global settings: read where a proxy is opened, taken over by workers, put back after each call."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.backends import mha, quantized
from torch.distributions import Distribution

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""Name of a setting -> its value, as plain data that can be told to another process."""

_torch: Any = torch
_C: Any = torch._C
_invariants: Any = torch.sparse.check_sparse_tensor_invariants
_backends: Any = torch.backends
_opt_einsum: Any = importlib.import_module("torch.backends.opt_einsum")  # torch 2.6 imports it when it is used
_TINY = sys.float_info.min
_HALF = 0.5  # a name, since the compiler would fold a product of two numbers

# Backend and operator of torch's new ``fp32_precision``; what is general comes first, since the rest inherits it.
_PRECISIONS = [
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    *((backend, operator) for backend in ("cuda", "mkldnn") for operator in ("matmul", "conv", "rnn")),
]
# Two functions of torch._C for each: ``_get_NAME`` and ``_set_NAME``, unless both are given.
_FLAGS = {
    "torch.backends.cudnn.enabled": "cudnn_enabled",
    "torch.backends.cudnn.benchmark": "cudnn_benchmark",
    "torch.backends.cudnn.deterministic": "cudnn_deterministic",
    "torch.backends.cudnn.depthwise_kernel": "cudnn_depthwise_kernel",
    "torch.backends.mkldnn.enabled": "mkldnn_enabled",
    "torch.backends.mkldnn.deterministic": "mkldnn_deterministic",
    "torch.backends.nnpack enabled": "nnpack_enabled",
    "torch.backends.cuda.matmul.allow_fp16_accumulation": "cublas_allow_fp16_accumulation",
    "torch.backends.cpu fp16 reductions": "cpu_allow_fp16_reduced_precision_reduction",
    "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp": "math_sdp_allow_fp16_bf16_reduction",
    "torch.backends.cuda.sdp_priority_order": "sdp_priority_order",
    "torch.utils.deterministic.fill_uninitialized_memory": "deterministic_fill_uninitialized_memory",
    "torch.set_warn_always": "warnAlways",
}
# Legacy switches, which torch refuses to tell where the new ``fp32_precision`` was set as well.
_LEGACY = {
    "torch.set_float32_matmul_precision": "float32_matmul_precision",
    "torch.backends.cuda.matmul.allow_tf32": "cublas_allow_tf32",
    "torch.backends.cudnn.allow_tf32": "cudnn_allow_tf32",
    "torch.backends.mkldnn.allow_tf32": "onednn_allow_tf32",
}
_SDP = ("flash", "mem_efficient", "math", "cudnn", "overrideable", "fa3")
_PREFERRED = {"linalg": "LinalgBackend", "blas": "BlasBackend", "rocm_fa": "ROCmFABackend"}


@dataclass(frozen=True)
class _Setting:
    """One setting.

    Attributes:
        name: as torch's documentation has it.
        get: gives its value, as plain data; None where that cannot be told.
        set: sets it; raises where it cannot be set.
        is_of_thread: whether each thread has its own.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], object]
    is_of_thread: bool = False


def read_settings() -> dict[str, Any]:
    """All settings of this process, and of the thread that asks."""
    return {setting.name: setting.get() for setting in _SETTINGS}


def adopt_settings(settings: Settings, *, of_thread_only: bool = False) -> list[str]:
    """Set what differs here.

    Args:
        settings: from `read_settings`, of this process or another; those that this torch does not know are left out.
        of_thread_only: whether to set only what each thread has for itself.

    Returns:
        What could not be set here, and why, as another build of torch may not have it.
    """
    problems = []
    for setting in _SETTINGS:
        wanted = settings.get(setting.name)
        if wanted is None and setting.name != _DEFAULT_DEVICE:
            continue
        if (of_thread_only and not setting.is_of_thread) or setting.get() == wanted:
            continue
        try:
            setting.set(wanted)
            why = "" if (found := setting.get()) == wanted else f"it stays {found!r}"
        except Exception as error:
            why = str(error) or type(error).__name__
        if why:
            problems.append(f"{setting.name} is {wanted!r} at the driver, and cannot be set so here: {why}")
    return problems


def _put_back(settings: Settings) -> None:
    """Set what differs here.

    Raises:
        RuntimeError: Something cannot be set; later calls would have it.
    """
    if problems := adopt_settings(settings):
        raise RuntimeError(f"a call has changed a setting for good: {problems[0]}")


def warn_of_default_device() -> None:
    """Tell that torch's default device is of a thread, and reaches no learner in any mode."""
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
        values: as of `read_settings`.
        glance: as of `glance`.
    """

    values: Settings
    glance: tuple[Any, ...]

    @classmethod
    def of_this_process(cls, num_threads: int) -> OpenedSettings:
        """Those of this process as they are now, for threads that have no default device, and so many threads."""
        values = read_settings() | {_DEFAULT_DEVICE: None, "torch.set_num_threads": num_threads}
        return cls(values, (*glance()[:-2], num_threads, None))


class SettingsGuard:
    """Around each step of a call: gives it the settings that its last step left, and the process its own back.

    A call begins with the settings as they were when the proxy was opened. After a method only the settings that
    `glance` reads are compared, since reading all takes some 20 microseconds; after a constructor, all are.

    Args:
        opened: the settings as of opening.
        is_thorough: whether to compare all.
        looks_first: whether the process may have changed its settings meanwhile, as the driver's own may.
    """

    __slots__ = ("_is_thorough", "_looks_first", "_opened", "_outer", "_own")

    def __init__(self, opened: OpenedSettings, *, is_thorough: bool, looks_first: bool) -> None:
        self._opened = opened
        self._is_thorough = is_thorough
        self._looks_first = looks_first
        self._own: Settings | None = None
        self._outer: Settings | None = None

    def __enter__(self) -> None:
        if self._looks_first and glance() != self._opened.glance:
            self._outer = read_settings()
            _put_back(self._own or self._opened.values)
        elif self._own is not None:
            _put_back(self._own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outer, self._outer = self._outer, None
        is_changed = glance() != self._opened.glance or (self._is_thorough and read_settings() != self._opened.values)
        self._own = read_settings() if is_changed else None
        if is_changed or outer is not None:
            _put_back(outer or self._opened.values)


def glance() -> tuple[Any, ...]:
    """The settings that methods change more than others, in a microsecond; of those of the thread, all."""
    return (
        _get_default_dtype(),
        _get_deterministic(),
        _get_warn_only(),
        _get_cudnn_deterministic(),
        _get_cudnn_benchmark(),
        _get_mkldnn_enabled(),
        _is_anomaly_enabled(),
        _get_matmul_precision(*_MATMUL),
        _TINY * _HALF,
        Distribution._validate_args,
        _get_num_threads(),
        getattr(_device_context, "device_context", None),
    )


_get_default_dtype = torch.get_default_dtype
_get_deterministic = _C._get_deterministic_algorithms
_get_warn_only = _C._get_deterministic_algorithms_warn_only
_get_cudnn_deterministic = _C._get_cudnn_deterministic
_get_cudnn_benchmark = _C._get_cudnn_benchmark
_get_mkldnn_enabled = _C._get_mkldnn_enabled
_is_anomaly_enabled = torch.is_anomaly_enabled
_get_num_threads = torch.get_num_threads
_device_context = _torch._GLOBAL_DEVICE_CONTEXT


# "high" and "medium" set that of the legacy API as well as the one of each backend.
_MATMUL = (
    ("cuda" if torch.cuda.is_available() else "mkldnn", "matmul") if hasattr(_C, "_get_fp32_precision_getter") else ()
)
_get_matmul_precision = _C._get_fp32_precision_getter if _MATMUL else _C._get_float32_matmul_precision


# The table.


def _all_settings() -> Iterator[_Setting]:
    yield _Setting("python -O", lambda: sys.flags.optimize, _refuse("start this worker's Python with the same -O"))
    yield _Setting("sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit)
    yield _Setting("sys.set_int_max_str_digits", sys.get_int_max_str_digits, sys.set_int_max_str_digits)
    yield _Setting(
        "torch.set_default_dtype",
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        lambda name: torch.set_default_dtype(getattr(torch, name)),
    )
    yield _Setting(_DEFAULT_DEVICE, _default_device, torch.set_default_device, is_of_thread=True)
    yield _Setting("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads, is_of_thread=True)
    yield _Setting(
        "torch.set_flush_denormal", lambda: _TINY * _HALF == 0.0, torch.set_flush_denormal, is_of_thread=True
    )
    yield _Setting("torch.use_deterministic_algorithms", _deterministic, _set_deterministic)
    yield _Setting("torch.autograd.set_detect_anomaly", _anomaly, lambda value: torch.set_anomaly_enabled(*value))
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
    yield _Setting("torch.backends.quantized.engine", lambda: quantized.engine, _set_quantized_engine)
    yield _Setting("torch.backends.opt_einsum", _einsum, lambda value: _opt_einsum.set_flags(*value))
    for name in ("overwrite", "swap"):
        what = f"{name}_module_params_on_conversion"
        yield _Setting(
            f"torch.__future__.set_{what}",
            getattr(torch.__future__, f"get_{what}"),
            getattr(torch.__future__, f"set_{what}"),
        )
    for documented, name in _FLAGS.items():
        if hasattr(_C, f"_set_{name}"):
            yield _Setting(documented, getattr(_C, f"_get_{name}"), getattr(_C, f"_set_{name}"))
    for name in _SDP:
        if hasattr(_C, f"_set_sdp_use_{name}"):
            enabled = getattr(_C, f"_get_{name}_sdp_enabled")
            yield _Setting(f"torch.backends.cuda.enable_{name}_sdp", enabled, getattr(_C, f"_set_sdp_use_{name}"))
    for dtype in ("fp16", "bf16"):
        name = f"cublas_allow_{dtype}_reduced_precision_reduction"
        yield _Setting(
            f"torch.backends.cuda.matmul.allow_{dtype}_reduced_precision_reduction",
            _listed(getattr(_C, f"_get_{name}")),
            _spread(getattr(_C, f"_set_{name}")),
        )
    for name, kind in _PREFERRED.items():
        if hasattr(_C, f"_get_{name}_preferred_backend") and hasattr(_C, f"_{kind}"):
            yield _preferred(name, getattr(_C, f"_{kind}"))
    if hasattr(_C, "_cuda_get_cudnn_benchmark_limit") and _backends.cudnn.is_available():
        yield _Setting(
            "torch.backends.cudnn.benchmark_limit",
            _C._cuda_get_cudnn_benchmark_limit,
            _C._cuda_set_cudnn_benchmark_limit,
        )
    for documented, name in _LEGACY.items():  # they set what the new ones tell, so these come after them
        if hasattr(_C, f"_set_{name}"):
            yield _Setting(documented, _or_none(getattr(_C, f"_get_{name}")), getattr(_C, f"_set_{name}"))
    if hasattr(_C, "_get_fp32_precision_getter"):
        yield _Setting("torch.backends fp32_precision", _precisions, _set_precisions)


_COMPILER = "torch._inductor.config"
_DEFAULT_DEVICE = "torch.set_default_device"


def _refuse(remedy: str) -> Callable[[Any], None]:
    def refuse(value: Any) -> None:
        raise RuntimeError(remedy)

    return refuse


def _default_device() -> str | None:
    context = getattr(_device_context, "device_context", None)
    return None if context is None else str(context.device)


def _deterministic() -> list[bool]:
    """Whether algorithms are deterministic, whether others are warned of only, and whether the compiler is told."""
    compiler = sys.modules.get(_COMPILER)
    return [_get_deterministic(), _get_warn_only(), bool(getattr(compiler, "deterministic", False))]


def _set_deterministic(value: list[bool]) -> None:
    """As ``torch.use_deterministic_algorithms``, which imports the compiler for seconds, where that is needed."""
    mode, warn_only, compiler_is_told = value
    compiler: Any = importlib.import_module(_COMPILER) if compiler_is_told else sys.modules.get(_COMPILER)
    if hasattr(compiler, "deterministic"):
        compiler.deterministic = compiler_is_told
    _C._set_deterministic_algorithms(mode, warn_only=warn_only)


def _anomaly() -> list[bool]:
    return [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()]


def _set_quantized_engine(name: str) -> None:
    quantized.engine = name


def _einsum() -> list[Any]:
    return [_opt_einsum.enabled, _opt_einsum.strategy]


def _listed(get: Callable[[], Any]) -> Callable[[], Any]:
    """A pair as JSON has it; older versions of torch have one flag."""

    def listed() -> Any:
        value = get()
        return list(value) if isinstance(value, tuple) else value

    return listed


def _spread(set_: Callable[..., object]) -> Callable[[Any], object]:
    return lambda value: set_(*value) if isinstance(value, list) else set_(value)


def _preferred(name: str, kind: Any) -> _Setting:
    get, set_ = getattr(_C, f"_get_{name}_preferred_backend"), getattr(_C, f"_set_{name}_preferred_backend")
    return _Setting(
        f"torch.backends.cuda.preferred_{name}_library",
        lambda: get().name if hasattr(get(), "name") else str(get()),
        lambda value: set_(getattr(kind, value)),
    )


def _or_none(get: Callable[[], Any]) -> Callable[[], Any]:
    def told() -> Any:
        try:
            return get()
        except RuntimeError:
            return None

    return told


def _precisions() -> list[str]:
    return [_C._get_fp32_precision_getter(*which) for which in _PRECISIONS]


def _set_precisions(values: list[str]) -> None:
    for which, value in zip(_PRECISIONS, values, strict=True):
        if _C._get_fp32_precision_getter(*which) != value:
            _C._set_fp32_precision_setter(*which, value)


_SETTINGS = tuple(_all_settings())
