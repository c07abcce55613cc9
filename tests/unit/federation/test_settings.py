"""Settings: attributes for mappings, and objects as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from torchfedrpc.federation.trainer import as_settings


def test_keys_are_attributes_at_every_depth() -> None:
    settings = as_settings({"optimizer": {"lr": 0.1}, "phases": [{"length": 3}]})
    assert settings.optimizer.lr == 0.1
    assert settings.phases[0].length == 3
    assert settings["optimizer"]["lr"] == 0.1


def test_an_object_is_returned_as_it_is() -> None:
    config = SimpleNamespace(num_rounds=3)
    assert as_settings(config) is config


def test_a_missing_setting_names_near_ones() -> None:
    with pytest.raises(AttributeError, match=r"no setting named 'num_round' .*'num_rounds'"):
        _ = as_settings({"num_rounds": 3}).num_round


def test_a_missing_setting_can_have_a_default() -> None:
    assert getattr(as_settings({}), "momentum", 0.9) == 0.9
