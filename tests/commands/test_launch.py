"""Tests how ranks are started, meet and end together: exit codes, signals, faults, and other launchers' variables."""

import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from inputs import make_inputs
from ports import free_port

from megatron_rl import launch
from megatron_rl.errors import Fault, SharedFault, Stopped, StopRequested, exit_code
from megatron_rl.place import Place, own_place
from megatron_rl.rollout.append_log import told_of_resume

ROOT = Path(__file__).parents[2]
CONFIG = """
run_dir = "{folder}/run"
threads = 1
[model]
path = "{inputs}/model"
[data]
train = "{inputs}/data/sft.jsonl"
batch_tokens = 400
[train]
steps = 20000
save_every = 0
micro_batch_tokens = 400
phase_deadline_seconds = 900
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 200, 100, 8)


class Run:
    """Runs `megatron-rl sft` in a process of its own. site: code that it and its ranks run before anything else."""

    def __init__(
        self, inputs: Path, folder: Path, *options: str, site: str = "", prefix: tuple[str, ...] = (), **env: str
    ) -> None:
        """Start the run. prefix: a command that runs the rest."""
        folder.mkdir(exist_ok=True)
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder=folder, inputs=inputs))
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site/sitecustomize.py").write_text(site)
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | env
        environment["PYTHONPATH"] = f"{folder}/site:{ROOT}"
        self.log = folder / f"log{env.get('RANK', '')}"
        if not prefix or prefix[0] == "unshare":
            prefix = (*prefix, sys.executable)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, "-m", "megatron_rl.cli", "sft", str(config), *options],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, what: str, seconds: float = 600) -> None:
        give_up = time.monotonic() + seconds
        while not re.search(what, self.said):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < give_up, f"still waiting for {what!r}: {self.said}"
            time.sleep(0.05)

    def finish(self, code: int) -> str:
        """Return the output after an end with `code`, long before a phase has its deadline. Check that none of the
        processes is left."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        assert self.process.wait(400) == code, self.said[-4000:]
        _, left = psutil.wait_procs(family, timeout=300)
        assert not left
        return self.said


@contextlib.contextmanager
def running(*runs: Run) -> Iterator[None]:
    try:
        yield
    finally:
        for run in runs:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(run.process.pid).children(recursive=True)
                run.process.kill()
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            run.process.wait()


LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def left_by_another(port: int, rank: int = 0) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


# -- what the launcher makes of its ranks' ends --------------------------------------------------------------------


def process(end: str, seconds: float = 0.0, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-S", "-c", f"import os, time\ntime.sleep({seconds})\n{end}"], **options)


def with_handler(handler: str) -> "subprocess.Popen[bytes]":
    """Start a process that waits for a long time. Return it when it has this handler of SIGTERM."""
    code = f"import signal\nsignal.signal(signal.SIGTERM, {handler})\nprint(flush=True)\ntime.sleep(1000)"
    found = process(code, stdout=subprocess.PIPE)
    assert found.stdout is not None
    assert found.stdout.readline() == b"\n"
    return found


class Scripted:
    """Stands for a rank that is seen to have ended with `code` at the look with this number."""

    def __init__(self, code: int, look: int) -> None:
        self.returncode, self._looks_left = code, look

    def poll(self) -> int | None:
        self._looks_left -= 1
        return self.returncode if self._looks_left < 0 else None


def test_the_exit_code_is_that_of_the_first_fault_and_75_only_where_nothing_worse_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_LOOK_EVERY_SECONDS", 0.0)
    meaning = {0: 0, 75: 75, 2: 2, 1: 1, 130: 130, 3: 3}
    meaning |= {-signal.SIGKILL: 1, -signal.SIGSEGV: 1, -signal.SIGTERM: 130, -signal.SIGINT: 130, -signal.SIGUSR1: 130}
    for ends in itertools.product(meaning, repeat=3):
        worse = [meaning[end] for end in ends if end not in (0, 75)]
        expected = worse[0] if worse else max(ends)
        for places in itertools.permutations(range(3)):  # which rank ends when
            ranks: list[Any] = [Scripted(ends[look], look) for look in places]
            assert launch._watch(ranks) == expected, (ends, places)


def test_after_a_fault_the_others_are_ended_kindly_and_then_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PATIENCE_AFTER_A_FAULT_SECONDS", 0.5)
    monkeypatch.setattr(launch, "_KINDNESS_SECONDS", 1.0)
    deaf, kind = with_handler("signal.SIG_IGN"), with_handler("lambda *_: os._exit(75)")
    ranks = [deaf, process("os._exit(7)"), kind, process("time.sleep(1000)")]
    ranks[1].wait()
    now = 0.0

    def sleep(seconds: float) -> None:
        """Go on with the clock, but stand still in the time of kindness until those who obey have ended."""
        nonlocal now
        time.sleep(0.01)
        assert now > 1.6 or deaf.poll() is None
        if now < 1.5 or all(rank.poll() is not None for rank in ranks[2:]):
            now += seconds

    # The fault is seen at 0.1, SIGTERM comes behind 0.6, and SIGKILL behind 1.7.
    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    try:
        assert launch._watch(ranks) == 7
        assert 1.7 < now < 2.2
        assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 7, 75, -signal.SIGTERM]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_who_ends_well_ends_nobody_and_a_clean_stop_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PATIENCE_AFTER_A_FAULT_SECONDS", 0.0)
    assert launch._watch([process("os._exit(0)"), process("os._exit(0)", 1.0)]) == 0
    assert launch._watch([process("os._exit(75)"), process("os._exit(75)", 1.0)]) == 75


