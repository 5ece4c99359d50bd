# Needs make and Python 3.11 or newer; everything else goes into .venv.
#
#   make demo    quantize the built-in model to 4 bits, draw with both, write a report        (a minute, installs aside)
#   make test    ruff, then pytest                                                            (a few minutes)
#   make test-oldest   the same tests with the oldest versions that pyproject.toml allows         (twenty minutes; gigabytes: no CPU build of an old torch)
#   make chaos   mistreat servers, saves and saved models: kill, flood, starve, spoil         (two to five hours)
#
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS adds options to pip, for a mirror or a build of torch for your card.

PYTHON   ?= python3
PIP_ARGS ?=
VENV     ?= .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.installed
GATES    := $(VENV)/.triton-installed
RUFF     := $(BIN)/ruff check --output-format concise .
SHELL    := /bin/bash

MODEL := builtin:cifar10-dit
SMALL := demo/cifar10-dit-w4a8

.PHONY: demo test test-oldest lint chaos clean
.DEFAULT_GOAL := test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dite needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch alone first: where an index offers a build for CPUs, pip keeps it, and does not fetch gigabytes of CUDA for the sake of a dependency.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[eval,serve,dev]" -c constraints.txt
	@touch $@

# For the tests that compile and interpret the GPU kernels. torch for CUDA brings its own triton; builds for CPUs come without.
$(GATES): $(READY)
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(PIP_ARGS) triton==3.6.0
	@touch $@

demo: $(READY)
	$(BIN)/dite quantize $(MODEL) --recipe w4a8 -o $(SMALL) --overwrite
	$(BIN)/dite generate $(SMALL) -n 10 --seed 0 --compare $(MODEL) -o demo/pictures --overwrite
	$(BIN)/dite eval fidelity $(SMALL) --baseline $(MODEL) --n 32 -o demo/report
	@echo
	@echo "Look at:"
	@echo "  demo/pictures/compare.png   the same ten pictures at full precision, at 4 bits, and 8 times their difference"
	@echo "  demo/report/report.html     what it cost, in numbers"

# Both run, whatever ruff says. The status of pytest is kept for .ci/run: make itself turns every failure into 2. One process a core, of one thread.
test: $(READY) $(GATES)
	@rm -f $(VENV)/.pytest-status
	@$(RUFF); lint=$$?; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile; tests=$$?; echo $$tests > $(VENV)/.pytest-status; exit $$((tests ? tests : lint))

# The constraints are read off pyproject.toml, so that the two can't disagree: every >= becomes ==.
OLDEST := .venv-oldest
define OLDEST_VERSIONS
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = (project["optional-dependencies"][extra] for extra in ("serve", "eval", "lora", "dev"))
wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
print(*sorted({re.sub(r">=", "==", one.split(";")[0].strip()) for one in wanted}), sep="\n")
endef
export OLDEST_VERSIONS

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) -c "$$OLDEST_VERSIONS" > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet $(PIP_ARGS) -r $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps --no-build-isolation -e .
	@touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(READY)
	$(RUFF)

# Figures of speed among the goals hold on a machine that does nothing else: python evals/serve_faults.py --help
chaos: $(READY)
	$(BIN)/python -m pytest -m chaos
	$(BIN)/python evals/serve_faults.py --full --out docs/results/serve-faults.json
	$(BIN)/python evals/save_faults.py --out docs/results/save-faults.json
	$(BIN)/python evals/checkpoint_lies.py --out docs/results/checkpoint-lies.json
	$(BIN)/python evals/checkpoint_fuzz.py --cases 200000 --out docs/results/checkpoint-fuzz.json
	$(BIN)/python evals/checkpoint_fuzz.py --subject text --cases 10000 --deep 1 --out docs/results/checkpoint-fuzz-text.json

clean:
	rm -rf demo build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
