# make            lists the targets
# make reproduce  runs every experiment of a profile (PROFILE=laptop) and writes results/<profile>/
PROFILE ?= laptop
PYTHON ?= python3

# Inside an environment (venv or conda) install there; else make and use .venv.
ifneq ($(strip $(VIRTUAL_ENV)$(CONDA_PREFIX)),)
  ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
else
  ENV := .venv
endif
BIN := $(ENV)/bin
DONE := $(ENV)/.focuslib-installed

.DEFAULT_GOAL := help
.PHONY: help setup reproduce smoke check test test-browser docs lab scan bench verify report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(DONE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(DONE) ## install the package and its pinned dependencies (in .venv, or the active environment)

reproduce: $(DONE) ## run the experiment notebooks: PROFILE=laptop (minutes, offline) or paper (GPU); ONLY=main for one
	$(BIN)/focus reproduce --profile $(PROFILE) $(if $(ONLY),--only $(ONLY))

smoke: $(DONE) ## run the notebooks of the profiles paper and modern on tiny replicas (minutes, offline)
	$(BIN)/python tests/smoke.py $(ONLY)

check: $(DONE) ## lint, format, import layers and types, and that the teaching notebooks run (a minute or two)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest --nbmake notebooks/extend.ipynb notebooks/explore.ipynb

test: $(DONE) ## run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-browser: $(DONE) ## test the explorer in headless Chromium (apt-get install chromium); screenshots in build/browser
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,browser]'
	$(BIN)/python -m pytest tests/browser

docs: $(DONE) ## build the documentation site, offline: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/check_links.py build/site

lab: $(DONE) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

scan: $(DONE) ## try every image-text-to-text family of transformers under the patch; writes docs/models/families.md (minutes)
	$(BIN)/python tests/scan_families.py $(ONLY)

bench: $(DONE) ## measure the speed claims, each a ratio within one run
	$(BIN)/python -m benchmarks.sic
	$(BIN)/python -m benchmarks.cmc_search

verify: $(DONE) ## run the experiments anew and compare their tables with the expected ones; fails on a difference
	$(BIN)/focus verify --profile $(PROFILE)

report: $(DONE) ## write all executed notebooks as one self-contained page: results/<profile>/report.html
	$(BIN)/focus report --profile $(PROFILE)

clean: ## remove the computed results of the profile (not its tables)
	rm -rf results/$(PROFILE)/cells results/$(PROFILE)/work results/$(PROFILE)/locks
