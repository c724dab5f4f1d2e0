# make help                      what there is
# make reproduce                 every cell of the paper's tables that this machine can fill; goes on where it stopped
# make -n reproduce              the plan: one command per cell
PYTHON ?= python3
BIN := .venv/bin
# torch says whether there is a GPU: it needs a driver that is new enough
HAS_GPU := import torch, sys; sys.exit(not torch.cuda.is_available())
ifndef PROFILE
PROFILE := $(if $(filter reproduce reproduced plan cells,$(or $(MAKECMDGOALS),help)),$(shell \
  $(or $(wildcard $(BIN)/python),$(PYTHON)) -c '$(HAS_GPU)' 2>/dev/null && echo paper || echo tiny),tiny)
endif
SEEDS ?= 1$(if $(filter small,$(PROFILE)), 2 3)
FIRST := $(firstword $(SEEDS))
RUNS := runs/$(PROFILE)
SCRIPTS := prompts.py metrics.py data.py lora.py infer.py train.py
export HF_HUB_DISABLE_TELEMETRY := 1

help:
	@echo "make setup       .venv with the exact versions of requirements*.txt (the other targets call it)"
	@echo "make test        the tests: CPU, no network"
	@echo "make reproduce   [PROFILE=tiny|small|paper] [SEEDS='1 2 3'] [MODEL=DIR] [DATA=DIR] [CSV='a.csv b.csv']"
	@echo "make tour        runs/tour.html: the method in stops, the paper's words beside the code and an example"
	@echo "make bench       speed and memory beside transformers Trainer + peft, in the same run"
	@echo "make chaos       kills and faults, many of them; what was lost"
	@echo "make lint        ruff and mypy"
	@echo "make clean       removes .venv, runs/ and caches; data/ stays"

setup: .venv/done

.venv/done: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: setup
	$(BIN)/python -m pytest -q -n 2 tests

lint: setup
	$(BIN)/ruff check . && $(BIN)/mypy $(SCRIPTS)

# ---- reproduce: a cell of the tables is runs/PROFILE/DATASET/MODEL/METHOD/SEED, made by one command ----

TRAINED := lm lmp cls clsp
QUERIES := q0s q1s q2s

# tiny: the embedded default, written by tests/tiny.py
TINY := $(RUNS)/inputs
# $(call seeded,DATASET/MODEL/METHOD ...): a query draws nothing, so it is asked once
seeded = $(foreach s,$(SEEDS),$(foreach c,$1,$(if $(and $(filter $(QUERIES),$(notdir $c)),$(filter-out $(FIRST),$s)),,$c/$s)))
CELLS_tiny = $(call seeded,$(foreach d,goemotions unhealthy,$(foreach m,$(QUERIES) $(TRAINED),$d/mistral/$m) $d/t5/cls $d/t5/clsp) \
  goemotions/phi/cls goemotions/phi/clsp unhealthy/neox/cls unhealthy/neox/clsp)
TINY_QUERY = --data_dir $(TINY)/$1 --model $(TINY)/models/$2 --dtype fp32 --note "synthetic, tiny"
ARGS_tiny = $(call TINY_QUERY,$1,$2) $(if $(filter $3,$(QUERIES)),,--batch_size 8 --lora_r 8 \
  --learning_rate 1e-3 --epochs $(if $(filter t5,$2),4,8) --validations 3)

# small: a real model of 135M parameters on the real corpora that are there, own files first, the same stated budget
# for every method. The cells that matter most come first; a variant, MODEL+VARIANT in a cell's path, and a query once.
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
DATA ?= data
LIMIT ?= 4000 500 2000
EPOCHS ?= 1
OWN := $(basename $(notdir $(CSV)))
CORPORA_small := $(or $(strip $(OWN) $(notdir $(wildcard $(DATA)/goemotions $(DATA)/unhealthy))),goemotions)
SMALL := $(notdir $(MODEL:/=))
VARIANT_unseen := --unseen_users 0.1
VARIANT_constrained := --constrain
VARIANT_endless := --follow T2=released
# $(call small,[+VARIANT/]METHODS,SEED)
small = $(foreach d,$(CORPORA_small),$(foreach m,$1,$d/$(SMALL)$(if $(findstring +,$m),,/)$m/$2))
CELLS_small = $(call small,cls clsp,$(FIRST)) $(call small,+unseen/cls +unseen/clsp,$(FIRST)) \
  $(foreach s,$(wordlist 2,9,$(SEEDS)),$(call small,cls clsp,$s)) \
  $(foreach s,$(wordlist 1,2,$(SEEDS)),$(call small,lm lmp,$s)) \
  $(call small,$(QUERIES) +constrained/q0s +constrained/q2s +endless/lm,$(FIRST))
