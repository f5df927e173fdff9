# The few verbs. Each makes what it needs first; a second run does only what has changed.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN  := $(VENV)/bin/python -m
PIP  := $(RUN) pip --disable-pip-version-check -qq install

.PHONY: demo test lint bench bench-short figures steps chaos soak clients workflows poison damage lock sbom clean

demo: $(VENV)/.examples        ## the main job on real input: no key, no network
	$(RUN) dspex demo $(ARGS)

test: $(VENV)/.test            ## the whole suite, three files at a time; it starts its own servers
	$(RUN) pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.lint            ## ruff, mypy --strict, the import order
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.test           ## figures, measured beside plain nats-py
	$(VENV)/bin/python benchmarks/run.py $(ARGS)
	$(VENV)/bin/python benchmarks/sqlite_log.py $(ARGS)

bench-short: $(VENV)/.test
	$(VENV)/bin/python benchmarks/run.py --short $(ARGS)
	$(VENV)/bin/python benchmarks/sqlite_log.py --short $(ARGS)
	$(VENV)/bin/python benchmarks/log_figures.py --short

figures: $(VENV)/.test         ## the log read, folded, found in, archived; beside sqlite3 and nats-py alone
	$(VENV)/bin/python benchmarks/log_figures.py $(ARGS)

steps: $(VENV)/.test           ## durable steps a second, beside LangGraph and DBOS
	$(VENV)/bin/python benchmarks/durable_steps.py $(ARGS)

chaos: $(VENV)/.test           ## faults under load: 10,000 tasks a class, and a checker of what clients were told
	$(RUN) benchmarks.chaos $(ARGS)

soak: $(VENV)/.test            ## an hour at 80 % of what the machine can do, with faults: does anything grow?
	$(VENV)/bin/python benchmarks/soak.py $(ARGS)

clients: $(VENV)/.test         ## 10,000 clients that ask at once
	$(VENV)/bin/python benchmarks/clients.py $(ARGS)

workflows: $(VENV)/.test       ## 5,000 workflows while the server is killed every 5 to 40 s
	$(VENV)/bin/python benchmarks/workflows.py $(ARGS)

poison: $(VENV)/.test          ## tasks that kill their process, and agents killed from outside: who is set aside?
	$(VENV)/bin/python benchmarks/poison.py $(ARGS)

damage: $(VENV)/.test          ## a log damaged at 220 random places: noticed, named, restored?
	$(VENV)/bin/python benchmarks/damage.py $(ARGS)

lock: | $(VENV)/bin/python     ## requirements.lock: what it runs on, with hashes, and no word of where it is from
	@$(PIP) uv
	@{ sed -n '1,2p' requirements.lock; $(VENV)/bin/uv pip compile pyproject.toml --generate-hashes --universal \
		--python-version 3.11 --no-header --no-annotate --no-emit-index-url --quiet $(ARGS); } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

sbom: | $(VENV)/bin/python     ## sbom.json: the same as a CycloneDX bill of materials
	@$(PIP) cyclonedx-bom
	@$(VENV)/bin/cyclonedx-py requirements requirements.lock --output-format JSON --output-file sbom.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp is older than pyproject.toml when the packages have to be looked at again.
$(VENV)/.examples $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo 'installing into $(VENV), once'
	@$(PIP) -e '.[$*]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dspex needs Python 3.11 or newer; say which: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