# -- whole runs: a rank goes ------------------------------------------------------------------------------------------

# The first rank to train goes on `place` with this; the other waits in a collective of the same step.
GOES = """
import os
if os.environ.get("RANK") == "1":
    from megatron_rl.train.step.trainer import Trainer
    def goes(*_):
        {how}
    Trainer.train_step = goes
"""
# A collective over NCCL does not end when a peer is gone, and while a process is inside of one it handles no signal.
STUCK = """
if os.environ.get("RANK") == "0":
    import ctypes
    from megatron_rl.train.step.trainer import Trainer
    def waits(*_):
        print("in a collective", flush=True)
        while True:
            ctypes.CDLL(None).sleep(60)
    Trainer.train_step = waits
"""
# A busy machine may take longer over the words of rank 0 than the launcher usually waits for them.
PATIENT = """
if "RANK" not in os.environ:
    from megatron_rl import launch
    launch._KINDNESS_SECONDS = 300.0
"""
FAULT = "from megatron_rl.errors import Fault; raise Fault('told by rank 1')"


@pytest.mark.parametrize(
    ("how", "site", "told"),
    [
        (FAULT, "", "megatron-rl sft: told by rank 1"),
        (FAULT, STUCK, "ending rank 0 by force"),
        ("os.kill(os.getpid(), 9)", "", "rank 1 was ended by SIGKILL; was memory full?"),
        ("{}[1]", "", "KeyError"),
    ],
    ids=["fault", "fault beside a stuck rank", "killed", "bug"],
)
def test_a_rank_that_goes_ends_the_run_within_seconds_with_its_code(
    inputs: Path, tmp_path: Path, how: str, site: str, told: str
) -> None:
    run = Run(inputs, tmp_path, "--nproc", "2", site=GOES.replace("{how}", how) + (site or PATIENT))
    with running(run):
        said = run.finish(1)
    assert told in said
    if how == FAULT:
        assert "told by rank 1" in said
    if not site and how != "{}[1]":
        assert "lost contact with another rank" in said  # rank 0 could say so itself
        assert "Traceback" not in said


def test_torchrun_ends_the_others_when_a_rank_has_a_fault(inputs: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--local_addr", "127.0.0.1")
    torchrun += ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}")
    run = Run(inputs, tmp_path, site=GOES.replace("{how}", FAULT), prefix=torchrun)
    with running(run):
        said = run.finish(1)
    assert "megatron-rl sft: told by rank 1" in said
    assert re.search(r"exitcode +: 1 ", said)


def test_ranks_that_no_launcher_watches_end_with_their_own_codes(inputs: Path, tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        Run(inputs, tmp_path, site=GOES.replace("{how}", FAULT), **left_by_another(port, rank)) for rank in range(2)
    ]
    with running(*ranks):
        assert "told by rank 1" in ranks[1].finish(1)
        assert "lost contact with another rank" in ranks[0].finish(1)


# -- whole runs: signals ----------------------------------------------------------------------------------------------


