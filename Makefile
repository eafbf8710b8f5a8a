VENV := .venv

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/gradstore demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) gradstore-demo*
