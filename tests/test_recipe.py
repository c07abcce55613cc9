"""Recipes: what they make, and what is said where they cannot."""

from __future__ import annotations

import pytest

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.recipe import build, locate


def test_a_recipe_calls_its_target() -> None:
    assert build({"_target_": "fractions.Fraction", "numerator": 3}, denominator=4) == 0.75


def test_extra_arguments_arrive_as_they_are() -> None:
    marker = object()
    assert build({"_target_": "builtins.dict", "plain": [1, 2]}, extra=marker) == {"plain": [1, 2], "extra": marker}


def test_an_error_of_the_target_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        build({"_target_": "fractions.Fraction", "numerator": 1, "denominator": 0})


def test_a_target_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"torchfedrpc\.models\.nothing"):
        build({"_target_": "torchfedrpc.models.nothing"})
    with pytest.raises(ConfigError, match=r"torchfedrpc\.models\.nothing"):
        locate({"_target_": "torchfedrpc.models.nothing"})


def test_a_recipe_without_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="_target_"):
        build({"size": 3})
    with pytest.raises(ConfigError, match="_target_"):
        locate({"size": 3})
