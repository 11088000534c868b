# Everything a person runs. `make quickstart` on a fresh machine is the place to start.

VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
export PYTHONUNBUFFERED := 1
# Nothing here asks a hub for models or data.
export HF_HUB_OFFLINE := 1

.PHONY: help quickstart env sglang te-cpu bridge modelopt trackers test test-fast test-long test-gpu \
  bench bench-compare bench-gpu lint format clean

help:
	@echo "make quickstart   environment, build, base model, FIPO training on this machine, report"
	@echo "make env          the environment ($(VENV)) and the build; does nothing if they are up to date"
	@echo "make sglang       the SGLang rollout engine, into the same environment (an SGLang beside a GPU is used as it is)"
	@echo "make te-cpu       TransformerEngine's layers and FP8 without a GPU, for tests and studies ($(TE_CPU))"
	@echo "make bridge       Megatron-Bridge, for tools/convert_checkpoint.py --bridge megatron-bridge ($(VENV)-bridge)"
	@echo "make modelopt     ModelOpt, for tools/quantize_checkpoint.py ($(VENV)-modelopt)"
	@echo "make trackers     W&B and MLflow, for the tests of what they get ($(VENV)-trackers)"
	@echo "make test         the whole test suite;  make test-fast: unit tests;  make test-long: soaks and wide sweeps"
	@echo "make test-gpu     on a machine with a GPU, with the torch that is there; make bench-gpu: how fast"
	@echo "make bench        every benchmark beside its peers, as tables and JSON under $(BENCH_DIR)"
	@echo "make bench-compare A=x.json B=y.json   what moved between two results beyond noise"
	@echo "make lint         ruff and mypy;  make format: let ruff mend what it can"
	@echo "make clean        remove the environment, the build and the quickstart's run"

quickstart: env
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart/run.sh

env: $(VENV)/.built

$(VENV)/.installed: requirements/base.txt requirements/dev.txt
	@python=$$(tools/find_python.sh) && echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/base.txt -r requirements/dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

sglang: $(VENV)/.sglang

# Without its CUDA packages, hence --no-deps. A GPU machine's own SGLang came with its kernels: it stays as it is.
SGLANG_HERE := import importlib.util, torch; print(torch.cuda.is_available(), bool(importlib.util.find_spec("sglang")))

$(VENV)/.sglang: $(VENV)/.built requirements/sglang.txt
	@case $$($(BIN)/python -c '$(SGLANG_HERE)') in \
	  "True True") echo "using the SGLang that is installed" ;; \
	  "True False") echo "a GPU without SGLang: use a container that has SGLang, or hide the GPU (CUDA_VISIBLE_DEVICES=)" >&2; exit 1 ;; \
	  *) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/sglang.txt ;; \
	esac
	@touch $@

# TransformerEngine's Python half, in an environment over $(VENV), never in it: half of a TransformerEngine changes what
# Megatron picks. A folder that a .pth file names only joins sys.path; addsitedir reads the .pth files in it as well.
export TE_CPU ?= $(abspath $(VENV))-te
LAY_OVER := import pathlib, sys, sysconfig; \
  site = pathlib.Path(sysconfig.get_path("purelib")); below = pathlib.Path(sys.argv[1]) / site.relative_to(sys.prefix); \
  (site / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")

te-cpu: $(TE_CPU)/.installed

$(TE_CPU)/.installed: requirements/te_cpu.txt | $(VENV)/.built
	$(BIN)/python -m venv --clear --without-pip $(TE_CPU)
	$(BIN)/python -m pip --python $(TE_CPU)/bin/python install --quiet --disable-pip-version-check --no-deps \
	  -r requirements/te_cpu.txt
	@$(TE_CPU)/bin/python -c '$(LAY_OVER)' $(abspath $(VENV))
	@touch $@

# More environments over $(VENV), for packages whose pins contradict its own.
bridge: $(VENV)-bridge/.installed
modelopt: $(VENV)-modelopt/.installed
trackers: $(VENV)-trackers/.installed

$(VENV)-bridge/.installed $(VENV)-modelopt/.installed $(VENV)-trackers/.installed: $(VENV)-%/.installed: requirements/%.txt | $(VENV)/.built
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-deps -r $<
	@$(@D)/bin/python -c '$(LAY_OVER)' $(abspath $(VENV))
	@touch $@

test: env sglang te-cpu bridge modelopt trackers
	$(BIN)/python -m pytest -m "not long" tests

test-fast: env
	$(BIN)/python -m pytest -m "not long" tests/unit

test-long: env sglang te-cpu bridge
	$(BIN)/python -m pytest -m long --timeout 3600 tests

# On a GPU machine, with the python and torch that are there (PYTHON=...): neither `make env` nor a package index.
PYTHON ?= python3

test-gpu:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest -p no:cacheprovider tests/gpu

bench-gpu:
	$(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) tools/benchmark_gpu.py $(if $(JSON),--json $(JSON))

BENCH_DIR ?= $(BENCH_NOW)
BENCH_NOW := runs/benchmarks/$(shell date +%Y%m%d-%H%M%S)
BENCHMARKS := $(wildcard tools/benchmark_*.py)
# Those that need more than `make env` brings have commands of their own.
BENCH := $(filter-out %_gpu.py %_rollout.py %_weight_sync.py,$(BENCHMARKS))

bench: env
	@for tool in $(BENCH); do \
	  name=$$(basename $$tool .py); echo; echo "== $$name"; \
	  $(BIN)/python $$tool --json $(BENCH_DIR)/$${name#benchmark_}.json || exit 1; \
	done

bench-compare: env
	@test -n "$(A)" -a -n "$(B)" || { echo "usage: make bench-compare A=x.json B=y.json" >&2; exit 2; }
	@$(BIN)/python tools/bench_compare.py $(A) $(B)

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(TE_CPU) $(VENV)-bridge $(VENV)-modelopt $(VENV)-trackers build *.egg-info megatron_fipo/*.so runs/quickstart .cache
