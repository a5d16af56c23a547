# Every target sets up what it needs; a set-up that is complete costs a fraction of a second.
#   make test FAMILY=original      the original OpenMMLab packages, in .venv-original
#   make setup PYTHON=python3.12   another interpreter for a new environment
#   make test-pretrain SSN_IMAGEFOLDER=FOLDER   train on FOLDER/{train,val}/CLASS/*
PYTHON ?= python3
FAMILY ?= onedl
VENV ?= .venv$(patsubst %,-%,$(filter-out onedl,$(FAMILY)))
RUN := $(VENV)/bin/python

export PIP_REQUIRE_VIRTUALENV := 1
export PYTHONNOUSERSITE := 1

.PHONY: help setup demo demo-seg test test-fast test-pretrain test-oldest bench docs lint format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

setup:  ## create the environment and install everything (10 minutes the first time)
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --family $(FAMILY)

demo: setup  ## train Mask R-CNN with SSN on the demo data, evaluate, draw
	$(RUN) tools/demo.py det

demo-seg: setup  ## the same with DeepLabV3+
	$(RUN) tools/demo.py seg

# A process per core, of one thread each; what a file sets up is set up once; files in the order of
# tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup  ## the test suite; in CI with the two demo trainings, which have targets of their own
	$(PYTEST) -m 'not demo'
	$(if $(CI),$(RUN) -m pytest -m demo)

test-fast: setup  ## the test suite without what is marked slow
	$(PYTEST) -m 'not slow and not demo'

test-pretrain:  ## set up mmpretrain in .venv-pretrain and test pre-training, with a real one
	@$(PYTHON) tools/setup_env.py --family pretrain --extras demo test
	.venv-pretrain/bin/python -m pytest tests/test_pretraining
	.venv-pretrain/bin/python -m pytest tests/test_docstrings.py tests/test_models/test_warm_starts.py -k mmpretrain

test-oldest:  ## torch 2.1, mmengine 0.10.7 and mmcv without ops, in .venv-oldest; what needs no more
	@$(PYTHON) tools/setup_env.py --family oldest --extras demo test
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		-m 'not slow and not demo' tests/test_layers tests/test_ops tests/test_engine \
		tests/test_checkpoint tests/test_functional.py tests/test_training.py tests/test_deploy \
		tests/test_docstrings.py tests/test_public_api.py

bench: setup  ## the benchmarks of the CPU (10 minutes; leave the machine alone meanwhile)
	$(RUN) benchmarks/layer.py
	$(RUN) benchmarks/sparsestmax.py
	$(RUN) benchmarks/training_step.py

docs: setup  ## build the documentation into build/docs; a warning is an error
	$(RUN) -m sphinx -W --keep-going -q -b html -c docs -d build/doctrees . build/docs
	@echo build/docs/index.html

lint: setup  ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: setup  ## mend style and formatting
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove caches and build products, keep environments, data and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find ssn_plugin configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
