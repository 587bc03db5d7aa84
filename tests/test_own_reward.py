"""Tests reward functions of the user's own: their arguments, their results, and what they cannot break."""

import asyncio
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from until import wait_until

from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.prompts import Prompt
from megatron_rl.own_functions import source_digest
from megatron_rl.reward import Score, functions
from megatron_rl.reward import own as own_module
from megatron_rl.reward.own import OUTPUT
from megatron_rl.reward.own_worker import OUTPUT_BYTES
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt, verdict_of
from megatron_rl.reward.verdict import Verdict
from megatron_rl.rollout.provenance import reward_settings

TASK = Prompt(id="p1", domain="math", prompt="What is 1 + 1?", answer="2", meta={"level": 3})
LIMIT = 256 * 1024**2

# One file, so that one pool of workers shows most of it: what a response says is what the function does with it.
OBEDIENT = """
import asyncio, json, os, sys, threading, time
from megatron_rl.reward import Score

shared = {"calls": 0}

def make():
    scale = 0.5
    return lambda response: scale * len(response)

closure = make()

def obey(response, answer, prompt, messages, meta, domain, id, finish_reason, response_tokens):
    match response:
        case "all":
            told = (answer, prompt, messages, meta, domain, id, finish_reason, response_tokens)
            return Score(-2.5, details="|".join(map(str, told)))
        case "raise":
            return meta["no such column"]
        case "library":
            return json.loads('{"score": ')
        case "group":
            return several()
        case "none":
            return None
        case "string":
            return "0.5"
        case "nan":
            return float("nan")
        case "huge":
            return 10**400
        case "list":
            return [1.0]
        case "lambda":
            return lambda: 1
        case "reason":
            return Score(1.0, reason="nice")
        case "part":
            return Score(1.0, parts={"form": "high"})
        case "coroutine":
            return later(0.75)
        case "true":
            return True
        case "exit":
            sys.exit(3)
        case "die":
            os.kill(os.getpid(), 9)
        case "hang":
            while True: pass
        case "fill":
            kept = []
            while True: kept.append(bytearray(b"x") * 2**24)
        case "fill elsewhere":
            if os.fork() == 0:
                kept = []
                while True: kept.append(bytearray(b"x") * 2**24)
            time.sleep(10**6)
        case "fork":
            os.fork()
            return 0.25
        case "fork and die":
            if os.fork() == 0:
                time.sleep(10**6)
            print("left a child of", os.getpid(), file=sys.stderr)
            os._exit(7)
        case "print":
            for _ in range(40): print("y" * 2**20)
            print("the end")
            return 1
        case "read":
            return len(sys.stdin.read())
        case "thread":
            threading.Thread(target=lambda: time.sleep(0.01)).start()
            return 1
    return float(response)

async def later(value):
    await asyncio.sleep(0)
    return value

async def several():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(one_of_them())

async def one_of_them():
    raise ConnectionError("the judge is away")

async def patient(response):
    if response == "hang":
        shared["hangs"] = True
        try:
            await asyncio.sleep(10**6)
        finally:
            shared["hangs"] = False
    await asyncio.sleep(0.2)
    return later(1.0) if response == "forgotten" else float(response) * shared["hangs"]

def ranks(responses, response_tokens, finish_reasons, answer):
    if responses[0] == "few":
        return [1.0]
    if responses[0] == "number":
        return 1.0
    order = sorted(responses, key=float)
    return [Score(order.index(one) - 1.0, parts={"tokens": n}) for one, n in zip(responses, response_tokens)]

def misspelt(response, anwser="x"): return 1
def unknown(response, colour): return 1
def everything(**kwargs): return len(kwargs)
def slash(response, /): return 1
class Callable:
    def __call__(self, response, scale=2.0): return scale * len(response)
instance = Callable()
number = 5

def combined(response, answer):
    from megatron_rl.reward import functions
    right = functions.math(response, answer)
    return Score(right.value - 0.5, reason=right.reason)
"""


def score(
    section: RewardSection, texts: Sequence[str], task: Prompt = TASK, folder: Path | None = None
) -> list[Verdict]:
    with Rewards(section, folder) as rewards:
        return asyncio.run(rewards.verdicts(task, [Attempt(text=text, num_tokens=len(text)) for text in texts]))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "rewards.py"
    path.write_text(OBEDIENT)
    return path


