# make demo   install what is needed into .venv, draw four images, and name commands to try next
# make serve  install the server too and start it: a page for the browser, and interfaces for other programs
# make test   install what the tests need and run them
# make lint   check style and types of the code
# make docs   build the pages of docs/ with the API reference into build/docs

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
VENV ?= .venv
PROMPT ?=
SEED ?= 4
export PROMPT SEED
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# pip does not compile what it installs as editable; where Python is told to write no bytecode, each start would.
COMPILE := $(VENV)/bin/python -m compileall -q latentdiff

.PHONY: help demo serve test lint docs clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/installed
	@if [ -n "$$PROMPT" ]; then set -- "$$PROMPT" -n 4; else set -- --prompts examples/prompts.txt; fi; \
	  $(VENV)/bin/latentdiff generate "$$@" --seed "$$SEED" --out images/ --sheet images/demo.png
	@printf '%s\n' "All four on one sheet: images/demo.png. Try next:" \
	  '  $(VENV)/bin/latentdiff words' \
	  '  $(VENV)/bin/latentdiff generate "a hat above a frog on a yellow background" --fast' \
	  '  $(VENV)/bin/latentdiff edit images/a-cat-on-a-blue-background-4.png "a dog on a blue background"'

serve: $(VENV)/installed-serve
	@$(VENV)/bin/latentdiff serve $(SERVE_ARGS)

test: $(VENV)/installed-test
	@$(VENV)/bin/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/installed-docs
	@$(VENV)/bin/mkdocs build --quiet --strict --config-file tools/mkdocs.yml

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "latentdiff needs Python 3.11 or newer and found none; install it, or name it: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "latentdiff needs Python 3.11 or newer, $(PYTHON) is older; name another one: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)

# The stamps are older than the files they depend on as soon as a requirement changes; then pip runs again.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing latentdiff into $(VENV) (the first time this takes a few minutes) ..."
	@$(INSTALL) --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing latentdiff and what its tests need into $(VENV) ..."
	@$(INSTALL) --editable '.[test]'
	@$(INSTALL) --no-deps spandrel einops  # without its torchvision, which would have to be that of the installed torch
	@touch $(VENV)/installed $@

$(VENV)/installed-serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing latentdiff and its server into $(VENV) ..."
	@$(INSTALL) --editable '.[serve]'
	@$(COMPILE)
	@touch $(VENV)/installed $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(INSTALL) --editable '.[docs]'
	@touch $(VENV)/installed $@
