"""Does Transformer Engine load, do its layers compute the model, and are they faster than local ones?

    python tools/gpu_trial/te_trial.py [--dry]

In order of value: the import; one step of its layers against fp64; Ling-lite's geometry by its layers and by local
ones.
`--dry` runs the same with local layers in its place, since a CPU cannot run it.
"""

import importlib.metadata
import subprocess
import sys
from functools import partial
from typing import Any

from parts import PartFailed, Trial, end, run_bench, trial_of

IMPORT = "import torch, transformer_engine.pytorch as te; te.Linear(64, 64, device='cuda')(torch.ones(8, 64).cuda())"


def load(is_dry: bool, seconds: float) -> dict[str, str]:
    """Import Transformer Engine and run one layer, in a process of its own: a wrong library can end one."""
    code = "import torch" if is_dry else IMPORT
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise PartFailed(f"code {done.returncode}: {done.stderr.strip()[-1500:]}")
    names = ("torch",) if is_dry else ("torch", "transformer-engine", "transformer-engine-torch")
    return {name: importlib.metadata.version(name) for name in names}


def run_part(trial: Trial, name: str, options: list[str], seconds: float) -> Any:
    return run_bench(trial, name, "8192", seconds, *options)


def main() -> int:
    trial = trial_of("te", __doc__ or "")
    from values import check_values

    layers = "local" if trial.is_dry else "transformer_engine"
    trial.part("load", 120, lambda seconds: load(trial.is_dry, seconds), decides=True)
    trial.part(
        "values", 150, lambda _: check_values({name: {"layers": name} for name in dict.fromkeys(("local", layers))})
    )
    few = ["--choices", "", "--recompute", "none", "--skip", "head,export,reference"]
    for name, asked in (("its_layers", layers), ("local_layers", "local")):
        options = [*few, "--model", f"layers={asked}"]
        trial.part(name, 150, partial(run_part, trial, name, options))
    return end(trial)


if __name__ == "__main__":
    sys.exit(main())
