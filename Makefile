# Every target sets up .venv first; that needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
DATA ?= ../shared/data/mpt
BIN := .venv/bin
READY := .venv/ready

# `make gpu`: the Python that has torch, and a folder with what else is needed
GPU_PYTHON ?= $(PYTHON)
GPU_WHEELS ?= wheels
GPU_WHEELS_PYTHON ?=
GPU_DEVICE ?= cuda
GPU_SECONDS := 510
GPU := .venv-gpu/bin/python

export OMP_NUM_THREADS := 1
# Empty: what is compiled is kept for the next of the hundreds of processes that tests start.
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-examples test-machines test-slow test-torch mutants lint bench predictions published \
	planner-table planning-table tight-table precision-table precision-curves zero-table zero-bench lengths-table schedules-table \
	schedules-bench backend-table chunked-table checkpoint-table metrics-table finetune-table \
	elastic-table compress-table chaos chaos-rivals gpu gpu-tests gpu-figures gpu-wheels clean

help:
	@echo "make demo              train a small GPT-2 on 2 stages × 2 replicas, 4 processes"
	@echo "make test              the tests that take minutes"
	@echo "make test-examples     the scripts of examples/ in short form, beside one device"
	@echo "make test-machines     several machines, of network namespaces: needs root on Linux"
	@echo "make test-slow         all tests but the timings"
	@echo "make test-torch        the same as make test, with another torch: TORCH=2.11.0"
	@echo "make mutants           do the tests find faults that are planted? 15 minutes"
	@echo "make lint              ruff and mypy"
	@echo "make bench             the timings"
	@echo "make predictions       do predicted step times and memory peaks come true?"
	@echo "make published         predicted against published speeds of training runs; DATA=folder"
	@echo "make planner-table     plans of large models against simple strategies"
	@echo "make planning-table    what planning large models costs: CPU seconds and memory"
	@echo "make tight-table       what plans in tight budgets leave on the table"
	@echo "make precision-table   casts, bytes and step times of bf16 against fp32 and autocast"
	@echo "make precision-curves  losses of fp32, bf16 and fp16 on real text"
	@echo "make schedules-table   what schedules and several stages per rank bring"
	@echo "make chunked-table     what losses in pieces save, and what the planner makes of it"
	@echo "make schedules-bench   steps of every schedule, measured, beside torch's; bubbles"
	@echo "make lengths-table     what a batch of a new length costs"
	@echo "make checkpoint-table  what checksums cost in saving and loading 1 GiB"
	@echo "make metrics-table     what metrics, callbacks and gathered outputs cost per step"
	@echo "make finetune-table    what LoRA and freezing save, measured and planned"
	@echo "make elastic-table     what copies of the state in memory cost per step"
	@echo "make compress-table    losses, bytes and steps on slow links with compress=; steps need root"
	@echo "make chaos             faults at random moments of a training: MINUTES=5 SEED=0 FAULTS=200"
	@echo "make chaos-rivals      the same faults of DDP and DeepSpeed, beside this: EACH=3 of each kind"
	@echo "make zero-table        what ZeRO's levels hold per rank, measured and predicted"
	@echo "make zero-bench        step times of 2 stages × 2 replicas against DeepSpeed and FSDP2"
	@echo "make backend-table     steps with Inductor's kernels, in one process, beside torch.compile"
	@echo "make gpu               on a machine with CUDA, without network: the tests on it, and figures"
	@echo "make gpu-wheels        fills the folder of wheels that make gpu installs from"
	@echo "make clean             remove .venv and what tools left behind"

demo: $(READY)
	$(BIN)/torchrun --standalone --nproc-per-node 4 examples/train_gpt2.py

# timings are not even imported
QUICKLY := -n 2 --dist loadgroup --durations=20 --ignore=tests/bench
test: $(READY)
	$(BIN)/pytest $(QUICKLY)

test-examples: $(READY)
	$(BIN)/pytest tests/examples -m "not bench" -n 2

# ONLY: some of them, as pytest's -k has it
ONLY ?=
CUT := tests/runtime/elastic/test_elastic_runs.py::test_a_machine_whose_cable_is_cut_is_lost_and_comes_back
test-machines: $(READY)
	$(BIN)/pytest tests/runtime/test_machines.py $(CUT) -m "not bench" -k "$(ONLY)"

test-slow: $(READY)
	$(BIN)/pytest -m "not bench"

# An environment of its own for each torch. The tests are those that take minutes.
test-torch:
	@test -n "$(TORCH)" || { echo "say which: make test-torch TORCH=2.11.0"; exit 2; }
	test -e .venv-torch/$(TORCH)/ready || $(MAKE) --no-print-directory .venv-torch/$(TORCH)/ready
	.venv-torch/$(TORCH)/bin/pytest $(QUICKLY)

