"""Tests the example agent with a tool against real SGLang, on a tiny Qwen3 that was fine-tuned to call the tool."""

import importlib.util
import json
import random
import sys
from pathlib import Path

from agent_chat import write_chat_model
from example_runs import finish, numbers
from inputs import ROOT

EXAMPLE = ROOT / "examples/agents/calculator"


def write_rows(folder: Path) -> None:
    """Write chats that call the tool as they should, and rows with the sums alone."""
    spec = importlib.util.spec_from_file_location("calculator", EXAMPLE / "agent.py")
    assert spec is not None and spec.loader is not None
    agent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    source = random.Random(1)
    chats, sums = [], []
    for number in range(600):
        a, b = source.randrange(10), source.randrange(10)
        function = {"name": "python", "arguments": {"code": f"print({a}+{b})"}}
        messages = [
            {"role": "system", "content": agent.SYSTEM},
            {"role": "user", "content": f"{a}+{b}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "1", "name": "python", "content": f"{a + b}\n"},
            {"role": "assistant", "content": f"\\boxed{{{a + b}}}"},
        ]
        chats.append({"id": str(number), "tools": [agent.TOOL], "messages": messages})
        sums.append({"id": str(number), "domain": "math", "prompt": f"{a}+{b}?", "answer": str(a + b)})
    for name, rows in (("chats", chats), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_calculator_trains_on_its_turns_alone(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "model", "--family", "qwen3", "--max-position-embeddings", "1024", "--seed", "1")
    write_rows(tmp_path)
    common = [sys.executable, "-m", "megatron_rl.cli"]
    warm = [f"run_dir={tmp_path}/sft", f"model.path={tmp_path}/model", f"data.train={tmp_path}/chats.jsonl"]
    warm += ["train.steps=100"]
    flags = [part for setting in warm for part in ("--set", setting)]
    finish([*common, "sft", str(ROOT / "examples/agents/guess/sft.toml"), *flags])
    settings = [
        *(f"run_dir={tmp_path}/rl", f"model.path={tmp_path}/sft/hf", f"data.train={tmp_path}/sums.jsonl"),
        *("model.dtype=float32", "rollout.release_memory=false", "rollout.sglang_arguments=[]"),
        *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=8", "rollout.max_prompt_tokens=600"),
        *("rollout.max_response_tokens=96", "rollout.max_running_requests=16", "budget.tokens=400"),
        *("optimizer.warmup_steps=0", "train.steps=1", "train.micro_batch_tokens=4096", "sync.transport=disk"),
        "train.offload_while_generating=false",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    finish([*common, "train", str(EXAMPLE / "rl.toml"), *flags])
    rows = numbers(tmp_path / "rl")
    assert [row["num_loss_tokens"] for row in rows] == [400]
    assert sum(row["num_tool_calls"] for row in rows) >= 3
    assert all(row["num_failed_agents"] == 0 for row in rows)
    # Over all turns of all trajectories, tools' results between them.
    assert all(row["logprob_difference_mean"] < 1e-4 for row in rows)
    first = [json.loads(line) for line in (tmp_path / "rl/rollouts/step_000000.jsonl").read_text().splitlines()]
    spans = [span for row in first for segment in row["segments"] for span in segment["spans"]]
    assert any("<|start|>tool\n" in text for text, is_policys in spans if not is_policys)
    assert not any("<|start|>tool\n" in text for text, is_policys in spans if is_policys)
