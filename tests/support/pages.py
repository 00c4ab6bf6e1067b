"""The pages that a reader sees, and the Python in them. `python pages.py FOLDER` writes it there, for mypy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
SETUP = "from docs_setup import *  # noqa: F403\n"
"""What runs before a page's first block: `docs_setup` is the reader's own script."""

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def write_modules(folder: Path) -> list[Path]:
    """One module for each page that has code: its blocks one after the other, as a reader would paste them."""
    written = []
    for page in PAGES:
        if code := blocks(page):
            module = folder / f"{re.sub('[^a-z]+', '_', name_of(page).removesuffix('.md').lower())}.py"
            module.write_text("\n".join([SETUP, *code]), encoding="utf-8")
            written.append(module)
    return written


if __name__ == "__main__":
    write_modules(Path(sys.argv[1]))
