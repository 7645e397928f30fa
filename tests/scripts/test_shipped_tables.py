"""The tables that come with the repository: every command that they stand for is accepted."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from families import SCRIPTS
from thorough import thorough_except

from qdiff.cli.document import DocumentBlock
from qdiff.cli.table_file import TableFile
from qdiff.io.repository import REPOSITORY

TABLES = sorted((REPOSITORY / "configs" / "tables").glob("*.yaml"))
CAPTIONS = "annotations/captions_val2014.json"


# The leaderboards of other models have the rows of this one.
BOARDS = [path for path in TABLES if path.stem.startswith("leaderboard-") and path.stem != "leaderboard-ddim"]


@pytest.fixture(params=thorough_except(TABLES, *(set(TABLES) - set(BOARDS))), ids=lambda path: path.name)
def shipped(request, tmp_path, monkeypatch):
    """A table file; captions, which do not come with the repository, are others."""
    monkeypatch.chdir(REPOSITORY)
    captions = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    text = request.param.read_text()
    assert (CAPTIONS in text) == ("txt2img" in text and "-sd" in request.param.name)
    path = tmp_path / request.param.name
    path.write_text(text.replace(CAPTIONS, str(tmp_path / "captions.json")))
    return path


@pytest.mark.slow
def test_rows_resolve(shipped, call):
    shown = json.loads(call("reproduce", shipped, "--out", "never-made", "--dry-run").out)
    assert "float" in next(iter(shown["commands"])).lower()  # float comes first
    groups = {row.label: row.group for row in TableFile(shipped).rows}
    seen: set[str] = set()
    for label, command in shown["commands"].items():
        group = groups[label] or label
        if group in seen:  # the others of a group differ in their calibration seed
            continue
        seen.add(group)
        python, script, *words = shlex.split(command)
        outcome = call(Path(script).stem, *words, "--dry-run")
        assert python == "python" and outcome.code == 0, (label, outcome.err)
        quantized = json.loads(outcome.out).get("ptq")
        assert (quantized is not None) == ("--ptq" in words), label
        if label.startswith("released"):
            assert quantized["action"] == "load" and quantized["checkpoint"].startswith("models/quantized/"), label
        if "linear" in label:
            assert quantized["method"] == "linear", label
    assert not (REPOSITORY / "never-made").exists()


@pytest.mark.slow
def test_recording_resolves(shipped):
    """The recording command has no dry run: its options and its model are taken as it would take them."""
    script, *words = TableFile(shipped, "never-made").recording_command("cpu")
    spec = importlib.util.spec_from_file_location("recording_script", REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = module.parse_args(words)
    assert SCRIPTS[args.like].pipeline_of(args).calls >= args.cali_st


def test_published_numbers_have_a_source(shipped):
    table = TableFile(shipped)
    assert (table.source is not None) == any(row.published for row in table.rows)
    for row in table.rows:  # widths in the label are those of the options
        bits = re.search(r"W(\d+)A(\d+)", row.label)
        words = shlex.split(row.options)
        if bits:
            assert words[words.index("--weight_bit") + 1] == bits[1], row.label
            assert (words[words.index("--act_bit") + 1] if "--quant_act" in words else "32") == bits[2], row.label


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.name)
def test_all_rows_of_a_leaderboard_have_the_same_softmax_bits(path):
    """An option of the protocol, not of a method: a row without it would not be comparable."""
    words = [shlex.split(row.options) for row in TableFile(path).rows]
    assert len({w[w.index("--sm_abit") + 1] if "--sm_abit" in w else None for w in words if "--ptq" in w}) == 1


@pytest.mark.parametrize(("names", "page"), [("TABLES", "results"), ("LEADERBOARDS", "leaderboard")])
def test_make_finds_the_place_of_every_table(names, page):
    """A table without its block would end `make tables` before those that follow."""
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    prefix = "leaderboard-" if names == "LEADERBOARDS" else ""
    tables = [f"{prefix}{name}" for name in re.search(rf"^{names} := (.*)$", text, re.MULTILINE)[1].split()]
    assert len(tables) > 5 and set(tables) <= {path.stem for path in TABLES}
    for table in tables:
        DocumentBlock(REPOSITORY / "docs" / f"{page}.md", table)
