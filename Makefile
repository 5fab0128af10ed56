# Two commands matter: `make demo` (the main job, from nothing) and `make test` (the tests, from nothing).
# Both make their own virtual environment in .venv; nothing else is written outside the project's folder
# but the cache of the video index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: demo test lint install clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

install: $(VENV)/.installed

# make demo                       synthetic street videos: pretrain, read out, report
# make demo VIDEOS=my_videos/     the same pretraining on your own clips
demo: $(VENV)/.installed
	$(BIN)/poodle-lightning demo --out "$(OUT)" $(if $(VIDEOS),--videos "$(VIDEOS)")

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q --nbmake notebooks
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

clean:
	rm -rf $(VENV) demo runs .pytest_cache .mypy_cache .ruff_cache
