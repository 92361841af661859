# make serve   everything from nothing to a served model, at http://127.0.0.1:8000; Ctrl-C stops it
# make test    the tests; make lint  ruff and mypy; make clean  forget the virtual environment
#
# PYTHON=python3.12 chooses the interpreter; ARGS="my.yaml --set kv.block_tokens=32" goes to `tandem serve`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: serve test lint clean

serve: .venv/.ready
	@exec $(BIN)/tandem serve $(ARGS)

# Two processes, each with whole files: first for tests that mostly compute, then for those that start whole clusters.
# What fails is run again, alone: beside another whole cluster, on two cores, a limit of time may say nothing.
pair = $(BIN)/python -m pytest -q -n 2 --dist loadfile $(1) || \
    { test $$? = 1 && $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none $(1); }

test: .venv/.ready-dev
ifeq ($(ARGS),)
	$(call pair,tests/unit tests/conformance tests/parity tests/gpu)
	$(call pair,tests/chaos tests/e2e)
else
	$(BIN)/python -m pytest -q $(ARGS)
endif

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "tandem: $(PYTHON) is not there; set PYTHON to a Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "tandem: $$($(PYTHON) --version) is too old; set PYTHON to a Python 3.11 or newer"; exit 1; }
	@test -x $(BIN)/python || { echo "creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; } \
	    || { echo "tandem: no virtual environment could be made; on Debian: apt install python3-venv"; rm -rf .venv; exit 1; }
	@echo "installing the dependencies of constraints.txt into .venv (once)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/.ready-dev: .venv/.ready
	@echo "installing what tests and lint need (once)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@mkdir -p .venv/src && ln -sfn ../.. .venv/src/tandem
	@touch $@
