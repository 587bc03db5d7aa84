"""Tests the pool of killable workers: verdicts are right, and hostile items cost only themselves."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from until import wait_until

from megatron_rl.reward.pool import REWARD_KINDS, WAITING_PER_WORKER, WORKER_MEMORY_BYTES, RewardKind, RewardPool
from megatron_rl.reward.verdict import Verdict, make_verdict

# Passes every limit on its text, and takes sympy minutes.
ENDLESS = "\\boxed{\\sum_{k=1}^{9999} k!}"
# What an item that ends may take on the slowest machine.
PATIENCE = 240.0


@pytest.fixture(scope="module")
def math_pool():
    with RewardPool("math", workers=2, timeout_seconds=PATIENCE) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient_pool():
    """Yield a pool that waits 2 s for the hostile item, and for the others as long as a slow machine may take."""
    with RewardPool("math", workers=2, timeout_seconds=2.0) as pool:
        schedule = pool._processes.schedule

        def limited(judge, arguments, seconds):
            return schedule(judge, arguments, seconds if arguments[0] in ENDLESS else PATIENCE)

        pool._processes.schedule = limited
        yield pool


def misbehave(command: str, _answer: str) -> Verdict:
    """Judge by doing what the response says, in the worker."""
    if command == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if command == "raise":
        raise KeyError("as asked")
    if command == "fill":
        bytearray(2 * WORKER_MEMORY_BYTES)
    if command.startswith("wait for "):
        while not os.path.exists(command.removeprefix("wait for ")):
            time.sleep(0.01)
    return make_verdict("correct", seconds=float(os.getpid()))


def fail_to_start() -> None:
    raise OSError("no grammar here")


@pytest.fixture
def misbehaving_kind(monkeypatch):
    monkeypatch.setitem(REWARD_KINDS, "misbehave", RewardKind(settle=lambda text, _: text, judge=misbehave))
    monkeypatch.setitem(
        REWARD_KINDS, "stillborn", RewardKind(settle=lambda text, _: text, judge=misbehave, warm_up=fail_to_start)
    )


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_equal_values_are_correct_and_others_are_not(math_pool):
    cases = [
        ("\\boxed{\\frac{1}{2}}", "0.5", "correct"),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", "correct"),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", "correct"),
        ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", "correct"),
        ("\\boxed{1{,}000}", "1000", "correct"),
        ("\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "correct"),
        ("\\boxed{0.51}", "\\frac{1}{2}", "wrong"),
        ("\\boxed{(2,1)}", "(1,2)", "wrong"),
        ("\\boxed{}", "1", "wrong"),
        ("\\boxed{%s}" % ("1+" * 1200 + "1"), "1201", "wrong"),
        ("it is \\frac{1}{2}", "\\frac{1}{2}", "no_answer"),
        ("\\boxed{\\frac{1}{2}", "\\frac{1}{2}", "no_answer"),
    ]
    verdicts = math_pool.score([(response, answer) for response, answer, _ in cases])
    assert [(case[0], v.reason) for case, v in zip(cases, verdicts, strict=True)] == [(c[0], c[2]) for c in cases]
    assert [v.score for v in verdicts] == [1.0] * 6 + [0.0] * 6


def test_an_equal_string_is_correct_even_where_it_cannot_be_parsed(math_pool):
    assert math_pool.score([("\\boxed{north-west}", "north-west")])[0].reason == "correct"


def test_a_hostile_answer_times_out_and_costs_no_other_item_its_verdict(impatient_pool):
    good = [(f"\\boxed{{{n}.0}}", str(n)) for n in range(20)]
    verdicts = impatient_pool.score([*good[:10], (ENDLESS, "1"), *good[10:]])
    assert [v.reason for v in verdicts] == ["correct"] * 10 + ["timeout"] + ["correct"] * 10
    assert verdicts[10].score == 0.0
    assert verdicts[10].seconds == 2.0


def test_async_scores_are_those_of_items_that_wait_for_each_other(impatient_pool):
    async def score_all() -> list[Verdict]:
        responses = ["\\boxed{0.5}", ENDLESS, "\\boxed{3}", "none"]
        return await asyncio.gather(*(impatient_pool.score_async(text, "\\frac{1}{2}") for text in responses))

    assert [v.reason for v in asyncio.run(score_all())] == ["correct", "timeout", "wrong", "no_answer"]


@pytest.mark.usefixtures("misbehaving_kind")
def test_async_scores_leave_the_event_loop_free(tmp_path):
    """Check that the loop goes on while an item is judged: the item does not end before the loop has gone on."""

    async def tick() -> None:
        for _ in range(10):
            await asyncio.sleep(0.01)
        (tmp_path / "ticked").touch()

    async def score_while_ticking() -> Verdict:
        verdict, _ = await asyncio.gather(pool.score_async(f"wait for {tmp_path}/ticked", ""), tick())
        return verdict

    with RewardPool("misbehave", workers=1, timeout_seconds=PATIENCE) as pool:
        assert asyncio.run(score_while_ticking()).reason == "correct"


@pytest.mark.usefixtures("misbehaving_kind")
def test_a_worker_that_crashes_or_raises_or_fills_memory_is_an_error_of_its_item_only():
    with RewardPool("misbehave", workers=1, timeout_seconds=PATIENCE) as pool:
        verdicts = pool.score([(command, "") for command in ("good", "die", "good", "raise", "fill", "good")])
    assert [v.reason for v in verdicts] == ["correct", "error", "correct", "error", "error", "correct"]
    assert [v.details.partition(":")[0] for v in verdicts] == ["", "ProcessExpired", "", "KeyError", "MemoryError", ""]
    # the crash cost a process; the exception and the memory limit did not
    pids = [verdicts[index].seconds for index in (0, 2, 5)]
    assert pids[0] != pids[1]
    assert pids[1] == pids[2]


@pytest.mark.usefixtures("misbehaving_kind")
def test_items_are_taken_only_as_workers_get_to_them():
    taken = 0

    def items():
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield "good", ""

    with RewardPool("misbehave", workers=1, timeout_seconds=PATIENCE) as pool:
        schedule, ahead = pool._schedule, []

        def counted(boxed, answer):
            ahead.append(taken - sum(future.done() for future in futures))
            futures.append(schedule(boxed, answer))
            return futures[-1]

        futures = []
        pool._schedule = counted
        assert [v.reason for v in pool.score(items())] == ["correct"] * 200
    assert max(ahead) <= WAITING_PER_WORKER + 1


@pytest.mark.usefixtures("misbehaving_kind")
def test_the_pool_survives_a_worker_that_was_killed_while_idle():
    with RewardPool("misbehave", workers=1, timeout_seconds=PATIENCE) as pool:
        pid = int(pool.score([("good", "")])[0].seconds)
        for is_known in (True, False):  # to pebble, when the next item comes
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_running(pid), f"worker {pid} has ended")
            if is_known:
                wait_until(lambda: not pool._processes._processes.active, "pebble has given up its workers")
            again = pool.score([("good", "")])[0]
            assert again.reason == "correct"
            assert again.seconds != pid
            assert asyncio.run(pool.score_async("good", "")).reason == "correct"
            pid = int(again.seconds)


@pytest.mark.usefixtures("misbehaving_kind")
def test_workers_that_cannot_start_raise_instead_of_scoring_everything_zero():
    with (
        RewardPool("stillborn", workers=1, timeout_seconds=PATIENCE) as pool,
        pytest.raises(RuntimeError, match="workers end before they take an item"),
    ):
        pool.score([("good", "")])


@pytest.mark.usefixtures("misbehaving_kind")
def test_close_ends_every_worker_and_later_use_is_refused():
    pool = RewardPool("misbehave", workers=2, timeout_seconds=PATIENCE)
    pids = {int(v.seconds) for v in pool.score([("good", "")] * 8)}
    pool.close()
    pool.close()
    assert pids
    assert not any(is_running(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        pool.score([("good", "")])


def test_a_busy_worker_does_not_outlive_a_killed_owner():
    # The owner prints its worker's pid once the hostile item is running, then waits to be killed.
    code = (
        "import sys, time, psutil\n"
        "from megatron_rl.reward.pool import RewardPool\n"
        "if __name__ == '__main__':\n"
        "    pool = RewardPool('math', workers=1, timeout_seconds=10**6)\n"
        "    pool.score([('\\\\boxed{y}', 'x')])\n"
        "    future = pool._schedule(sys.argv[1][7:-1], 'x')\n"
        "    while not future.running(): time.sleep(0.01)\n"
        "    print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n"
        "    time.sleep(10**6)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, ENDLESS], stdout=subprocess.PIPE, text=True)
    pids: list[int] = []
    try:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) >= 2
        assert all(is_running(pid) for pid in pids)
    finally:
        owner.kill()
        owner.wait()
    try:
        wait_until(lambda: not any(is_running(pid) for pid in pids), f"the processes {pids} of the owner have ended")
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def test_the_exact_kind_runs_inline_and_starts_no_process():
    with RewardPool("exact", workers=2, timeout_seconds=1.0) as pool:
        verdicts = pool.score([("\\boxed{4}", "4"), ("\\boxed{5}", "4"), ("4", "4")])
        assert asyncio.run(pool.score_async("\\boxed{4}", "4")).score == 1.0
        assert pool._processes._processes is None
    assert [v.reason for v in verdicts] == ["correct", "wrong", "no_answer"]


def test_wrong_settings_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="one of choice, exact, math, stem, got 'maths'"):
        RewardPool("maths", workers=1, timeout_seconds=1.0)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        RewardPool("math", workers=0, timeout_seconds=1.0)
    with pytest.raises(ValueError, match="timeout_seconds must be above 0, got 0"):
        RewardPool("math", workers=1, timeout_seconds=0.0)