# Ranks wait for each other for ever.
APART = """
import os
print("up", flush=True)
if "RANK" in os.environ:
    import time
    from megatron_rl import stores
    def apart(place, seconds, check):
        while True:
            check()
            time.sleep(0.02)
    stores.join = apart
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_there_is_anything_to_save_ends_every_rank_with_130(
    inputs: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = Run(inputs, tmp_path, "--nproc", "2", site=APART)
    with running(run):
        run.until("(?s)(up\n.*){3}")  # the ranks' interpreters run, and have not met
        run.process.send_signal(number)
        said = run.finish(130)
    assert "Traceback" not in said.replace("Exception ignored", "")
    assert not (tmp_path / "run/checkpoints/latest").exists()


def test_a_signal_behind_a_step_saves_and_ends_with_75_as_often_as_it_is_resumed(inputs: Path, tmp_path: Path) -> None:
    for resume, number in (((), signal.SIGUSR1), (("--resume",), signal.SIGINT)):
        run = Run(inputs, tmp_path, "--nproc", "2", *resume)
        with running(run):
            run.until("step [0-9]+ of 20000")
            run.process.send_signal(number)
            run.finish(75)
        assert (tmp_path / "run/checkpoints/latest").exists()


# -- meeting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_rank_that_nobody_joins_says_for_whom_it_waits_and_obeys_a_signal_at_once(
    inputs: Path, tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    port = free_port()
    run = Run(inputs, tmp_path, **left_by_another(port, rank))
    with running(run):
        run.until("waits at")
        run.process.send_signal(number)
        said = " ".join(run.finish(130).split())
    assert f"rank {rank} of 2 (RANK, WORLD_SIZE) waits at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)" in said
    assert ("for 1 of 2 ranks: 1" if rank == 0 else "for rank 0, which is not there") in said
    assert "`unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT`" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_rank_gives_up_on_those_who_do_not_come(inputs: Path, tmp_path: Path) -> None:
    run = Run(inputs, tmp_path, "--set", "train.phase_deadline_seconds=7", **left_by_another(free_port()))
    with running(run):
        said = run.finish(2)
    assert "for 1 of 2 ranks: 1 after 7 s (train.phase_deadline_seconds)" in said


def test_what_has_the_port_and_is_no_rank_0_is_named(inputs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = int(other.getsockname()[1])
        runs = [Run(inputs, tmp_path, **left_by_another(port, rank)) for rank in range(2)]
        with running(*runs):
            assert f"rank 0 cannot listen on MASTER_PORT {port} of this machine" in runs[0].finish(2)
            runs[1].until("what listens there may be another program than rank 0")
            runs[1].process.send_signal(signal.SIGTERM)
            runs[1].finish(130)


def test_two_processes_of_one_rank_are_told(inputs: Path, tmp_path: Path) -> None:
    port = free_port()
    ranks = [Run(inputs, tmp_path / str(i), **left_by_another(port, rank)) for i, rank in enumerate((0, 1, 1))]
    with running(*ranks):
        give_up = time.monotonic() + 600
        while all(rank.process.poll() is None for rank in ranks[1:]):
            assert time.monotonic() < give_up, f"neither has ended: {[rank.said for rank in ranks]}"
            time.sleep(0.1)
        (second,) = (rank for rank in ranks[1:] if rank.process.poll() is not None)
        assert second.process.returncode == 2
        assert "as rank 1 of this run" in second.said


def test_a_machine_whose_own_name_does_not_resolve_trains(inputs: Path, tmp_path: Path) -> None:
    name = "no-such-host-of-the-tests"
    alone = ["unshare", "--uts", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*alone, "hostname", name], check=False).returncode:
        pytest.skip("this machine does not let a test change the host name for itself (unshare --uts)")
    with pytest.raises(OSError, match="."):
        socket.getaddrinfo(name, 80)
    prefix = (*alone, "sh", "-c", f'hostname {name}; exec "$@"', "sh")
    run = Run(inputs, tmp_path, "--nproc", "2", "--set", "train.steps=1", prefix=prefix)
    with running(run):
        run.finish(0)
    assert (tmp_path / "run/hf/config.json").exists()


# -- exit codes of one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, False),
        (ValueError("wrong"), 2, True),
        (Fault("broken"), 1, True),
        (SharedFault("broken"), 1, True),
        (OSError(errno.ENOSPC, "full"), 1, True),
        (KeyError("a bug"), 1, True),
        (Stopped(), 75, False),
        (StopRequested(), 130, True),
        (KeyboardInterrupt(), 130, True),
    ],
)
def test_every_end_has_its_code(error: BaseException | None, code: int, told: bool, capsys: Any) -> None:
    def run() -> int:
        if error is not None:
            raise error
        return 0

    assert exit_code("p", run) == code
    assert bool(capsys.readouterr().err) == told


def test_a_signal_is_a_stop_where_there_are_responses_and_else_an_interruption(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    for responses, error, expected in (
        ("", KeyboardInterrupt, KeyboardInterrupt),
        ("{}", KeyboardInterrupt, Stopped),
        ("", Fault, Fault),
        ("{}", Fault, Fault),
    ):
        file.write_text(responses)
        with pytest.raises(expected), told_of_resume(tmp_path, [tmp_path / "none", file]):
            raise error


HANDLED = """
import os, sys, time
from megatron_rl.errors import exit_code, interrupt_on_signals
def run():
    interrupt_on_signals()
    print("ready", flush=True)
    time.sleep(1000)
    return 0
