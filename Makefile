# make demo, make test: each sets itself up. The README has the same commands without make.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

demo: $(STAMP)
	$(VENV)/bin/megapar train experiment=demo

# What a newcomer should see pass; then what a change must pass, too; then what takes longer than a change can wait.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -m "not slow and not more"

test-more: $(STAMP)
	$(VENV)/bin/python -m pytest -m "more and not slow"

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

# Formatter, linter, type checker, and the floors of docs/architecture.md.
check: $(STAMP)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# What every rank holds and sends, and the kernels' machine code, written down anew: look at the difference.
replay: $(STAMP)
	$(VENV)/bin/python -m tests.plan.replay

replay-kernels: $(STAMP)
	$(VENV)/bin/python -m tests.plan.replay --kernels

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test test-more test-slow check replay replay-kernels
