"""The documentation site: a complete reference, and links that lead to where they did in the repository."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from doc_snippets import snippets
from folders import ROOT

import torchfedrpc as tfr

REPOSITORY = "https://example.org/repository"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    named = {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)}
    whole = {"torchfedrpc.errors", "torchfedrpc.events", "torchfedrpc.testing"}
    assert whole < named
    missing = [
        name
        for name in tfr.__all__
        if not {f"torchfedrpc.{name}", f"torchfedrpc.{name}.{name}"} & named  # run and stream are modules as well
        and getattr(getattr(tfr, name), "__module__", "") not in whole
    ]
    assert missing == ["__version__"]


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= named


def test_the_readme_in_chinese_has_the_code_and_the_headings_of_the_english_one() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"

    def code(page: Path) -> list[str]:
        return [re.sub(r" *#.*", "", snippet.code) for snippet in snippets(page)]

    def num_headings(page: Path) -> int:
        return page.read_text(encoding="utf-8").count("\n## ")

    assert code(chinese) == code(english)
    assert num_headings(chinese) == num_headings(english)


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/guarantees.md#same-bits", "guarantees.md#same-bits"),
        ("README.md", "docs/metrics.png", "metrics.png"),
        ("README.md", "examples", f"{REPOSITORY}/blob/main/examples"),
        ("README.md", "CHANGELOG.md", "changelog.md"),
        ("docs/security.md", "../README.md", "index.md"),
        ("docs/security.md", "../torchfedrpc/config.py", f"{REPOSITORY}/blob/main/torchfedrpc/config.py"),
        ("docs/reference/errors.md", "../guarantees.md", "../guarantees.md"),
        ("docs/reference/errors.md", "../../README.md", "../index.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    hook: ModuleType, source: str, link: str, expected: str
) -> None:
    assert hook.relinked(f"a [word]({link}), ![picture]({link})", source, REPOSITORY) == (
        f"a [word]({expected}), ![picture]({expected})"
    )


def test_links_of_code_anchors_and_other_hosts_stay(hook: ModuleType) -> None:
    text = "[a](#here) [b](https://example.org/x.md) `[c](nothing.md)`\n```python\nx[0](nothing)\n```\n"
    assert hook.relinked(text, "README.md", REPOSITORY) == text


def test_a_link_to_a_missing_file_is_an_error(hook: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match=r"README\.md links to docs/missing\.md"):
        hook.relinked("[a](docs/missing.md)", "README.md", REPOSITORY)