@pytest.fixture(scope="module")
def rewards(file: Path) -> Iterator[Rewards]:
    section = RewardSection(kind=f"{file}:obey", workers=1, timeout_seconds=240, memory_bytes=LIMIT)
    with Rewards(section, file.parent) as made:
        yield made


@pytest.fixture(scope="module")
def judged(rewards: Rewards) -> Any:
    """Return a function that judges texts by `obey`, each as the response to a prompt of its own."""

    def judge(*texts: str) -> list[Verdict]:
        async def all_of() -> list[Verdict]:
            found = [await rewards.verdicts(TASK, [Attempt(text=one, num_tokens=len(one))]) for one in texts]
            return [verdict for verdicts in found for verdict in verdicts]

        return asyncio.run(all_of())

    return judge


def test_a_function_is_called_with_what_its_parameters_name(judged: Any) -> None:
    (verdict,) = judged("all")
    messages = "[{'role': 'user', 'content': 'What is 1 + 1?'}]"
    assert verdict.details == f"2|What is 1 + 1?|{messages}|{{'level': 3}}|math|p1|stop|3"
    assert (verdict.score, verdict.reason) == (-2.5, "wrong")


def test_a_number_a_bool_and_a_coroutine_are_scores(judged: Any) -> None:
    found = judged("0.5", "-1", "true", "coroutine", "3")
    assert [(v.score, v.reason) for v in found] == [
        (0.5, "wrong"), (-1.0, "wrong"), (1.0, "correct"), (0.75, "wrong"), (3.0, "correct"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise", r"KeyError: 'no such column' < rewards.py line \d+ in obey: return meta\[\"no such column\"\]"),
        # The place is the user's, not the library's that raised.
        ("library", r"JSONDecodeError: [^<]* < rewards.py line \d+ in obey: return json.loads\('\{\"score\": '\)$"),
        ("group", r"\(1 sub-exception\): ConnectionError: the judge is away < rewards.py line \d+ in one_of_them"),
        ("none", "it returned None; every way through it must end in `return`"),
        ("string", "it returned '0.5', a str, and must be a number"),
        ("nan", "it returned nan, and must be a finite number"),
        ("huge", "it returned inf, and must be a finite number"),
        ("list", r"it returned \[1.0\], a list"),
        ("lambda", "it returned <function .*, a function"),
        ("reason", "the reason of its Score is 'nice'; it must be one of correct, wrong"),
        ("part", "the part 'form' of its Score is 'high', a str"),
        ("exit", r"SystemExit: 3 < rewards.py line \d+ in obey: sys.exit\(3\)"),
        ("die", "it ended its worker by SIGKILL"),
    ],
)
def test_what_is_no_score_is_an_error_that_says_why_and_the_next_response_is_judged(
    judged: Any, text: str, told: str
) -> None:
    failed, after = judged(text, "0.5")
    assert failed.reason == "error"
    assert re.search(told, failed.details), failed.details
    assert (after.score, after.reason) == (0.5, "wrong")


def test_a_function_that_hangs_costs_its_own_response_alone(judged: Any, rewards: Rewards) -> None:
    own: Any = rewards._judges[rewards._section.kind]
    with pytest.MonkeyPatch.context() as patch:  # what does not hang has more time: the machine may be slow
        patch.setattr(own, "_section", own._section.model_copy(update={"timeout_seconds": 1.5}))
        (hung,) = judged("hang")
    (after,) = judged("0.5")
    assert (hung.reason, hung.details) == ("timeout", "not done after 1.5 s (reward.timeout_seconds)")
    assert after.score == 0.5


@pytest.mark.parametrize("text", ["fill", "fill elsewhere"])
def test_memory_is_limited_for_a_worker_and_what_it_starts(judged: Any, text: str) -> None:
    failed, after = judged(text, "0.5")
    assert (failed.reason, failed.details) == ("error", "it took more than 0.25 GiB of memory (reward.memory_bytes)")
    assert after.score == 0.5


