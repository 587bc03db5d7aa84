"""Tests that the pages name only what exists, and that the check of the pages finds mistakes."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import docs_check  # noqa: E402
import docs_reference  # noqa: E402
import docs_tutorials  # noqa: E402
from docs_tutorials import Command, File, matches, steps_of  # noqa: E402

from megatron_rl.config.load import load_config  # noqa: E402
from megatron_rl.config.schema import RlConfig  # noqa: E402
from megatron_rl.preflight.registry import CHECKS, THOROUGH  # noqa: E402


@pytest.mark.parametrize("page", docs_check.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_keys_commands_and_python_of_every_page_are_right(page: Path) -> None:
    assert list(docs_check.check_page(page)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```toml\n[train]\nstepz = 3\n```\n", "TOML has train.stepz"),
        ("```toml\n[train\n```\n", "TOML does not parse"),
        ("```toml\n[reward.parts]\na = { knd = 'math' }\n```\n", ""),  # a table by name is the section's own affair
        ("```toml\n[[source]]\npath = 'a'\nprompt = 'q'\n```\n", ""),  # a mapping of prepare_data.py
        ("```python\nreturn (\n```\n", "Python does not compile"),
        ("```console\n$ megatron-rl trian rl.toml\n```\n", "no command `megatron-rl trian`"),
        ("```console\n$ megatron-rl train rl.toml --resum\n```\n", ""),  # argparse takes what is short and plain
        ("```console\n$ megatron-rl train rl.toml --again\n```\n", "unrecognized arguments: --again"),
        ("```console\n$ megatron-rl train rl.toml --nproc N  # as many as GPUs\n```\n", ""),
        ("```console\n$ megatron-rl train rl.toml \\\n    --servers\n```\n", "--servers: expected one argument"),
        ("    megatron-rl evaluate evaluate.toml\n", "required: --output"),
        ("    megatron-rl plan CONFIG [--node N]\n", "no option --node"),
        ("so `megatron-rl plan --rats` says\n", "no option --rats"),
        ("so `budget.token` is\n", "budget.token is named"),
        ('so `budget.tokens`, `model.path = "x"` and `model.py` are\n', ""),
        ("see [it](nothing.md)\n", "no such file"),
        ("# A `b` (c)\n\n## A\n\nsee [it](#a-b-c) and [that](#a)\n", ""),
        ("# A\n\nsee [it](#b)\n", "no such heading"),
    ],
)
def test_what_is_wrong_with_a_page_is_found(text: str, problem: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    found = list(docs_check.check_page(page))
    assert [problem in one for one in found] == [True] if problem else found == []


def test_the_reference_has_every_key_command_and_check() -> None:
    keys, commands, codes = docs_reference.keys(), docs_reference.commands(), docs_reference.exit_codes()
    assert re.search(r"\| `budget\.tokens` \| .+ \| whole number", keys)
    assert "| `validation.benchmarks.NAME.samples` |" in keys
    assert "| `source.path` |" in keys
    assert all(f"## {name}\n" in commands for name in ("train", "sft", "rollout", "evaluate", "select", "plan", "keys"))
    assert "--resume" in commands
    assert all(f"| `{name}` |" in codes for name in (*CHECKS, *THOROUGH))
    assert all(f"| {code} | EXIT_" in codes for code in (0, 1, 2, 75, 130, 141))


def test_the_configuration_of_the_readme_is_complete(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your model, data and reward\n")[2]
    block = [line[4:] for line in text.partition("`megatron-rl check")[0].splitlines() if line.startswith("    ")]
    (tmp_path / "mine.toml").write_text("\n".join(block))
    (tmp_path / "reward.py").write_text("def score(response, answer): return 0.0\n")
    assert load_config(RlConfig, tmp_path / "mine.toml").budget.tokens == 131072


def test_no_cell_of_the_reference_ends_its_table() -> None:
    for table in ("| key | description | type | default | files |", "| key | description | type | default |"):
        rows = docs_reference.keys().split(f"{table}\n")[1].split("\n\n")[0].splitlines()[1:]
        assert {row.replace("\\|", "").count("|") for row in rows} == {table.count("|")}


PAGE = """
Text.

```toml title="a/b.toml"
x = 1
```

```console
$ ls a \\
    | sort
b.toml

$ true
```

```text
$ no command
```
"""


def test_a_page_is_its_files_and_commands_in_order() -> None:
    assert list(steps_of(PAGE)) == [
        File(path="a/b.toml", text="x = 1\n"),
        Command(command="ls a \\\n    | sort", expected=("b.toml",)),
        Command(command="true", expected=()),
    ]


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (["a 1"], "a 1\n", True),
        (["a 1"], "a 2\n", False),
        (["a 1"], "a 1\nb\n", False),
        (["a ... b"], "a 17 b\n", True),
        (["a ... b"], "a 17\n b\n", False),
        (["...", "b", "..."], "a\nx\nb\n", True),
        (["...", "b", "..."], "a\nbc\n", False),
        (["a.c (d)"], "abc (d)\n", False),
    ],
)
def test_dots_stand_for_what_varies_and_nothing_else_does(expected: list[str], printed: str, same: bool) -> None:
    assert matches(tuple(expected), printed) is same


def test_a_page_runs_in_a_folder_of_its_own_and_stops_at_what_is_not_as_it_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        PAGE + "\n```console\n$ test -d tools && wc -l < a/b.toml\n2\n$ touch late\n```\n", encoding="utf-8"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (problem,) = docs_tutorials.run_page(page, folder, show=False)
    assert "printed\n1\n" in problem
    assert not (folder / "late").exists()


def test_a_command_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo no room >&2; exit 3\n```\n", encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (problem,) = docs_tutorials.run_page(page, folder, show=False)
    assert "ended with 3 and said:\nno room" in problem
