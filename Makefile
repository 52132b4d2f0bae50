# Two commands for a fresh machine with Python >= 3.10. PYTHON=... chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

demo: .venv/runtime
	$(BIN)/python train_tokenizer.py --out runs/demo

test: .venv/dev
	$(BIN)/python -m pytest tests

# The stamps make pip run again only when a requirements file changes.
.venv/runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
