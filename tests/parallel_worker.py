"""One rank of a parallel test: trains one step of a given plan and writes gradients, weights and log-probs.

Run by tests/parallel.py. The spec names a model directory, a layout, sequences and how to train them.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.config.schema import AlgorithmSection, SftConfig
from megatron_rl.model.build import load_weights, mpu
from megatron_rl.sync.export import export_tensors
from megatron_rl.train import state
from megatron_rl.train.batch import TrainSequence
from megatron_rl.train.objective import PolicyObjective
from megatron_rl.train.session import Session


def sequences_from(spec: dict) -> list[TrainSequence]:
    return [
        TrainSequence(
            token_ids=np.array(row["token_ids"], np.int32),
            loss_positions=np.arange(row["num_prompt_tokens"], len(row["token_ids"]), dtype=np.int32),
            weight=row.get("weight", 1.0),
            advantage=row.get("advantage", 1.0),
            old_logprobs=np.full(len(row["token_ids"]) - row["num_prompt_tokens"], np.nan, np.float32),
            rollout_logprobs=np.full(len(row["token_ids"]) - row["num_prompt_tokens"], np.nan, np.float32),
        )
        for row in spec["sequences"]
    ]


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    config = SftConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "threads": 1,
            "model": {"path": spec["model"], "dtype": spec.get("dtype", "float32")},
            "parallel": spec.get("parallel", {}),
            "moe": spec.get("moe", {"load_balance_coefficient": 0.0, "z_loss_coefficient": 0.0}),
            "optimizer": {"learning_rate": 1e-3, "clip_grad": spec.get("clip_grad", 0.0)},
            "train": {"steps": 10, "micro_batch_tokens": spec["token_cap"], "phase_deadline_seconds": 120},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )
    whole_gradients = spec.get("whole_gradients", True)
    session = Session(config, 10, resume=False, distributed_optimizer=not whole_gradients)
    if "resume_from" in spec:
        state.load(Path(spec["resume_from"]), session.trainer)
    sequences = sequences_from(spec)
    lengths = [len(s.token_ids) for s in sequences]
    placed = pack_micro_batches(lengths, session.layout.data, spec["token_cap"], cost_model(session.bailing))
    mine = [[sequences[i] for i in bin_] for bin_ in placed[session.layout.data_rank(session.rank)]]
    out: dict[str, torch.Tensor] = {}

    if mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0:
        order = [i for bin_ in placed[session.layout.data_rank(session.rank)] for i in bin_]
        logprobs = torch.cat(session.trainer.logprobs(mine) or [torch.zeros(0)])
        parts = logprobs.split([len(sequences[i].loss_positions) for i in order])
        out |= {f"logprobs/{i}": part.clone() for i, part in zip(order, parts, strict=True)}
    else:
        session.trainer.logprobs(mine)

    objective = PolicyObjective(AlgorithmSection(entropy_coefficient=spec.get("entropy_coefficient", 0.01)))
    for step in range(spec.get("steps", 1)):
        result = session.trainer.train_step(mine, objective, spec["denominator"])
        if step == 0 and whole_gradients:
            out |= {f"grad/{n}": t.clone() for n, t in export_tensors(session.model, lambda p: p.main_grad)}
    out |= {f"weight/{n}": t.clone() for n, t in export_tensors(session.model)}
    if "save_to" in spec:
        state.save(Path(spec["save_to"]), 1, session.trainer, {"step": 1}, b"", 1, session.control)
    if session.rank == 0:
        out["grad_norm"] = torch.tensor(result.grad_norm, dtype=torch.float64)
        (folder / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    save_file({name: t.contiguous() for name, t in out.items()}, folder / f"out-{session.rank}.safetensors")
    if spec.get("export"):
        load_weights(session.model, spec["model"])
        session.export(folder / "hf")
    session.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's process groups may take seconds to wind down
