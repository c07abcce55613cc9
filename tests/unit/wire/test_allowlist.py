"""The allow-list: plain data and classes of trusted packages pass, whatever could run something does not."""

from __future__ import annotations

import collections
import enum
import os
import sys
import types
from os import system
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strangers
import torch
from folders import ROOT
from strangers import Stranger

from torchfedrpc.errors import ConfigError, SerializationError, UntrustedTypeError
from torchfedrpc.wire import arrays
from torchfedrpc.wire.allowlist import LISTED, AllowList
from torchfedrpc.wire.packing import pack

HERE = __name__
ALLOW = AllowList([HERE])


class Outer:
    imported = Stranger
    run = os.system
    module = os

    class Inner:
        class Innermost:
            pass

    def method(self) -> None: ...

    @classmethod
    def make(cls) -> Outer:
        return cls()


class Colour(enum.Enum):
    RED = 1


class Odd(Exception):
    pass


Pair = collections.namedtuple("Pair", ["first", "second"])
Alias = Outer
Number = int
Listed = list[int]
instance = Outer()
assert system is os.system
assert strangers.Stranger is Stranger


def function() -> None: ...


# What a trusted package may send.


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("Outer", Outer),
        ("Outer.Inner", Outer.Inner),
        ("Outer.Inner.Innermost", Outer.Inner.Innermost),
        ("Colour", Colour),
        ("Odd", Odd),
        ("Pair", Pair),
        ("Alias", Outer),
    ],
)
def test_a_class_that_a_trusted_package_defines_may_travel(name: str, entry: type) -> None:
    assert ALLOW.find(HERE, name) is entry


@pytest.mark.parametrize(
    "name",
    [
        "system",
        "os",
        "os.system",
        "sys.modules",
        "Path",
        "Stranger",
        "strangers.Stranger",
        "Any",
        "function",
        "function.__globals__",
        "instance",
        "instance.__class__",
        "Number",
        "Listed",
        "Outer.method",
        "Outer.make",
        "Outer.run",
        "Outer.module",
        "Outer.module.system",
        "Outer.imported",
        "Outer.__init__",
        "Outer.__class__",
        "Outer.__base__",
        "Outer.__subclasses__",
        "Outer.__dict__",
        "Outer.mro",
        "Colour.RED",
        "missing",
        "Outer.missing",
        "Outer..Inner",
        "",
        ".",
        "__builtins__",
        "__builtins__.eval",
        "__loader__",
        "__name__",
        "<lambda>",
    ],
)
def test_of_a_trusted_package_nothing_else_may(name: str) -> None:
    with pytest.raises(UntrustedTypeError, match="only classes that it defines itself") as caught:
        ALLOW.find(HERE, name)
    assert str(caught.value).startswith(f"{HERE}.{name} may not travel")


def test_a_nested_class_of_a_stranger_is_not_reached_through_a_trusted_one() -> None:
    with pytest.raises(UntrustedTypeError):
        ALLOW.find(HERE, "Outer.imported.__class__")


def test_trust_in_a_module_is_trust_in_its_whole_top_level_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "allowed_site"
    package.mkdir()
    (package / "__init__.py").write_text("from allowed_site.models import Model\n")
    (package / "models.py").write_text("class Model: ...\n")
    (package / "losses.py").write_text("from allowed_site.models import Model\nclass Loss: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    allow = AllowList(["allowed_site.models"])
    assert allow.trusted == {"allowed_site"}
    loss = allow.find("allowed_site.losses", "Loss")
    assert loss is sys.modules["allowed_site.losses"].Loss
    model = sys.modules["allowed_site.models"].Model
    assert allow.find("allowed_site", "Model") is allow.find("allowed_site.losses", "Model") is model
    for name in ("allowed_site", "allowed_site.models", "allowed_site.losses"):
        monkeypatch.delitem(sys.modules, name)


def test_a_trusted_packages_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "runnable_site"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UntrustedTypeError, match="would run it"):
        AllowList(["runnable_site"]).find("runnable_site.__main__", "Main")
    monkeypatch.delitem(sys.modules, "runnable_site", raising=False)


