VENV := .venv
MODULES := $(addprefix gradstore.,factored errors capture store upkeep training influence unlearn evaluate report)

.PHONY: demo test lint api clean

demo: $(VENV)/installed
	$(VENV)/bin/gradstore demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

api: $(VENV)/installed
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[docs]'
	$(VENV)/bin/pdoc --docformat restructuredtext -o api $(MODULES)

$(VENV)/installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) api gradstore-demo*
