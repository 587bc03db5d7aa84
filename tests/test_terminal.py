"""Tests the terminal output: short lines on stdout, warnings on stderr, one line at an interruption."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rank_zero import config_of
from tiny_model import TINY_CONFIG

from megatron_rl.cli import check_environment
from megatron_rl.config.layout import Layout
from megatron_rl.config.lora import LoraSection
from megatron_rl.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_STOPPED, StopRequested, exit_code
from megatron_rl.families import Architecture, architecture_of
from megatron_rl.place import Place
from megatron_rl.terminal import COLUMNS, Eta, fitted, table
from megatron_rl.train.run.overview import ending, overview


def test_a_line_that_is_too_long_loses_its_least_important_parts_and_keeps_the_last() -> None:
    assert fitted(["a", "", "b", "c"]) == "a  b  c"
    line = fitted(["step 12 of 20", "reward 0.500", "x" * 40, "y" * 30, "ETA 5 min"])
    assert line == f"step 12 of 20  reward 0.500  {'x' * 40}  ETA 5 min"
    assert len(line) <= COLUMNS


def test_a_step_line_of_a_long_run_fits() -> None:
    """Check the longest line that the orchestrator writes."""
    parts = ["step 99999 of 100000", "reward -0.500", "no answer 100%", "entropy 12.34", "1.23e+03 s"]
    assert len(fitted([*parts, "ETA 1234.5 h"])) <= COLUMNS


def test_the_time_left_is_that_of_the_last_steps() -> None:
    eta = Eta(100)
    assert eta.after(0, 10.0) == "ETA 16 min"  # 99 steps of 10 s
    for step in range(1, 41):
        said = eta.after(step, 1.0)
    assert said == "ETA 59 s"  # of the last 20 steps each took 1 s
    assert eta.after(99, 1.0) == ""


def test_rows_of_a_table_go_on_below_themselves() -> None:
    lines = table([("a", "word " * 30), ("longer", "x")]).splitlines()
    assert lines[0].startswith("a       word")
    assert lines[1].startswith("        word")
    assert lines[-1] == "longer  x"
    assert max(map(len, lines)) <= COLUMNS


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return architecture_of(TINY_CONFIG)


def test_what_runs_where_is_a_short_table(architecture: Architecture, tmp_path: Path) -> None:
    config = config_of(Path(tmp_path))
    layout = Layout(world_size=4, tensor=2)
    said = overview(config, architecture, layout, Place(), "the CPU", (0, 4), ["http://a:1", "http://b:2"])
    lines = said.splitlines()
    assert lines[0].startswith("model     model, ")
    assert "training  4 ranks on the CPU: tensor 2, data 2; float32" in said
    assert "servers   2 embedded at http://a:1, http://b:2" in said
    assert f"{config.run_dir}, steps 0 to 3" in re.sub(r"\s+", " ", said)
    assert len(lines) <= 6 + 2
    assert "none; responses come from a file" in overview(config, architecture, layout, Place(), "the CPU", (0, 4))
    assert "adapters" not in said
    adapted = config.model_copy(update={"lora": LoraSection(rank=4, targets=["attention", "experts"])})
    said = overview(adapted, architecture, layout, Place(), "the CPU", (0, 4))
    assert "M parameters beside frozen weights, rank 4, attention, experts" in re.sub(r"\s+", " ", said)


def test_the_end_says_where_the_model_is_and_what_comes_next(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    done = ending(config, "train", EXIT_DONE, None, 4)
    assert f"done: 4 steps; the model is in {config.run_dir}/hf\n" in done
    assert "megatron-rl evaluate BENCHMARKS.toml --model" in done
    stopped = ending(config, "train", EXIT_STOPPED, tmp_path / "step_2", 4)
    assert f"the checkpoint is {tmp_path}/step_2\n" in stopped
    assert "the same `megatron-rl train` with --resume" in stopped
    assert "nothing to resume" in ending(config, "sft", EXIT_INTERRUPTED, None, 4)


@pytest.mark.parametrize(
    ("error", "said"), [(KeyboardInterrupt(), "interrupted"), (StopRequested("stopped by X"), "stopped by X")]
)
def test_an_interruption_is_one_line(error: BaseException, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise error

    assert exit_code("megatron-rl convert", run) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == f"megatron-rl convert: {said}\n"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [["keys"], ["keys", "no_such_key"], ["--help"], ["--version"], ["train", "a.toml"]])
def test_a_reader_that_is_gone_costs_no_stack_trace(words: list[str], buffered: bool) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-c", "import sys; from megatron_rl.cli import main; sys.exit(main())", *words]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    expected = {"no_such_key": (2,), "--help": (0, 141)}.get(words[-1], (141,))  # argparse drops a help nobody reads
    assert done.returncode in expected
    assert done.stderr.count("\n") <= 1 and "Error" not in done.stderr


def test_a_broken_pipe_to_something_else_than_a_reader_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise BrokenPipeError(errno.EPIPE, "to a worker")

    assert exit_code("megatron-rl convert", run) == EXIT_FAULT
    assert "to a worker" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_output_for_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-c", "import sys; from megatron_rl.cli import main; sys.exit(main())", "keys", "seed"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "megatron-rl keys: [Errno 28] No space left on device\n")


def test_log_lines_that_nobody_reads_cost_no_stack_trace() -> None:
    script = (
        "import logging, sys\nfrom megatron_rl.errors import exit_code\nfrom megatron_rl.terminal import "
        "configure_logging\nconfigure_logging(sys.stdout)\n"
        "run = lambda: logging.getLogger('megatron_rl.x').info('line') or 0\nsys.exit(exit_code('x', run))\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode in (0, 141) and done.stderr == ""


def test_what_goes_well_is_on_stdout_and_warnings_are_on_stderr() -> None:
    script = (
        "import logging, sys\nfrom megatron_rl.terminal import configure_logging, say\nconfigure_logging(sys.stdout)\n"
        "log = logging.getLogger('megatron_rl.x')\nlog.debug('no'); log.info('well'); log.warning('bad')\n"
        "logging.getLogger('other').info('no'); logging.getLogger('other').warning('theirs')\nsay('line')\n"
    )
    environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb"}
    environment.pop("MEGATRON_RL_LOG", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "well\nline\n"
    assert done.stderr == "warning: bad\nwarning of other: theirs\n"
    environment["MEGATRON_RL_LOG"] = "debug"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "no\nwell\nline\n"


def test_a_command_says_something_before_it_imports_anything_heavy(tmp_path: Path) -> None:
    """Check that a line is shown before anything heavy is imported, which takes several seconds."""
    script = (
        "import sys\nfrom megatron_rl import cli\nwrite = sys.stdout.write\n"
        "def noted(text):\n    write(f'{sorted({*sys.modules} & {*sys.argv[2:]})} {text}')\n"
        "sys.stdout.write = noted\ncli.main(['train', sys.argv[1]])\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "no.toml", "torch", "pydantic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"[] megatron-rl train {tmp_path}/no.toml\n"
    assert "no.toml does not exist" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MEGATRON_RL_LOG", "debgu", "MEGATRON_RL_LOG is 'debgu'; set it to debug or info or warning or error, or"),
        ("MEGATRON_RL_DEVICE", "CPU", "MEGATRON_RL_DEVICE is 'CPU'; set it to cpu, or take it out"),
    ],
)
def test_a_variable_with_a_value_that_would_be_ignored_is_refused(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        check_environment()
    monkeypatch.setenv(name, "")
    monkeypatch.delenv("MEGATRON_RL_DEVICE", raising=False)
    check_environment()
    monkeypatch.setenv("MEGATRON_RL_LOG", "DEBUG")
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")
    check_environment()
