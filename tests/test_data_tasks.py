"""Tests completion tasks by solving every answer and every step again, from the question alone."""

import json
import random
import re
import sys
from pathlib import Path

import forked
import pytest

from megatron_rl.data.tasks import TASK_KINDS, as_chat, as_prompt, generate, make_dataset

ALL_CELLS = [(kind, difficulty) for kind in TASK_KINDS for difficulty in range(1, 6)]


def solve_count(body: str) -> tuple[str, str]:
    asked, word = body[0], body[2:]
    steps = "".join(word[i] + str(word[: i + 1].count(asked)) for i in range(len(word)))
    return steps + ";", str(word.count(asked))


def solve_sort(body: str) -> tuple[str, str]:
    kept: list[str] = []
    steps = ""
    for letter in body:
        place = sum(other <= letter for other in kept)
        kept.insert(place, letter)
        steps += "".join(kept) + ","
    return steps, "".join(kept)


def solve_reverse(body: str) -> tuple[str, str]:
    forward = "".join(f"{body[i]}{i + 1}" for i in range(len(body)))
    backward = "".join(f"{body[i]}{i + 1}" for i in range(len(body) - 1, -1, -1))
    return f"{forward};{backward};", "".join(reversed(body))


def solve_filter(body: str) -> tuple[str, str]:
    bound, word = ord(body[0]), body[2:]
    answer = re.sub(r".", lambda m: m[0] if ord(m[0]) > bound else "", word)
    return "".join(f"{c}+" if ord(c) > bound else f"{c}-" for c in word) + ";", answer


def solve_merge(body: str) -> tuple[str, str]:
    first, second = map(list, body.split(","))
    steps, answer = "", ""
    while first or second:
        take_first = bool(first) and (not second or first[0] <= second[0])
        letter = (first if take_first else second).pop(0)
        steps += letter + ("1" if take_first else "2")
        answer += letter
    return steps + ";", answer


def solve_maximum(body: str) -> tuple[str, str]:
    numbers = [int(text) for text in body.split(",")]
    steps = ",".join(str(max(numbers[: i + 1])) for i in range(len(numbers)))
    return steps + ";", str(sorted(numbers)[-1])


def solve_add(body: str) -> tuple[str, str]:
    left, right = body.split("+")
    steps, carry, total = [], 0, ""
    for column in range(1, len(left) + 1):
        a, b = int(left[-column]), int(right[-column])
        steps.append(f"{a}{b}{carry}={(a + b + carry) // 10}{(a + b + carry) % 10}")
        total = str((a + b + carry) % 10) + total
        carry = (a + b + carry) // 10
    return ",".join(steps) + ";", ("1" if carry else "") + total


SOLVERS = {
    "C": solve_count,
    "S": solve_sort,
    "R": solve_reverse,
    "F": solve_filter,
    "G": solve_merge,
    "M": solve_maximum,
    "A": solve_add,
}


@pytest.mark.parametrize(("kind", "difficulty"), ALL_CELLS)
def test_steps_and_answer_follow_from_the_question(kind, difficulty):
    for seed in range(200):
        problem = generate(kind, random.Random(seed), difficulty)
        assert problem.question.endswith("?")
        steps, answer = SOLVERS[problem.question[0]](problem.question[1:-1])
        assert (problem.steps, problem.answer) == (steps, answer), problem.question
        assert problem.response == steps + "\\boxed{" + answer + "}"
        assert answer
        # `\boxed{` is one token, and the end of the response is one more
        assert len(problem.response.replace("\\boxed{", "#")) + 1 < 60


def test_the_seven_kinds_start_their_questions_with_seven_letters():
    firsts = {generate(kind, random.Random(0), 1).question[0] for kind in TASK_KINDS}
    assert firsts == set(SOLVERS)