@pytest.mark.parametrize("module", [f"{HERE}.os", f"{HERE}.missing", f"{HERE}."])
def test_a_module_that_a_trusted_package_lacks_is_refused(module: str) -> None:
    with pytest.raises(UntrustedTypeError, match="may not travel"):
        ALLOW.find(module, "system")


def test_a_package_is_not_trusted_for_beginning_alike() -> None:
    with pytest.raises(UntrustedTypeError, match="strangers"):
        AllowList(["stranger", "strangers_and_friends"]).find("strangers", "Stranger")


def test_the_script_is_the_same_package_under_both_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("__main__")
    script.Learner = type("Learner", (), {"__module__": "__main__"})  # type: ignore[attr-defined]
    adopted = type("Adopted", (), {"__module__": "__mp_main__"})
    script.Adopted = adopted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", script)
    for trusted in ("__main__", "__mp_main__"):
        allow = AllowList([trusted])
        for module in ("__main__", "__mp_main__"):
            assert allow.find(module, "Learner") is script.Learner
            assert allow.find(module, "Adopted") is adopted
    with pytest.raises(UntrustedTypeError):
        AllowList().find("__main__", "Learner")


def test_this_library_is_never_trusted_as_a_whole() -> None:
    allow = AllowList(["torchfedrpc.experiments.learners.classification"])
    assert allow.trusted == frozenset()
    for module, name in (("torchfedrpc.config", "RuntimeConfig"), ("torchfedrpc.host.learner_host", "LearnerHost")):
        with pytest.raises(UntrustedTypeError):
            allow.find(module, name)


# What everybody may send.


@pytest.mark.parametrize(
    ("module", "name", "entry"),
    [
        ("builtins", "set", set),
        ("builtins", "complex", complex),
        ("collections", "OrderedDict", collections.OrderedDict),
        ("types", "SimpleNamespace", types.SimpleNamespace),
        ("builtins", "ValueError", ValueError),
        ("builtins", "KeyboardInterrupt", KeyboardInterrupt),
        ("builtins", "ExceptionGroup", ExceptionGroup),
        ("torchfedrpc.errors", "ConfigError", ConfigError),
        ("torch", "Size", torch.Size),
        ("torch", "bfloat16", torch.bfloat16),
        ("torch", "sparse_coo", torch.sparse_coo),
        ("torch", "per_tensor_affine", torch.per_tensor_affine),
        ("torch._utils", "torch.channels_last", torch.channels_last),
        ("torch.nn.modules.linear", "Linear", torch.nn.Linear),
        ("torch.optim.sgd", "SGD", torch.optim.SGD),
        ("torch.optim.lr_scheduler", "StepLR", torch.optim.lr_scheduler.StepLR),
        ("torch", "OutOfMemoryError", torch.OutOfMemoryError),
        ("numpy.exceptions", "AxisError", np.exceptions.AxisError),
    ],
)
def test_plain_data_is_allowed_without_trust(module: str, name: str, entry: Any) -> None:
    assert AllowList().find(module, name) is entry


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "compile"),
        ("builtins", "getattr"),
        ("builtins", "setattr"),
        ("builtins", "__import__"),
        ("builtins", "open"),
        ("builtins", "type"),
        ("builtins", "map"),
        ("builtins", "object.__subclasses__"),
        ("builtins", "ValueError.__class__"),
        ("copyreg", "_reconstructor"),
        ("copyreg", "__newobj__"),
        ("operator", "attrgetter"),
        ("operator", "methodcaller"),
        ("functools", "partial"),
        ("functools", "reduce"),
        ("types", "FunctionType"),
        ("types", "CodeType"),
        ("types", "MethodType"),
        ("importlib", "import_module"),
        ("pickle", "loads"),
        ("_pickle", "Unpickler"),
        ("marshal", "loads"),
        ("collections", "namedtuple"),
        ("pathlib", "Path.unlink"),
        ("random", "Random.seed"),
        ("ctypes", "CDLL"),
        ("code", "InteractiveInterpreter"),
        ("pdb", "run"),
        ("timeit", "timeit"),
        ("socket", "socket"),
        ("tempfile", "NamedTemporaryFile"),
        ("torch", "load"),
        ("torch", "save"),
        ("torch", "compile"),
        ("torch", "Tensor"),
        ("torch", "nn"),
        ("torch", "hub.load"),
        ("torch.hub", "load"),
        ("torch.package", "PackageImporter"),
        ("torch.jit", "load"),
        ("torch.serialization", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "torch.load"),
        ("torch._utils", "load"),
        ("torch._utils", "torch.torch.channels_last"),
        ("torch.utils.cpp_extension", "load_inline"),
        ("torch.nn.modules.linear", "init"),
        ("torch.nn.modules.linear", "Tensor"),
        ("torch.nn.modules.linear", "Linear.forward"),
        ("torch.nn.modules.module", "register_module_forward_hook"),
        ("torch.nn", "Linear"),
        ("torch.nn.modules", "Linear"),
        ("torch.optim.sgd", "cast"),
        ("torch.optim.optimizer", "register_optimizer_step_post_hook"),
        ("torch.distributed.rpc", "rpc_sync"),
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy", "frompyfunc"),
        ("numpy.f2py", "compile"),
        ("numpy.f2py.crackfortran", "myeval"),
        ("numpy.testing", "measure"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy.distutils.exec_command", "exec_command"),
        ("torchfedrpc.errors", "suggest"),
        ("torchfedrpc.errors", "difflib"),
        ("torchfedrpc.wire.packing", "pack"),
        ("torchfedrpc.host.spec", "LearnerSpec"),
        ("torchfedrpc", "run"),
        ("", "x"),
        ("no_such_module_anywhere", "X"),
        (".os", "system"),
    ],
)
@pytest.mark.parametrize("allow", [AllowList(), ALLOW], ids=["trusting_nobody", "trusting_this_module"])
def test_what_could_run_something_is_refused_by_name_with_what_to_do(
    allow: AllowList, module: str, name: str
) -> None:
    with pytest.raises(UntrustedTypeError) as caught:
        allow.find(module, name)
    assert f"{module}.{name} is not a type that may travel" in str(caught.value)
    assert "not_state" in str(caught.value)
    root = module.partition(".")[0]
    is_library = root in ("numpy", "torch") or root in sys.stdlib_module_names
    is_of_library = is_library or not isinstance(_named(module, name), type | None)
    assert (f"runtime.trusted_modules=[{root}]" in str(caught.value)) is not is_of_library


