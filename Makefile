# `make demo` and `make test` work on a fresh machine; everything is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin
DEMO := runs/demo
CORES := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
LAUNCH := $(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)

.PHONY: install demo test test-fast lint types docs clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A dense model and its Sparse-IFT twin at the same whole-model FLOPs and rates tuned for each, a table, a picture, a suite, a page.
demo: install
	rm -rf $(DEMO)/dense $(DEMO)/sparse
	$(LAUNCH) recipes/pretrain.py recipes/demo.yaml --output_dir $(DEMO)/dense --sparse_ift null --learning_rate 1.6e-2 --embedding_lr_factor 4
	$(LAUNCH) recipes/pretrain.py recipes/demo.yaml --output_dir $(DEMO)/sparse
	$(RUN)/sparseift compare $(DEMO)/dense $(DEMO)/sparse --output $(DEMO)
	TQDM_DISABLE=1 $(RUN)/python eval/leaderboard.py --model $(DEMO)/dense --suite builtin
	TQDM_DISABLE=1 $(RUN)/python eval/leaderboard.py --model $(DEMO)/sparse --suite builtin
	$(RUN)/python eval/compare.py $(DEMO)/dense/eval_builtin.json $(DEMO)/sparse/eval_builtin.json --output $(DEMO)/evaluation
	$(RUN)/sparseift report $(DEMO)/dense $(DEMO)/sparse -o $(DEMO)/report.html

# a file runs in one worker, so that what its processes report is made once
test: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile --quiet $(TEST_FLAGS)

# the half of the suite without ranks, whole runs, evaluations and builds, for a second version of Python
SLOW := distributed e2e evaluation docs bench reporting packaging/test_wheel.py
test-fast: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile --quiet \
		$(SLOW:%=--ignore tests/%) $(TEST_FLAGS)

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: install
	$(RUN)/mypy

# the documentation site, in build/site; a link to nothing is an error
docs: install
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs build *.egg-info
