#!/usr/bin/env bash
# Every stage of the example, from the root of a checkout: bash examples/smollm2/run.sh [SEED]
# What is done is left out, and what was killed goes on, so the same command also continues. NPROC: training processes.
# RL=rl_lora: reinforcement learning by rl_lora.toml, beside what rl.toml made.
set -euo pipefail
seed=${1:-1}
nproc=${NPROC:-2}
rl=${RL:-rl}
suffix=${rl#rl}
here=examples/smollm2
run=runs/smollm2/seed_$seed
bin=.venv/bin
export MEGATRON_RL_PARENT=$$

resume() { if [ -e "$1/checkpoints/latest" ]; then echo --resume; fi; }

$bin/python tools/make_pretrained.py models/SmolLM2-135M-Instruct
$bin/python $here/word_problems.py "$run/data" --seed "$seed"
if [ ! -e "$run/sft/hf" ]; then
  # shellcheck disable=SC2046
  $bin/megatron-rl sft $here/sft.toml --nproc "$nproc" $(resume "$run/sft") \
    --set seed="$seed" --set run_dir="$run/sft" --set data.train="$run/data/sft.jsonl"
fi
$bin/megatron-rl evaluate $here/evaluate.toml --resume --model "$run/sft/hf" --output "$run/accuracy_before" \
  --set seed="$seed" --set benchmarks.word_problems.path="$run/data/test.jsonl"
if [ ! -e "$run/$rl/hf" ]; then
  # shellcheck disable=SC2046
  $bin/megatron-rl train "$here/$rl.toml" --nproc "$nproc" $(resume "$run/$rl") \
    --set seed="$seed" --set run_dir="$run/$rl" --set data.train="$run/data/train.jsonl" --set model.path="$run/sft/hf"
fi
$bin/megatron-rl evaluate $here/evaluate.toml --resume --model "$run/$rl/hf" --output "$run/accuracy_after$suffix" \
  --set seed="$seed" --set benchmarks.word_problems.path="$run/data/test.jsonl"
$bin/megatron-rl report "$run/sft" "$run/$rl" --evaluation "$run/accuracy_before" "$run/accuracy_after$suffix" \
  --output "$run/report$suffix.html"
