# Every target sets up what it needs. PYTHON= names the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin
# Quiet unless something goes wrong; the index is the one pip is set up with.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

N ?= 1000

.PHONY: run test bench chaos docs lint clean

run: .venv/ready
	$(BIN)/samestep run examples/digits.py

test: .venv/ready
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

bench: .venv/ready
	$(BIN)/python benchmarks/compare.py

# The long forms: N trainings under random deaths, a kill at every line of the protocol, N trainings with a flipped bit,
# N damaged checkpoints, and the tests that `make test` leaves out. 20 minutes under faults: benchmarks/soak.py.
chaos: .venv/ready
	$(BIN)/python tests/faults/campaign.py --cases $(N)
	$(BIN)/python -m tests.faults.points --all
	$(BIN)/python tests/faults/flip_campaign.py --cases $(N)
	$(BIN)/python -m tests.faults.checkpoint_campaign --cases $(N)
	$(BIN)/python -m pytest -q --long -m long

# Every Python snippet in README.md and docs/ is run.
docs: .venv/ready
	$(BIN)/python -m pytest -q tests/test_docs.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: it is large, and its version decides the bits.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("samestep needs Python 3.11 or newer; use make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev,examples]'
	touch $@

clean:
	rm -rf .venv
