# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-long chaos fuzz bounds scale bench check audit lock image-steps clean

demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

# 200 schedules of faults, or CHAOS_SCHEDULES of them from CHAOS_SEED on: hours.
chaos: $(INSTALLED)
	CHAOS_SCHEDULES=$${CHAOS_SCHEDULES:-200} CHAOS_SEED=$${CHAOS_SEED:-1} CHAOS_STOP_S=$${CHAOS_STOP_S:-30} \
		$(BIN)/python -m pytest -s tests/chaos -m "long or not long"

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

# All installed peers and our job on the embedded model: under 15 minutes on 2 cores.
bench: $(VENV)/.bench
	$(BIN)/transcribe bench --out bench --minutes 6 --price 0.10

# Broken files through decoding; `make fuzz FIRST=10001` tries others.
FIRST := 1
CASES := 10000
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --first $(FIRST) --cases $(CASES) --save build/fuzz

# Memory peaks of whole runs over a bomb, 12 hours in one file, 200,000 tiny files: half an hour.
bounds: $(INSTALLED)
	$(BIN)/python -m tests.bounds

# Planning a million recordings, and a run's first 3,000 shards on real Ray (docs/scaling.md).
scale: $(INSTALLED)
	$(BIN)/python -m tests.scale --shards 3000

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known vulnerabilities of what the lock pins; needs the internet, so it is no part of `check`.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --no-deps --disable-pip --requirement requirements.lock

# The lock says which versions; pyproject.toml says which packages are meant.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The benchmark's peers, beside what the lock says.
$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[bench]'
	touch $@

# Resolve pyproject.toml anew and write down what came out.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet '.[test]'
	build/lock/bin/python -m pip freeze | grep -v '^transcribe' > requirements.lock

clean:
	rm -rf $(VENV) build demo bench

# The Dockerfile's own steps and smoke command in a clean environment, where no Docker can build it.
image-steps:
	rm -rf build/image
	sed -n 's#^RUN \(.*/opt/transcribe.*\)#\1#p' Dockerfile | sed 's#/opt/transcribe#build/image#g' \
		| sed 's#^python -m venv#$(PYTHON) -m venv#' | sh -ex
	cd build && image/bin/transcribe preflight local
	rm -rf build/image
