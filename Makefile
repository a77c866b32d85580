# make demo      builds three miniature corpora and runs the four scripts on them (about 10 minutes on 2 cores)
# make test      runs the tests
# make bench     runs the benchmarks
#
# make demo SPEECH=<folder of recordings>                        real voices instead of synthetic ones
# make demo FEAT=xls-r-5 SSL=<hub id or folder>                  W2V2-AASIST instead of Mel-LCNN

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
DEMO   ?= data/demo
FEAT   ?= mel
EPOCHS ?= 10
SSL    ?=
SPEECH ?=

HEAD      := $(if $(filter mel,$(FEAT)),lcnn,W2VAASIST)
FRONT_END := --feat $(FEAT)$(if $(SSL), --ssl $(SSL))
MODEL     := $(DEMO)/models/$(FEAT)-$(HEAD)
RESULT    := $(DEMO)/result/$(FEAT)-$(HEAD)
RESUME     = $(if $(wildcard $(MODEL)/last_state.pt), --continue_training)

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test bench clean-demo
.DELETE_ON_ERROR:

# Every step takes up what an earlier run left: a second `make demo` shows the same table at once.
demo: .venv/.ready
	python demo.py -o $(DEMO)$(if $(SPEECH), --speech $(SPEECH))
	python preprocess.py -t codecfake -d $(DEMO)/Codecfake -f $(DEMO)/features/Codecfake $(FRONT_END)
	python preprocess.py -t 19LA -d $(DEMO)/LA -f1 $(DEMO)/features/LA $(FRONT_END)
	python main_train.py -t codecfake -f $(DEMO)/features/Codecfake --feat $(FEAT) -m $(HEAD) -o $(MODEL) --num_epochs $(EPOCHS) --batch_size 16$(RESUME)
	python generate_score.py -t 19LA -d $(DEMO)/LA --model_folder $(MODEL) --result_folder $(RESULT)
	python generate_score.py -t ITW -d $(DEMO)/ITW --model_folder $(MODEL) --result_folder $(RESULT)
	python generate_score.py -t codecfake -d $(DEMO)/Codecfake --model_folder $(MODEL) --result_folder $(RESULT)
	python evaluate_score.py --result_folder $(RESULT) --plot $(RESULT)/det.png
	@cat $(DEMO)/README.txt

test: .venv/.ready
	python -m pytest -q

bench: .venv/.ready
	for script in benchmarks/bench_*.py; do echo "python $$script"; python "$$script"; done

clean-demo:
	rm -rf $(DEMO) $(DEMO).part

.venv/.ready: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "error: expected Python 3.10, 3.11 or 3.12, $(PYTHON) is $$("$(PYTHON)" --version 2>&1); name another one: make PYTHON=python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	python -m pip install -r requirements.txt
	@touch $@
