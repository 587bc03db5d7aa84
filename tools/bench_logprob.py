"""Measure peak extra memory and time of the fused head and the plain one, at growing token counts, as one JSON object.

    python tools/bench_logprob.py [--tokens 1024,2048,4096,8192] [--vocab 126464] [--hidden 512] [--threads 2]

Both compute log-probs and entropies of one layer's hidden states, forward and backward, in fp32. The plain head is the
formula with autograd: all logits in one piece, log_softmax, gather, and the entropy. Every measurement is a process of
its own. Its extra memory is the peak of its resident memory after the first pass, less what was resident when the
inputs had been made and touched; gradients count as extra, for both. The same process then repeats the pass for
--seconds, at least once; `seconds` is the fastest pass by the clock, `cpu_seconds` by what the processor spent on it
over all threads, which a busy machine disturbs less. `difference` compares log-probs, entropies and rows of both
gradients, relative to the largest value of each.

The real model's hidden size is 2,048; the default keeps the run to minutes. What would need more than --memory-gb is
left out, and says so. --logprob-only leaves the entropy out of both sides: the plain head then needs fewer matrices,
and fits at more tokens.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_rl.model.logprobs import logprobs_and_entropy  # noqa: E402

# Matrices of tokens x vocabulary that the plain head holds at its peak, measured, with and without the entropy.
PLAIN_MATRICES = {False: 5, True: 3}
GRADIENT_ROWS = 1024


def plain_head(hidden: Tensor, weight: Tensor, targets: Tensor, logprob_only: bool) -> tuple[Tensor, Tensor | None]:
    logp = (hidden @ weight.T).log_softmax(-1)
    entropy = None if logprob_only else -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def fused_head(hidden: Tensor, weight: Tensor, targets: Tensor, logprob_only: bool) -> tuple[Tensor, Tensor | None]:
    logprobs, entropy = logprobs_and_entropy(hidden, weight, targets, len(weight))
    return logprobs, None if logprob_only else entropy


HEADS = {"fused": fused_head, "plain": plain_head}


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def measure(name: str, num_tokens: int, arguments: argparse.Namespace) -> dict:
    """Measure one case, as a child's work."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, arguments.hidden, requires_grad=True)
    weight = (torch.randn(arguments.vocab, arguments.hidden).mul_(2 / math.sqrt(arguments.hidden))).requires_grad_()
    targets = torch.randint(0, arguments.vocab, (num_tokens,))
    upstream = torch.randn(2, num_tokens)
    before = resident_bytes("VmRSS")
    assert resident_bytes("VmHWM") - before < 64 * 2**20, "making the inputs took more than the inputs"

    def one_pass() -> tuple[Tensor, ...]:
        logprobs, entropy = HEADS[name](hidden, weight, targets, arguments.logprob_only)
        total = (upstream[0] * logprobs).sum()
        if entropy is not None:
            total = total + (upstream[1] * entropy).sum()
        gradients = torch.autograd.grad(total, [hidden, weight])
        return logprobs.detach(), logprobs if entropy is None else entropy.detach(), *gradients

    seconds, cpu_seconds = [], []

    def timed_pass() -> tuple[Tensor, ...]:
        started, cpu_started = time.perf_counter(), time.process_time()
        outputs = one_pass()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        return outputs

    logprobs, entropy, grad_hidden, grad_weight = timed_pass()
    extra = resident_bytes("VmHWM") - before
    if arguments.values:
        rows = [x[:: max(1, len(x) // GRADIENT_ROWS)].clone() for x in (grad_hidden, grad_weight)]
        values = {"logprobs": logprobs, "entropy": entropy, "grad_hidden": rows[0], "grad_weight": rows[1]}
        save_file({k: v.detach().clone() for k, v in values.items()}, arguments.values)
    del logprobs, entropy, grad_hidden, grad_weight
    while len(seconds) < 2 or sum(seconds) < arguments.seconds:
        timed_pass()
    return {
        "extra_mb": round(extra / 1e6, 1),
        "seconds": round(min(seconds), 3),
        "median_seconds": round(statistics.median(seconds), 3),
        "cpu_seconds": round(min(cpu_seconds), 3),
        "passes": len(seconds),
    }


def in_a_process(name: str, num_tokens: int, values: Path) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, str(num_tokens), "--values", str(values)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, encoding="utf-8", errors="replace")
    print(f"{name} at {num_tokens} tokens: {done.stdout.strip()}", file=sys.stderr)
    return json.loads(done.stdout)


def largest_difference(found: Path, expected: Path) -> float:
    a, b = load_file(found), load_file(expected)
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def slope(row: dict[int, dict]) -> float | None:
    """Return the slope of the logarithm of extra memory against the logarithm of tokens. At 1 it grows with the tokens,
    at 0 it does not."""
    if len(row) < 2:
        return None
    extra = [result["extra_mb"] for result in row.values()]
    return round(float(np.polyfit(np.log(list(row)), np.log(extra), 1)[0]), 3)


def compare(arguments: argparse.Namespace) -> dict:
    results: dict[str, dict[int, dict]] = {name: {} for name in HEADS}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / f"{name}.safetensors" for name in HEADS}
        for num_tokens in arguments.tokens:
            row: dict = {"tokens": num_tokens}
            matrix = num_tokens * arguments.vocab * 4
            needed = PLAIN_MATRICES[arguments.logprob_only] * matrix + 2 * arguments.vocab * arguments.hidden * 4
            for name in HEADS:
                if name == "plain" and needed > arguments.memory_gb * 1e9:
                    row["plain"] = f"left out: about {needed / 1e9:.1f} GB, --memory-gb is {arguments.memory_gb}"
                    continue
                row[name] = results[name][num_tokens] = in_a_process(name, num_tokens, files[name])
            if num_tokens in results["plain"]:
                fused, plain = row["fused"], row["plain"]
                row["memory_ratio"] = round(plain["extra_mb"] / fused["extra_mb"], 2)
                row["time_ratio"] = round(fused["seconds"] / plain["seconds"], 3)
                row["cpu_time_ratio"] = round(fused["cpu_seconds"] / plain["cpu_seconds"], 3)
                row["difference"] = largest_difference(files["fused"], files["plain"])
            rows.append(row)
    return {
        **{name: getattr(arguments, name) for name in ("vocab", "hidden", "threads", "logprob_only")},
        "rows": rows,
        "memory_slope": {name: slope(result) for name, result in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1024, 2048, 4096, 8192]
    )
    parser.add_argument("--vocab", type=int, default=126_464)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--memory-gb", type=float, default=14.0)
    parser.add_argument("--logprob-only", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--values", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], int(arguments.child[1]), arguments)))
    else:
        print(json.dumps(compare(arguments), indent=1))


if __name__ == "__main__":
    main()
