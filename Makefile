.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all numbers compare faults lint bench lock wheel clean

# uv makes the environment; it is installed into .tools where the machine has none.
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PY := .venv/bin/python
export UV_PYTHON_DOWNLOADS := never
unexport VIRTUAL_ENV
# Where Python is told to keep no bytecode (containers often are), every process would compile torch anew: 15 s each.
unexport PYTHONDONTWRITEBYTECODE

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

.tools/bin/uv:
	python3 -m pip install --quiet --disable-pip-version-check --target .tools uv

.venv/.ready: requirements.lock pyproject.toml | $(filter .tools/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python ">=3.11,<3.13" .venv
	$(UV) pip sync --quiet --python $(PY) --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(PY) --no-deps --editable .
	@touch $@

setup: .venv/.ready  ## make .venv from requirements.lock

demo: setup  ## FSR on handwritten digits beside a plainly trained net: train, attack, table
	$(PY) src/train.py experiment=demo

# Tests in a random order: make test ORDER=, or as once told: ORDER=--randomly-seed=7
ORDER ?= -p no:randomly

test: setup  ## the tests, without the slow cells
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile $(ORDER)

test-all: setup  ## every test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(ORDER)

# CELLS= takes a part of the cells, as CELLS='fsr trades'.
numbers: setup  ## store the numbers of tests/numbers again, and say what moved
	$(PY) -m tests.numbers.compare --only "$(CELLS)"

compare: setup  ## hold this tree's numbers and weights against a commit's, bit by bit: make compare BASE=HEAD~1
	@test -n "$(BASE)" || { echo "make compare wants a commit: make compare BASE=HEAD~1"; exit 2; }
	$(PY) -m tests.numbers.compare "$(BASE)" --only "$(CELLS)"

KILLS ?= 40

faults: setup  ## inject every fault of the README's table (KILLS=200: as many kills)
	OMP_NUM_THREADS=1 KILLS=$(KILLS) $(PY) -m pytest tests/faults -n 2 --dist worksteal $(ORDER)

lint: setup  ## ruff and mypy
	.venv/bin/ruff check src tests benchmarks notebooks
	.venv/bin/ruff format --check src tests benchmarks notebooks
	.venv/bin/mypy src

bench: setup  ## what the framework costs beside the papers' own ways and beside the arithmetic (minutes)
	$(PY) benchmarks/bench.py model=resnet18,wrn34_10 batch=32,4 pairs=5 seconds=4 minutes=18 \
		to=outputs/bench.json markdown=outputs/bench.md

lock: | $(filter .tools/bin/uv,$(UV))  ## compile requirements.lock anew
	$(UV) pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --quiet --output-file requirements.lock

wheel: setup  ## build dist/*.whl, with conf/ inside
	$(UV) build --quiet --wheel --out-dir dist

clean:  ## remove the environment and caches, keep outputs/
	rm -rf .venv .tools dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