sys.exit(exit_code("p", run))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_interrupts_a_command_also_where_a_script_started_it_in_the_background(
    number: signal.Signals,
) -> None:
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring, sys.executable, "-c", HANDLED], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(300) == 130


def test_a_job_goes_back_into_the_queue_only_for_what_can_go_on(tmp_path: Path) -> None:
    script = ROOT / "examples/ring_lite/slurm/job.sh"
    fakes = "say() { :; }; squeue() { echo RUNNING; }; scontrol() { echo requeued; }; tail() { :; }; "
    for signalled in (0, 1):
        for code in (0, 1, 2, 75, 130, 137, 138):
            job = f"SLURM_JOB_ID=1; logs=/; signalled={signalled}; {fakes}"
            job += f"eval \"$(sed -n '/^finish/,/^}}/p' {script})\"; finish {code}"
            done = subprocess.run(["bash", "-euc", job], capture_output=True, text=True, check=False)
            again = code == 75 or (signalled == 1 and code in (130, 138))
            assert (done.returncode, done.stdout) == (code, "requeued\n" if again else ""), (code, signalled)


# -- the environment --------------------------------------------------------------------------------------------------

WHOLE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
WHOLE |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_place_is_what_a_launcher_says() -> None:
    whole = Place(rank=5, world_size=8, local_rank=1, local_world_size=4, node=1, address="node0", port=29500)
    assert own_place(WHOLE) == whole
    assert whole.num_nodes == 2
    assert own_place({"MASTER_ADDR": "node0", "LOCAL_RANK": "3"}) == Place()  # serve knows the first alone
    assert own_place({"RANK": "0", "WORLD_SIZE": "1"}) == Place()


def test_an_environment_that_no_launcher_makes_is_refused_by_name_with_the_remedy() -> None:
    for name in WHOLE:
        with pytest.raises(ValueError, match=rf"\b{name} is missing; when no launcher .*`unset "):
            own_place({key: value for key, value in WHOLE.items() if key != name})
    bad = {
        "RANK": ("8", "-1", "x", "", "1.0", "٣"),
        "WORLD_SIZE": ("0", "5", "-8", "eight"),
        "LOCAL_RANK": ("4", "-1"),
        "LOCAL_WORLD_SIZE": ("0", "9"),
        "GROUP_RANK": ("8", "x"),
        "MASTER_PORT": ("0", "65536", "http"),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=r"in the environment is no number .*`unset "):
                own_place(WHOLE | {name: value})


@pytest.mark.parametrize(
    ("environment", "options", "told"),
    [
        ({"RANK": "1"}, (), "RANK=1 in the environment, and WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "2"}, (), "WORLD_SIZE=2 in the environment, and RANK is missing"),
        (left_by_another(1), ("--nproc", "2"), "--nproc starts ranks, and RANK or WORLD_SIZE says that this is one"),
        (left_by_another(1, 1), ("--set", "train.stpes=1"), "unknown key train.stpes"),
        ({}, ("--nproc", "0"), "--nproc must be at least 1, got 0"),
    ],
)
def test_a_mistake_in_the_environment_is_told_by_whatever_rank(
    inputs: Path, tmp_path: Path, environment: dict[str, str], options: tuple[str, ...], told: str
) -> None:
    run = Run(inputs, tmp_path, *options, **environment)
    with running(run):
        assert told in run.finish(2)
