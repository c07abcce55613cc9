"""Runs the notebook of examples/ and stores its outputs in it, or writes it as a page of HTML."""

from __future__ import annotations

import html
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
_STYLE = """
body { font-family: sans-serif; line-height: 1.5; max-width: 56em; margin: 2em auto; padding: 0 1em; }
pre { font: 0.85em/1.45 monospace; overflow-x: auto; margin: 0.5em 0; }
.code { background: #f5f5f5; border: 1px solid #ddd; border-radius: 4px; padding: 0.7em; }
img { max-width: 100%; }
"""


def run(path: Path = NOTEBOOK, timeout_s: float = 300) -> Any:
    """Run a notebook in its folder; return it with its outputs, without what differs between machines and runs."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.pop("metadata" if output.output_type == "stream" else "transient", None)
    nbformat.validate(notebook)
    return notebook


def page_of(notebook: Any) -> str:
    """Return a notebook as a page of HTML without scripts."""
    import markdown  # noqa: PLC0415 - to store outputs does not need it

    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(markdown.markdown(cell.source, extensions=["fenced_code", "tables"]))
            continue
        parts.append(f'<pre class="code">{html.escape(cell.source)}</pre>')
        parts += map(_shown, cell.outputs)
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Notebook</title><style>{_STYLE}</style>{body}'
    )


def _shown(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="{html.escape(data["text/plain"])}" src="data:image/png;base64,{data["image/png"]}">'
    if "text/html" in data:
        return str(data["text/html"])
    return f"<pre>{html.escape(output.get('text') or data.get('text/plain', ''))}</pre>"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page_of(nbformat.read(NOTEBOOK, as_version=4)), encoding="utf-8")
    else:
        NOTEBOOK.write_text(nbformat.writes(run()) + "\n", encoding="utf-8")