def test_a_function_that_forks_is_judged_once_and_leaves_nothing_behind(judged: Any, file: Path) -> None:
    assert [v.score for v in judged("fork", "0.5", "0.75")] == [0.25, 0.5, 0.75]
    died, after = judged("fork and die", "0.5")
    assert (died.reason, died.details, after.score) == ("error", "it ended its worker by exit code 7", 0.5)
    output = (file.parent / OUTPUT).read_text(errors="replace")
    worker = int(output.rpartition("left a child of ")[2].split()[0])
    wait_until(lambda: not _processes_of_group(worker), f"no process of the group of worker {worker} is left")


def _processes_of_group(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_what_it_prints_goes_to_a_file_that_stays_short(judged: Any, file: Path) -> None:
    assert [v.score for v in judged("print", "read")] == [1.0, 0.0]
    path = file.parent / OUTPUT
    wait_until(lambda: path.stat().st_size <= OUTPUT_BYTES + 2**20, f"{path} is short")
    wait_until(lambda: "(what was here before is gone" in path.read_text(), f"{path} says that its begin is gone")


def test_of_the_responses_to_a_prompt_one_that_dies_takes_the_mean_of_the_others(rewards: Rewards) -> None:
    texts = ["-3", "die", "-1", "raise"]
    for _ in range(2):  # one by one, and together
        rewards._judges[rewards._section.kind]._seconds = 0.0  # type: ignore[attr-defined]
        found = asyncio.run(rewards.verdicts(TASK, [Attempt(text=text) for text in texts]))
        assert [(v.score, v.reason) for v in found] == [
            (-3.0, "wrong"),
            (-2.0, "error"),
            (-1.0, "wrong"),
            (-2.0, "error"),
        ]


def test_fast_functions_get_the_responses_of_several_prompts_as_one_item(rewards: Rewards, monkeypatch: Any) -> None:
    own = rewards._judges[rewards._section.kind]
    monkeypatch.setattr(own, "_seconds", 0.0)
    counts = []
    run = own._run  # type: ignore[attr-defined]

    async def counted(function: Any, arguments: Any) -> Any:
        counts.append([asked.count for asked in arguments[0]])
        return await run(function, arguments)

    monkeypatch.setattr(own, "_run", counted)

    async def all_of() -> list[list[Verdict]]:
        groups = [[Attempt(text=str(10 * g + n)) for n in range(8)] for g in range(20)]
        return list(await asyncio.gather(*(rewards.verdicts(TASK, group) for group in groups)))

    found = asyncio.run(all_of())
    assert [[v.score for v in group] for group in found] == [[10 * g + n for n in range(8)] for g in range(20)]
    # Two items for the one worker, then all that has waited meanwhile, at most sixteen prompts.
    assert counts == [[8], [8], [8] * 16, [8] * 2]


def test_async_calls_of_a_prompt_wait_together_and_one_that_hangs_costs_itself(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_module, "_GRACE_SECONDS", 240.0)
    # The others are done after 0.2 s, and have the same limit: it is one that no slow machine needs.
    section = RewardSection(kind=f"{file}:patient", workers=1, timeout_seconds=12.0)
    with Rewards(section, file.parent) as made:
        own: Any = made._judges[section.kind]
        run, counts = own._run, []

        async def counted(function: Any, arguments: Any) -> Any:
            counts.append(arguments[0].count)
            return await run(function, arguments)

        monkeypatch.setattr(own, "_run", counted)
        texts = ["hang", "forgotten", *["1"] * 10]
        found = asyncio.run(made.verdicts(TASK, [Attempt(text=text) for text in texts]))
    # Correct is who is done while the first one hangs.
    assert [v.reason for v in found] == ["timeout", "error", *["correct"] * 10]
    assert "a coroutine, and must be a number, a bool or a Score; write `await` before the call" in found[1].details
    assert counts == [12], "all of them are one item"


def test_a_function_with_responses_gets_the_whole_group(file: Path) -> None:
    with Rewards(RewardSection(kind=f"{file}:ranks", workers=1, timeout_seconds=240), file.parent) as made:

        def group(*texts: str) -> list[Verdict]:
            attempts = [Attempt(text=text, num_tokens=10 * i) for i, text in enumerate(texts)]
            return asyncio.run(made.verdicts(TASK, attempts))

        found = group("0.3", "0.1", "0.2")
        assert [(v.score, v.parts) for v in found] == [
            (1.0, {"tokens": 0.0}),
            (-1.0, {"tokens": 10.0}),
            (0.0, {"tokens": 20.0}),
        ]
        assert [v.details for v in group("few", "1")] == [
            "it returned 1 scores for 2 responses, and must return one for each"
        ] * 2
        assert "must return a list with a score for each" in group("number", "1")[0].details


def test_a_closure_an_instance_and_a_built_in_kind_can_be_used(file: Path) -> None:
    assert [v.score for v in score(RewardSection(kind=f"{file}:closure", workers=1, timeout_seconds=240), ["abc"])] == [
        1.5
    ]
    assert [
        v.score for v in score(RewardSection(kind=f"{file}:instance", workers=1, timeout_seconds=240), ["abc"])
    ] == [6.0]
    half = Prompt(id="p", domain="d", prompt="?", answer="0.5")
    found = score(
        RewardSection(kind=f"{file}:combined", workers=1, timeout_seconds=240),
        ["\\boxed{\\frac12}", "\\boxed{1}", "x"],
        half,
    )
    assert [(v.score, v.reason) for v in found] == [(0.5, "correct"), (-0.5, "wrong"), (-0.5, "no_answer")]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("obei", r"has no function 'obei'; it has .*Did you mean 'obey'\?"),
        ("number", "'number' of .* is no function but int"),
        ("misspelt", r"nothing is called 'anwser'. Did you mean 'answer'\?(.|\n)*finish_reason: str"),
        ("unknown", r"nothing is called 'colour'. Parameters may be\n  response: str"),
        ("slash", "parameter 'response' is positional-only"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_what_is_known(file: Path, name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        score(RewardSection(kind=f"{file}:{name}", workers=1, timeout_seconds=240), ["1"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "names the file .*, which does not exist; it is looked for beside the configuration"),
        (
            "def score(response:\n    return 1\n",
            r"wrong.py line 1 is no Python \('\(' was never closed\): 'def score\(response:'",
        ),
        ("import sys\nsys.exit(1)\n", "importing .*wrong.py failed: SystemExit: 1 < wrong.py line 2"),
        ("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library' < wrong.py line 1"),
        ("import os\nos._exit(0)\n", "the worker that imports its file ended"),
    ],
)
def test_a_file_that_does_not_import_is_one_message(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(ValueError, match=told):
        score(RewardSection(kind=f"{tmp_path}/wrong.py:score", workers=1, timeout_seconds=240), ["1"], folder=tmp_path)


def test_a_module_is_imported_by_its_name_and_one_that_is_missing_is_named() -> None:
    assert (
        score(RewardSection(kind="megatron_rl.reward.functions:exact", workers=1, timeout_seconds=240), ["\\boxed{2}"])[
            0
        ].reason
        == "correct"
    )
    with pytest.raises(ValueError, match="there is no 'no_such_package' to import; install its package"):
        score(RewardSection(kind="no_such_package.inner:score", workers=1, timeout_seconds=240), ["1"])


def test_a_kind_that_is_none_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"must be exact, math, stem, code, a function of your own .*Did you mean 'math'\?"
    ):
        RewardSection(kind="maths")
    with pytest.raises(ValueError, match="judge is asked about wrong answers of the kinds exact, math, stem alone"):
        RewardSection(kind="a.py:f", judge={"domains": ["d"], "url": "http://x", "model": "m"})


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-10, 10))
def test_a_score_is_correct_from_the_passing_score_on(value: float, passing: float) -> None:
    verdict = verdict_of(value, passing)
    assert (verdict.score, verdict.reason) == (value, "correct" if value >= passing else "wrong")
    assert verdict_of(Score(value, reason="no_answer"), passing).reason == "no_answer"


