# Two commands for a fresh machine with Python >= 3.10. PYTHON=... chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

# Two processes of one thread each: on two cores they are faster than one process of two threads, and it is the same run.
demo: .venv/runtime
	$(BIN)/torchrun --standalone --nproc-per-node=2 train_tokenizer.py --out runs/demo

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
