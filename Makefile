PYTHON ?= python3
DEMO_ARGS ?= --pairs 200 --n-prompts 60
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

# An installed environment is marked by a file inside it, so that removing the environment removes the mark.
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable
TL3 := .venv-tl3/.testable
REQUIREMENTS := pyproject.toml constraints.txt requirements-data.txt

TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

.PHONY: demo zoo notebook notebooks docs test install lint types unit tl3 clean
.DELETE_ON_ERROR:

demo: install
	@HF_HUB_OFFLINE=1 .venv/bin/python scripts/patch_direction_norm.py --out results/demo --overwrite $(DEMO_ARGS)

# Resumable; ONLY="standard 15/aligned" for a part.
zoo: install
	@HF_HUB_OFFLINE=1 .venv/bin/python scripts/train_zoo.py $(if $(ONLY),--only $(ONLY))

# Jupyter opens in the folder of notebooks; .venv is their kernel.
notebook: install
	@.venv/bin/pip install -q -c constraints.txt -e '.[notebook]'
	@HF_HUB_OFFLINE=1 .venv/bin/jupyter lab notebooks

test: lint types docs unit tl3

install: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS)
	@echo "installing into .venv (once)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install -q -c constraints.txt -e .
	@.venv/bin/pip install -q --no-deps -r requirements-data.txt
	@touch $@

$(TESTABLE): $(INSTALLED)
	@.venv/bin/pip install -q -c constraints.txt -e '.[test]'
	@touch $@

lint: $(TESTABLE)
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@echo "lint: ok"

types: $(TESTABLE)
	@.venv/bin/basedpyright --pythonpath .venv/bin/python

# Runs the notebooks from clean and writes their outputs into them.
notebooks: $(TESTABLE)
	@$(TEST_ENV) .venv/bin/python -m tests.notebooks

docs: $(TESTABLE)
	@.venv/bin/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "docs: build/docs/index.html"

unit: $(TESTABLE)
	@$(TEST_ENV) .venv/bin/python -m pytest -q $(PYTEST_ARGS)

# sae-lens 6 pins transformer-lens below 4. One command, so that pip sees every requirement at once.
$(TL3): $(REQUIREMENTS)
	@echo "installing into .venv-tl3 (once)"
	@$(PYTHON) -m venv .venv-tl3
	@.venv-tl3/bin/pip install -q -c constraints.txt -e '.[test]' 'transformer-lens>=3.9,<4' 'sae-lens>=6'
	@.venv-tl3/bin/pip install -q --no-deps -r requirements-data.txt
	@touch $@

tl3: $(TL3)
	@$(TEST_ENV) .venv-tl3/bin/python -m pytest -q -m bridge $(PYTEST_ARGS)

clean:
	rm -rf .venv .venv-tl3 build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find interventions diagnostics sae_models scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