ARGS_small = --model $(MODEL) $(if $(filter-out $(OWN),$1),--data_dir $(DATA)/$1 --max_share 1) --limit $(LIMIT) \
  --note "$(SMALL), $(LIMIT) annotations of train, val, test, epochs $(EPOCHS)" $(VARIANT_$(word 2,$(subst +, ,$2))) \
  $(if $(filter $3,$(QUERIES)),,--epochs $(EPOCHS) --batch_size 16 --lora_r 8 --learning_rate 1e-3 --validations 4)

# paper: the authors' recipe is the scripts' default
CELLS_paper = $(call seeded,$(foreach d,goemotions unhealthy,\
  $(foreach m,phi-2 stablelm mistral,$(addprefix $d/$m/,$(TRAINED))) $(addprefix $d/flan-t5/,cls clsp lm lmp) \
  $(foreach m,mistral flan-t5 $(if $(OPENAI_API_KEY),gpt-6-luna gpt-5.6-terra),$(addprefix $d/$m/,$(QUERIES)))))
ARGS_paper = --model $2 --data_dir $(DATA)/$1 $(if $(filter gpt-%,$2),--reasoning_effort none)

LAUNCH_tiny = $(if $(filter mistral/clsp,$2/$3),$(BIN)/torchrun --standalone --nproc_per_node 2,$(BIN)/python)
LAUNCH_small = $(BIN)/python
LAUNCH_paper = $(BIN)/torchrun --standalone --nproc_per_node gpu

# $(call cell,DATASET,MODEL,METHOD,SEED): tests/cell.py puts the output into SEED.log
define cell
$(RUNS)/$1/$2/$3/$4/metrics_test.json: $(INPUTS_$(PROFILE)) | setup
	@$(ENV_$(PROFILE)) $(BIN)/python tests/cell.py $$@ -- $(if $(filter $3,$(QUERIES)),$(BIN)/python infer.py,$(call LAUNCH_$(PROFILE),$1,$2,$3) train.py) \
	  --method $3 --dataset $(or $(firstword $(foreach f,$(CSV),$(if $(filter $1,$(basename $(notdir $f))),$f))),$1) \
	  $(call ARGS_$(PROFILE),$1,$2,$3) --seed $4 --out $(RUNS)/$1/$2/$3/$4
endef

ENV_tiny := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
JOBS_tiny := 2
INPUTS_tiny := $(TINY)/tiny.json
CELLS := $(CELLS_$(PROFILE))
TARGETS := $(CELLS:%=$(RUNS)/%/metrics_test.json)
$(foreach c,$(CELLS),$(eval $(call cell,$(word 1,$(subst /, ,$c)),$(word 2,$(subst /, ,$c)),$(word 3,$(subst /, ,$c)),$(word 4,$(subst /, ,$c)))))

$(TINY)/tiny.json: tests/tiny.py prompts.py | setup
	$(BIN)/python tests/tiny.py $(TINY)

plan: setup
	@$(ENV_$(PROFILE)) $(BIN)/python tests/plan.py $(PROFILE) --data $(DATA) --model $(MODEL) --limit $(LIMIT) --epochs $(EPOCHS) --cells $(TARGETS)

cells: $(TARGETS)

.PRECIOUS: $(TARGETS)  # files are renamed into place whole: an interrupted make need not delete them

reproduce: setup  # first: without torch the profile is not known
	@$(MAKE) --no-print-directory reproduced

reproduced: plan
	@$(MAKE) --no-print-directory -j $(or $(JOBS_$(PROFILE)),1) cells PROFILE=$(PROFILE)
	@$(BIN)/python tests/show.py $(RUNS)
	@$(BIN)/python tests/plan.py $(PROFILE) --missing

tour: setup
	@$(MAKE) --no-print-directory -j 2 PROFILE=tiny \
	  $(foreach m,cls clsp lmp,runs/tiny/unhealthy/mistral/$m/1/metrics_test.json)
	$(BIN)/python tests/tour.py --runs runs/tiny

bench: setup
	$(BIN)/python tests/bench/bench.py --results results/bench.jsonl $(BENCH)
	$(BIN)/python tests/bench/data.py $(if $(wildcard $(MODEL)),--tokenizer $(MODEL)) --long_rows 10000000 --results results/bench.jsonl
	$(BIN)/python tests/bench/api.py --results results/bench.jsonl

chaos: setup
	$(BIN)/python tests/chaos.py --results results/reliability.jsonl
	$(BIN)/python tests/fuzz.py --results results/reliability.jsonl
	$(BIN)/python tests/mutants.py --results results/reliability.jsonl

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__

.PHONY: help setup test lint plan cells reproduce reproduced tour bench chaos clean
