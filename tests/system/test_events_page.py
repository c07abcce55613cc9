"""docs/events.md lists every event with the types of its fields, as in events.py."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

from folders import ROOT

from torchfedrpc import events

PAGE = ROOT / "docs" / "events.md"


def rows() -> Iterator[str]:
    """Yield the row of each event: its name, the first sentence of its docstring, and its fields with their types."""
    for node in ast.parse((ROOT / "torchfedrpc" / "events.py").read_text(encoding="utf-8")).body:
        kind = getattr(events, node.name) if isinstance(node, ast.ClassDef) else None
        if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)) or kind is events.Event:
            continue
        sentence = (kind.__doc__ or "").split("\n\n")[0].replace("\n    ", " ").replace("``", "`")
        sentence = re.match(r".*?\.(?= |$)", sentence, re.DOTALL)[0]  # type: ignore[index]
        fields = ", ".join(f"`{field.name}: {field.type}`" for field in dataclasses.fields(kind))
        yield f"| `{kind.__name__}` | {sentence} | {fields} |".replace(" | None", " \\| None")


def test_page_has_a_row_for_each_event_with_the_types_of_its_fields() -> None:
    expected = list(rows())
    assert len(expected) > 10
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert found == expected, "write these rows:\n" + "\n".join(expected)
