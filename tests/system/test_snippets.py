"""The documentation's code blocks run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import needs
from doc_snippets import pages, run_page, snippets
from folders import ROOT, SUPPORT, TESTS

pytestmark = pytest.mark.timeout(600)
PACKAGES = {
    "algorithms.md": ("dp_accounting",),
    "learners.md": ("transformers", "accelerate", "torchvision", "lightning"),
    "data.md": ("mlxtend", "datasets", "sklearn"),
}
COMPARED = ROOT / "docs" / "coming-from.md"
WITH_CODE = [page for page in pages() if page != COMPARED and any(snippet.runs for snippet in snippets(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_of_a_page_run_as_they_stand(page: Path, tmp_path: Path) -> None:
    for package in PACKAGES.get(page.name, ()):
        needs(package)
    run_page(page, tmp_path)


def test_one_task_gives_the_same_in_all_libraries(tmp_path: Path) -> None:
    printed = run_page(COMPARED, tmp_path)
    assert len(printed) >= 4  # those of the other libraries run where they are installed
    for output in printed:
        assert "accuracy 0.964" in output.splitlines()


def test_blocks_that_do_not_run_here_cite_a_test_or_a_reason() -> None:
    for page in pages():
        for snippet in snippets(page):
            if snippet.verb == "tested by":
                file, _, name = snippet.what.partition("::")
                assert f"def {name}(" in (TESTS.parent / file).read_text(encoding="utf-8"), snippet.place
            elif snippet.verb == "not run:":
                assert len(snippet.what.split()) >= 3, snippet.place
            elif snippet.verb == "within":
                frame = (SUPPORT / "snippets" / f"{snippet.what}.py").read_text(encoding="utf-8")
                assert "# SNIPPET\n" in frame, snippet.place


def test_a_block_that_fails_fails_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\necho first >seen\n```\n\n```python\nraise SystemExit(3)\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:6 ends with status 3"):
        run_page(page, tmp_path)
    assert (tmp_path / "seen").read_text() == "first\n"


@pytest.mark.parametrize("text", ["<!-- snippet: file -->\n", "<!-- snippet: runs nowhere -->\n", "```python\n1\n"])
def test_a_malformed_directive_or_block_is_an_error(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md:1: no directive|page\.md:2: the block has no end"):
        snippets(page)
