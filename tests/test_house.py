"""The house is as CONTRIBUTING.md says: who imports whom, how long files are, how docstrings begin."""

from __future__ import annotations

import ast
import re
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradrep_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
GUIDE = ROOT / "CONTRIBUTING.md"
FREE = ("__init__.py", "moved.py")  # of the package: its public names, and old places of classes; they import all rooms

pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="CONTRIBUTING.md is not here")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> frozenset[Path]:
    """The files of the package that a file imports, at its head, under TYPE_CHECKING or inside a function."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return frozenset(MODULES[name] for name in names if name in MODULES) - {path}


def the_map() -> dict[str, tuple[str, ...]]:
    """Room -> the rooms that it may import, in the order of the table, uppermost first."""
    table = re.search(r"^\| room .*?\n\|[-|]+\n(.*?)\n\n", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    rooms = {}
    for line in table[1].splitlines():
        names, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
        allowed = tuple(re.findall(r"`([^`]+)`", imports))
        rooms.update({name: allowed for name in re.findall(r"`([^`]+)`", names)})
    return rooms


ROOMS = the_map() if GUIDE.exists() else {}


def room_of(path: Path) -> str:
    """The room with the longest name that holds the file."""
    inside = path.relative_to(PACKAGE).as_posix()
    return max((room for room in ROOMS if inside == room or (room.endswith("/") and inside.startswith(room))), key=len)


def test_every_file_has_a_room_and_every_room_is_there():
    for path in FILES:
        if path.relative_to(PACKAGE).as_posix() not in FREE:
            assert room_of(path)
    for room in ROOMS:
        assert (PACKAGE / room).exists() or (ROOT / room).exists(), room


def test_the_map_runs_downwards():
    names = list(ROOMS)
    for room, allowed in ROOMS.items():
        for other in allowed:
            assert names.index(other) > names.index(room), f"{room} imports {other}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_are_those_of_the_map(path):
    if path.relative_to(PACKAGE).as_posix() in FREE:
        pytest.skip("imports every room")
    room = room_of(path)
    for other in imports_of(path):
        assert room_of(other) in (room, *ROOMS[room]), (
            f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}, against the table in CONTRIBUTING.md"
        )


def test_there_is_no_circle_of_imports():
    """A face (`__init__.py`) is not followed: importing a room's file runs its face, which the map allows."""
    state: dict[Path, str] = {}

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        if state.get(path) == "left":
            return
        assert path not in way, " -> ".join(module_of(step) for step in (*way[way.index(path) :], path))
        for other in sorted(imports_of(path)):
            if other.name != "__init__.py":
                visit(other, (*way, path))
        state[path] = "left"

    for path in FILES:
        visit(path, ())


OTHERS = {"_modules", "_parameters", "_buffers", "_version", "_orig_mod", "_init_group", "_replace"}
OTHERS |= {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_values", "_base"}
OTHERS |= {"_forward_hooks", "_forward_pre_hooks", "_ConvNd", "_per_optimizer_states"}
"""Private names of torch's and Python's classes that the package reads, since there are no public ones for them."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_private_is_read_across_files(path):
    """A name with one leading underscore belongs to the file that defines it."""
    tree = tree_of(path)
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {word for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value for word in [node.value]}
    private = re.compile(r"_[^_]")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradrep_kernels"):
            names = [alias.name for alias in node.names if private.match(alias.name)]
        elif isinstance(node, ast.Attribute) and private.match(node.attr) and node.attr not in own | OTHERS:
            names = [ast.unparse(node)] if not ast.unparse(node).startswith(("torch.", "sys.")) else []
        else:
            continue
        assert not names, f"{path.relative_to(ROOT)}:{node.lineno} reads {', '.join(names)}"


LIMITS = {"gradrep_kernels/**/*.py": 400, "csrc/*": 450, "tests/**/*.py": 700, "tests/**/*.cpp": 700}


@pytest.mark.parametrize("pattern", LIMITS)
def test_files_are_short(pattern):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob(pattern)}
    assert lengths
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LIMITS[pattern]}
    assert not long


def test_lines_of_csrc_are_short():
    """Those of Python are ruff's."""
    for path in (ROOT / "csrc").iterdir():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        long = [f"{path.name}:{number} has {len(line)} columns of 120" for number, line in lines if len(line) > 120]
        assert not long, "\n".join(long)


def first_lines() -> dict[str, str]:
    """Where a docstring stands -> its first line."""
    found = {}
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
                place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                found[place] = text.splitlines()[0]
    return found


def test_docstrings_begin_with_one_short_fact():
    lines = first_lines()
    assert statistics.median(map(len, lines.values())) < 85
    two_facts = [f"{place}: a ';' in the first line: {line}" for place, line in lines.items() if ";" in line]
    assert not two_facts, "\n".join(two_facts)
