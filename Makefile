# Everything from a fresh checkout: `make demo` shows what Espalier does, `make test` passes the tests.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test coverage test-slow lint types docs seedling clean

setup: $(STAMP)

# torch first and pinned, so that nothing else chooses a build of it
$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[test,bench]"
	$(BIN)/python -m pip install --quiet --no-deps galore-torch==1.0  # a test compares with it; what it asks for is for GPUs
	touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

test: $(STAMP) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=20

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --cov=espalier --cov-report=term:skip-covered

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/build.py

seedling: $(STAMP)
	$(BIN)/python seedling/build.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build demo-out
