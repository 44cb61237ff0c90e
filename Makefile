# Two commands do everything: `make demo` and `make test`. Each installs what it needs into .venv:
# the demo what training needs, the tests also what only tests use (gradio, selenium, torchao, ...).
PYTHON ?= python3
PY = .venv/bin/python
RUN = runs/demo

.PHONY: demo test test-all lint reference clean
.DEFAULT_GOAL := demo

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("picoVLM needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt -e '.[plot]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(PY) -m pip install -q -c constraints.txt -e '.[plot,dev]'
	@touch $@

# Train the built-in default, score it, show its answers. A finished or interrupted demo continues.
demo: .venv/installed
	$(PY) train.py tiny --train.out $(RUN) --train.resume auto
	$(PY) score.py $(RUN) --data.source world --split test --json $(RUN)/score.json --answer-sheet $(RUN)/answers.png
	$(PY) -m data.world $(RUN)/question.png
	@echo
	@echo "Look at $(RUN)/answers.png, then ask it yourself:"
	@echo "  $(PY) generate.py $(RUN) --image $(RUN)/question.png --prompt 'Describe the picture.'"
	@$(PY) generate.py $(RUN) --image $(RUN)/question.png --prompt 'Describe the picture.'

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile

test-all: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyrefly check

# Write docs/reference.md again after a change of configs.py or configs_classify.py.
reference: .venv/installed
	$(PY) -m docs.make_reference

clean:
	rm -rf .venv runs *.egg-info .pytest_cache .ruff_cache .hypothesis
