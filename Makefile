# make demo        three miniature corpora, the four scripts on them, an EER table (six minutes on 2 cores)
# make test        the tests
# make bench       the benchmarks: benchmarks/RESULTS.md and SCALE.md (about half an hour on 2 cores)
# make torture     the long robustness tests: kills, damage, full disks, hostile files (about 10 minutes)
# make clean-demo  removes what make demo made
#
# make demo SPEECH=<folder of recordings>              real voices instead of synthetic ones
# make demo FEAT=xls-r-5 SSL=<hub id or folder>        W2V2-AASIST instead of Mel-LCNN

PYTHON ?= $(shell for python in python3.11 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done)
DEMO   ?= data/demo
FEAT   ?= mel
HEAD   ?= $(if $(filter mel,$(FEAT)),lcnn,W2VAASIST)
SSL    ?=
SPEECH ?=
EPOCHS ?= 8

MODEL := $(DEMO)/models/$(FEAT)-$(HEAD)
SCORE := --model_folder $(MODEL) --result_folder $(DEMO)/result/$(FEAT)-$(HEAD)
FRONT := --feat $(FEAT)$(if $(SSL), --ssl $(SSL))
# So few clips need small batches and larger steps than the published recipe.
TRAIN := --num_epochs $(EPOCHS) --batch_size 8 --lr 1e-3 --interval 3

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test bench torture clean-demo

# Each step takes up what an earlier run left, so that a second `make demo` soon shows the same table.
demo: .venv/.ready
	python -m demo -o $(DEMO)$(if $(SPEECH), --speech $(SPEECH))
	python preprocess.py -t codecfake -d $(DEMO)/Codecfake -f $(DEMO)/features/Codecfake $(FRONT)
	python preprocess.py -t 19LA -d $(DEMO)/LA -f1 $(DEMO)/features/LA $(FRONT)
	python main_train.py -t codecfake -f $(DEMO)/features/Codecfake --feat $(FEAT) -m $(HEAD) -o $(MODEL) $(TRAIN)$(if $(wildcard $(MODEL)/*), --continue_training)
	python generate_score.py -t 19LA -d $(DEMO)/LA $(SCORE)
	python generate_score.py -t ITW -d $(DEMO)/ITW $(SCORE)
	python generate_score.py -t codecfake -d $(DEMO)/Codecfake $(SCORE)
	python evaluate_score.py --result_folder $(DEMO)/result --plot $(DEMO)/det.png
	@sed -n 's/^Real clips: /note: /p' $(DEMO)/README.txt

test: .venv/.ready
	python -m pytest

bench: .venv/.ready
	for script in bench bench_parity bench_scale; do echo "python -m benchmarks.$$script" >&2; python -m benchmarks.$$script; echo; done > benchmarks/RESULTS.md.part
	mv benchmarks/RESULTS.md.part benchmarks/RESULTS.md
	cat benchmarks/RESULTS.md
	python -m benchmarks.scale

torture: .venv/.ready
	python -m tests.torture

clean-demo:
	rm -rf $(DEMO) $(DEMO).part

.venv/.ready: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "error: expected Python 3.10, 3.11 or 3.12, $(PYTHON) is $$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	python -m pip install -r requirements.txt
	@touch $@
