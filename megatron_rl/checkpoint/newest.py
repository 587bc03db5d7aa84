"""This module tells which checkpoint of a run is the newest, without torch."""

from pathlib import Path


def newest(checkpoints: Path) -> Path | None:
    """Read which checkpoint the file `latest` of a run names; None where there is no such file. ValueError where it
    names nothing beside itself."""
    marker = checkpoints / "latest"
    if not marker.is_file():
        return None
    name = marker.read_bytes()[:256].decode(errors="replace").strip()
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{marker} must hold the name of a checkpoint beside it, such as step_8")
    return checkpoints / name
