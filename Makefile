# Two commands do everything: `make sweep` and `make test`. Both need Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin

sweep: .venv/ready
	$(BIN)/lmsat sweep --grid ranks.yaml

# Two at a time, most of them commands with workers of their own; in the order of files, or the
# longest would come last.
test: export OMP_NUM_THREADS = 1
test: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The site, for `python3 -m http.server -d site`: every link and anchor has to lead somewhere.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What is known against the packages of the lock file.
audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	.venv/audit/bin/pip-audit -s osv -r constraints.txt --no-deps --disable-pip

# Sweeps killed; and noticed, damaged, filled: docs/reliability.md.
chaos faults: export OMP_NUM_THREADS = 1
chaos: .venv/ready
	$(BIN)/python -m tests.chaos

faults: .venv/ready
	$(BIN)/python -m tests.chaos --only faults

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmsat needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --progress-bar off -q -c constraints.txt -e . --group dev
	touch $@

.PHONY: sweep test docs chaos faults audit
