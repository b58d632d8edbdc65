PYTHON ?= python3
DEMO_ARGS ?= --pairs 80 --n-prompts 50
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

# The tests' tolerances are checked with this torch, on the CPU. With a GPU, install the torch for your CUDA.
TORCH := torch==2.13.0
# sae-lens 6 needs transformer-lens below 4: an environment of its own.
TL3 := 'transformer-lens>=3.9,<4' 'sae-lens>=6'
# Without setuptools' advice about editable installs; Python compiles what is imported, a small part of what is installed.
PIP := python -W 'ignore:Editable installation' -m pip install -q --no-compile

# An installed environment is marked by a file inside it, so that removing the environment removes the mark.
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable
TL3_TESTABLE := .venv-tl3/.testable
OLDEST := .venv-oldest/.testable

TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
# For processes that share the cores: two of two threads each slow each other.
ONE_THREAD := $(TEST_ENV) OMP_NUM_THREADS=1
# What a new or an old version of a library can break: the engine, the readers, every hook.
ENGINE_TESTS := tests/interventions tests/sae_models
# The engine's core, which runs on a pretended GPU.
DEVICE_TESTS := $(addprefix tests/interventions/,test_metrics.py test_recording.py test_effects.py test_inside.py \
	replaying/test_replay.py replaying/test_replay_check.py replaying/test_rows.py)
# Without the lock a third party's deprecation is shown; it is an error only where one of our lines causes it.
UNLOCKED := $(ONE_THREAD) MECHDIAG_UNLOCKED=1

.PHONY: demo zoo polarity-zoo notebook notebooks pages long docs dist measure test install lint types unit tl3 test-pretend-cuda device-check test-latest test-oldest lock fuzz kills architectures mutations simulate clean
.DELETE_ON_ERROR:

demo: install
	@HF_HUB_OFFLINE=1 .venv/bin/python scripts/patch_direction_norm.py --out results/demo --overwrite $(DEMO_ARGS)

# Resumable; ONLY="standard 15/aligned" for a part.
zoo: install
	@HF_HUB_OFFLINE=1 .venv/bin/python scripts/train_zoo.py $(if $(ONLY),--only $(ONLY))

# Gated and sign-aware SAEs, 48 at each of three sites, trained and compared: about three hours on two cores. ONLY=mlp_out for one site.
polarity-zoo: install
	@HF_HUB_OFFLINE=1 PYTHON=.venv/bin/python scripts/polarity_zoo.sh results/polarity_zoo $(or $(ONLY),mlp_out attn_out resid_mid)

# Jupyter opens in the folder of notebooks; .venv is their kernel.
notebook: install
	@.venv/bin/$(PIP) -c constraints.txt --no-build-isolation -e '.[notebook]'
	@HF_HUB_OFFLINE=1 .venv/bin/jupyter lab notebooks

# Two at a time: what installs or checks takes one core. Output comes target by target, as each ends.
test:
	@$(MAKE) -j2 --output-sync=target lint types docs unit tl3 test-pretend-cuda

install: $(INSTALLED)

# $(call environment,FOLDER,LOCK,REQUIREMENTS...): pip and setuptools are of the lock too, and build what has no wheel.
define environment
	@echo "installing into $(1)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -q -U -c $(2) pip setuptools
	@$(1)/bin/$(PIP) -c $(2) --no-build-isolation $(3)
	@$(1)/bin/$(PIP) --no-deps -r requirements-data.txt
endef

$(INSTALLED): pyproject.toml constraints.txt requirements-data.txt
	$(call environment,.venv,constraints.txt,-e .)
	@touch $@

$(TESTABLE): $(INSTALLED)
	@.venv/bin/$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# A wheel and a source archive, and what a new user does first with the wheel: in an empty environment, which takes gigabytes.
