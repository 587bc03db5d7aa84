"""This module tells mkdocs what mkdocs.yml does not: pages that are made from the code, and links to files outside of
docs/."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import docs_reference as reference  # noqa: E402

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of docs_reference.py."""
    for name, make in reference.PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write the path of a linked file that is outside of docs/ in place of the link; a missing one stops the build.

    A site stands alone, and the reader has the file in a checkout.
    """
    source = page.file.abs_src_path
    if source is None:  # made from the code
        return markdown
    docs = ROOT / "docs"

    def told(match: re.Match[str]) -> str:
        text, target = match.group(1), match.group(2)
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = (Path(source).parent / target).resolve()
        if path.is_relative_to(docs):
            return match.group(0)
        if not path.exists():
            raise ValueError(f"{page.file.src_uri} links to {target}, and there is no such file")
        name = f"`{path.relative_to(ROOT)}`"
        return name if text.strip("`") in (path.name, path.stem, name.strip("`")) else f"{text} ({name})"

    return _LINK.sub(told, markdown)
