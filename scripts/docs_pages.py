"""Hook of mkdocs: pages that lie outside docs/, and links that leave it.

On the site, README and the other pages of the top folder are pages beside those of docs/, and links to other files of
the repository go to its host. In the repository all links are relative, so that they work there too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the top folder."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - the site's builder alone has it

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, source, config["repo_url"])))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change the links of a page in docs/; those of the other pages are changed already."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return relinked(markdown, f"docs/{page.file.src_uri}", config["repo_url"])


def relinked(text: str, source: str, repository: str) -> str:
    """Return a page with its links as the site needs them.

    Args:
        text: The page.
        source: Its path in the repository.
        repository: Address of the repository.

    Raises:
        FileNotFoundError: If a link names no file of the repository.
    """
    here = posixpath.dirname(PAGES.get(source, posixpath.relpath(source, "docs")))

    def relink(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {link[2]}, which does not exist")
        if target in PAGES:
            where = posixpath.relpath(PAGES[target], here or ".")
        elif target.startswith("docs/") and (ROOT / target).is_file():
            where = posixpath.relpath(target.removeprefix("docs/"), here or ".")
        else:
            where = f"{repository}/blob/main/{target}"
        return f"{link[1]}{where}{link[3]}"

    parts = _CODE.split(text)
    parts[::2] = [_LINK.sub(relink, part) for part in parts[::2]]
    return "".join(parts)
