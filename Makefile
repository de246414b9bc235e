# Everything runs in one virtual environment, .venv, which the first command creates. `make demo` shows the whole path.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint install simulate bench-encoder bench-freshness bench-ingest chaos bench-restore evaluate-ml1m bench-train

demo: $(STAMP)
	@$(BIN)/streamformer demo

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv (about 6 GB of disk and a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: Python 3.11 is needed, found $(PYTHON); install it or set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: no virtual environment; on Debian: apt-get install python3.11-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' || \
	  { echo "error: the installation failed, see the lines above; check network and disk, then run make again"; exit 1; }
	@touch $@

# make simulate SEED=7 RUNS=10000: without SEED a fresh one is drawn and printed.
simulate: $(STAMP)
	$(BIN)/python -m infra.harness.simulation $(if $(SEED),--seed $(SEED)) --runs $(or $(RUNS),1000)

bench-encoder: $(STAMP)
	$(BIN)/python -m infra.bench.encoder

bench-freshness: $(STAMP) .venv-peers/installed
	$(BIN)/python -m infra.bench.stream.freshness

bench-ingest: $(STAMP) .venv-peers/installed
	$(BIN)/python -m infra.bench.stream.ingest

# make chaos SEED=7 MINUTES=60; without a seed a fresh one is drawn and printed.
chaos: $(STAMP)
	$(BIN)/python -m infra.chaos $(if $(SEED),--seed $(SEED)) --minutes $(or $(MINUTES),10)

bench-restore: $(STAMP)
	$(BIN)/python -m infra.bench.stream.restore

# make evaluate-ml1m SEEDS=1,2,3 MINUTES=60; without minutes a training ends with its recipe's budget.
evaluate-ml1m: $(STAMP)
	$(BIN)/python -m infra.bench.training.ml1m --seeds $(or $(SEEDS),1) --minutes $(or $(MINUTES),0)

bench-train: $(STAMP) .venv-peers/rectools
	$(BIN)/python -m infra.bench.training.train

# A peer that cannot be installed is left out of the comparison, which then says so.
.venv-peers/installed: infra/bench/baselines/requirements.txt
	@echo "installing the peers into .venv-peers"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@grep -v '^#' $< | while read -r peer; do \
	  .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "$$peer" || echo "not installed: $$peer"; \
	done
	@touch $@

.venv-peers/rectools: infra/bench/baselines/rectools.txt
	@echo "installing RecTools into .venv-peers (about 5 GB, for it brings its own torch)"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $< || echo "not installed: RecTools"
	@touch $@
