# Stillroom's verbs. Each sets up .venv by itself from constraints.txt; nothing else is needed but Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EVERY_CORE := OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test coverage mutations fuzz crash check e2e gpu gpu-bench bench docs clean

demo: .venv/.stillroom  ## a teacher and four students on this machine's own Python source, and their report, in about ten minutes
	$(OFFLINE) $(BIN)/python examples/demo.py

test: .venv/.tools  ## unit tests: no GPU, no network
	$(EVERY_CORE) tests/unit

coverage: .venv/.tools  ## the unit tests once more, in twice the time, and which lines they reach
	$(EVERY_CORE) tests/unit --cov --cov-report=term

mutations: .venv/.tools  ## faults made by hand, which tests must catch
	$(BIN)/python benchmarks/mutations.py --json benchmarks/mutations.json

fuzz: .venv/.tools  ## damaged and hostile files, for ten minutes: what is refused, and what is not
	$(OFFLINE) $(BIN)/python benchmarks/fuzz.py

crash: .venv/.tools  ## kills, failing disks and power cuts at random writes of every verb, for a quarter of an hour; needs a C compiler
	$(OFFLINE) $(BIN)/python benchmarks/crash.py

check: .venv/.tools  ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

e2e: .venv/.tools  ## whole runs by the real command line
	$(EVERY_CORE) tests/e2e

gpu: .venv/.tools  ## what needs a CUDA device, against the CPU
	$(OFFLINE) $(BIN)/python -m pytest tests/gpu

gpu-bench: .venv/.bench  ## exactness, memory and speed on a CUDA device, in 20 minutes at most; results in benchmarks/gpu.json
	$(OFFLINE) $(BIN)/python benchmarks/gpu.py

bench: .venv/.bench  ## start-up, losses, throughput, store, quality, hidden states, evaluation, memory, many processes and quantized teachers, as told in LOG.md; results in benchmarks/*.json
	$(OFFLINE) $(BIN)/python benchmarks/startup.py
	$(OFFLINE) $(BIN)/python benchmarks/losses.py
	$(OFFLINE) $(BIN)/python benchmarks/throughput.py
	$(OFFLINE) $(BIN)/python benchmarks/store.py
	$(OFFLINE) $(BIN)/python benchmarks/quality.py
	$(OFFLINE) $(BIN)/python benchmarks/hidden.py
	$(OFFLINE) $(BIN)/python benchmarks/hidden_cost.py
	$(OFFLINE) $(BIN)/python benchmarks/evaluate.py
	$(OFFLINE) $(BIN)/python benchmarks/memory.py
	$(OFFLINE) $(BIN)/python benchmarks/processes.py
	$(OFFLINE) $(BIN)/python benchmarks/quantized.py --stories 500

docs: .venv/.docs  ## the reference of settings and the pictures of the losses, from the code
	$(BIN)/stillroom distill --help > docs/guide/distill-settings.txt
	$(BIN)/stillroom capture --help > docs/guide/capture-settings.txt
	$(BIN)/stillroom evaluate --help > docs/guide/evaluate-settings.txt
	$(BIN)/stillroom prune --help > docs/guide/prune-settings.txt
	$(BIN)/python docs/guide/plot_losses.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and "stillroom needs Python 3.11 to 3.13, this is %d.%d; set PYTHON=…" % v)'
	$(PYTHON) -m venv .venv

.venv/.stillroom: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[report]'
	touch $@

.venv/.tools: .venv/.stillroom
	$(PIP) -e '.[hub,lora,server,eval,report,tensorboard,wandb,trackio,mlflow,test,dev]'
	touch $@

.venv/.bench: .venv/.tools
	$(PIP) -e '.[bench,quantized]'
	touch $@

.venv/.docs: .venv/.stillroom
	$(PIP) -e '.[docs]'
	touch $@
