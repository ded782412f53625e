# Every target sets itself up: a virtual environment in .venv, made once and re-used while pyproject.toml is the same.
#
#   make demo     compress, export, verify and run a small model; everything it makes is in out/demo
#   make unit     the tests that run no whole pipeline: a minute or so, before every commit
#   make test     ruff, mypy and all tests: unit, whole runs on tiny models, real models
#   make families every model family through all its tests; makes docs/families.md
#   make docs     the documentation as a site in out/site; a dead link ends it
#   make PYTHON=python3.12 ...    another interpreter (3.11 or newer)
#   make TORCH=torch ...          another PyTorch, e.g. the newest one with CUDA; any pip requirement or options

PYTHON ?= python3
# An exact version, so that an index or folder with CPU wheels serves those: they are ten times smaller.
TORCH ?= torch==2.13.0

# Processes that run the tests side by side, one thread each.
WORKERS ?= 2

VENV := .venv
OPTIMUM_VENV := .venv-optimum
SENTENCE_TRANSFORMERS_VENV := .venv-sentence-transformers
RAY_VENV := .venv-ray
RAY_SERVE_VENV := .venv-ray-serve
TRITON_VENV := .venv-triton
TRITON_CLIENT_VENV := .venv-triton-client
KUBERNETES_VENV := .venv-kubernetes
BIN := $(VENV)/bin
READY := $(VENV)/ready
DOCS_READY := $(VENV)/docs-ready
OPTIMUM_READY := $(OPTIMUM_VENV)/ready
SENTENCE_TRANSFORMERS_READY := $(SENTENCE_TRANSFORMERS_VENV)/ready
RAY_READY := $(RAY_VENV)/ready
RAY_SERVE_READY := $(RAY_SERVE_VENV)/ready
TRITON_READY := $(TRITON_VENV)/ready
TRITON_CLIENT_READY := $(TRITON_CLIENT_VENV)/ready
KUBERNETES_READY := $(KUBERNETES_VENV)/ready
SOURCES := rk_export passes runtime samples tests optimum_commands

# ONNX Runtime and GenAI would record the device under the user's cache.
export ORT_DISABLE_TELEMETRY ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Other runtimes, each in an environment of its own; `test` runs none of them.
ELSEWHERE := test-optimum test-sentence-transformers test-ray test-ray-serve test-triton test-triton-client test-kubernetes test-container \
	test-node test-browser

.PHONY: help setup demo test lint types format unit suite families docs $(ELSEWHERE) results inputs fuzz clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "other targets: setup lint types format suite $(ELSEWHERE) results inputs fuzz clean"

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: ONNX Runtime 1.31 comes for no older one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "== 1/3 virtual environment in $(VENV)"
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	@echo "== 2/3 $(TORCH)"
	$(BIN)/python -m pip install $(TORCH)
	@echo "== 3/3 rk-export and what it needs"
	$(BIN)/python -m pip install -e '.[test]'
	@touch $@
	@echo "== ready"

demo: $(READY)
	$(BIN)/python samples/demo.py

test: lint types suite

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python tests/prose.py

types: $(READY)
	$(BIN)/python -m mypy

# docs/how-to/testing.md says what the markers mean.
unit: $(READY)
	$(PYTEST) -m "not whole and not real_model and not slow"

suite: $(READY)
	$(PYTEST) --durations=30

# Every model family through all tests of families; docs/families.md is written from what they measure.
families: $(READY)
	rm -rf out/families
	RK_FAMILIES=all RK_FAMILIES_RESULTS=$(abspath out/families) $(PYTEST) tests/families --durations=10 \
		--deselect tests/families/test_families_page.py
	PYTHONPATH=.:tests $(BIN)/python tests/families_page.py out/families

docs: $(DOCS_READY)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site . out/site
	@echo "== open out/site/index.html"

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@

format: $(READY)
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

# Optimum's ONNX Runtime classes need older transformers than rk-export, hence an environment of their own.
# The main one writes tiny bundles and the tokens of our runtime.
test-optimum: $(READY) $(OPTIMUM_READY)
	rm -rf out/optimum
	OMP_NUM_THREADS=1 $(BIN)/python tests/optimum_bundles.py out/optimum
	OMP_NUM_THREADS=1 $(BIN)/python tests/sentence_bundles.py out/optimum
	RK_BUNDLES=out/optimum $(OPTIMUM_VENV)/bin/python -m pytest tests/optimum_env --confcutdir=tests/optimum_env

$(OPTIMUM_READY): tests/optimum_env/requirements.txt
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install -r $<
	@touch $@

# sentence-transformers opens the bundles of embedding models and cross-encoders by Optimum, hence the same split.
test-sentence-transformers: $(READY) $(SENTENCE_TRANSFORMERS_READY)
	rm -rf out/sentence-transformers
	OMP_NUM_THREADS=1 $(BIN)/python tests/sentence_bundles.py out/sentence-transformers
	RK_BUNDLES=out/sentence-transformers $(SENTENCE_TRANSFORMERS_VENV)/bin/python -m pytest \
		tests/sentence_transformers_env --confcutdir=tests/sentence_transformers_env

$(SENTENCE_TRANSFORMERS_READY): tests/sentence_transformers_env/requirements.txt
	$(PYTHON) -m venv $(SENTENCE_TRANSFORMERS_VENV)
	$(SENTENCE_TRANSFORMERS_VENV)/bin/python -m pip install -r $<
	@touch $@