def _named(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def test_looking_up_a_refused_name_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_for_nothing.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UntrustedTypeError):
        ALLOW.find("imported_for_nothing", "X")
    assert "imported_for_nothing" not in sys.modules


def test_an_exception_of_another_package_is_refused() -> None:
    with pytest.raises(UntrustedTypeError, match=r"trusted_modules=\[strangers\]"):
        ALLOW.find("strangers", "StrangeError")


def test_a_subclass_of_a_module_in_another_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = type("Layer", (torch.nn.Linear,), {"__module__": "strangers"})
    monkeypatch.setattr(strangers, "Layer", layer, raising=False)
    with pytest.raises(UntrustedTypeError):
        ALLOW.find("strangers", "Layer")


def test_a_class_put_into_a_module_of_torch_by_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = type("Layer", (torch.nn.Linear,), {"__module__": "strangers"})
    monkeypatch.setattr(torch.nn.modules.linear, "Layer", layer, raising=False)
    with pytest.raises(UntrustedTypeError):
        ALLOW.find("torch.nn.modules.linear", "Layer")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.random._pickle", "__bit_generator_ctor"),
        ("numpy.random._pickle", "__generator_ctor"),
        ("numpy.random._pickle", "__randomstate_ctor"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
        ("numpy.random._pcg64", "PCG64"),
        ("numpy.random._mt19937", "MT19937"),
    ],
)
def test_reconstruction_functions_of_numpy_are_refused(module: str, name: str) -> None:
    with pytest.raises(UntrustedTypeError, match="may travel"):
        AllowList(["numpy_of_mine"]).find(module, name)


@pytest.mark.parametrize(
    ("trusted", "value"),
    [
        ("torch", [torch.float16, torch.channels_last, torch.sparse_coo, torch.device("cpu"), torch.Size([1])]),
        ("collections", [collections.OrderedDict(a=1), collections.Counter("aab")]),
        ("numpy", [np.arange(3), np.float32(1), np.dtype("i4")]),
    ],
)
def test_trust_in_a_package_takes_nothing_from_what_travels_anyway(trusted: str, value: list[Any]) -> None:
    received = pack(value).open(AllowList([trusted]))
    assert list(map(repr, received)) == list(map(repr, value))


