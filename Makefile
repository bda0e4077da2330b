# Everything runs in .venv; it is made once, and again only when pyproject.toml changes.
# PYTHON=python3.12 chooses the interpreter, TORCH=2.14.1 the version of PyTorch, which stays until `make clean`.
PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
STAMP := .venv/.installed$(TORCH:%=-torch-%)
# One file stays in one process, so that its tests share their fixtures.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --enforce-slow

.PHONY: help demo quick test check soak bench bench-peers docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(TORCH:%='torch==%')
	@rm -f .venv/.installed*
	@touch $(STAMP)

demo: $(STAMP)  ## quantize a bundled network with ZS-CGAN, noise and real images, and show the report
	$(BIN)/zsq compare recipes/demo.toml --jobs 2 --resume --out runs/demo
	$(BIN)/zsq report runs/demo --open

quick: $(STAMP)  ## run the tests that take less than about half a second each, under a minute
	$(PYTEST) -m 'not slow and not real'

test: $(STAMP)  ## run all tests
	$(PYTEST)

check: $(STAMP)  ## format, lint, types, the order of imports, and the quick tests
	$(BIN)/ruff format --check src tests examples benchmarks tools
	$(BIN)/ruff check src tests examples benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory quick

soak: $(STAMP)  ## kill, damage, fill and deceive zsq from outside, as docs/reliability.md counts; ten minutes on one core
	$(BIN)/python benchmarks/trials.py

bench: $(STAMP)  ## measure steps, growth, memory and the deployed file at small sizes; writes to benchmarks/results
	$(BIN)/python benchmarks/moments.py
	$(BIN)/python benchmarks/fakequant.py
	$(BIN)/python benchmarks/step.py --small
	$(BIN)/python benchmarks/growth.py --small
	$(BIN)/python benchmarks/deployed.py --small
	$(BIN)/python benchmarks/memory.py --small
	$(BIN)/python benchmarks/checkpoints.py

bench-peers: $(STAMP)  ## compare ways of making images and quantizers on ../shared/data, about ten minutes
	$(BIN)/python benchmarks/peers.py --small

docs: $(STAMP)  ## write the reference pages from the code and build the site into site/
	$(BIN)/python tools/reference.py
	$(BIN)/python benchmarks/results_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the environment and the runs
	rm -rf .venv runs
