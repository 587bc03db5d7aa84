"""Run the commands of tutorials as they stand, and compare what is printed with what the page says.

    python tools/docs_tutorials.py docs/tutorials/*.md
    python tools/docs_tutorials.py --show docs/tutorials/your_reward.md     # print what commands say, compare nothing

Each page has a folder of its own, with copies of examples/ and tools/ as in a clone. A block with a title,
```` ```toml title="rl.toml" ````, becomes a file of that name. In a block of `console` a line that begins with "$ " is
a command (a backslash at its end continues it), and the lines behind it are what it prints, stdout and stderr together:
"..." stands for anything within a line, and alone for any lines. Nothing behind a command means that its output is
not compared. Every command has to end with 0.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECONDS = 240  # for one command


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Holds a file that the page writes."""

    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Holds a command and the lines that it prints; none where they are not compared."""

    command: str
    expected: tuple[str, ...]


def steps_of(page: str) -> Iterator[File | Command]:
    """Yield the files and commands of a page in their order."""
    for language, title, body in _FENCE.findall(page):
        if title:
            yield File(path=title, text=body)
        elif language == "console":
            yield from _commands(body)


def _commands(block: str) -> Iterator[Command]:
    lines = block.splitlines()
    while lines:
        line = lines.pop(0)
        if not line.startswith("$ "):
            raise ValueError(f"a block of console begins with {line!r}; a command begins with '$ '")
        command = [line[2:]]
        while command[-1].endswith("\\"):
            command.append(lines.pop(0))
        end = next((i for i, one in enumerate(lines) if one.startswith("$ ")), len(lines))
        expected, lines = lines[:end], lines[end:]
        while expected and not expected[-1].strip():
            expected.pop()
        yield Command(command="\n".join(command), expected=tuple(expected))


def matches(expected: tuple[str, ...], printed: str) -> bool:
    """Tell whether a text is what a page says."""
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(re.escape(part.rstrip()) for part in line.split("...")) + r"[ ]*\n"
    return re.fullmatch(pattern, printed if printed.endswith("\n") else printed + "\n") is not None


def run_page(page: Path, folder: Path, show: bool) -> list[str]:
    """Run a page in a folder, up to the first command that fails. Return what is not as the page says."""
    for name in ("examples", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for step in steps_of(page.read_text(encoding="utf-8")):
        if isinstance(step, File):
            path = folder / step.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text, encoding="utf-8")
            continue
        began = time.monotonic()
        code, printed = _run(step.command, folder)
        if show:
            print(f"$ {step.command}\n{printed}[{code}, {time.monotonic() - began:.0f} s]", flush=True)
        if code != 0:
            return [f"{page}: `{step.command}` ended with {code} and said:\n{printed}"]
        if step.expected and not show and not matches(step.expected, printed):
            wanted = "\n".join(step.expected)
            return [f"{page}: `{step.command}` printed\n{printed}\nand the page says\n{wanted}\n"]
    return []


def _run(command: str, folder: Path) -> tuple[int, str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MEGATRON_RL_DEVICE": "cpu",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=_SECONDS * float(os.environ.get("DOCS_TEST_PATIENCE", "1")),
    )
    return done.returncode, done.stdout


def main(argv: list[str]) -> int:
    """Run pages. Return 1 where one is not as it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--show", action="store_true", help="print what commands say; compare nothing")
    arguments = parser.parse_args(argv)

    def run(page: Path) -> list[str]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="docs_test_") as folder:
            found = run_page(page, Path(folder), arguments.show)
        print(f"{page}: {'not as it says' if found else 'as it says'}, {time.monotonic() - began:.0f} s", flush=True)
        return found

    with ThreadPoolExecutor(1 if arguments.show else 2) as pool:  # most of a command is imports, which take one core
        faults = [fault for found in pool.map(run, arguments.pages) for fault in found]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