.venv-torch/%/ready: pyproject.toml
	$(PYTHON) -m venv .venv-torch/$*
	echo "torch==$*" > .venv-torch/$*/constraints.txt
	.venv-torch/$*/bin/python -m pip install -qq torch==$*
	.venv-torch/$*/bin/python -m pip install -qq -c .venv-torch/$*/constraints.txt -e '.[dev]'
	touch $@

mutants: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutants.run

bench: $(READY)
	$(BIN)/pytest tests/bench -m bench

published: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/published.py $(DATA)

predictions: $(READY)
	$(BIN)/python tests/bench/predictions.py

planner-table: $(READY)
	$(BIN)/python tests/bench/planner_table.py

planning-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/planning_table.py

tight-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/tight_table.py

precision-table: $(READY)
	$(BIN)/python tests/bench/precision_table.py

precision-curves: $(READY)
	$(BIN)/python tests/bench/precision_curves.py

schedules-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/schedules_table.py

schedules-bench: $(READY)
	$(BIN)/python tests/bench/schedules_measured.py

chunked-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/chunked_table.py

lengths-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/lengths_table.py

checkpoint-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/checkpoint_table.py

metrics-table: $(READY)
	$(BIN)/python tests/bench/metrics_table.py

finetune-table: $(READY)
	$(BIN)/python tests/bench/finetuning_table.py

elastic-table: $(READY)
	$(BIN)/python tests/bench/elastic_table.py

compress-table: $(READY)
	$(BIN)/python tests/bench/compress_table.py

# CHAOS=--network: between machines with cables, as root; CHAOS="--skip 60": not the first ones
MINUTES ?= 5
SEED ?= 0
FAULTS ?= 10000
chaos: $(READY)
	$(BIN)/python tests/bench/chaos.py --minutes $(MINUTES) --seed $(SEED) --faults $(FAULTS) $(CHAOS)

EACH ?= 3
chaos-rivals: $(READY)
	-DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq -c constraints.txt -e '.[rivals]'
	$(BIN)/python tests/bench/chaos_rivals.py --each $(EACH) --seed $(SEED)

zero-table: $(READY)
	PIPECOMPILE_COSTS=roofline $(BIN)/python tests/bench/zero_table.py

backend-table: $(READY)
	$(BIN)/python tests/bench/backend_table.py
	$(BIN)/python tests/bench/backend_table.py --compiling 4,24
	$(BIN)/python tests/bench/backend_table.py --memory

# Two calls of at most nine minutes each; what does not fit is skipped, and said.
gpu:
	$(MAKE) --no-print-directory gpu-tests
	$(MAKE) --no-print-directory gpu-figures

gpu-tests: .venv-gpu/ready
	PIPECOMPILE_TEST_DEVICE=$(GPU_DEVICE) PIPECOMPILE_TEST_SECONDS=$(GPU_SECONDS) \
		timeout -k 5 540 $(GPU) -m pytest -p no:cacheprovider --durations=10 tests/gpu -m "not bench"

gpu-figures: .venv-gpu/ready
	timeout -k 5 540 $(GPU) tests/gpu/figures.py --device $(GPU_DEVICE) --seconds $(GPU_SECONDS) \
		--write docs/gpu.md

# On a machine with network; for another Python: make gpu-wheels GPU_WHEELS_PYTHON=3.12
gpu-wheels:
	$(PYTHON) tests/gpu/environment.py download $(GPU_WHEELS) --python "$(GPU_WHEELS_PYTHON)"

.venv-gpu/ready: pyproject.toml constraints.txt
	$(GPU_PYTHON) tests/gpu/environment.py make .venv-gpu $(GPU_WHEELS)
	touch $@

# As in chaos-rivals, DeepSpeed is only measured against: without it the others are. Its operators are not built.
zero-bench: $(READY)
	-DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq -c constraints.txt -e '.[rivals]'
	$(BIN)/python tests/bench/zero_rivals.py

# The repository root is the package, whatever the checkout is called: mypy gets it under its name.
lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	mkdir -p .venv/typed && ln -sfn "$(CURDIR)" .venv/typed/pipecompile
	MYPYPATH=.venv/typed $(BIN)/mypy
	MYPYPATH=.venv/typed:tests $(BIN)/mypy --config-file tests/mypy.ini tests/bench tests/support examples

# torch first, alone: the version that constraints.txt pins, before anything else asks for one.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; this is %s: make PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-torch .venv-gpu build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
