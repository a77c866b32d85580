# make demo        three miniature corpora, the four scripts on them, an EER table (six minutes)
# make lint        ruff's checks and format
# make test        the tests, two at a time (TESTS=tests/test_model.py: some of them)
# make bench       the benchmarks: benchmarks/RESULTS.md and SCALE.md (40 minutes on 2 cores)
# make bench-gpu   the benchmark of a GPU (eight minutes), then SCALE.md with its figures
# make torture     the long robustness tests: kills, damage, full disks, hostile files (10 min)
# make clean-demo  removes what make demo made
#
# make demo SPEECH=<folder of recordings>              real voices instead of synthetic ones
# make demo FEAT=xls-r-5 SSL=<hub id or folder>        W2V2-AASIST instead of Mel-LCNN

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
            $$python -c '' 2>/dev/null && echo $$python && break; done)
DEMO   ?= data/demo
FEAT   ?= mel
HEAD   ?= $(if $(filter mel,$(FEAT)),lcnn,W2VAASIST)
SSL    ?=
SPEECH ?=
TESTS  ?= tests
EPOCHS ?= 8

MODEL := $(DEMO)/models/$(FEAT)-$(HEAD)
SCORE := --model_folder $(MODEL) --result_folder $(DEMO)/result/$(FEAT)-$(HEAD)
FRONT := --feat $(FEAT)$(if $(SSL), --ssl $(SSL))
# So few clips need small batches and larger steps than the published recipe.
TRAIN := --num_epochs $(EPOCHS) --batch_size 8 --lr 1e-3 --interval 3

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo lint test bench bench-gpu torture clean-demo

# Each step takes up what an earlier run left: a second `make demo` soon shows the same table.
demo: .venv/.ready
	python -m demo -o $(DEMO)$(if $(SPEECH), --speech $(SPEECH))
	python preprocess.py -t codecfake -d $(DEMO)/Codecfake -f $(DEMO)/features/Codecfake $(FRONT)
	python preprocess.py -t 19LA -d $(DEMO)/LA -f1 $(DEMO)/features/LA $(FRONT)
	python main_train.py -t codecfake -f $(DEMO)/features/Codecfake --feat $(FEAT) -m $(HEAD) \
	  -o $(MODEL) $(TRAIN)$(if $(wildcard $(MODEL)/last_state.pt), --continue_training)
	python generate_score.py -t 19LA -d $(DEMO)/LA $(SCORE)
	python generate_score.py -t ITW -d $(DEMO)/ITW $(SCORE)
	python generate_score.py -t codecfake -d $(DEMO)/Codecfake $(SCORE)
	python evaluate_score.py --result_folder $(DEMO)/result --plot $(DEMO)/det.png
	@sed -n 's/^Real clips: /note: /p' $(DEMO)/README.txt

lint: .venv/.ready
	ruff check .
	ruff format --check .

# One thread a worker: two workers of two threads each are slower on two cores.
test: .venv/.ready
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal $(TESTS)

bench: .venv/.ready
	for script in bench before_after bench_writer bench_lcnn bench_openvino bench_parity \
	    bench_scale; do \
	  echo "python -m benchmarks.$$script" >&2; \
	  python -m benchmarks.$$script; \
	  echo; \
	done > benchmarks/RESULTS.md.part
	mv benchmarks/RESULTS.md.part benchmarks/RESULTS.md
	cat benchmarks/RESULTS.md
	python -m benchmarks.scale

bench-gpu: .venv/.ready
	python -m benchmarks.gpu -o data/gpu | tee benchmarks/GPU.md.part
	mv benchmarks/GPU.md.part benchmarks/GPU.md
	python -m benchmarks.scale --gpu_results data/gpu/results.json

torture: .venv/.ready
	python -m tests.torture

clean-demo:
	rm -rf $(DEMO) $(DEMO).part

.venv/.ready: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "error: expected Python 3.11 to 3.14, $(PYTHON) is" \
	    "$$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	python -m pip install -r requirements.txt
	@touch $@
