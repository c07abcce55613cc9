"""The lines that `scripts/mutations` breaks are still there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from folders import ROOT

import torchfedrpc


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_each_mutation_finds_its_line_and_the_files_of_its_tests() -> None:
    mutations = script().MUTATIONS
    assert len(mutations) >= 40
    for mutation in mutations:
        mutation.applied(Path(torchfedrpc.__file__).parent)
        files = [word for word in mutation.tests.split() if word.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files), mutation
