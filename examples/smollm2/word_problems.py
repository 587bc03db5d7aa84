"""Write word problems of two steps as data files: sft.jsonl (chats), train.jsonl and test.jsonl (RL prompts).

    python examples/smollm2/word_problems.py OUT --num-sft 400 --num-train 4000 --num-test 400

Questions of the three files are disjoint; the same flags give the same files.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.errors import exit_code

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Julia", "Leo", "Maria", "Oscar")
THINGS = ("apples", "books", "buttons", "cards", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
WARES = ("bag", "ball", "book", "cup", "hat", "kite", "lamp", "scarf")
_TRIES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Holds a question, its solution in two equations, and the answer, a whole number above 0."""

    question: str
    first: str
    second: str
    answer: int
    kind: str = ""

    @property
    def response(self) -> str:
        return f"{self.first}, and {self.second}. \\boxed{{{self.answer}}}"


def trade(rng: random.Random) -> Problem:
    """Make a problem in which somebody gives some things away and buys others."""
    (name, friend), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    had, bought = rng.randint(11, 49), rng.randint(3, 29)
    given = rng.randint(2, had - 2)
    left = had - given
    return Problem(
        question=f"{name} has {had} {things}, gives {given} of them to {friend} and then buys {bought} more. "
        f"How many {things} does {name} have now?",
        first=f"{had} - {given} = {left}",
        second=f"{left} + {bought} = {left + bought}",
        answer=left + bought,
    )


def boxes(rng: random.Random) -> Problem:
    """Make a problem in which things lie in boxes, equally many in each, and some beside them."""
    things = rng.choice(THINGS)
    count, each, beside = rng.randint(2, 9), rng.randint(3, 9), rng.randint(2, 19)
    inside = count * each
    return Problem(
        question=f"There are {count} boxes with {each} {things} in each, and {beside} more {things} on the table. "
        f"How many {things} are there?",
        first=f"{count} * {each} = {inside}",
        second=f"{inside} + {beside} = {inside + beside}",
        answer=inside + beside,
    )


def together(rng: random.Random) -> Problem:
    """Make a problem in which one has so many more than the other, and the question is how many both have."""
    (name, friend), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    has, more = rng.randint(4, 39), rng.randint(2, 19)
    return Problem(
        question=f"{name} has {has} {things}, and {friend} has {more} more than {name}. "
        f"How many {things} do they have together?",
        first=f"{has} + {more} = {has + more}",
        second=f"{has} + {has + more} = {2 * has + more}",
        answer=2 * has + more,
    )


def change(rng: random.Random) -> Problem:
    """Make a problem in which somebody buys two things and pays with more than they cost."""
    name, (one, other) = rng.choice(NAMES), rng.sample(WARES, 2)
    price, second = rng.randint(3, 29), rng.randint(3, 19)
    total = price + second
    paid = total + rng.randint(1, 20)
    return Problem(
        question=f"{name} buys a {one} for {price} dollars and a {other} for {second} dollars, and pays with {paid} "
        "dollars. How many dollars does the shop give back?",
        first=f"{price} + {second} = {total}",
        second=f"{paid} - {total} = {paid - total}",
        answer=paid - total,
    )


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "trade": trade,
    "boxes": boxes,
    "together": together,
    "change": change,
}


def make_problems(count: int, rng: random.Random, seen: set[str]) -> list[Problem]:
    """Make problems, kind by kind in turn, whose questions are not in `seen`, and add these to it."""
    return [_new_problem(kind, rng, seen) for kind in (list(KINDS) * count)[:count]]


def _new_problem(kind: str, rng: random.Random, seen: set[str]) -> Problem:
    for _ in range(_TRIES):
        problem = replace(KINDS[kind](rng), kind=kind)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise ValueError(f"hardly any question of the kind {kind!r} is left; ask for fewer problems")


def as_chat(problem: Problem) -> dict:
    """Return a row of SFT."""
    messages = [("user", problem.question), ("assistant", problem.response)]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def as_prompt(problem: Problem) -> dict:
    """Return a row of reinforcement learning and evaluation."""
    return {"prompt": problem.question, "answer": str(problem.answer), "meta": {"kind": problem.kind}}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-sft", type=int, default=400)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    return exit_code("word_problems", lambda: write_files(arguments))


def write_files(arguments: argparse.Namespace) -> int:
    rng, seen = random.Random(f"word problems {arguments.seed}"), set[str]()
    # The test questions come first: they do not depend on the size of the other files.
    parts = {"test": as_prompt, "sft": as_chat, "train": as_prompt}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, row in parts.items():
        problems = make_problems(getattr(arguments, f"num_{name}"), rng, seen)
        path = arguments.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row(problem)) + "\n" for problem in problems), encoding="utf-8")
        print(f"{path}: {len(problems)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
