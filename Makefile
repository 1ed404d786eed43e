# Every command a person needs. `make demo` and `make test` do all set-up themselves.
PYTHON ?= python3
PIP_ARGS ?=
REQUIREMENTS ?= requirements/cpu.txt
VENV := .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test bench observability-check lint audit format clean

setup: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $$(grep -c == $(REQUIREMENTS)) pinned packages into $(VENV) (about two minutes) ..."
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) -r $(REQUIREMENTS) || { \
	  echo "make setup: pip could not install $(REQUIREMENTS); if it found no torch==2.13.0+cpu, your package index carries no CPU build of PyTorch (PyPI has none): name PyTorch's own index of CPU wheels, as on PyTorch's installation page, with make setup PIP_ARGS='--extra-index-url URL'." >&2; exit 1; }
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(RUN)/trifleet demo

# Two at a time, whole files each, long ones first, what needs one thread. A fleet needs all cores for itself.
test: setup
	$(RUN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/engine tests/unit tests/observability
	$(RUN)/python -m pytest tests/k8s tests/fleet

# One after the other; the figures count on a machine that does nothing else. About 40 minutes.
BENCHES := engine http router compaction eviction trace start
bench: setup
	@for name in $(BENCHES); do $(RUN)/trifleet bench $$name --json benchmarks/results/$$name.json || exit 1; done
	$(RUN)/trifleet bench engine --model bundled --json benchmarks/results/engine-bundled.json
	$(RUN)/python -m benchmarks.tables

observability-check: setup
	OBSERVABILITY_JSON=observability.json $(RUN)/python -m pytest tests/fleet/test_observability.py
	@cat observability.json

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# Asks a database of known weaknesses, so it needs the network, and pip-audit installed (pip install pip-audit). Fails
# where that has no answer for a package, too; it knows nothing of local versions such as torch's +cpu.
audit: setup
	sed 's/+cpu//' $(REQUIREMENTS) | $(RUN)/python -m pip_audit --strict --disable-pip --no-deps -r /dev/stdin

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
