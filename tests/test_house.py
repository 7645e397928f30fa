"""The size of the house: few files at the root of qdiff, none too long, and no modules that import each other."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from thorough import thorough_except

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("qdiff", "ddim", "ldm", "scripts")
AT_ROOT, LINES = 16, 300
FILES = [path for folder in PACKAGES for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in FILES}


def imported(source: str, names: set[str]) -> set[str]:
    """Return which of our modules a module imports when it is loaded: at the top, not inside functions."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in names else node.module)
    return found & names


def circle(sources: dict[str, str]) -> list[str]:
    """Return modules that import each other, in order; empty where there are none."""
    graph = {name: imported(source, set(sources)) for name, source in sources.items()}
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        finished.add(name)
        return []

    for name in graph:
        if found := visit(name, []):
            return found
    return []


def test_few_files_at_the_root():
    assert len(list((REPOSITORY / "qdiff").glob("*.py"))) <= AT_ROOT


@pytest.mark.parametrize("path", FILES, ids=lambda path: name_of(path))
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.slow
def test_no_modules_import_each_other():
    # A package's front names its modules, which import one another and not the front.
    fronts = {name for name in SOURCES if (REPOSITORY / name.replace(".", "/")).is_dir()}
    assert circle({name: source for name, source in SOURCES.items() if name not in fronts}) == []


def test_a_planted_circle_is_found():
    sources = {"a": "from b import x", "b": "import c", "c": "def f():\n    import a"}
    assert circle(sources) == []
    assert circle({**sources, "c": "from a import y"}) == ["a", "b", "c", "a"]


# --- Tests


def deselecting(recipe: str) -> list[str]:
    """Return the words of a pytest command that choose among the tests of the repository."""
    words = shlex.split(recipe.partition("pytest")[2])
    options = ("-n", "--dist")  # take a value, and choose nothing
    return [
        word for before, word in zip(["", *words], words, strict=False) if word not in options and before not in options
    ]


def recipe(makefile: str, target: str) -> str:
    """Return the one command of a target."""
    return re.search(rf"(?m)^{target}: \$\(READY\)\n\t(.+)\n(?!\t)", makefile).group(1)


def test_all_tests_are_run_by_ci():
    """``make test`` leaves out what is marked thorough or slow, and nothing else; ``make test-all`` nothing."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert deselecting(recipe(makefile, "test")) == ["-m", "not thorough and not slow"]
    assert deselecting(recipe(makefile, "test-all")) == []
    assert "make test-all" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in settings and 'addopts = "-q --strict-markers"' in settings


@pytest.mark.parametrize("words", ["-k cuda", "tests/qdiff", "--deselect x", "--ignore=tests/scripts", "-m gpu"])
def test_a_planted_choice_is_found(words):
    assert deselecting(f"python -m pytest -n 2 {words} --dist loadfile") == words.split()


def test_what_is_not_kept_is_thorough():
    kept, other = thorough_except(("a", "b"), "a")
    assert kept == "a" and other.values == ("b",) and [mark.name for mark in other.marks] == ["thorough"]
    with pytest.raises(ValueError, match="'c'"):
        thorough_except(("a", "b"), "c")
