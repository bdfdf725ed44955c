# Bare `make` lists the targets. Each first makes .venv, or refreshes it when the requirements have changed.
# `make PYTHON=python3 ...` uses that interpreter and its packages instead.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train-cifar train-cifar-s3 s3-upload s3-server split-cores serial gpu demo experiments analyze
.PHONY: data predict check-prediction report bench measure accuracy readme lint test test-all clean
SHELL := /bin/sh

ifeq ($(origin PYTHON),command line)
READY := check-python
else
override PYTHON := .venv/bin/python
READY := .venv/.ready
endif

IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
MEASURED = results/measured
S3_DATA = # options of train_cifar.py --export
OPTIONS = $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(SUBSET),--subset $(SUBSET)) $(ARGS)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile
	@echo "Variables: EPOCHS=2 SUBSET=5000 ARGS='--batch-size 64', PYTHON=python3 (use its packages, make no .venv)"

setup: $(READY)  ## install everything into .venv; CuPy too where there is an NVIDIA driver

train-cifar: $(READY)  ## train ResNet-50 on CIFAR-10 with PyTorch
	$(PYTHON) train_cifar.py $(OPTIONS)

train-cifar-s3: $(READY)  ## the same with the images from an S3 server, started on this machine
	$(PYTHON) experiments/s3_server.py $(PYTHON) train_cifar.py --export s3://cifar10 $(S3_DATA)
	$(PYTHON) experiments/s3_server.py $(PYTHON) train_cifar.py --source s3://cifar10 $(OPTIONS)

s3-server: $(READY)  ## serve CIFAR-10 over S3 on this machine until Ctrl-C
	$(PYTHON) experiments/s3_server.py $(PYTHON) train_cifar.py --export s3://cifar10 $(S3_DATA)
	$(PYTHON) experiments/s3_server.py

