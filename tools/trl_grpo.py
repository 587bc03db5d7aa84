"""Train by TRL's GRPOTrainer on a CPU, and print what each step took as JSON; the other side of tools/bench_trl.py.

It runs in an environment of its own, which has trl; `PYTHONPATH` names this repository for the reward, which is ours.
The settings come as JSON in the one argument. What TRL leaves free is set as a person would who wants it fast here:
no checkpointing of activations, no reference model, sampling without cut-offs, every micro-batch as large as its share.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from megatron_rl.reward.exact import exact_verdict


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Holds what both sides share; tools/bench_trl.py fills it in from the configuration of the run.

    dtype: of the weights, float32 or bfloat16. autocast: compute in bfloat16 in training, for weights in float32.
    backend: generate, or continuous for transformers' continuous batching. micro_batch: responses at once in training.
    """

    model: str
    data: str
    output: str
    steps: int
    prompts: int
    samples: int
    response_tokens: int
    learning_rate: float
    warmup_steps: int
    beta1: float
    beta2: float
    clip_grad: float
    seed: int
    threads: int
    dtype: str
    autocast: bool
    backend: str
    micro_batch: int


class Timed(GRPOTrainer):
    """Notes for each step the seconds that generation takes, and the tokens of prompts and responses."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.rows: list[dict[str, float]] = []
        super().__init__(*arguments, **options)

    def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        answer = super()._generate_single_turn(prompt_ids, *arguments, **options)
        seconds = time.perf_counter() - started
        prompts, responses = (sum(map(len, ids)) for ids in (prompt_ids, answer[0]))
        row = {"num_generated_tokens": responses, "num_forward_tokens": prompts + responses}
        self.rows.append(row | {"rollout_seconds": seconds})
        return answer


class Steps(TrainerCallback):
    """Notes for each step how long all of it takes, the optimizer included."""

    def __init__(self, rows: list[dict[str, float]]) -> None:
        self.rows = rows

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        row = self.rows[-1]
        row["step_seconds"] = time.perf_counter() - self.started
        row["train_seconds"] = row["step_seconds"] - row["rollout_seconds"]


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [completion[-1]["content"] for completion in completions]
    return [exact_verdict(text, right).score for text, right in zip(texts, answer, strict=True)]


def arguments_of(settings: Settings) -> GRPOConfig:
    responses = settings.prompts * settings.samples
    return GRPOConfig(
        output_dir=settings.output,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=responses // settings.micro_batch,
        generation_batch_size=responses,
        num_generations=settings.samples,
        max_completion_length=settings.response_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip_grad,
        seed=settings.seed,
        use_cpu=True,
        bf16=settings.autocast,
        gradient_checkpointing=False,
        use_transformers_continuous_batching=settings.backend == "continuous",
        # Without these limits it sizes its cache by the free memory of the machine, in minutes.
        transformers_continuous_batching_config={"num_blocks": 1024, "max_batch_tokens": 2048},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def main() -> int:
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    data = [json.loads(line) for line in Path(settings.data).read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in data]
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype),
        processing_class=AutoTokenizer.from_pretrained(settings.model, padding_side="left"),
        reward_funcs=reward,
        args=arguments_of(settings),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.add_callback(Steps(trainer.rows))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    for row, log in zip(trainer.rows, logged, strict=True):
        row |= {"reward": log["reward"], "grad_norm": log["grad_norm"]}
    Path(settings.output, "rows.json").write_text(json.dumps(trainer.rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
