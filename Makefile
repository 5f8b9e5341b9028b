# Two commands matter: `make run` (see it work) and `make test` (prove it). Both make the environment on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# the strict editable install links every source file, so a new file means a new install: the stamp's name hashes the file list
SOURCES := $(sort $(wildcard node/*.py node/protocols/* control/*.py transports/*.py ops/*.py ops/*.cpp chaos/*.py))
STAMP  := $(VENV)/.installed-$(shell (echo $(SOURCES); cat pyproject.toml) | cksum | cut -d' ' -f1)

.PHONY: run cluster test test-rdma check lint types bench install clean

run: $(STAMP)
	@$(BIN)/tickmesh up $(if $(CAPTURE),--capture $(CAPTURE)) $(ARGS)

cluster: $(STAMP)
	@$(BIN)/tickmesh cluster $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "not cluster and not rdma"
	@$(BIN)/python -m pytest -m cluster

test-rdma: $(STAMP)
	@$(BIN)/python tests/run_rdma.py $(ARGS)

check: $(STAMP)
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not rdma" -x

lint: $(STAMP)
	@$(BIN)/ruff check .

types: $(STAMP)
	@$(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/pip install --quiet '.[bench]' >/dev/null 2>&1 || $(BIN)/pip install --quiet order-book itchfeed simplefix
	@$(BIN)/tickmesh bench $(ARGS)

install: $(STAMP)

$(STAMP):
	@test -x $(BIN)/python || { echo "making the environment in $(VENV), first time only"; $(PYTHON) -m venv $(VENV) || { \
	  echo "python's venv module is missing: install it (Debian: apt-get install python3-venv) and run make again" >&2; exit 1; }; }
	@echo "installing tickmesh and what it needs"
	@rm -f $(VENV)/.installed-*
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]' --config-settings editable_mode=strict
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
