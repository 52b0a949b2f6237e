# make demo              answer questions about the Python standard library (make demo QUERY="...")
# make demo-train        teach a small encoder what a large one says, and see whether it has learned
# make test              install what the tests need into .venv and run them
# make full              the tests that take longer: every configuration, more examples, emulators
# make bench             measure every op beside its peers (benchmarks/README.md)
# make gpu-table         write docs/gpu_kernels.md (what the compiled GPU kernels need) and
#                        docs/gpu_bounds.md (what they can't be faster than)
# make mutate            break the GPU kernels spot by spot: do the tests notice?
# make gpu-test          on a machine with a GPU: all tests, compute-sanitizer, benchmarks
# make lint              ruff, mypy, clang-format
# make format            let ruff and clang-format rewrite the sources

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := python tests benchmarks examples
CXX_SOURCES := csrc tests/native tests/simt tests/mutation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
# Idle threads sleep instead of spinning: on a shared machine spinning costs more than it saves.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Files of tests go to processes whole, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-train test full bench gpu-table mutate mutate-changed gpu-test lint format clean

# Each extra is installed once; the marker file is newer than what it was installed from.
# torch comes first and alone: the constraint keeps it, whatever the other packages ask for.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q 'scikit-build-core>=0.10' 'pybind11>=2.13' cmake ninja
	$(BIN)/python -m pip freeze | grep -i '^torch==' > $(VENV)/constraints.txt
	touch $@

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc python -type f -not -name '*.pyc')

$(VENV)/installed-%: $(VENV)/torch $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation -c $(VENV)/constraints.txt '.[$*]'
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/python examples/stdlib_search/search.py $(if $(QUERY),--query "$(QUERY)")

demo-train: $(VENV)/installed-experiments
	$(BIN)/python examples/small_encoder/train.py

test: $(VENV)/installed-dev,demo,bench
	$(PYTEST)

full: $(VENV)/installed-dev,demo,bench
	HYPOTHESIS_PROFILE=full EMBLAS_ARCHITECTURES="75 80 86 89 90 100 120" $(PYTEST)
	for isa in $$($(BIN)/python -c 'from emblas._load import _C; print(*_C.supported_isas())'); do \
	  EMBLAS_ISA=$$isa $(PYTEST) || exit 1; done
	PATH=$(abspath $(BIN)):$$PATH bash .ci/native all

bench: $(VENV)/installed-dev,demo,bench
	mkdir -p benchmarks/results
	result=benchmarks/results/$$(date +%F)-$$(uname -n).json; \
	$(BIN)/python -m pytest benchmarks --override-ini addopts= -q \
	  -o python_files='bench_*.py' -o python_functions='bench_*' \
	  --benchmark-json=$$result --benchmark-columns=median --benchmark-disable-gc && \
	$(BIN)/python benchmarks/report.py $$result

gpu-table: $(VENV)/installed-dev,demo,bench
	$(BIN)/python tests/gpu/report.py
	$(BIN)/python tests/gpu/cost.py

mutate: $(VENV)/installed-dev,demo,bench
	PYTHONPATH=tests:tests/gpu $(BIN)/python -m mutation.run cuda $(KERNELS)
	PYTHONPATH=tests:tests/gpu TRITON_INTERPRET=1 $(BIN)/python -m mutation.run triton $(KERNELS)

# Only the families whose kernels or tests are not those of tests/mutation/record.json.
mutate-changed: KERNELS = --changed
mutate-changed: mutate

# docs/gpu_testing.md. The sanitizer sees overruns of single tensors only without torch's cache.
gpu-test: $(VENV)/torch
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("there is no usable GPU")'
	$(BIN)/python -m pip install -q --no-build-isolation -c $(VENV)/constraints.txt \
	  -C cmake.define.EMBLAS_CUDA=ON '.[dev,demo,bench]'
	$(BIN)/python -m pytest
	for tool in memcheck racecheck synccheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    --target-processes all $(BIN)/python -m pytest tests/test_executors.py -k cuda || exit 1; done
	PYTHONPATH=tests/gpu $(BIN)/python benchmarks/gpu.py

lint: $(VENV)/installed-dev,demo,bench
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	find $(CXX_SOURCES) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/installed-dev,demo,bench
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	find $(CXX_SOURCES) | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist wheelhouse .cache
