# make demo, make test: each sets itself up. The README has the same commands without make. `make help` lists all.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

demo: $(STAMP)  ## train a small model with tp=2, pp=2, dp=2: eight processes on a CPU
	$(VENV)/bin/megapar train experiment=demo

# What a newcomer should see pass; then what a change must pass, too; then what takes longer than a change can wait.
test: $(STAMP)  ## the tests that a newcomer should see pass
	$(VENV)/bin/python -m pytest -m "not slow and not more"

test-more: $(STAMP)  ## what a change must pass, too
	$(VENV)/bin/python -m pytest -m "more and not slow"

test-slow: $(STAMP)  ## what takes longer, and all that judges wall-clock time
	$(VENV)/bin/python -m pytest -m slow

# Needs nothing but this repository, torch and numpy: a GPU machine without a network has no .venv.
gpu:  ## acceptance on one GPU, eight minutes, no network; a rehearsal without a GPU
	$(or $(wildcard $(VENV)/bin/python),$(PYTHON)) experiments/gpu/accept.py --out runs/gpu

chaos: $(STAMP)  ## ten minutes of faults at random times, then a clean run beside it; the table goes into docs/reliability.md
	$(VENV)/bin/python -m tests.faults.chaos --write docs/reliability.md

# Formatter, linter, type checker, and the floors of docs/architecture.md.
check: $(STAMP)  ## formatter, linter, type checker, floors
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# What every rank holds and sends, and the kernels' machine code, written down anew: look at the difference.
replay: $(STAMP)  ## write down anew what every rank holds and sends
	$(VENV)/bin/python -m tests.plan.replay

replay-kernels: $(STAMP)  ## the same of the kernels' machine code
	$(VENV)/bin/python -m tests.plan.replay --kernels

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 22

.PHONY: help demo test test-more test-slow gpu chaos check replay replay-kernels
