"""Run directories as `megatron-rl train` leaves them, made without training."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = """run_dir = "{run_dir}"
seed = {seed}
[model]
path = "{model}"
[data]
train = "data/train.jsonl"
[rollout]
prompts_per_step = 3
samples_per_prompt = 4
max_response_tokens = 64
[train]
steps = {steps}
micro_batch_tokens = 4096
[budget]
tokens = 6000
[algorithm]
name = "{algorithm}"
"""


def make_run(
    folder: Path,
    num_steps: int = 30,
    *,
    seed: int = 1,
    algorithm: str = "c3po",
    model: str = "models/start",
    texts: Sequence[str] = ("1 + 1 = 2, \\boxed{2}",),
    every: int = 1,
) -> Path:
    """Write a run into `folder` whose responses are the texts in turn.

    every: steps between those with a file of responses. The first group of each step has traces.
    """
    (folder / "rollouts").mkdir(parents=True)
    (folder / "tokens").mkdir()
    values = {"run_dir": folder, "seed": seed, "model": model, "steps": num_steps, "algorithm": algorithm}
    (folder / "config.toml").write_text(CONFIG.format(**values))
    noise = random.Random(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(num_steps):
            file.write(json.dumps(metrics_row(step, num_steps, noise)) + "\n")
    for step in range(0, num_steps, every):
        rows = [response_row(i, step, texts[i % len(texts)]) for i in range(12)]
        write_rows(folder / f"rollouts/step_{step:06d}.jsonl", rows)
        traced = [trace_row(row, step, noise) for row in rows[:4]]
        write_rows(folder / f"tokens/step_{step:06d}.jsonl", traced)
    return folder


def metrics_row(step: int, num_steps: int, noise: random.Random) -> dict[str, Any]:
    progress = step / num_steps
    rollout, train = noise.uniform(1, 2), noise.uniform(0.5, 1)
    shares = ("truncated", "no_answer", "uniform_group", "clip_low", "clip_high", "padding")
    return {
        "step": step,
        "reward": 0.3 + 0.4 * progress + noise.gauss(0, 0.05),
        "entropy": math.exp(-1 - progress) + noise.gauss(0, 0.01),
        "grad_norm": math.exp(noise.gauss(-1, 0.3)),
        "loss": noise.gauss(0, 0.02),
        "kl": noise.uniform(0, 0.1),
        **{f"{name}_share": noise.uniform(0, 0.1) for name in shares},
        **{f"response_tokens_{name}": noise.uniform(40, 60) * scale for name, scale in (("mean", 1), ("p90", 2))},
        "response_tokens_max": noise.randrange(120, 140),
        "num_prompts": 3,
        "num_samples": 12,
        "num_generated_tokens": 6100,
        "num_loss_tokens": 6000,
        "num_loss_tokens_by_step": [6000],
        "budget_use": 1.0,
        "num_carried": noise.randrange(4),
        "num_cut_tokens": noise.randrange(40),
        "num_dropped_stale": 0,
        "off_policy_token_share": noise.uniform(0, 0.2),
        "learning_rate": 4e-5,
        "ratio_mean": 1.0,
        "ratio_min": noise.uniform(0.5, 1),
        "ratio_max": noise.uniform(1, 2),
        "load_balance_loss": noise.uniform(1, 1.1),
        "z_loss": noise.uniform(4, 5),
        **{f"logprob_difference_{name}": math.exp(noise.gauss(-9, 1)) for name in ("mean", "p999", "max")},
        "rollout_seconds": rollout,
        "plan_seconds": 0.02,
        "update_weights_seconds": 0.05,
        "train_seconds": train,
        "step_seconds": rollout + train + 0.09,
        "generated_tokens_per_second": 6100 / rollout,
        "trained_tokens_per_second": 6000 / train,
        "end_to_end_tokens_per_second": 6100 / (rollout + train),
    }


def response_row(index: int, step: int, text: str) -> dict[str, Any]:
    """Return a row of rollouts/ for one of three prompts with four responses each.

    Most responses are trained, one is cut, one is stale, and the last are carried. A token has four characters.
    """
    position, sample = divmod(index, 4)
    outcome = "carried" if index > 9 else "dropped: stale" if index == 9 else "trained"
    num_tokens = -(-len(text) // 4)
    trained = 0 if outcome != "trained" else num_tokens // 2 if index == 2 else num_tokens
    reward = float(sample % 2)
    return {
        "prompt_id": f"id{position}",
        "position": 3 * step + position,
        "sample_index": sample,
        "prompt": f"<role>HUMAN</role>{text[:200]}<role>ASSISTANT</role>",
        "response": text,
        "policy_versions": {str(step): num_tokens},
        "finish_reason": "stop",
        "num_tokens": num_tokens,
        "reward": reward,
        "reason": "correct" if reward else "wrong",
        "details": "",
        "advantage": 2 * reward - 1,
        "num_loss_tokens": trained,
        "outcome": outcome,
    }


def trace_row(response: Mapping[str, Any], step: int, noise: random.Random) -> dict[str, Any]:
    """Return the trace of a row of `response_row`. Log-probs differ by 1e-4 to 1 nat; tokens not trained have none."""
    text = response["response"]
    tokens = [text[at : at + 4] for at in range(0, len(text), 4)]
    rollout = [round(-abs(noise.gauss(0, 0.5)), 4) for _ in tokens]
    train = [round(value + 10 ** noise.uniform(-4, 0), 4) for value in rollout]
    trained = response["num_loss_tokens"]
    half = len(tokens) // 2
    return {
        "position": response["position"],
        "sample_index": response["sample_index"],
        "tokens": tokens,
        "rollout_logprobs": rollout,
        "train_logprobs": [value if i < trained else None for i, value in enumerate(train)],
        "policy_versions": [[step, half], [step + 1, len(tokens) - half]],
        "optimizer_step": 0,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
