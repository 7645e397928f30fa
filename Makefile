# Every target creates .venv and installs the pinned set when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo demo-ldm demo-txt2img demo-dit tables leaderboard test test-all test-cpus gpu-check gpu-packages lint format clean

$(READY): setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: set PYTHON=/path/to/python3')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python scripts/reproduce.py configs/tables/digits-demo.yaml

demo-ldm: $(READY)
	$(BIN)/python scripts/reproduce.py configs/tables/digits-vq-demo.yaml

demo-txt2img: $(READY)
	$(BIN)/python scripts/reproduce.py configs/tables/digits-text-demo.yaml

demo-dit: $(READY)
	$(BIN)/python scripts/reproduce.py configs/tables/digits-dit-demo.yaml

# All of docs/results.md: several hours on two cores; repeat it to continue.
TABLES := digits digits-methods digits-vq digits-kl digits-class digits-text digits-dit \
	modiff-digits modiff-digits-vq modiff-digits-class modiff-digits-text \
	digits-parts digits-first-token grip-ablation grip-ablation-kl

tables: $(READY)
	for table in $(TABLES); do \
		$(BIN)/python scripts/reproduce.py configs/tables/$$table.yaml --document docs/results.md || exit; done

# docs/leaderboard.md and .html: every method, three widths, three seeds, six models; days on two cores. It continues
# where it stopped, in a fresh clone too: docs/leaderboard keeps the rows that were run.
LEADERBOARDS := ddim vq kl class text dit

leaderboard: $(READY)
	for model in $(LEADERBOARDS); do \
		$(BIN)/python scripts/reproduce.py configs/tables/leaderboard-$$model.yaml --results docs/leaderboard \
			--document docs/leaderboard.md || exit; done
	$(BIN)/python scripts/tables_page.py $(LEADERBOARDS:%=configs/tables/leaderboard-%.yaml) --out docs/leaderboard.html \
		--title Leaderboard

# Bytecode is kept even where the environment says not to: pytest compiles every test file, in every worker, else.
test test-all: export PYTHONDONTWRITEBYTECODE =

# Seven in ten tests. Marked thorough: what repeats a property on another network, family or runtime; marked slow:
# whole runs, exports, processes.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not thorough and not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# With a Python that has torch and a GPU; it installs nothing (docs/gpu.md).
gpu-check:
	PYTHONPATH=. $(PYTHON) scripts/gpu_check.py

# What such a machine may lack, for one without a network: carry the folder there.
gpu-packages:
	$(PYTHON) -m pip install -q --target .gpu-packages --upgrade --no-deps -c constraints.txt \
		omegaconf torch-fidelity

# The numeric part as smaller CPUs run it, and with two threads: about as long as the suite for each.
test-cpus: $(READY)
	$(BIN)/python tests/on_every_cpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
