# Everything runs in one virtual environment, .venv, which the first command creates. The text behind `##` is what
# `make help` prints.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
PEERS := .venv-peers
PARTS := .venv-parts
export OMP_NUM_THREADS ?= 1

# What the base installation consists of: it has to hold on later Pythons too.
BASE := streams.subscriber streams.producer streams.send streams.cli streams.config.settings streams.wire.embeddings \
        infra.cli infra.commands.topics infra.commands.features

.DEFAULT_GOAL := help
.PHONY: help demo test test-parts lint install simulate chaos field-cases clean \
        bench-ingest bench-features bench-freshness bench-restore bench-encoder bench-train evaluate-ml1m

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Run the whole path on MovieLens-1M and print a report; FOREVER=1 stays up afterwards
	@$(BIN)/streamformer demo

test: lint  ## Run lint and every test, against a real Apache Kafka; JOBS=1 runs one test at a time
	$(BIN)/python -m pytest -n $(or $(JOBS),2) --dist worksteal

test-parts: $(PARTS)/installed  ## Test with other products (Feast), in an environment of their own
	$(PARTS)/bin/python -m pytest --noconftest -o addopts= tests/parts

lint: $(STAMP)  ## Check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13 $(addprefix -m ,$(BASE))
	$(BIN)/lint-imports

install: $(STAMP)  ## Create .venv with everything, as every other target does when it has to

simulate: $(STAMP)  ## Run random histories of faults in memory; SEED=7 RUNS=10000, without SEED a new one is drawn
	$(BIN)/python -m infra.harness.simulation $(if $(SEED),--seed $(SEED)) --runs $(or $(RUNS),1000) --processes $(or $(PROCESSES),1)

chaos: $(STAMP)  ## Inject faults into real processes and check the outcome; SEED=7 MINUTES=60 BROKERS=3 FEATURES=1
	$(BIN)/python -m infra.chaos $(if $(SEED),--seed $(SEED)) --minutes $(or $(MINUTES),10) --brokers $(or $(BROKERS),3) $(if $(filter 0,$(FEATURES)),--no-features)

field-cases: $(STAMP)  ## Try what people reported about such systems on real workers; ONLY=5,17 TREE=/path/to/checkout
	$(BIN)/python -m infra.field_cases $(if $(ONLY),--only $(ONLY)) $(if $(TREE),--tree $(TREE))

bench-ingest: $(STAMP) $(PEERS)/installed  ## Measure events per CPU-second, beside other stream processors
	$(BIN)/python -m infra.bench.stream.ingest

bench-features: $(STAMP) $(PEERS)/installed  ## Measure what features cost, beside windows of other stream processors
	$(BIN)/python -m infra.bench.stream.features

bench-freshness: $(STAMP) $(PEERS)/installed  ## Measure the time from event to embedding, and against load
	$(BIN)/python -m infra.bench.stream.freshness

bench-restore: $(STAMP)  ## Measure how long a worker takes to restore its state
	$(BIN)/python -m infra.bench.stream.restore

bench-encoder: $(STAMP)  ## Measure updates per second of the encoder, with and without its cache
	$(BIN)/python -m infra.bench.encoder

bench-train: $(STAMP) $(PEERS)/rectools  ## Measure training speed, beside RecTools
	$(BIN)/python -m infra.bench.training.train

evaluate-ml1m: $(STAMP)  ## Train and evaluate on MovieLens-1M; SEEDS=1,2,3 MINUTES=60, without MINUTES to the recipe's end
	$(BIN)/python -m infra.bench.training.ml1m --seeds $(or $(SEEDS),1) --minutes $(or $(MINUTES),0)

clean:  ## Remove environments, caches, reports and builds; RELEASES=1 removes releases/ too
	rm -rf .venv $(PEERS) $(PARTS) build dist *.egg-info reports $(if $(RELEASES),releases) \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find streams encoder infra tests docs -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv (about 6 GB of disk and a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: Python 3.11 is needed, found $(PYTHON); install it or set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: no virtual environment; on Debian: apt-get install python3.11-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]' || \
	  { echo "error: the installation failed, see the lines above; check network and disk, then run make again"; exit 1; }
	@touch $@

# The base installation, because that is what reads features where Feast runs.
$(PARTS)/installed: tests/parts/requirements.txt pyproject.toml
	@echo "installing Feast and the base installation into $(PARTS) (about 600 MB)"
	@test -x $(PARTS)/bin/python || $(PYTHON) -m venv $(PARTS)
	@$(PARTS)/bin/python -m pip install --quiet --disable-pip-version-check -e . -r $<
	@touch $@

# A baseline that cannot be installed is left out of the comparison, which then says so.
$(PEERS)/installed: infra/bench/baselines/requirements.txt
	@echo "installing the baselines into $(PEERS)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@grep -v '^#' $< | while read -r peer; do \
	  $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$peer" || echo "not installed: $$peer"; \
	done
	@touch $@

$(PEERS)/rectools: infra/bench/baselines/rectools.txt
	@echo "installing RecTools into $(PEERS) (about 5 GB, because it brings its own torch)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $< || echo "not installed: RecTools"
	@touch $@
