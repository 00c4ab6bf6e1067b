"""The code in docs/ runs, block after block, and what a comment shows after a print is what it prints."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_of_a_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text())
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(compile(block, str(page), "exec"), names)
        shown = re.findall(r"^# (.*)$", block.partition("print(")[2], re.M)
        printed = capsys.readouterr().out.splitlines()
        if shown and printed:
            assert printed == shown
    assert blocks