PARTS = {
    "form": {"kind": "{file}:obey", "weight": 0.25},
    "answer": {"kind": "exact", "weight": 2.0},
}


def parts_of(file: Path, **more: Any) -> RewardSection:
    parts = {name: {**part, "kind": str(part["kind"]).format(file=file)} for name, part in PARTS.items()}
    return RewardSection(parts=parts, workers=1, timeout_seconds=240, **more)


def test_parts_are_added_up_with_their_weights_and_one_of_them_says_what_is_correct(tmp_path: Path) -> None:
    (tmp_path / "form.py").write_text(
        "def obey(response):\n    return response.count('x') if response != '!' else 1 / 0\n"
    )
    texts = ["\\boxed{2} xx", "x \\boxed{3}", "!", "\\boxed{2}"]
    found = score(parts_of(tmp_path / "form.py", correct_part="answer"), texts)
    assert [v.score for v in found] == [2.75, 0.5, pytest.approx(5.5 / 3), 2.25]  # \boxed has an x, too
    assert [v.reason for v in found] == ["correct", "wrong", "error", "correct"]
    assert [dict(v.parts) for v in found] == [
        {"form": 3.0, "answer": 1.0}, {"form": 2.0, "answer": 0.0}, {"answer": 0.0}, {"form": 1.0, "answer": 1.0},
    ]  # fmt: skip
    assert found[2].details.startswith("form: ZeroDivisionError: division by zero < form.py line 2")
    # all of them, where no part is named
    assert [v.reason for v in score(parts_of(tmp_path / "form.py", passing_score=2), texts)] == [
        "correct", "wrong", "error", "wrong",
    ]  # fmt: skip
    # other domains have their own
    other = score(parts_of(tmp_path / "form.py", domains={"math": "exact"}), texts[:1])
    assert (other[0].score, other[0].parts) == (1.0, {})


