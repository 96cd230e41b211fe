# Sevenfold. Needs Python 3.11, pip, make and git; nothing has to be activated.
#
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu   Linux without a GPU: saves several GB
#   make setup PYTHON=/path/to/python3.11                         another interpreter

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
PORT ?= 5000

PIP_INSTALL = -m pip install -qq --disable-pip-version-check
MAIN = .venv/.installed
LEGACY = .venv-legacy/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo federate ui test lint bench clean

help:  ## list what can be typed
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## install both environments (.venv, .venv-legacy); instant when nothing changed
	@$(MAKE) --no-print-directory -j2 $(MAIN) $(LEGACY)

demo: setup  ## from real text to signed 4-bit submodels, with a table at the end
	@.venv/bin/python -m pipeline

federate: setup  ## three devices train an adapter together, on this machine; makes the packages first if needed
	@[ -e artifacts/packages/small/manifest.json ] || .venv/bin/python -m pipeline
	@.venv/bin/python -m server demo

ui: setup  ## open the family's runs in MLflow on http://127.0.0.1:5000
	@.venv/bin/python -m pipeline.tracking_ui --port $(PORT)

test: setup  ## every test, two at a time
	@.venv/bin/python -m pytest -n 2 --dist loadgroup

lint: setup  ## ruff, mypy and the import contracts
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

bench: setup  ## the tables of benchmarks/, one script each
	@for script in benchmarks/*.py; do \
	    [ -e "$$script" ] || { echo "no benchmark scripts yet"; break; }; \
	    echo "== $$script"; .venv/bin/python "$$script" || exit 1; \
	done

clean:  ## remove what a run wrote and the tools' caches; keeps both environments
	rm -rf artifacts runs .cache dist build *.egg-info mlflow.db* mlruns mlartifacts
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# A stamp is written last: an interrupted installation is simply repeated.
$(MAIN): pyproject.toml constraints.txt
	@$(call require_python)
	@echo "Installing into .venv (a few minutes the first time) ..."
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@.venv/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --constraint constraints.txt --editable '.[pipeline,edge,server,dev]'
	@touch $@

$(LEGACY): pyproject.toml constraints-legacy.txt
	@$(call require_python)
	@.venv-legacy/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-legacy
	@.venv-legacy/bin/python $(PIP_INSTALL) --constraint constraints-legacy.txt \
	    cryptography jinja2 'numpy<2' rich safetensors tflite-runtime==2.14.0 tokenizers
	@touch $@

define require_python
[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
    { echo "PYTHON: got '$(PYTHON)', allowed: Python 3.11; type: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
endef
