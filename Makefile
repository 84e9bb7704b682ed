# make quickstart   install into .venv, then train and evaluate a model on built-in data
# make test         install into .venv, then style, types, spelling and the fast tests (what CI runs)
# make test-heavy   the tests that take minutes
# make soak         kill a training a hundred times; it must end with the weights of one that was left alone
# make lint         style, types and spelling alone
# make bench        speed beside other libraries (installs torch)
# make clean        remove .venv and what tools left behind
#
# PYTHON=... chooses the interpreter (3.11 or 3.12), VENV=... the environment, WORKERS=... the test processes.

ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && echo $$p && break; \
	done)
endif
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
LOCK := $(if $(filter 3.12, $(VERSION)),requirements-py312.txt,requirements.txt)
READY := $(VENV)/.ready-$(VERSION)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test test-heavy soak lint bench setup clean

quickstart: $(READY)
	$(BIN)/recjax run quickstart

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-heavy: $(READY)
	$(BIN)/python -m pytest -m heavy

soak: $(READY)
	$(BIN)/python tests/soak/kills.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell

bench: $(READY)
	$(PIP) install --no-build-isolation --editable '.[bench]'
	$(BIN)/python benchmarks/train_step.py

setup: $(READY)

$(READY): $(LOCK) pyproject.toml
	@case "$(VERSION)" in 3.11|3.12) ;; *) \
	  echo 'recjax needs Python 3.11 or 3.12 ($(or $(PYTHON),none found)): make PYTHON=/path/to/python3.11' >&2; exit 2;; esac
	@echo 'Installing into $(VENV) with Python $(VERSION); the first time takes some minutes.'
	@$(BIN)/python$(VERSION) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --requirement $(LOCK)
	$(PIP) install --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-*
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
