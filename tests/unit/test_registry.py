"""Names for trainers, learners and modes."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.registry import Registry, executors, learners, trainers


@pytest.fixture
def registry() -> Registry[Any]:
    return Registry("recipe")


def make(name: str, module: str = "kitchen") -> type:
    return type(name, (), {"__qualname__": name, "__module__": module})


def test_a_decorated_class_is_found_by_its_name_and_is_unchanged(registry: Registry[Any]) -> None:
    soup = make("Soup")
    assert registry.register("soup")(soup) is soup
    assert registry.get("soup") is soup


def test_a_function_can_have_a_name(registry: Registry[Any]) -> None:
    @registry.register("bake")
    def bake() -> None: ...

    assert registry.get("bake") is bake


def test_an_unknown_name_says_what_it_may_have_meant(registry: Registry[Any]) -> None:
    registry.register("soup")(make("Soup"))
    with pytest.raises(ConfigError, match=r"^no recipe named 'suop' \(did you mean 'soup'\?\)$"):
        registry.get("suop")


def test_an_unknown_name_lists_the_known_ones(registry: Registry[Any]) -> None:
    registry.register("soup")(make("Soup"))
    registry.register("bread")(make("Bread"))
    with pytest.raises(ConfigError, match=r"\(known: 'bread', 'soup'\)$"):
        registry.get("zzz")


def test_a_name_is_not_given_to_another_class(registry: Registry[Any]) -> None:
    first = make("Soup")
    registry.register("soup")(first)
    with pytest.raises(ConfigError, match=r"the recipe 'soup' .* by kitchen\.Soup: .* for garden\.Stew$"):
        registry.register("soup")(make("Stew", "garden"))
    assert registry.get("soup") is first


@pytest.mark.parametrize("kind", ["trainer", "learner", "executor"])
def test_name_registered_by_two_modules_is_refused_and_a_reload_is_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Registry[Any] = {"trainer": trainers, "learner": learners, "executor": executors}[kind]
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("soup_of_one", "soup_of_another"):
        (tmp_path / f"{module}.py").write_text(
            f"import torchfedrpc as tfr\n\n\n@tfr.{kind}('soup')\nclass Soup: ...\n"
        )
    monkeypatch.delitem(sys.modules, "soup_of_one", raising=False)
    first = importlib.import_module("soup_of_one")
    with pytest.raises(ConfigError, match=r"'soup' .* by soup_of_one\.Soup: .* for soup_of_another\.Soup$"):
        importlib.import_module("soup_of_another")
    assert registry.get("soup") is first.Soup
    importlib.reload(first)
    assert registry.get("soup") is first.Soup
    script = runpy.run_path(str(tmp_path / "soup_of_one.py"), run_name="__mp_main__")  # as a worker runs a script
    assert script["Soup"].__module__ == "__mp_main__"
    assert registry.get("soup") is script["Soup"]


def test_a_class_imported_anew_takes_its_own_place(registry: Registry[Any]) -> None:
    registry.register("soup")(make("Soup", "__main__"))
    again = registry.register("soup")(make("Soup", "__mp_main__"))
    assert registry.get("soup") is again


def test_a_module_is_imported_once_its_name_is_asked_for(
    registry: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "provided_late.py").write_text("import sys\n\n\n@sys.recipes('late')\nclass Late: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "recipes", registry.register, raising=False)
    registry.provide("late", "provided_late")
    assert registry.names() == ["late"]
    assert "provided_late" not in sys.modules
    with pytest.raises(ConfigError, match=r"registered already, by provided_late\.Late"):
        registry.register("late")(make("Soup"))
    assert registry.get("late").__qualname__ == "Late"
    monkeypatch.delitem(sys.modules, "provided_late")


def test_an_import_that_fails_is_tried_again(
    registry: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.provide("late", "provided_broken")
    with pytest.raises(ModuleNotFoundError):
        registry.get("late")
    with pytest.raises(ModuleNotFoundError):
        registry.get("late")


def test_names_are_sorted(registry: Registry[Any]) -> None:
    for name in ("soup", "bread", "pie"):
        registry.register(name)(make(name))
    assert registry.names() == ["bread", "pie", "soup"]


def test_registries_are_apart(registry: Registry[Any]) -> None:
    registry.register("soup")(make("Soup"))
    assert Registry("other").names() == []


def test_the_built_in_modes_are_registered() -> None:
    assert {"distributed", "local", "pseudo"} <= set(executors.names())


@pytest.mark.parametrize(("look_up", "kind"), [(tfr.get_trainer, "trainer"), (tfr.get_learner, "learner")])
def test_the_public_look_ups_name_their_kind(look_up: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^no {kind} named 'nobody_has_this'"):
        look_up("nobody_has_this")
