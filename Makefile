# Needs make, python3 (3.11 or newer) and a package registry.
PYTHON ?= python3
RUN := .venv/bin/python
# one worker per core, each on one thread
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)
# hypothesis examples per property
export FASTSAE_EXAMPLES ?= 25

.PHONY: demo test bench soak lint types clean .venv-hosts

# the main job: train on the language model that comes along, then evaluate
demo: .venv/ready
	$(RUN) -m fastsae train --out runs/demo
	$(RUN) -m fastsae eval runs/demo

test:
	$(MAKE) -j2 .venv/ready .venv-hosts/ready
	$(PYTEST)

# the peers live in .venv-hosts; the goals that ratios within one run must meet are in bench/test_cpu.py
bench: .venv/ready .venv-hosts/ready
	SPARSIFY_DISABLE_TRITON=1 .venv-hosts/bin/python -m bench
	$(RUN) -m pytest bench --benchmark-only
	$(RUN) -m bench.report

# the full counts that docs/log.md records: no time limits
soak: .venv/ready .venv-hosts/ready
	FASTSAE_EXAMPLES=2000 $(PYTEST) --timeout=0

lint: .venv/ready
	$(RUN) -m ruff check

types: .venv/ready
	.venv/bin/pyright

clean:
	rm -rf .venv .venv-hosts build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints decide which torch is installed: without them pip takes the newest.
.venv/ready: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -c tests/constraints.txt -e '.[dev,triton,lm,plot]'
	touch $@

.venv-hosts: .venv-hosts/ready

# torch brings what it needs; the rest is the list as it stands (the list says why).
.venv-hosts/ready: tests/constraints-hosts.txt
	$(PYTHON) -m venv .venv-hosts
	.venv-hosts/bin/python -m pip install -c tests/constraints-hosts.txt torch
	.venv-hosts/bin/python -m pip install --no-deps -r tests/constraints-hosts.txt
	touch $@
