"""This module says where supervised fine-tuning leaves the model of each epoch: `run_dir/epochs/epoch_N`, Hugging Face
directories with `sft.json` (docs/sft.md)."""

from pathlib import Path

# The file of such a directory with what was measured of these very weights.
SFT_NOTE = "sft.json"


def epoch_path(run_dir: Path, epoch: int) -> Path:
    """Return the directory of an epoch's model. epoch: counted from 1."""
    return run_dir / "epochs" / f"epoch_{epoch}"


def refuse_other_epochs(run_dir: Path, num_epochs: int, resume: bool) -> None:
    """Raise ValueError when there are epochs that this run will not write itself. Whoever chooses among them would take
    them for the run's own."""
    found = sorted(path.name for path in (run_dir / "epochs").glob("epoch_*"))
    own = {epoch_path(run_dir, epoch).name for epoch in range(1, num_epochs + 1)} if resume else set()
    other = [name for name in found if name not in own]
    if other:
        raise ValueError(
            f"{run_dir}/epochs has {', '.join(other)} of another run; delete the folder, or set run_dir to a new one"
        )
