# Two commands do everything on a machine with Python 3.11, make and a C compiler: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

# A folder of wheels to look in first, as pip's own variable names it; without one, uv picks PyTorch's CPU build.
WHEELS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",--torch-backend cpu)

.PHONY: demo test test-slow test-kills test-browser test-megatron check install format ui up ps down clean

demo: $(READY)
	$(BIN)/moe-replay run

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Needs chromium and chromedriver (Debian and Ubuntu: packages chromium, chromium-driver). SCREENSHOTS=folder keeps them.
test-browser: $(READY)
	$(BIN)/python -m pytest tests/browser -m browser

# Megatron-Core and its bridge in a folder of their own: beside verl they make each import of it some 2 s longer.
MEGATRON := $(VENV)/megatron
test-megatron: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(MEGATRON) --no-deps \
		--constraints infra/constraints.txt megatron-core mbridge
	PYTHONPATH=$(MEGATRON) $(BIN)/python -m pytest -m "slow or not slow" \
		tests/engines/test_megatron_replay.py tests/engines/test_megatron_engine.py \
		tests/engines/test_megatron_ranks.py tests/flow/test_megatron_run.py

# Seconds to a minute a kill; KILLS=100 is the long version.
KILLS ?= 30
test-kills: $(READY)
	$(BIN)/python -m pytest -m slow tests/kill --kills $(KILLS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ui: $(READY)
	$(BIN)/moe-replay ui

# The local stack; ports are PREFECT_PORT, MLFLOW_PORT, S3_PORT and WORKER_PORT: `make up PREFECT_PORT=4300`.
up: $(READY)
	@$(BIN)/python -m infra.stack up

ps: $(READY)
	@$(BIN)/python -m infra.stack status

down: $(READY)
	@$(BIN)/python -m infra.stack down

install: $(READY)

# Bytecode is made here, once: where PYTHONDONTWRITEBYTECODE is set, every process would make all of it, in 15 s for vLLM.
$(READY): pyproject.toml infra/constraints.txt infra/overrides.txt
	@command -v $(PYTHON) >/dev/null || { echo "moe-replay needs Python 3.11; name it: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python $(WHEELS) --compile-bytecode \
		--constraints infra/constraints.txt --overrides infra/overrides.txt --editable ".[cpu,dev]"
	$(BIN)/python -m compileall -q moe_replay tasks flows infra
	@touch $@

clean:
	rm -rf $(VENV) .moe-replay