dist: $(TESTABLE)
	@rm -rf dist
	@.venv/bin/python -m build --quiet --no-isolation --outdir dist
	@PYTHON=$(abspath .venv/bin/python) DEMO_ARGS="$(DEMO_ARGS)" tests/first_ten_minutes.sh dist/*.whl
	@ls dist/*

# README's length, the start of commands and the widths of pages beside their limits.
measure: docs
	@$(TEST_ENV) .venv/bin/python -m tests.first_minutes

lint: $(TESTABLE)
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@echo "lint: ok"

types: $(TESTABLE)
	@.venv/bin/basedpyright --pythonpath .venv/bin/python

# Every page's Python, in order; the daily tests leave out those that take longest.
pages: $(TESTABLE)
	@$(TEST_ENV) MECHDIAG_ALL_PAGES=1 .venv/bin/python -m pytest -q $(PYTEST_ARGS) tests/test_snippets.py

# Runs the notebooks from clean and writes their outputs into them.
notebooks: $(TESTABLE)
	@$(TEST_ENV) .venv/bin/python -m tests.notebooks

docs: $(TESTABLE)
	@.venv/bin/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "docs: build/docs/index.html"

unit: $(TESTABLE)
	@$(ONE_THREAD) .venv/bin/python -m pytest -q -m "not long" $(PYTEST_ARGS)

# What the daily tests leave out.
long: $(TESTABLE)
	@$(ONE_THREAD) .venv/bin/python -m pytest -q -m long $(PYTEST_ARGS)

# The engine on a CUDA device that does not exist: operands on two devices, and waits of the host, are found without a GPU.
test-pretend-cuda: $(TESTABLE)
	@if { command -v c++ || command -v g++ || command -v clang++; } > /dev/null; then \
		$(ONE_THREAD) .venv/bin/python -m pytest -q $(PYTEST_ARGS) -p tests.pretend_cuda.plugin --device cuda \
			-m "not model and not bridge" tests/pretend_cuda/waits.py $(DEVICE_TESTS); \
	else echo "test-pretend-cuda: SKIPPED, no C++ compiler (c++, g++ or clang++)"; fi

$(TL3_TESTABLE): pyproject.toml constraints-tl3.txt requirements-data.txt
	$(call environment,.venv-tl3,constraints-tl3.txt,-e '.[test]' $(TL3))
	@touch $@

tl3: $(TL3_TESTABLE)
	@$(ONE_THREAD) .venv-tl3/bin/python -m pytest -q -m bridge $(PYTEST_ARGS) $(ENGINE_TESTS) \
		$(shell grep -rl mark.bridge tests/diagnostics tests/scripts --include=*.py)

# The newest of everything but torch, installed anew each time; TORCH=torch for the newest torch too.
test-latest:
	@rm -rf .venv-latest
	$(call environment,.venv-latest,/dev/null,'$(TORCH)' -e '.[test]')
	@$(UNLOCKED) .venv-latest/bin/python -m pytest -q $(PYTEST_ARGS) $(ENGINE_TESTS)

# The lower bounds of pyproject.toml, on Python 3.10 or 3.11; its torch takes gigabytes.
$(OLDEST): pyproject.toml constraints-oldest.txt requirements-data.txt
	$(call environment,.venv-oldest,constraints-oldest.txt,-e '.[test]')
	@touch $@

test-oldest: $(OLDEST)
	@$(UNLOCKED) .venv-oldest/bin/python -m pytest -q $(PYTEST_ARGS) $(ENGINE_TESTS)

# Each lock is one resolve for all supported Pythons and platforms, without torch's CUDA, so that any torch of the version fits; Triton
# is that of the version, which every build of torch for CUDA asks for.
LOCKS := build/locks
# $(call resolve,FILE,OPTIONS,REQUIREMENTS...)
define resolve
	@printf '%s\n' 'pip>=26' 'setuptools>=77' $(3) > $(LOCKS)/more.in
	@$(LOCKS)/bin/uv pip compile -q --universal --python-version 3.10 --no-header --no-annotate $(2) \
		pyproject.toml $(LOCKS)/more.in -o $(LOCKS)/$(1)
	@{ echo "# Made by 'make lock'."; grep -Ev '^(cuda|nvidia)' $(LOCKS)/$(1); } > $(1)
	@echo "$(1): $$(grep -c == $(1)) lines"
endef

lock:
	@$(PYTHON) -m venv --clear $(LOCKS)
	@$(LOCKS)/bin/pip install -q uv
	$(call resolve,constraints.txt,--all-extras,'$(TORCH)' 'transformer-lens>=4')
	$(call resolve,constraints-tl3.txt,--all-extras,'$(TORCH)' $(TL3))
	$(call resolve,constraints-oldest.txt,--extra test --resolution lowest-direct)
	@$(MAKE) test-latest test-oldest

# Every reader of SAEs and every loader of results on 2,000 mutated files each.
fuzz: $(TESTABLE)
	@$(TEST_ENV) .venv/bin/python -m tests.fuzz_saes --n 2000 --seed 0
	@$(TEST_ENV) .venv/bin/python -m tests.fuzz_results --n 2000 --seed 0

# Runs killed at random moments and resumed, and runs whose workers are killed, end in the same bytes.
kills: $(TESTABLE)
	@$(ONE_THREAD) .venv/bin/python -m tests.kills --kills 40
	@$(TEST_ENV) MECHDIAG_ALL_COMMANDS=1 .venv/bin/python -m pytest -q tests/scripts/test_workers.py

# Coverage and size of intervals and tests, with 20 times the replications of the daily tests, and the page of coverage.
simulate: $(TESTABLE)
	@$(ONE_THREAD) .venv/bin/python -m tests.coverage --write docs/statistics_coverage.md
	@$(TEST_ENV) MECHDIAG_SIMULATIONS=20 .venv/bin/python -m pytest -q -m simulation $(PYTEST_ARGS) tests/diagnostics

# Every causal model class of the installed transformers: replayed exactly, by full passes exactly, or refused.
architectures: $(TESTABLE)
	@$(ONE_THREAD) .venv/bin/python -m tests.architectures

# On a machine with a GPU, in under 9 minutes: exactness, waits, benches, tests. DEVICE=cpu TINY=1 for a dry run.
device-check: $(TESTABLE)
	@$(TEST_ENV) .venv/bin/python -m tests.device_check --device $(or $(DEVICE),cuda) $(if $(TINY),--tiny) --out results/device_check

# Faults planted one at a time in a copy are each caught by a test; ONLY="a tie counts as a win" for one.
mutations: $(TESTABLE)
	@$(TEST_ENV) .venv/bin/python -m tests.mutations --jobs 2 $(if $(ONLY),--only "$(ONLY)")

clean:
	rm -rf .venv .venv-tl3 .venv-latest .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find interventions diagnostics sae_models scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
