"""README and the pages in docs/: their code runs, their links lead somewhere, their figures are the benches'."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT, name_of

import gradrep_kernels as gr
from gradrep_kernels.recipes.options.arguments import parsers

if not (ROOT / "bench").is_dir():
    pytest.skip("the benches are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT / "bench"))

import ledger

CODE = [page for page in PAGES if pages.blocks(page)]
B1_SCALES = "RepOpt-VGG-B1-scales.pth"


@pytest.fixture(scope="module")
def b1_scales(tmp_path_factory) -> Path:
    """A scales file for the network that the pages load the authors' file into."""
    file = tmp_path_factory.mktemp("scales") / B1_SCALES
    search = gr.csla.hyper_search_model(gr.models.repopt_vgg_b1(num_classes=1))
    gr.csla.save_scales(gr.csla.extract_scales(search), file)
    return file


@pytest.mark.parametrize("page", CODE, ids=name_of)
def test_code_of_a_page(page, tmp_path, monkeypatch, capsys, request):
    """Block after block in one process; what a comment shows behind a print is what it prints."""
    monkeypatch.chdir(tmp_path)
    if B1_SCALES in page.read_text(encoding="utf-8"):
        shutil.copy(request.getfixturevalue("b1_scales"), tmp_path)
    names: dict = {"__name__": page.stem}
    exec(pages.SETUP, names)
    for block in pages.blocks(page):
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(compile(block, str(page), "exec"), names)
        shown = re.findall(r"^# (.*)$", block.partition("print(")[2], re.MULTILINE)
        if shown:
            assert capsys.readouterr().out.splitlines() == shown


def test_the_first_page_has_code():
    assert ROOT / "README.md" in CODE


_LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Those of files. mkdocs holds those of anchors, and knows nothing of README."""
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_every_page_stands_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT}


def test_every_public_name_has_a_place_in_the_reference():
    shown = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^::: gradrep_kernels\.(\w+)$", shown, re.MULTILINE)
    assert sorted(named) == sorted(set(gr.__all__) - {"__version__"})


def test_every_option_of_the_commands_is_on_their_page():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    table = text[text.index("| option |") : text.index("What the recipes are")]
    told = set(re.findall(r"`(--[\w-]+)", table))
    _, commands = parsers("gradrep")
    flags = {flag for command in commands.values() for flag in command.flags} - {"-h", "--help"}
    assert told == {flag for flag in flags if not flag.startswith("--no-")}  # which turn a switch off


def test_every_example_is_on_a_page():
    shown = {name for page in PAGES for name in re.findall(r'--8<-- "examples/(\w+\.py)"', page.read_text("utf-8"))}
    scripts = {file.name for file in (ROOT / "examples").glob("*.py") if "__main__" in file.read_text("utf-8")}
    assert shown == scripts != set()


# -- figures

results_are_here = pytest.mark.skipif(not ledger.RESULTS.is_dir(), reason="an sdist brings no results of the benches")


@results_are_here
def test_the_page_of_figures_is_what_the_results_give():
    assert ledger.PAGE.read_text(encoding="utf-8") == ledger.page(), "`make figures` renews docs/figures.md"


@results_are_here
def test_the_figures_of_the_first_page_are_those_of_the_results():
    text = ledger.README.read_text(encoding="utf-8")
    assert ledger.readme(text) == text, "`make figures` renews README.md"


@results_are_here
def test_every_measured_row_is_on_the_page_of_figures():
    text = ledger.page()
    for benches in ledger.results().values():
        for content in benches.values():
            for row in content["targets"]:
                cells = [cell for cell in ledger.target_cells(row) if cell]
                assert any(row["what"] in line and all(c in line for c in cells) for line in text.splitlines()), row
    assert "**missed**" in text
    assert "not measured: no GPU has run it" in text


@results_are_here
def test_the_overflows_of_the_first_page_are_those_of_the_replay():
    """Each row names the versions of torch with one outcome, and each outcome has a row."""
    told = {}
    for run in json.loads((ledger.RESULTS / "overflow.json").read_text(encoding="utf-8")):
        for situation, outcomes in run["outcomes"].items():
            cells = [outcomes[way].partition(":")[0] for way in ("SGD(fused=True)", "FusedRepSGD(fused=True)")]
            told.setdefault((situation, *cells), []).append(run["torch"])
    rows = [f"| {' | '.join(cells)} | {', '.join(versions)} |" for cells, versions in told.items()]
    text = ledger.README.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if "overflow" in line and line.startswith("|")] == rows


@results_are_here
def test_a_row_without_words_is_refused(monkeypatch):
    """A new target must be explained before it can be shown."""
    monkeypatch.setattr(ledger, "CODES", {code: words for code, words in ledger.CODES.items() if code != "S3"})
    with pytest.raises(ValueError, match="no words for the rows S3"):
        ledger.page()


def test_a_readme_without_its_comments_is_refused():
    with pytest.raises(ValueError, match="found 0 times"):
        ledger.readme("# README")