def test_trust_in_builtins_makes_no_classes() -> None:
    with pytest.raises(UntrustedTypeError, match="standard library"):
        AllowList(["builtins"]).find("builtins", "type")


# Numpy's classes.


class Waves(np.ndarray):
    """A trusted class of arrays."""

    unit: str


@pytest.mark.parametrize("allow", [AllowList(), AllowList(["numpy"])], ids=["trusting_nobody", "trusting_numpy"])
def test_numpys_own_class_of_arrays_is_not_named(allow: AllowList) -> None:
    with pytest.raises(UntrustedTypeError, match=r"may not travel|may travel: it is of numpy"):
        allow.find("numpy", "ndarray")


def test_a_class_of_arrays_may_be_named_and_not_called() -> None:
    found = ALLOW.find(HERE, "Waves")
    assert issubclass(found, np.ndarray)
    with pytest.raises(UntrustedTypeError, match="which pickling never does"):
        ALLOW.constructor(found, ())
    assert not ALLOW.may_have_instances(found)


def test_an_array_of_a_trusted_class_travels() -> None:
    for value in (np.arange(6.0).reshape(2, 3).T.view(Waves), np.array([None, "a"], dtype=object).view(Waves)):
        value.unit = "Hz"
        received = pack(value).open(ALLOW)
        assert type(received) is Waves
        assert received.unit == "Hz"
        assert received.tolist() == value.tolist()


@pytest.mark.parametrize("name", ["f8", ">i4", "|b1", "U5", "S3", "V16", "M8", "O8", "?", "c16", "u1", "e"])
def test_a_dtype_is_made_by_its_name(name: str) -> None:
    assert arrays.put_together("dtype", (name,), owned=False) == np.dtype(name)


@pytest.mark.parametrize(
    "spec",
    ["O,O", "i4,i4", "T", "(2,)f8", "{'a': 'O'}", "", "f8\n", "f8 ", dict, object, [("a", "O")], None, np.dtype("O")],
    ids=repr,
)
def test_a_dtype_is_made_of_nothing_else(spec: Any) -> None:
    with pytest.raises(SerializationError, match="numpy dtype"):
        arrays.put_together("dtype", (spec,), owned=False)


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("a", ">i4"), ("b", "f8", (2,))]),
        np.dtype([("a", "i1"), ("b", "f8")], align=True),
        np.dtype({"names": ["a"], "formats": ["f4"], "offsets": [4], "itemsize": 12}),
        np.dtype([(("title", "a"), "f4"), ("b", [("c", "U3"), ("d", "M8[ns]")])]),
        np.dtype(("f8", (2, 3))),
        np.dtype("M8[3D]"),
        np.dtype("m8"),
        np.dtype("V7"),
        np.dtype(">U4"),
        np.dtype("O"),
        np.dtype("f8", metadata={"unit": "m"}),
    ],
    ids=str,
)
def test_a_dtype_keeps_its_layout(dtype: np.dtype[Any]) -> None:
    received = pack(dtype).open(ALLOW)
    assert received == dtype
    assert (received.itemsize, received.alignment, received.isalignedstruct) == (
        (dtype.itemsize, dtype.alignment, dtype.isalignedstruct)
    )
    # From 2.5 on numpy has a hint for its copies in the bit above, which its own pickles change too.
    assert received.flags & 0xFF == dtype.flags & 0xFF
    assert (received.fields, received.metadata) == (dtype.fields, dtype.metadata)


def test_records_that_hold_objects_are_refused_with_what_to_send() -> None:
    with pytest.raises(SerializationError, match="send a dict of arrays"):
        pack(np.zeros(2, dtype=[("a", "O"), ("b", "f8")])).open(ALLOW)


def test_the_page_on_security_names_each_entry_of_the_list() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    missing = {name for _, name in LISTED if f"`{name}`" not in page}
    assert missing == set()


def test_each_entry_of_the_list_is_found_or_is_of_another_version_of_python() -> None:
    for module, name in LISTED:
        if module != "pathlib._local":
            assert AllowList().find(module, name) is getattr(sys.modules[module], name)
