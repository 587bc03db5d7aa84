"""Measure the conversion of a checkpoint of Ling-lite-1.5's shape both ways, against `cp` of the same bytes, as JSON.

    python tools/bench_convert.py FOLDER [--layers 28]

Makes a synthetic directory of 33.6 GB in FOLDER, copies it, converts it to Megatron and back, compares, and removes
everything. With less room than two copies it takes fewer layers and says so. Every measurement starts with the source
out of the page cache and ends with the result on the disk. Memory is RssAnon of the converting process, sampled.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_rl.checkpoint.convert import forget_cached
from megatron_rl.checkpoint.hf import SafetensorsWriter, divide_into_shards, shard_file, write_index
from megatron_rl.checkpoint.names import name_table
from megatron_rl.families import Architecture, architecture_of, tensor_shapes

LING_LITE = {
    "architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe", "vocab_size": 126464, "hidden_size": 2048,
    "intermediate_size": 1408, "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 6, "num_shared_experts": 2,
    "first_k_dense_replace": 0, "norm_topk_prob": True, "norm_head": False, "max_position_embeddings": 32768,
    "rope_theta": 600000, "rms_norm_eps": 1e-6, "eos_token_id": 126081, "pad_token_id": 126081,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SHARD_BYTES = 5 * 10**9
ROOM = 2.1  # copies that have to fit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench-convert"))
    parser.add_argument("--layers", type=int, default=28)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    layers = arguments.layers
    while layers > 1 and ROOM * 2 * shape(layers).num_parameters() > shutil.disk_usage(folder).free:
        layers -= 1
    if layers < arguments.layers:
        sys.stderr.write(f"{folder} has room for two copies of {layers} layers, not {arguments.layers}\n")
    try:
        print(json.dumps(run(folder, layers), indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def run(folder: Path, layers: int) -> dict[str, object]:
    source, copy, there, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    size = make_directory(source, layers)
    report: dict[str, object] = {
        "layers": layers,
        "parameters": shape(layers).num_parameters(),
        "gigabytes": size / 1e9,
    }

    forget(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, copy], check=True)
    on_disk(copy)
    cp_seconds = time.perf_counter() - started
    shutil.rmtree(copy)
    report["cp"] = {"seconds": round(cp_seconds, 1), "gigabytes_per_second": round(size / 1e9 / cp_seconds, 3)}

    tools = Path(__file__).parent
    options = ["--no-verify"]
    report["to_megatron"] = measured([tools / "convert_hf_to_megatron.py", source, there, *options], size, cp_seconds)
    # The disk need not hold three copies: the source is made again for the comparison, which takes no measurement.
    shutil.rmtree(source)
    report["to_hf"] = measured([tools / "convert_megatron_to_hf.py", there, back, *options], size, cp_seconds)
    shutil.rmtree(there)
    make_directory(source, layers)
    compared = subprocess.run(
        [sys.executable, tools / "verify_checkpoint.py", source, back],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        errors="replace",
    )
    report["back_equals_source"] = compared.returncode == 0
    return report


def shape(layers: int) -> Architecture:
    return architecture_of(LING_LITE | {"num_hidden_layers": layers})


def make_directory(directory: Path, layers: int) -> int:
    """Write values that are cheap and the same every time: windows of one random buffer, another for every tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps(LING_LITE | {"num_hidden_layers": layers}, indent=1), encoding="utf-8"
    )
    model = shape(layers)
    infos = [(name, size, torch.bfloat16) for name, size in tensor_shapes(model).items()]
    largest = max(torch.Size(s).numel() for _, s, _ in infos)
    noise = torch.randn(largest + len(infos), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shards = divide_into_shards(infos, SHARD_BYTES)
    offset = total = 0
    for number, shard in enumerate(shards):
        with SafetensorsWriter(directory / shard_file(number), shard) as writer:
            for name, size, _ in shard:
                count = torch.Size(size).numel()
                writer.write(name, noise[offset : offset + count].view(size))
                offset, total = offset + 1, total + 2 * count
    write_index(directory, [[name for name, _, _ in shard] for shard in shards], name_table(model))
    return total


def measured(command: list[object], size: int, cp_seconds: float) -> dict[str, float]:
    """Return the seconds of the whole command, start-up included, and the most anonymous memory it had."""
    forget(Path(str(command[1])))
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)])
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(0.02)
    on_disk(Path(str(command[2])))
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return {
        "seconds": round(seconds, 1),
        "gigabytes_per_second": round(size / 1e9 / seconds, 3),
        "speed_over_cp": round(cp_seconds / seconds, 3),
        "peak_anonymous_gigabytes": round(peak / 1e9, 3),
    }


def rss_anon(pid: int) -> int:
    """Return the bytes; 0 when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def on_disk(directory: Path) -> None:
    for path in files_of(directory):
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def forget(directory: Path) -> None:
    """Drop a file from the page cache, so that the next reader goes to the disk."""
    on_disk(directory)
    for path in files_of(directory):
        forget_cached(path)


if __name__ == "__main__":
    sys.exit(main())