s3-upload: $(READY)  ## write CIFAR-10 to TO=s3://bucket/prefix, as pictures and as shards
	$(PYTHON) train_cifar.py --export $(or $(TO),$(error say where to: make s3-upload TO=s3://bucket/prefix)) $(S3_DATA)

data: $(READY)  ## prepare a data set for --data-dir: FROM=mnist TO=data/mnist, or FROM=your/pictures
	$(PYTHON) experiments/import_data.py $(or $(FROM),$(error say what: make data FROM=mnist TO=data/mnist)) $(or $(TO),$(error say where to: make data FROM=mnist TO=data/mnist)) $(ARGS)

split-cores: $(READY)  ## ResNet-50 on CPU, forward and backward on separate cores: train, then compare
	$(PYTHON) train_resnet50_split_cores.py $(OPTIONS)

serial: $(READY)  ## train the CNN from scratch with NumPy on one core
	$(PYTHON) serial_cnn.py $(OPTIONS)

gpu: $(READY)  ## train the CNN from scratch on a GPU; without one with NumPy
	$(PYTHON) gpu_scratch.py $(OPTIONS)

demo: $(READY)  ## watch serial, MPI and hybrid train in the terminal, then their speed-ups
	$(PYTHON) demo.py $(OPTIONS)

experiments: $(READY)  ## run a suite of the scripts for analysis; ARGS="--suite all" runs all suites
	$(PYTHON) experiments/run_experiments.py $(OPTIONS)

analyze: $(READY)  ## tables and plots of the results of make experiments, into results/analysis
	$(PYTHON) experiments/analyze_results.py $(ARGS)

BEYOND = $(addprefix --prediction ,$(wildcard results/prediction/prediction.json)) \
  $(addprefix --check ,$(wildcard $(MEASURED)/check_prediction.json))
report: analyze  ## the technical report: report/report.html, .md, .tex, and .pdf where LaTeX is installed
	$(PYTHON) experiments/make_report.py --pdf $(BEYOND)

bench: $(READY)  ## compare speeds with PyTorch on the same work; ARGS=--quick measures less
	$(PYTHON) experiments/bench.py $(ARGS)

ONE_RANK = --epochs 1 --subset 30000 --log results/one_rank.csv --trace results/one_rank.trace
predict: $(READY)  ## predict the scaling to 1,024 ranks from a run of one rank
	$(PYTHON) parallel_cnn_mpi.py $(ONE_RANK) $(OPTIONS)
	$(PYTHON) experiments/predict_scaling.py --run results/one_rank.csv

LADDER = experiments/run_experiments.py --results-dir $(MEASURED)/ladder --suite ladder --batch-size 32 \
  --epochs 2 --subset 3200 --repeats 5
EXPERIMENTS = experiments/run_experiments.py --results-dir $(MEASURED)/experiments
TRAINING = experiments/run_experiments.py --results-dir $(MEASURED)/training --repeats 1 --epochs 10 --subset 50000 --batch-size 32
measure: $(READY)  ## measure all that README and docs/ show, into measurements/: an hour on an idle machine
	$(PYTHON) experiments/bench.py --output $(MEASURED)/bench.json
	$(PYTHON) experiments/bench.py --loading --output $(MEASURED)/loading.json
	$(PYTHON) train_resnet50_split_cores.py --benchmark --output $(MEASURED)/split_cores.json
	$(PYTHON) $(EXPERIMENTS) --suite parallel --repeats 5
	$(PYTHON) $(EXPERIMENTS) --suite hardware --only cnn --repeats 5
	$(PYTHON) $(EXPERIMENTS) --suite loading
	$(PYTHON) $(LADDER)
	$(PYTHON) $(TRAINING) --only serial
	$(PYTHON) $(TRAINING) --only mpi-2-strong
	$(PYTHON) $(TRAINING) --suite recipes
	$(PYTHON) experiments/update_readme.py --collect $(MEASURED)

# As many epochs as two cores with bfloat16 train in 100 minutes
RECIPE = --model resnet18 --epochs 13 --batch-size 128 --lr 0.1 --nesterov --weight-decay 0.0005 \
  --schedule one-cycle --warmup 0.2 --label-smoothing 0.1
accuracy: $(READY)  ## train ResNet-18 on all of CIFAR-10 for accuracy: 100 minutes; goes on where it was stopped
	$(PYTHON) train_cifar.py $(RECIPE) --checkpoint $(MEASURED)/resnet18.pt --resume \
	  --log $(MEASURED)/resnet18.csv --save-metrics $(MEASURED)/resnet18.npz $(OPTIONS)

check-prediction: $(READY)  ## train over links of limited rate and compare with the prediction: half an hour, as root
	$(PYTHON) experiments/check_prediction.py --output $(MEASURED)/check_prediction.json
	$(PYTHON) experiments/check_prediction.py --accuracy --output $(MEASURED)/check_prediction.json

readme: $(READY)  ## build the tables of README and docs/, and docs/report, from measurements/
	$(PYTHON) experiments/update_readme.py

lint: $(READY)  ## check style and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# pytest takes the last -m: make test ARGS='-m gpu' runs the tests that need a GPU.
test: $(READY)  ## run the quick tests: all that a change can break, within 5 minutes
	$(PYTHON) -m pytest -m "not slow" $(ARGS)

test-all: $(READY)  ## run all tests, within 20 minutes; ARGS='-m slow' runs what make test does not
	$(PYTHON) -m pytest $(ARGS)

clean:  ## remove .venv and caches; results/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ experiments/__pycache__ tests/__pycache__

.PHONY: check-python
check-python:
	@$(PYTHON) -c '$(IS_NEW_ENOUGH)' || { \
	  echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 2; }

# BASE_PYTHON names the interpreter to build .venv with; otherwise the first that is new enough.
.venv/.ready: requirements.txt requirements-gpu.txt
	@for base in $(or $(BASE_PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python3.14); do \
	  command -v $$base >/dev/null || continue; \
	  seen="$$seen ($$base is $$($$base -V 2>&1))"; \
	  if $$base -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then found=$$base; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: Python 3.10 or newer is needed$$seen: install it or name it, make BASE_PYTHON=/path/to/python3 setup" >&2; exit 2; \
	fi; \
	echo "Setting up .venv with $$($$found -V); this takes some minutes, once."; \
	$$found -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then \
	  cuda=$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA \(UMD \)*Version: *\([0-9]*\).*/\2/p'); \
	  if [ -z "$$cuda" ]; then \
	    echo "No CuPy: there is an NVIDIA driver, but nvidia-smi, which tells its CUDA version, does not run." >&2; \
	  elif [ "$$cuda" -lt 12 ]; then \
	    echo "No CuPy: the NVIDIA driver is for CUDA $$cuda, CUDA 12 is needed: update the driver, then make clean setup." >&2; \
	  else .venv/bin/python -m pip install --disable-pip-version-check -r requirements-gpu.txt; fi; fi
	@touch $@
