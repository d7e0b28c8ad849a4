# Each target works on its own on a machine that has only make and Python 3.11 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AOT := .venv-aot
MUTATION := .venv-mutation
TRAINERS := .venv-trainers
MATRIX := .venv-matrix
PYTHON311 ?= python3.11
# The trainers ask for it, or for a later one.
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
PYTHONS ?= $(PYTHON311) $(PYTHON312) $(PYTHON313)
# One of oldest and newest; empty for both.
VERSIONS ?=
WORKERS ?= 2
ROWS ?= 1000000
SAMPLE ?= 200
MINUTES ?= 60

# Relative on purpose: pip splits these variables at spaces, so an absolute path could break.
# Older pips pin the build backend by the first of them, newer ones by the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Where this is set, as in some containers, each process compiles a thousand imported modules anew, for ten seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-aot test-trainers test-matrix fuzz soak mutate check-package lint format docs bench \
	lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Verify the derivative on this machine, then train on handwritten digits
	@echo "==> Verifying the derivatives"
	@$(BIN)/python -m jsoftmax verify
	@echo "==> Training on handwritten digits"
	@$(BIN)/python examples/digits.py

test: lint ## Lint, check the types and run the tests
	@echo "==> Running the tests that compare values, compiled quickly"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not exact and not slow"
	@echo "==> Running the tests of last digits and of programs, compiled as users do"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "exact and not slow"

test-all: export JSOFTMAX_LAYOUTS := all
test-all: lint ## Run the long form of the tests, which a release needs (half an hour to an hour)
	@echo "==> Running all tests that compare values, in every layout"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not exact"
	@echo "==> Running all tests of last digits and of programs"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m exact

test-aot: $(AOT)/.installed ## Compile for an H200 and a TPU, neither of them needed, and count bytes and instructions
	@echo "==> Compiling"
	@$(AOT)/bin/python -m benchmarks.aot

test-trainers: $(TRAINERS)/.installed ## Train with the losses of MaxText, Tunix and EasyDeL, and with ours (some minutes)
	@for name in tunix maxtext easydel; do \
		echo "==> $$name" && $(TRAINERS)/$$name/bin/python -m benchmarks.trainers $$name || exit 1; done

test-matrix: $(VENV)/.installed $(VENV)/.installed-uv ## Run the tests with the oldest and the newest JAX under each Python (hours; goes on where it stopped)
	@echo "==> Testing"
	@$(BIN)/python tests/matrix.py $(BIN)/uv $(PYTHONS) $(addprefix --only ,$(VERSIONS))

fuzz: $(VENV)/.installed ## Search for errors with a million rows of hard inputs (ROWS=…; goes on where it stopped)
	@echo "==> Searching"
	@PYTHONPATH=tests XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m fuzz --rows $(ROWS)

mutate: $(VENV)/.installed $(MUTATION)/.installed ## Change the core in small ways, of which each should fail a test (SAMPLE=…; goes on, too)
	@echo "==> Changing"
	@$(BIN)/python tests/mutate.py --sample $(SAMPLE) --operators $(MUTATION)

soak: $(VENV)/.installed ## Call losses of changing shapes from several threads for an hour (MINUTES=…): memory, caches, compilations
	@echo "==> Soaking"
	@PYTHONPATH=.:tests $(BIN)/python -m soak --minutes $(MINUTES)

check-package: $(VENV)/.installed $(VENV)/.installed-uv ## Build the package twice, install it where nothing else is, and check what others get
	@$(BIN)/python tests/package.py $(BIN)/uv

lint: $(VENV)/.installed ## Run ruff and pyright
	@echo "==> Linting"
	@$(BIN)/ruff check --quiet
	@echo "==> Checking the format"
	@$(BIN)/ruff format --check --quiet
	@echo "==> Checking the types"
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed ## Format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build/html
	@echo "==> Building the documentation"
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "==> Open docs/_build/html/index.html"

# Freed memory is kept: else large results are made of fresh pages, of some programs and not of others. That of threads,
# which have arenas of their own, would be given back whatever the thresholds are.
bench: $(VENV)/.installed ## Time jsoftmax beside its peers (some minutes)
	@echo "==> Measuring"
	@MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 $(BIN)/python -m benchmarks

# The build backend, its helper and uv are used here but are no dependency of jsoftmax, so they are named.
lock: $(VENV)/.created ## Renew constraints.txt and tests/oldest.txt
	@echo "==> Resolving the newest versions"
	@PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= $(BIN)/python -m pip install -qq --upgrade uv
	@printf 'editables\nhatchling\nuv\n' | UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile --quiet \
		--universal --python-version 3.11 --all-extras --no-annotate --no-emit-index-url \
		--no-emit-find-links --upgrade --output-file constraints.txt pyproject.toml -
	@$(BIN)/python -m pip install -qq --editable '.[test]'
	@$(BIN)/python tests/matrix.py $(BIN)/uv

clean: ## Remove everything that make has made
	@rm -rf $(VENV) $(AOT) $(MATRIX) $(MUTATION) $(TRAINERS) build dist out docs/_build .hypothesis .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "jsoftmax needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there')." >&2; \
		echo "Name another one, for example: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Compilers for devices that are not here; their plugins would ask for the devices' own libraries.
$(AOT)/.installed: $(VENV)/.created
	@echo "==> Installing the compilers for an H200 and a TPU (once)"
	@$(BIN)/python -m venv $(AOT)
	@PIP_CONSTRAINT= $(AOT)/bin/python -m pip install -qq jax==0.10.2 'libtpu==0.0.42.*' absl-py jaxtyping optax
	@PIP_CONSTRAINT= $(AOT)/bin/python -m pip install -qq --no-deps \
		jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm==13.5.37
	@touch $@

$(MUTATION)/.installed: $(VENV)/.created
	@echo "==> Installing the operators of cosmic-ray (once)"
	@PIP_CONSTRAINT= $(BIN)/python -m pip install -qq --target $(MUTATION) cosmic-ray==8.7.0
	@touch $@

# One each, since they ask for different releases of JAX; by uv, since pip takes long over so many packages.
$(TRAINERS)/.installed: $(VENV)/.installed-uv $(wildcard benchmarks/trainers-*.txt)
	@echo "==> Installing three trainers (once; 4 GB)"
	@for name in tunix maxtext easydel; do \
		$(PYTHON312) -m venv $(TRAINERS)/$$name && $(BIN)/uv pip install --quiet \
			--python $(TRAINERS)/$$name/bin/python -r benchmarks/trainers-$$name.txt || exit 1; done
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "==> Installing jsoftmax and what its tests need (a minute or two, once)"
	@$(BIN)/python -m pip install -qq --no-compile --editable '.[test]' # Python compiles what is imported
	@touch $@

$(VENV)/.installed-uv: $(VENV)/.created
	@$(BIN)/python -m pip install -qq uv
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "==> Installing what the documentation needs (once)"
	@$(BIN)/python -m pip install -qq --editable '.[docs]'
	@touch $@
