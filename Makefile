# make demo is all that a fresh clone needs; everything is installed into .venv from the pins in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Processes that run the fast tests, a file at a time; the slow ones measure memory and kill processes.
WORKERS ?= 2
INSTALLED := .venv/.installed

.PHONY: .venv demo test test-slow lint types clean help

demo: $(INSTALLED) ## integrate 700 real blood cells into demo-run/
	$(BIN)/schelix demo -o demo-run

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: $(INSTALLED) ## run the tests that take longer
	$(BIN)/python -m pytest -q -m slow || test $$? -eq 5 # 5: there are none

lint: $(INSTALLED) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## check types
	$(BIN)/mypy

.venv: $(INSTALLED) ## install into .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'scHelix-Scale needs Python 3.11 or later; name one: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo 'the venv module does not work; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Installing into .venv (a few minutes the first time): PyTorch ...'
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@echo 'Installing into .venv: scHelix-Scale and the rest ...'
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	@touch $@

clean: ## remove .venv, caches and demo-run
	rm -rf .venv demo-run build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## list the targets
	@while IFS= read -r line; do case "$$line" in \
	  [.a-z]*:*'## '*) printf '  make %-10s %s\n' "$${line%%:*}" "$${line#*## }";; esac; done < Makefile
