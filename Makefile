PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed for the demo alone, and for everything.
DEMO := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
# The tests are many small ones: a process per core beats threads within one. Each takes tests of a module that stand together,
# whose fixtures are then made once, and in the end those that the other has left.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

# The oldest supported torch and triton. Of numpy a new one: triton 3.6 alone would not run with it.
# The oldest numpy too: make test-oldest NUMPY=1.26.4
OLDEST := .venv-oldest
NUMPY ?= 2.4.6
# Tests that need torch, triton and numpy only: kernels, mask and loss, what they compile to, and their launches.
OLDEST_TESTS := tests/kernels $(patsubst %,tests/test_%.py,mask loss properties)

.PHONY: demo test test-oldest mutants bench lint format inspect clean

$(DEMO): EXTRAS := demo
$(STAMP): EXTRAS := demo,dev
$(DEMO) $(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(DEMO)  ## real photos, a tiny FLUX, the real training path: writes demo-output/
	$(BIN)/focusdpo demo --out demo-output --overwrite true

test: $(STAMP)  ## all tests; without a GPU the kernels run in Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

$(OLDEST)/.installed: constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		torch triton hypothesis pytest pytest-timeout pytest-xdist scikit-image
	touch $@

test-oldest: $(OLDEST)/.installed  ## the kernels' tests with the oldest supported torch and triton
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt numpy==$(NUMPY)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) $(OLDEST_TESTS)

mutants: $(STAMP)  ## how many one-line faults in loss, mask and step the tests notice: half an hour
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mutmut
	$(BIN)/python tests/mutants.py

bench: $(STAMP)  ## kernels against every peer, with a report: writes bench-output/
	rm -f bench-output/result.jsonl
	$(BIN)/python -m pytest benchmarks/test_kernels.py --result bench-output/result.jsonl --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m benchmarks.report bench-output/result.jsonl

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## ruff, fixing what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

inspect: $(STAMP)  ## registers, spills and wide loads of every kernel, compiled without a GPU
	$(BIN)/python -m focusdpo_kernels.tools.inspect

clean:
	rm -rf $(VENV) $(OLDEST) demo-output bench-output build *.egg-info
