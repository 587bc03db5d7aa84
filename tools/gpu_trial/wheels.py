"""Carry wheels to a GPU machine without network: fetch them here in pieces, and join and install them there.

    python tools/gpu_trial/wheels.py fetch QUESTION     here, with network: .trial/QUESTION/1, 2, ...
    python tools/gpu_trial/wheels.py unpack QUESTION    there, once for every piece that was carried

QUESTION is a name of wheels.toml. Each piece is a folder that one call carries beside the working tree, with a copy of
the manifest: names, versions and SHA-256 of all wheels, and the piece in which each part of them is. `unpack` keeps
what came outside of the checkout, so that pieces may come one after the other, and installs once all are there. Nothing
but the standard library and pip, since it runs before anything is installed.
"""

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.errors import Fault, exit_code  # noqa: E402

LISTS = Path(__file__).with_name("wheels.toml")
# Below the checkout, ignored by git; and where pieces meet on the other machine.
FETCHED, STORE = ROOT / ".trial", Path("/tmp/gpu_trial")
# A call carries so many bytes, the working tree included. How a file travels is not known: an archive adds up to so
# many bytes to each.
CALL_BYTES, BYTES_OF_A_HEADER, SPARE_BYTES = 64 * 2**20, 1024, 2**20
MANIFEST = "manifest.json"
# The other machine's Python and platforms. pip takes platforms by name, not by "this one or older".
PYTHON = "3.12"
GLIBCS = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in GLIBCS] + [f"manylinux{n}_x86_64" for n in ("2014", "2010", "1")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Describes some bytes of a wheel, which are a file of their own. piece: the number of the folder that it is in."""

    file: str
    piece: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Describes one wheel. file: the wheel's name, which pip reads. requirement: what was asked for. changed: empty, or
    how the file differs from the index's."""

    file: str
    requirement: str
    sha256: str
    changed: str
    parts: tuple[Part, ...]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- fetch ---------------------------------------------------------------------------------------------------------


def asked_for(question: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the requirements of a question, with those of the lists that it includes, and the patterns of what is left
    out of a wheel, by its distribution. ValueError for an unknown question."""
    lists = tomllib.loads(LISTS.read_text(encoding="utf-8"))
    if question not in lists["questions"]:
        raise ValueError(f"no question is called {question!r}; {LISTS.name} has {', '.join(lists['questions'])}")
    wheels = [wheel for name in lists["questions"][question] for wheel in lists["wheels"][name]]
    twice = {name for name in wheels if sum(other.split("==")[0] == name.split("==")[0] for other in wheels) > 1}
    if twice:
        raise ValueError(f"{LISTS.name} names several versions for {question}: {', '.join(sorted(twice))}; keep one")
    return wheels, lists["leave_out"]


def room_beside_the_tree() -> int:
    """Return how many bytes of wheels one call carries beside the working tree: what git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        raise Fault(f"git does not say what is in the working tree, which travels too: {done.stderr.strip()}")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    tree = sum(path.lstat().st_size + BYTES_OF_A_HEADER for path in paths if path.exists())
    return CALL_BYTES - SPARE_BYTES - tree


def fetch(question: str, destination: Path, added: Sequence[Path] = ()) -> list[Wheel]:
    """Download the wheels of `question` and lay them, with those `added`, into `destination`/1, 2, ... in place of what
    was there. Fault when some cannot be had, with what pip says of each; then nothing is laid out."""
    requirements, leave_out = asked_for(question)
    with tempfile.TemporaryDirectory() as name:
        files: list[tuple[str, str, Path]] = []
        missing = []
        for requirement in requirements:
            folder = Path(name) / requirement
            said = download(requirement, folder)
            found = [*folder.glob("*.whl")] if folder.exists() else []
            if len(found) != 1:
                missing.append(f"{requirement}: {said}")
                continue
            patterns = leave_out.get(requirement.partition("==")[0], [])
            changed = f"without {' '.join(patterns)}" if patterns else ""
            if patterns:
                stripped(found[0], patterns)
            files.append((requirement, changed, found[0]))
        if missing:
            raise Fault("these wheels cannot be had:\n" + "\n".join(missing))
        files += [(path.name, "not from the index", path) for path in added]
        shutil.rmtree(destination, ignore_errors=True)
        return laid_out(files, destination, room_beside_the_tree())


def download(requirement: str, folder: Path) -> str:
    """Download one wheel into `folder`, without its own requirements. Return pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    done = subprocess.run(
        [*command, requirement],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        encoding="utf-8",
        errors="replace",
    )
    return done.stderr.strip().rpartition("\n")[2]


def stripped(wheel: Path, patterns: Sequence[str]) -> None:
    """Take the members that fit a pattern out of a wheel, and out of its RECORD. ValueError for a pattern that fits
    none: the wheel is another one than was meant."""
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        left_out = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        if idle := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
            raise ValueError(f"{LISTS.name}: nothing in {wheel.name} fits {', '.join(idle)}; correct the pattern")
        for member in old.infolist():
            if member.filename in left_out:
                continue
            content = old.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                rows = csv.reader(io.StringIO(content.decode()))
                kept = io.StringIO()
                csv.writer(kept, lineterminator="\n").writerows(row for row in rows if row[0] not in left_out)
                content = kept.getvalue().encode()
            new.writestr(member, content, zipfile.ZIP_DEFLATED)
    partial.replace(wheel)


def laid_out(files: Sequence[tuple[str, str, Path]], destination: Path, piece_bytes: int) -> list[Wheel]:
    """Lay wheels out in pieces: requirement, change and path of wheels -> pieces with a manifest each, in
    `destination`/1, 2, ..."""
    ordered = sorted(files, key=lambda item: -item[2].stat().st_size)
    sizes = [path.stat().st_size for *_, path in ordered]
    wheels = [
        Wheel(file=path.name, requirement=requirement, sha256=sha256(path), changed=changed, parts=())
        for requirement, changed, path in ordered
    ]
    # The manifest is in every piece, and longer the more parts there are.
    room = 0
    while True:
        if (capacity := piece_bytes - room) <= 0:
            raise ValueError(f"a piece of {piece_bytes:,} bytes does not even hold the manifest of {len(files)} wheels")
        planned = zip(wheels, parts_of(wheels, sizes, capacity), strict=True)
        placed = [replace(wheel, parts=parts) for wheel, parts in planned]
        if (needed := len(manifest(placed))) <= room:
            break
        room = needed
    for number, (wheel, (*_, path)) in enumerate(zip(placed, ordered, strict=True)):
        parts = []
        with path.open("rb") as source:
            for part in wheel.parts:
                folder = destination / str(part.piece)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / part.file).write_bytes(source.read(part.num_bytes))
                parts.append(replace(part, sha256=sha256(folder / part.file)))
        placed[number] = replace(wheel, parts=tuple(parts))
    for folder in destination.iterdir():
        (folder / MANIFEST).write_text(manifest(placed), encoding="utf-8")
    return placed


def parts_of(wheels: Sequence[Wheel], sizes: Sequence[int], capacity: int) -> Iterator[tuple[Part, ...]]:
    """Return the parts of each wheel, the largest first: each in the first piece that has room. They have no checksums
    yet."""
    free: list[int] = []
    for wheel, num_bytes in zip(wheels, sizes, strict=True):
        parts = list(divided(num_bytes, capacity))
        found = []
        for number, size in enumerate(parts, 1):
            piece = next((i for i, left in enumerate(free) if left >= size), len(free))
            if piece == len(free):
                free.append(capacity)
            free[piece] -= size
            file = wheel.file if len(parts) == 1 else f"{wheel.file}.part{number}"
            found.append(Part(file=file, piece=piece + 1, num_bytes=size, sha256="0" * 64))
        yield tuple(found)


def manifest(wheels: Sequence[Wheel]) -> str:
    return json.dumps([asdict(wheel) for wheel in wheels], indent=1)


def divided(num_bytes: int, at_most: int) -> Iterator[int]:
    while num_bytes > at_most:
        yield at_most
        num_bytes -= at_most
    yield num_bytes


# -- unpack --------------------------------------------------------------------------------------------------------


def manifest_of(folder: Path) -> list[Wheel]:
    return [
        Wheel(**row | {"parts": tuple(Part(**part) for part in row["parts"])})
        for row in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    ]


def unpack(carried: Path, store: Path) -> list[int]:
    """Take the pieces below `carried` into `store`. Return the numbers of those that have not come yet. When there are
    none, the wheels are installed into `store`/site. ValueError for a part that is not what the manifest says."""
    folders = sorted(path.parent for path in carried.glob(f"*/{MANIFEST}"))
    if not folders:
        raise ValueError(f"{carried} has no piece; carry one, or make them by `wheels.py fetch {carried.name}`")
    wheels = manifest_of(folders[0])
    if any((folder / MANIFEST).read_bytes() != (folders[0] / MANIFEST).read_bytes() for folder in folders):
        raise ValueError(f"the pieces in {carried} were not fetched together; fetch and carry them anew")
    parts = store / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for part in (part for wheel in wheels for part in wheel.parts):
        source, kept = carried / str(part.piece) / part.file, parts / part.file
        if source.exists():
            shutil.copyfile(source, kept)
        if kept.exists() and sha256(kept) != part.sha256:
            kept.unlink()
            raise ValueError(f"{source} is not the file that the manifest names; fetch and carry the pieces anew")
    waiting = {part.piece for wheel in wheels for part in wheel.parts if not (parts / part.file).exists()}
    if not waiting:
        install(wheels, store)
    return sorted(waiting)


def install(wheels: Sequence[Wheel], store: Path) -> None:
    joined, site = store / "wheels", store / "site"
    for folder in (joined, site):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for wheel in wheels:
        with (joined / wheel.file).open("wb") as file:
            for part in wheel.parts:
                file.write((store / "parts" / part.file).read_bytes())
        if sha256(joined / wheel.file) != wheel.sha256:
            raise ValueError(f"{wheel.file} is not whole after its parts were joined; fetch and carry the pieces anew")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(site)]
    command += [str(joined / wheel.file) for wheel in wheels]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise Fault(f"pip does not install the wheels:\n{done.stderr.strip()}")
    # Python looks for .pth files where packages are installed, not in the folders of PYTHONPATH; cutlass has one.
    (site / "sitecustomize.py").write_text(
        "import os, site\n\nsite.addsitedir(os.path.dirname(__file__))\n", encoding="utf-8"
    )
    shutil.rmtree(joined)


# -- command -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fetch", "unpack"))
    parser.add_argument("question")
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="WHEEL", help="built here; with fetch")
    arguments = parser.parse_args()
    question = arguments.question
    if arguments.action == "unpack":
        asked_for(question)
        waiting = unpack(FETCHED / question, STORE / question)
        if waiting:
            print(f"{question}: next carry {' or '.join(f'.trial/{question}/{number}' for number in waiting)}")
        else:
            print(f"{question}: installed; PYTHONPATH={STORE / question / 'site'}")
        return 0
    if absent := [str(path) for path in arguments.add if path.suffix != ".whl" or not path.is_file()]:
        raise ValueError(f"--add {absent[0]} is no wheel; give the .whl that was built")
    wheels = fetch(question, FETCHED / question, arguments.add)
    sizes: dict[int, int] = {}
    for wheel in wheels:
        notes = [f"{len(wheel.parts)} parts"] * (len(wheel.parts) > 1) + [wheel.changed] * bool(wheel.changed)
        print(f"{sum(part.num_bytes for part in wheel.parts):>12,}  {wheel.file}  {'; '.join(notes)}")
        for part in wheel.parts:
            sizes[part.piece] = sizes.get(part.piece, 0) + part.num_bytes
    for piece, size in sorted(sizes.items()):
        print(f"{size:>12,}  .trial/{question}/{piece}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(Path(__file__).name, main))
