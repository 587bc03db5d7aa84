"""Measure what router replay does to the gap between the sampler's and the trainer's log-probs, on the same responses.

    python tools/bench_replay.py [--dtype bfloat16] [--layers 6] [--experts 16] [--topk 4] [--seed 0] [--sglang ...]

Makes a model (tools/make_tiny_model.py; weights of 1/sqrt(hidden), so that tokens and experts matter as in a trained
one), lets a server sample responses in `--dtype` and asks it for the experts that it chose. The server is the embedded
one, or with `--sglang` SGLang on a GPU, which gets the arguments in it. The trainer, in
the same precision, works out the responses' log-probs with its routers' own choice and with the server's. The two
round differently, and where two experts are nearly tied they choose differently. Prints one JSON object: |trainer -
server| of the response tokens (mean, 99th and 99.9th percentile, maximum) without and with replay, and the share of the
server's choices that the trainer would not have made.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from make_tiny_model import TinyModel, write_tiny_model  # noqa: E402

from megatron_rl.config.layout import Layout  # noqa: E402
from megatron_rl.config.model import ModelSection, MoeSection  # noqa: E402
from megatron_rl.config.optimizer import OptimizerSection  # noqa: E402
from megatron_rl.config.rollout import RolloutSection  # noqa: E402
from megatron_rl.families import load_architecture  # noqa: E402
from megatron_rl.model.build import build_model, initialize_parallel, load_weights  # noqa: E402
from megatron_rl.rollout.client import Completion, GenerationClient, SampleRequest, gather_all  # noqa: E402
from megatron_rl.rollout.routing import routed_shape  # noqa: E402
from megatron_rl.rollout.supervisor import start_servers  # noqa: E402
from megatron_rl.train.step.batch import TrainSequence  # noqa: E402
from megatron_rl.train.step.trainer import Trainer  # noqa: E402

PROMPT_TOKENS = 16


def sample(model: Path, prompts: list[list[int]], arguments: argparse.Namespace) -> list[list[Completion]]:
    """Sample responses by prompt, from a server of its own."""
    rollout = RolloutSection(
        engine="embedded" if arguments.sglang is None else "sglang",
        sglang_arguments=tuple((arguments.sglang or "").split()),
        servers=1,
        router_replay=True,
        prompts_per_step=1,
        samples_per_prompt=1,
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=arguments.new_tokens,
        max_running_requests=64,
        ready_deadline_seconds=240,
    )
    shape = routed_shape(load_architecture(model))
    with start_servers(model, model.parent, rollout, arguments.dtype) as supervisor:
        supervisor.wait_ready()

        async def run() -> list[list[Completion]]:
            client = GenerationClient(supervisor.urls[0], key_of=supervisor.key_of)
            options: dict[str, Any] = {"temperature": 1.0, "timeout_seconds": 300.0, "routed": shape}
            wanted = [
                [
                    SampleRequest(input_ids=p, seed=s, max_new_tokens=arguments.new_tokens)
                    for s in range(arguments.samples)
                ]
                for p in prompts
            ]
            try:
                return await gather_all(
                    gather_all(client.generate(one, **options) for one in of_prompt) for of_prompt in wanted
                )
            finally:
                await client.close()

        return asyncio.run(run())


def trainer_of(model: Path, dtype: Any) -> Trainer:
    layout = Layout(world_size=1)
    initialize_parallel(layout, deadline_seconds=600, seed=0)
    section = ModelSection(path=model, dtype=dtype, layers="local")
    moe = MoeSection(load_balance_coefficient=0.0, z_loss_coefficient=0.0)
    built = build_model(load_architecture(model), section, moe, layout)
    load_weights(built, model)
    return Trainer(built, OptimizerSection(), 1, dist.group.WORLD)


def sequence_of(prompt: list[int], one: Completion, replay: bool) -> TrainSequence:
    ids = np.concatenate([np.array(prompt, np.int32), one.output_ids])
    return TrainSequence(
        token_ids=ids,
        loss_positions=np.arange(len(prompt), len(ids), dtype=np.int32),
        weight=1.0,
        rollout_logprobs=one.logprobs,
        num_stale_tokens=0,
        routed_experts=one.routed_experts if replay else None,
    )


def summary(differences: np.ndarray) -> dict[str, float]:
    levels = {"mean": differences.mean(), "max": differences.max()}
    quantiles = {f"p{100 * q:g}": np.quantile(differences, q) for q in (0.99, 0.999)}
    return {name: round(float(value), 6) for name, value in (levels | quantiles).items()}


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model = folder / "model"
    shape = TinyModel(
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        experts=arguments.experts,
        experts_per_token=arguments.topk,
        moe_intermediate_size=arguments.hidden_size // 2,
        shared_experts=1,
        init_std=arguments.hidden_size**-0.5,
        seed=arguments.seed,
    )
    write_tiny_model(model, shape)
    rng = random.Random(arguments.seed)
    prompts = [[rng.randrange(96) for _ in range(PROMPT_TOKENS)] for _ in range(arguments.prompts)]
    groups = sample(model, prompts, arguments)
    trainer = trainer_of(model, arguments.dtype)
    differences: dict[bool, np.ndarray] = {}
    for replay in (False, True):
        batches = [
            trainer.micro_batch([sequence_of(prompt, one, replay) for one in group])
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        found = trainer.logprobs(batches)
        parts = [(x - b.rollout_logprobs).abs() for x, b in zip(found, batches, strict=True)]
        differences[replay] = torch.cat(parts).double().numpy()
    routers = trainer.model.routers
    replayed, replaced = (sum(int(getattr(r, name)) for r in routers) for name in ("num_replayed", "num_replaced"))
    return {
        **vars(arguments),
        "num_tokens": len(differences[False]),
        "without_replay": summary(differences[False]),
        "with_replay": summary(differences[True]),
        "changed_share": round(replaced / replayed, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sglang", metavar="ARGUMENTS", help="of launch_server, in one word")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments), indent=1))


if __name__ == "__main__":
    main()
