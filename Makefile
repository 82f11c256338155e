# make test | test-fast | test-versions | test-tritons | test-races | test-tensor-cores | test-families | fuzz | coverage | mutants | test-gpu | demo | demo-llm | docs | notebooks | lint | package | clean. The first of them makes .venv and installs the tested versions into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MEASURING := $(VENV)/.measuring
# The oldest and the newest Transformers: what `tests/versions` has requirements of.
VERSIONS := $(basename $(notdir $(wildcard tests/versions/*.*.*.txt)))
# Every Triton that is supported, and the GPUs that each compiles for.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
TRITON_TARGETS ?= sm80,sm100,gfx942
# Of their kernels those with this in their name; empty: all. For sm90 all are compiled in any case.
TRITON_KERNELS ?= prefill
# Launches are chosen so that nothing spills with the tested Triton (`benchmarks/results/kernels.json`); with others a kernel may
# spill so many bytes a thread.
TRITON_SPILLS ?= 96

.PHONY: test test-fast test-versions $(VERSIONS:%=test-transformers-%) test-tritons $(TRITONS:%=test-triton-%) test-races test-tensor-cores test-families fuzz coverage mutants test-gpu demo demo-llm docs notebooks lint package clean
.NOTPARALLEL:

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# Something of every part of the library, in under two minutes. Only files with tests that are marked
# so are given to pytest: to import the others takes half a minute.
FAST := grep --recursive --files-with-matches --include 'test_*.py' pytest.mark.fast tests
test-fast: $(INSTALLED)
	$(BIN)/pytest -m fast --numprocesses logical --maxprocesses 4 --dist worksteal $$($(FAST))

# The tests that meet Transformers, with the oldest and the newest that are supported: each lies in a folder before the others.
# (The real model answers through the tested version alone: it takes minutes, and meets nothing that tiny models do not.)
test-versions: $(VERSIONS:%=test-transformers-%)

$(VERSIONS:%=test-transformers-%): test-transformers-%: build/transformers-%/.installed
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -c "import transformers; assert transformers.__version__ == '$*', transformers"
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -m pytest -k 'not real_model' --numprocesses logical --maxprocesses 4 --dist worksteal $$(cat tests/versions/files.txt)

build/transformers-%/.installed: tests/versions/%.txt | $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# Kernels, compiled by every Triton for every kind of GPU, without one. Each version keeps one core busy.
test-tritons: $(INSTALLED)
	printf '%s\n' $(TRITONS) | xargs -P $$(getconf _NPROCESSORS_ONLN) -I VERSION $(MAKE) test-triton-VERSION

$(TRITONS:%=test-triton-%): test-triton-%: build/triton-%/.installed
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -c "import triton; assert triton.__version__ == '$*', triton.__version__"
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/hip-hf kernels --targets $(TRITON_TARGETS) --dims 128 --dtypes bf16 --only '$(TRITON_KERNELS)' --spills $(TRITON_SPILLS)
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/hip-hf kernels --targets sm90 --dims 128 --dtypes bf16 --spills $(TRITON_SPILLS)

build/triton-%/.installed: | $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

# Kernel tests in a harsher interpreter (tests/lib/sanitizer.py), without a GPU. RACES: which; all: RACES=tests/backends/test_kernel_*.py
RACES ?= $$(cat tests/races.txt)
SEED ?= 0
test-races: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest $(RACES) --races $(SEED) --numprocesses logical --maxprocesses 4 --dist worksteal

# All kernel tests with the arithmetic of NVIDIA's tensor cores (tests/lib/tensor_cores.py), without a GPU: what `make test-gpu` would
# say of their tolerances. `make test-races` computes so as well.
test-tensor-cores: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest tests/backends/test_kernel_*.py --tensor-cores --numprocesses logical --maxprocesses 4 --dist worksteal

# Every model type of the installed Transformers; `make test` runs a third of them.
test-families: $(INSTALLED)
	$(BIN)/pytest tests/integration/test_families.py --families all --numprocesses logical --dist worksteal

# The share of lines that the suite runs, which must be 90 %. Without a GPU the kernels run in the interpreter, and count.
coverage: $(MEASURING)
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal --cov --cov-report=term:skip-covered

# Small faults are put into a few files: the share that the tests notice must be 85 % of each. MUTANTS: options of tests/mutants.py.
mutants: $(MEASURING)
	$(BIN)/python tests/mutants.py $(MUTANTS)

$(MEASURING): pyproject.toml constraints.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[measuring]'
	@touch $@

# The kernel tests on a GPU, with the Python and the packages that are there: nothing is installed.
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest tests/backends/test_kernel_*.py

# 100,000 cases of the properties that `make test` tries on a few hundred; they differ from run to run.
fuzz: $(INSTALLED)
	$(BIN)/pytest tests/*/test_fuzz*.py --hypothesis-profile fuzz --hypothesis-show-statistics

demo: $(INSTALLED)
	$(BIN)/hip-hf demo

# The same with a real model of 135M parameters, which is fetched into runs/smollm2 (513 MiB) the first time.
demo-llm: $(INSTALLED)
	$(BIN)/hip-hf demo --model smollm2

# The pages: build/docs/index.html. Warnings are errors.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

# Executes the notebooks and saves their outputs, which the documentation shows.
notebooks: $(INSTALLED)
	$(BIN)/python notebooks/execute.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Builds sdist and wheel, checks them with twine, and uses the wheel in an environment of its own. Nothing is kept.
package: $(INSTALLED)
	.ci/package $(BIN)/python

$(INSTALLED): pyproject.toml setup.cfg constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plot,docs]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf .venv build dist mutants .coverage docs/_generated *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
