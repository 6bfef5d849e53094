# Everything a newcomer needs: each target sets up what it requires in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check conformance fuzz soak bench clean

setup: $(STAMP)

# torch first and by itself: the version is pinned, and everything else is resolved around it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup  ## one executor, four fine-tuning clients, one streaming client
	$(BIN)/python examples/demo.py

test: setup  ## the test-suite
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
		--numprocesses logical --maxprocesses 8 --dist worksteal

check: setup  ## lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: setup  ## every architecture and PEFT method, split against whole; writes docs/compatibility.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance --jobs 2
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.methods

fuzz: setup  ## some 350,000 mutated frames against parsers and a server; about 5 minutes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive SYMBIOSIS_LOG=error \
		$(BIN)/python -W ignore -m tests.fuzz --frames 300000 --connections 20000

SOAK ?= --minutes 5

soak: setup  ## clients of all kinds come and go, some die, so does the executor; SOAK="--hours 8"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -W ignore -m tests.soak $(SOAK)

bench: setup  ## the figures of the README and of docs/decisions; well over an hour on 2 cores
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/finetuning.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/finetuning.py --from-bf16
	$(BIN)/python benchmarks/overhead.py --lend
	$(BIN)/python benchmarks/finetuning.py --from-bf16 --lend
	$(BIN)/python benchmarks/decoding.py --from-bf16 --lend
	$(BIN)/python benchmarks/decoding.py --from-bf16
	$(BIN)/python benchmarks/adapter_names.py
	$(BIN)/python benchmarks/adapter_names.py --lend
	$(BIN)/python benchmarks/adapter_names.py --fastest
	$(BIN)/python benchmarks/adapter_names.py --lend --fastest
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/dtypes.py
	$(BIN)/python benchmarks/placement.py
	$(BIN)/python benchmarks/policies.py
	$(BIN)/python benchmarks/quantized.py
	$(BIN)/python benchmarks/privacy.py
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf $(VENV) build demo-out