# Ray as a cluster of this machine alone: its processes listen on the loopback, and report to nobody.
RAY_ALONE := RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_USAGE_STATS_ENABLED=0

# Ray is large, and few need it: a local cluster of two nodes in an environment of its own.
test-ray: $(RAY_READY)
	OMP_NUM_THREADS=1 $(RAY_ALONE) $(RAY_VENV)/bin/python -m pytest tests/ray_env --confcutdir=tests/ray_env

$(RAY_READY): pyproject.toml
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install $(TORCH)
	$(RAY_VENV)/bin/python -m pip install -e '.[ray]' 'pytest>=8'
	@touch $@

# Triton's client wants older protobuf than rk-export, which serves in its own environment.
test-triton-client: $(READY) $(TRITON_CLIENT_READY)
	RK_PYTHON=$(abspath $(BIN)/python) $(TRITON_CLIENT_VENV)/bin/python -m pytest tests/triton_client_env \
		--confcutdir=tests/triton_client_env -p no:cacheprovider

$(TRITON_CLIENT_READY): tests/triton_client_env/requirements.txt
	$(PYTHON) -m venv $(TRITON_CLIENT_VENV)
	$(TRITON_CLIENT_VENV)/bin/python -m pip install -r $<
	@touch $@

# The sample for Ray Serve, without PyTorch: two replicas of tiny models, of which one is killed.
test-ray-serve: $(RAY_SERVE_READY)
	OMP_NUM_THREADS=1 $(RAY_ALONE) PYTHONPATH=$(CURDIR)/samples:$(CURDIR)/tests \
		$(RAY_SERVE_VENV)/bin/python -m pytest tests/ray_serve_env --confcutdir=tests/ray_serve_env

$(RAY_SERVE_READY): tests/ray_serve_env/requirements.txt
	$(PYTHON) -m venv $(RAY_SERVE_VENV)
	$(RAY_SERVE_VENV)/bin/python -m pip install -r $<
	$(RAY_SERVE_VENV)/bin/python -m pip install --no-deps -e .
	@touch $@

# The real tritonserver, on the CPU and on 127.0.0.1 only. Its package needs numpy below 2.
test-triton: $(TRITON_READY)
	OMP_NUM_THREADS=1 $(TRITON_VENV)/bin/python -m pytest tests/triton_env --confcutdir=tests/triton_env -o pythonpath=tests

# The package brings a server that is linked against libpython, for Linux on x86_64.
$(TRITON_READY): tests/triton_env/requirements.txt tests/triton_env/libpython.py pyproject.toml
	@rm -f $@
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python tests/triton_env/libpython.py
	$(TRITON_VENV)/bin/python -m pip install -r $<
	$(TRITON_VENV)/bin/python -m pip install --no-deps -e .
	@touch $@

# Manifests against the schemas of Kubernetes and KServe, and the Containerfile against a linter.
test-kubernetes: $(KUBERNETES_READY)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(KUBERNETES_VENV)/bin/python -m pytest tests/kubernetes_env \
		--confcutdir=tests/kubernetes_env

# kserve without its own requirements: its types are read, its server is not started.
$(KUBERNETES_READY): tests/kubernetes_env/requirements.txt samples/container/requirements.txt
	$(PYTHON) -m venv $(KUBERNETES_VENV)
	$(KUBERNETES_VENV)/bin/python -m pip install -r $<
	$(KUBERNETES_VENV)/bin/python -m pip install --no-deps kserve==0.21.0
	@touch $@

# The steps of samples/container/Containerfile, carried out without a container engine; fetches 100 MB of packages.
test-container: $(READY)
	RK_TEST_CONTAINER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/container_env

# Minutes a row; rows that are in docs/results/groupings.json already are not measured again.
results: $(READY)
	$(BIN)/python samples/measure/factorize_groupings.py

# What becomes of inputs as people bring them: docs/results/inputs.*; fails where a case does not end as expected.
inputs: $(READY)
	$(BIN)/python tests/measure_inputs.py

# Damaged files of every kind, 100,000 each: docs/results/fuzz.*; fails where one is not refused or read.
fuzz: $(READY)
	$(BIN)/python tests/measure_fuzz.py --cases 100000 --seed 0

# A bundle in JavaScript: Node.js 20 or newer with npm, and for the pages a Chromium of the system; make BROWSER=...
# names another one. RK_BUNDLE=... tries a chat model, too, which has its folder for transformers.js.
.PHONY: test-node test-browser
BROWSER ?= /usr/bin/chromium
NODE_ENV := .venv-node
NODE_READY := $(NODE_ENV)/ready
NODE_PYTEST := OMP_NUM_THREADS=1 RK_NODE_MODULES=$(abspath $(NODE_ENV)/node_modules) $(BIN)/python -m pytest

test-node: $(READY) $(NODE_READY)
	$(NODE_PYTEST) tests/node_env/test_node.py

test-browser: $(READY) $(NODE_READY)
	RK_BROWSER=$(BROWSER) $(NODE_PYTEST) tests/node_env/test_browser.py

# onnxruntime-node's install script would fetch libraries for CUDA.
$(NODE_READY): tests/node_env/package.json tests/node_env/package-lock.json
	mkdir -p $(NODE_ENV)
	cp $^ $(NODE_ENV)
	cd $(NODE_ENV) && ONNXRUNTIME_NODE_INSTALL=skip npm ci --no-audit --no-fund
	@touch $@

clean:
	rm -rf .venv .venv-* out build dist .pytest_cache .mypy_cache .ruff_cache
