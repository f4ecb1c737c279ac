# On a fresh machine `make demo` and `make test` do all set-up: Python 3.11+, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The oldest generator whose stubs we support: the lower bounds of grpcio and protobuf in pyproject.toml are its own.
STUB_TOOLS := grpcio-tools==1.76.0 mypy-protobuf==5.1.0
STUBS := .venv-stubs
RAY := .venv-ray
BUF := npx --yes @bufbuild/buf@1.75.0

.PHONY: demo test test-ray docs lint format stubs release-proto lock client-cost ray-cost peers wheel clean

demo: $(VENV)/.demo  ## the main job, end to end, in under a minute once installed
	$(BIN)/matvae-bench demo

test: $(VENV)/.test $(STUBS)/.made  ## every suite; torch and faiss never share a process
	@$(BIN)/python tests/suites.py

test-ray: $(RAY)/.made  ## matvae-serve-ray on a cluster of this machine; Ray has an environment of its own
	$(RAY)/bin/python -m pytest tests/ray

lint: $(VENV)/.test  ## ruff, mypy --strict, and buf where npx is to be had
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy client/examples
	$(BIN)/mypy docs
	@if command -v npx >/dev/null; then \
		$(BUF) lint proto && $(BUF) breaking proto --against proto/released.binpb && echo "buf lint and breaking: ok"; \
	elif [ "$$CI" = true ]; then echo "buf: no npx, which CI must have"; exit 1; \
	else echo "buf: skipped, no npx"; fi

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test  ## write the reference pages from the code, and what commands and snippets print into the others
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/pages.py --write

stubs: $(STUBS)/.made  ## write proto/matvae/v1/*_pb2* again
	$(STUBS)/bin/python proto/generate.py proto

release-proto:  ## at a release: what `buf breaking` compares with from then on
	$(BUF) build proto --exclude-source-info -o proto/released.binpb

client-cost: $(VENV)/.demo  ## what a constrained client pays: bytes installed, import time, memory
	$(BIN)/matvae-bench client-cost

ray-cost: $(RAY)/.made  ## what Ray costs beside matvae-serve
	$(RAY)/bin/python -m matvae_bench.ray_cost --out bench/results/ray.json --write docs/ray.md

peers:  ## an environment for each peer of `matvae-bench peers`; one that cannot be installed is left out
	PYTHON=$(PYTHON) bench/peers/setup .venv-peers

wheel: $(VENV)/.test
	$(BIN)/hatchling build

lock: ## resolve everything anew into constraints.txt, and what only Ray needs into constraints-ray.txt
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q --upgrade pip
	.venv-lock/bin/pip install -q '.[all]' --group dev
	.venv-lock/bin/pip freeze --exclude matvae > constraints.txt
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q --upgrade pip
	.venv-lock/bin/pip install -q -c constraints.txt '.[ray]' --group test
	.venv-lock/bin/pip freeze --exclude matvae | grep -vxFf constraints.txt > constraints-ray.txt
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) $(STUBS) $(RAY) demo dist build

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'pip>=25.1'

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q -c constraints.txt -e '.[server,bench]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q -c constraints.txt -e '.[all]' --group dev
	@touch $@ $(VENV)/.demo

$(STUBS)/.made: Makefile
	$(PYTHON) -m venv $(STUBS)
	$(STUBS)/bin/pip install -q $(STUB_TOOLS)
	@touch $@

$(RAY)/.made: pyproject.toml constraints.txt constraints-ray.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install -q --upgrade 'pip>=25.1'
	$(RAY)/bin/pip install -q -c constraints.txt -c constraints-ray.txt -e '.[ray]' --group test
	@touch $@
