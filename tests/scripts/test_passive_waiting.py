"""Every script chooses how OpenMP threads wait before torch loads, and leaves the user's choice alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from thorough import thorough_except

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
REPOSITORY = Path(__file__).parents[2]
# But for the table that they share.
SCRIPTS = sorted({path.name for path in (REPOSITORY / "scripts").glob("*.py")} - {"families.py"})
# Libraries that load an OpenMP runtime. The first of them to be imported ends the script, so none really loads.
LOADING = ["torch", "sklearn", "openvino", "onnxruntime"]
PROBE = """
import json, os, runpy, sys
script, variables, loading = json.loads(sys.argv[1])

class Loaded(BaseException):
    pass

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in loading:
            raise Loaded(name)

sys.meta_path.insert(0, Watch())
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
    ended = "without"
except Loaded as loaded:
    ended = str(loaded)
except SystemExit:
    ended = "without"
print(json.dumps([ended, {name: os.environ[name] for name in variables if name in os.environ}]))
"""


def when_torch_loads(script: Path, **environment: str) -> tuple[str, dict[str, str]]:
    """Run a script up to where torch would load; return what would load, and the variables as they are then."""
    inherited = {k: v for k, v in os.environ.items() if k not in PASSIVE}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([str(script), list(PASSIVE), LOADING])],
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "scripts")]), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_idle_threads_sleep_in_every_script(script):
    loaded, found = when_torch_loads(REPOSITORY / "scripts" / script)
    assert found == PASSIVE, f"{loaded} loads before"


@pytest.mark.parametrize("script", thorough_except(SCRIPTS, "evaluate.py", "txt2img.py"))
def test_a_user_who_has_chosen_is_heeded_in_every_script(script):
    _, found = when_torch_loads(REPOSITORY / "scripts" / script, OMP_WAIT_POLICY="ACTIVE")
    assert found == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "20"}])
def test_any_of_the_variables_is_a_choice(chosen):
    _, found = when_torch_loads(REPOSITORY / "scripts" / "evaluate.py", **chosen)
    assert found == chosen


def test_a_script_that_imports_torch_first_is_noticed(tmp_path):
    late = tmp_path / "late.py"
    late.write_text("import torch\nimport qdiff.cli.passive_waiting\n")
    assert when_torch_loads(late) == ("torch", {})
