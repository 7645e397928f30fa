"""The documents name files, modules, classes and attributes that exist."""

from __future__ import annotations

import fnmatch
import importlib
import re
from pathlib import Path

import pytest

from qdiff.weight_forms import WeightForm

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("qdiff", "ddim", "ldm", "scripts", "tests", "configs", "examples", "models")
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
DOCUMENT = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
OF_OTHERS = {"comfy/model_detection.py"}
TABLE = DOCUMENT.split("## From the papers' code to here")[1].split("\n## ")[0]
NAMES = [
    name
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| there")
    for name in re.findall(r"`((?:qdiff|ddim|ldm)\.[\w.]+)`", line.split("|")[2])
]


def test_the_table_is_there():
    assert len(NAMES) > 25


@pytest.mark.parametrize("name", NAMES)
def test_each_name_exists(name):
    module, attribute = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), attribute)


def test_files_of_the_walk_through_exist():
    text = DOCUMENT.split("## One run, from argv to PNG")[1]
    paths = re.findall(r"`((?:qdiff|ddim|scripts)/[\w/]+\.py)", text)
    assert len(paths) > 8
    assert [path for path in paths if not (Path(__file__).parents[1] / path).is_file()] == []


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module of ours or something in one; parts of optional packages count."""
    module, rest = name, []
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name):
                return True
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
            continue
        for part in rest:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def missing(text: str) -> list[str]:
    """Return what a document names in backticks that is not in the repository.

    Files count by the end of their path, and may have ``*``. ``Class.name`` is there if the file of the class has the
    word ``name``.
    """
    paths = [p for folder in FOLDERS for p in (REPOSITORY / folder).rglob("*.*")]
    files = [f"/{p.relative_to(REPOSITORY).as_posix()}" for p in (*paths, *REPOSITORY.glob("*.*"))]
    sources = [p.read_text(encoding="utf-8") for p in paths if p.suffix == ".py"]
    named = set(re.findall(r"`([\w*./-]+\.(?:py|j2|ya?ml))`", text)) - OF_OTHERS
    wrong = [name for name in named if not fnmatch.filter(files, f"*/{name}")]
    dotted = set(re.findall(r"`((?:qdiff|ddim|ldm)(?:\.\w+)+)", text)) - named
    wrong += [name for name in dotted if not is_there(name)]
    for kind, attribute in set(re.findall(r"`([A-Z]\w+)\.(\w+)(?!\w*\.)", text)):
        own = [source for source in sources if re.search(rf"(?m)^class {kind}\b", source)]
        if own and not any(re.search(rf"\b{attribute}\b", source) for source in own):
            wrong.append(f"{kind}.{attribute}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document):
    assert missing(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "name",
    [
        "calibration/memory.py",
        "dropping.py",
        "Sampler.call_times",
        "qdiff.calibration.memory",
        "qdiff.quantizer.Unknown",
    ],
)
def test_a_planted_name_is_found(name):
    there = "`calibration/footprint.py`, `Sampler.visited`, `qdiff.calibration.footprint`, `page*.py`, `GPU.md`"
    assert missing(f"{there} and `{name}`") == [name]


def test_the_forms_of_a_weight_are_all_there():
    text = DOCUMENT.split("## The forms of a weight")[1].split("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| form")]
    named = {name for row in rows for name in re.findall(r"`([A-Z]+)`", row[1])}
    assert named == {form.name for form in WeightForm}
    files = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[5])]
    assert len(files) > len(rows)
    assert [name for name in files if not (Path(__file__).parents[1] / "qdiff" / name).is_file()] == []
