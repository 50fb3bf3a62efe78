# One environment in .venv for everything; each target builds what is missing.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo check test test-slow test-faults clean

demo: .venv/installed
	$(BIN)/python jobs/demo.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A test that hangs is ended, named, and shown where it hung.
test: .venv/installed-dev
	$(BIN)/python -m pytest --max-worker-restart=0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -m faults -n 0

clean:
	rm -rf .venv demo *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