def test_known_problems_are_written_as_documented():
    examples = [
        ("Cb:abbbcccb?", "a0b1b2b3c3c3c3b4;", "4", solve_count),
        ("Smcop?", "m,cm,cmo,cmop,", "cmop", solve_sort),
        ("Rabc?", "a1b2c3;c3b2a1;", "cba", solve_reverse),
        ("Fk:amzk?", "a-m+z+k-;", "mz", solve_filter),
        ("Gacx,bdz?", "a1b2c1d2x1z2;", "abcdxz", solve_merge),
        ("M37,85,12?", "37,85,85;", "85", solve_maximum),
        ("A47+85?", "750=12,481=13;", "132", solve_add),
    ]
    # the solvers above are what the generator is checked with, so they are checked by hand
    for question, steps, answer, solve in examples:
        assert solve(question[1:-1]) == (steps, answer)


def test_train_and_test_questions_are_distinct_and_even_over_the_cells():
    data = make_dataset(["count", "sort"], [1, 2], num_train=2000, num_test=400, seed=3)
    train, test = ([p.question for p in part] for part in (data.train, data.test))
    assert (len(train), len(test)) == (2000, 400)
    assert len({*train, *test}) == 2400
    for part, each in ((data.train, 500), (data.test, 100)):
        counts = dict.fromkeys([("count", 1), ("count", 2), ("sort", 1), ("sort", 2)], 0)
        for problem in part:
            counts[problem.kind, problem.difficulty] += 1
        assert set(counts.values()) == {each}


def test_a_dataset_depends_on_its_arguments_only_and_its_test_part_not_on_the_size_of_train():
    kinds = list(TASK_KINDS)
    first = make_dataset(kinds, [1, 3], num_train=300, num_test=50, seed=1)
    assert first == make_dataset(kinds, [1, 3], num_train=300, num_test=50, seed=1)
    assert first.test == make_dataset(kinds, [1, 3], num_train=10, num_test=50, seed=1).test
    assert first.test != make_dataset(kinds, [1, 3], num_train=300, num_test=50, seed=2).test


def test_the_same_seed_gives_the_same_problem_on_every_machine():
    # Written down once: a change here changes every published curve.
    problem = make_dataset(["sort"], [2], num_train=0, num_test=1, seed=0).test[0]
    assert problem.question == "Sdhlo?"


def test_wrong_requests_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"one of count, sort, .*, got 'cuont'"):
        generate("cuont", random.Random(0), 1)
    with pytest.raises(ValueError, match="from 1 to 5, got 6"):
        generate("count", random.Random(0), 6)
    with pytest.raises(ValueError, match="at least one kind"):
        make_dataset([], [1], num_train=1, num_test=1, seed=0)


def test_a_kind_that_runs_out_of_questions_says_so(monkeypatch):
    fixed = generate("count", random.Random(0), 1)
    monkeypatch.setitem(TASK_KINDS, "count", lambda _rng, _difficulty: fixed)
    with pytest.raises(ValueError, match="'count' at difficulty 1 has too few distinct questions"):
        make_dataset(["count"], [1], num_train=2, num_test=0, seed=0)


def test_problems_become_prompts_and_chats_with_the_same_id():
    problem = generate("count", random.Random(5), 2)
    prompt, chat = as_prompt(problem), as_chat(problem)
    assert (prompt.prompt, prompt.answer, prompt.domain) == (problem.question, problem.answer, "tasks")
    assert prompt.meta == {"kind": "count", "difficulty": 2}
    assert [(m.role, m.content) for m in chat.messages] == [
        ("user", problem.question),
        ("assistant", problem.steps + "\\boxed{" + problem.answer + "}"),
    ]
    assert chat.id == prompt.id


def test_files_have_the_columns_that_rows_of_this_kind_have_and_no_others(tmp_path):
    tool = Path(__file__).parents[1] / "tools/make_task_data.py"
    sizes = ["--num-sft", "4", "--num-train", "4", "--num-test", "4"]
    forked.run([sys.executable, tool, tmp_path, *sizes]).check_returncode()
    for name, columns in (("sft", {"messages"}), ("train", {"domain", "prompt", "answer"})):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert {frozenset(row) for row in rows} == {frozenset({"id", "meta"} | columns)}
        assert {frozenset(message) for row in rows for message in row.get("messages", ())} <= {
            frozenset({"role", "content"})
        }