def test_parts_beside_a_kind_and_a_part_that_is_none_are_refused(file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reward.parts takes the place of reward.kind, and both are set \(kind 'math'\)"
    ):
        parts_of(file, kind="math")
    with pytest.raises(ValueError, match=r"reward.correct_part 'answr' is no part .*Did you mean 'answer'\?"):
        parts_of(file, correct_part="answr")


def test_a_fault_names_the_key_that_names_the_function(tmp_path: Path) -> None:
    missing = f"{tmp_path}/none.py:score"
    for key, section in {
        "reward.kind": {"kind": missing},
        "reward.parts.form.kind": {"parts": {"form": {"kind": missing}, "answer": {"kind": "exact"}}},
        "reward.domains.code": {"domains": {"math": "math", "code": missing}},
    }.items():
        with (
            pytest.raises(ValueError, match=f"^{re.escape(key)} names the file .*none.py"),
            Rewards(RewardSection(**section), tmp_path),
        ):
            pass


def test_a_file_is_looked_for_beside_the_configuration_that_names_it_or_its_base(tmp_path: Path) -> None:
    for name in ("below", "above"):
        (tmp_path / name).mkdir()
    (tmp_path / "below/rewards.py").write_text("def score(response): return 1\n")
    (tmp_path / "below/base.toml").write_text(MINIMAL + '[reward]\nkind = "rewards.py:score"\n')
    (tmp_path / "above/run.toml").write_text('base = "../below/base.toml"\nrun_dir = "elsewhere"\n')
    config = load_config(RlConfig, tmp_path / "above/run.toml")
    assert config.reward.kind == f"{tmp_path}/below/rewards.py:score"
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_config(RlConfig, tmp_path / "config.toml") == config


MINIMAL = """
run_dir = "run"
model.path = "model"
data.train = "train.jsonl"
rollout = {prompts_per_step = 2, samples_per_prompt = 2, max_prompt_tokens = 64, max_response_tokens = 64}
train = {steps = 1, micro_batch_tokens = 128}
budget.tokens = 128
optimizer.learning_rate = 1e-4
"""


def test_a_changed_function_is_another_reward_and_new_keys_change_no_old_folder(tmp_path: Path) -> None:
    before = reward_settings(RewardSection())
    assert not {"parts", "correct_part", "passing_score", "functions"} & before.keys()
    path = tmp_path / "mine.py"
    section = RewardSection(parts={"a": {"kind": f"{path}:f"}, "b": {"kind": "math"}})
    digests = []
    for text in ("def f(response): return 1\n", "def f(response): return 2\n"):
        path.write_text(text)
        digests.append(reward_settings(section)["functions"])
    assert [list(found) for found in digests] == [[f"{path}:f"]] * 2
    assert digests[0] != digests[1]
    exact = source_digest("megatron_rl.reward.functions:exact")
    assert exact == hashlib.sha256(Path(functions.__file__).read_bytes()).hexdigest()[:16]
