"""The table in tests/README.md: each sentence of the contract has a test that exists, or a mark that says why not."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from folders import TESTS

MARKS = ("not yet:", "needs a GPU:", "no promise:")
_TEST = re.compile(r"`tests/([\w/]+\.py)::([\w:]+)`")


def rows_of(page: str) -> dict[str, str]:
    """Sentence -> what the table has beside it; header rows are left out."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in row] for row in cells]
    assert all(len(row) == 2 for row in found), "each row has two cells"
    rows = {sentence: proof for sentence, proof in found if sentence not in ("sentence", "---")}
    assert len(rows) == sum(row[0] not in ("sentence", "---") for row in found), "a sentence has one row"
    return rows


@cache
def names_in(file: str) -> frozenset[str]:
    """``test_x`` and ``TestX::test_y`` of a file, which is not imported."""
    path = TESTS / file
    if not path.is_file():
        return frozenset()
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {prefix + one.name for one in inner if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    return frozenset(name for name in names if name.rpartition("::")[2].startswith("test_"))


def faults_of(rows: dict[str, str]) -> list[str]:
    """What is wrong with the rows, in words."""
    faults = []
    for sentence, proof in rows.items():
        cited = _TEST.findall(proof)
        faults += [f"tests/{file} has no {name}: {sentence}" for file, name in cited if name not in names_in(file)]
        if proof.count("`tests/") != len(cited):
            faults.append(f"a test is cited as `tests/FILE.py::NAME`: {sentence}")
        if not cited and not proof.startswith(MARKS):
            faults.append(f"neither a test nor one of {', '.join(MARKS)}: {sentence}")
    return faults


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    return rows_of((TESTS / "README.md").read_text(encoding="utf-8"))


def test_each_sentence_has_tests_that_exist_or_a_mark(rows: dict[str, str]) -> None:
    assert not faults_of(rows)


def test_table_has_the_whole_contract(rows: dict[str, str]) -> None:
    assert len(rows) > 150
    page = (TESTS / "README.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## 4. Public contract",
        "## 5. Semantics, the same in every mode",
        "## 6. Failure and trust",
    ]


@pytest.mark.parametrize(
    ("proof", "fault"),
    [
        ("`tests/system/test_contract_table.py::test_that_is_not_there`", "has no test_that_is_not_there"),
        ("`tests/test_nowhere.py::test_x`", "tests/test_nowhere.py has no test_x"),
        ("`tests/unit/test_errors.py::test_is_exported`", "has no test_is_exported"),  # which is in a class
        ("`tests/unit/test_errors.py`", "is cited as"),
        ("", "neither a test nor one of"),
        ("later", "neither a test nor one of"),
    ],
)
def test_wrong_rows_are_found(proof: str, fault: str) -> None:
    good = "`tests/unit/test_errors.py::TestEveryError::test_is_exported`"
    rows = rows_of(
        f"| sentence | tests |\n| --- | --- |\n| good | {good} |\n| later | not yet: so it is |\n| x | {proof} |"
    )
    found = faults_of(rows)
    assert any(fault in one for one in found)
    assert all(one.endswith(": x") for one in found)
