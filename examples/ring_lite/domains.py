"""The miniature's problems: three verifiable domains that one small character-level model has to share.

    python examples/ring_lite/domains.py runs/ring_lite/data --seed 1

- **math**: sums of many terms, linear equations, values of functions, with every step written out.
- **code**: programs, which the reward runs in the sandbox.
- **science**: products and sums of quantities, with units.

They interfere on purpose: the same formula is evaluated in one domain and programmed in another, the letters that are
quantities in one are unknowns in another, and only a unit tells a physical product from a plain one. The answer is a
bare number, a program or a number with its unit. Responses have from 6 to 139 tokens.

A fourth domain, **general**, is for the last stage: spelling a word backwards. It shares nothing with the others.

Writes for each domain: DOMAIN_worked.jsonl (written-out solutions, which make the teacher), DOMAIN_train.jsonl and
DOMAIN_test.jsonl (prompts). No question of a test file is in another.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.data import tasks

_NUM_CODE_TESTS = 4
_TRIES = 1000
_LETTERS = "abcdefghkmnpqrstuvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """response: a right one, with its steps. answer: what the domain's reward compares with or runs. size: of what
    makes it long, such as the number of terms."""

    kind: str
    size: int
    question: str
    response: str
    answer: str


def _boxed(steps: str, answer: object) -> str:
    return f"{steps}\\boxed{{{answer}}}"


# -- math --------------------------------------------------------------------------------------------------------------


def _sums(numbers: list[int]) -> str:
    """`7-5+4` -> `7-5+4=2+4=6`, for [7, -5, 4]: the first two become one until one is left."""
    lines = [numbers]
    while len(lines[-1]) > 1:
        first, second, *rest = lines[-1]
        lines.append([first + second, *rest])
    return "=".join("".join([str(line[0]), *(f"{n:+d}" for n in line[1:])]) for line in lines)


def chain(rng: random.Random) -> Problem:
    """`7-5+4=?` -> `2+4=6,\\boxed{6}`: one to six sums, never below 0 or above 9."""
    size = rng.randint(1, 6)
    numbers = [rng.randint(1, 9)]
    for _ in range(size):
        total = sum(numbers)
        numbers.append(rng.choice([n for n in range(-total, 10 - total) if n]))
    question, _, steps = _sums(numbers).partition("=")
    answer = str(sum(numbers))
    return Problem(
        kind="chain", size=size, question=f"{question}=?", response=_boxed(f"{steps},", answer), answer=answer
    )


def equation(rng: random.Random) -> Problem:
    """`3k+4=19,k?` -> `3k=19-4=15,k=15/3=5,\\boxed{5}`."""
    x, root, factor, term = rng.choice(_LETTERS), rng.randint(2, 9), rng.randint(2, 5), rng.randint(1, 9)
    product = root * factor
    steps = f"{factor}{x}={product + term}-{term}={product},{x}={product}/{factor}={root},"
    question = f"{factor}{x}+{term}={product + term},{x}?"
    return Problem(kind="equation", size=1, question=question, response=_boxed(steps, root), answer=str(root))


def value(rng: random.Random) -> Problem:
    """`f(k)=3k+4,f(5)?` -> `3*5=15,15+4=19,\\boxed{19}`."""
    x, factor, term, at = rng.choice(_LETTERS), rng.randint(2, 5), rng.randint(1, 9), rng.randint(2, 9)
    product = factor * at
    steps = f"{factor}*{at}={product},{product}+{term}={product + term},"
    question = f"f({x})={factor}{x}+{term},f({at})?"
    response = _boxed(steps, product + term)
    return Problem(kind="value", size=1, question=question, response=response, answer=str(product + term))


# -- code --------------------------------------------------------------------------------------------------------------


def _program(parameter: str, lines: list[str]) -> str:
    return "```python\n" + "\n".join([f"def f({parameter}):", *(f" {line}" for line in lines)]) + "\n```"


def _tests(inputs: list[Any], results: list[Any]) -> str:
    return json.dumps({"type": "function_io", "fn_name": "f", "inputs": [[x] for x in inputs], "outputs": results})


def formula(rng: random.Random) -> Problem:
    """`f(k)=3k+4,code?` or `f(k)=2k^2+3k+4,code?` -> a function of one line."""
    size = rng.randint(1, 2)
    x, square, factor, term = rng.choice(_LETTERS), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    question, line = f"{factor}{x}+{term}", f"{factor}*{x}+{term}"
    if size == 2:
        question, line = f"{square}{x}^2+{question}", f"{square}*{x}*{x}+{line}"
    inputs = rng.sample(range(-50, 50), _NUM_CODE_TESTS)
    return Problem(
        kind="formula",
        size=size,
        question=f"f({x})={question},code?",
        response=_program(x, [f"return {line}"]),
        answer=_tests(inputs, [(square * n * n if size == 2 else 0) + factor * n + term for n in inputs]),
    )


def _operation(rng: random.Random) -> tuple[str, str, Callable[[list[int]], list[int]]]:
    """Its name in the question, its line in the program, and what it does to a list."""
    k = rng.randint(2, 9)
    choices: list[tuple[str, str, Callable[[list[int]], list[int]]]] = [
        (f"add{k}", f"a=[x+{k} for x in a]", lambda a: [x + k for x in a]),
        (f"mul{k}", f"a=[x*{k} for x in a]", lambda a: [x * k for x in a]),
        (f"over{k}", f"a=[x for x in a if x>{k}]", lambda a: [x for x in a if x > k]),
        ("odd", "a=[x for x in a if x%2]", lambda a: [x for x in a if x % 2]),
        ("rev", "a=a[::-1]", lambda a: a[::-1]),
        ("cut", "a=a[1:]", lambda a: a[1:]),
    ]
    return rng.choice(choices)


def pipeline(rng: random.Random) -> Problem:
    """`sum(add4(odd(a))),code?` -> a line for each operation, the innermost first: one to four of them."""
    size = rng.randint(1, 4)
    operations = [_operation(rng) for _ in range(size)]
    last = rng.choice(["", "sum", "len"])
    question, lines = "a", []
    for name, line, _ in operations:
        question = f"{name}({question})"
        lines.append(line)
    inputs = [[rng.randint(-9, 19) for _ in range(rng.randint(3, 7))] for _ in range(_NUM_CODE_TESTS)]
    results: list[Any] = []
    for numbers in inputs:
        for _, _, run in operations:
            numbers = run(numbers)
        results.append({"": numbers, "sum": sum(numbers), "len": len(numbers)}[last])
    question = f"{last}({question})" if last else question
    lines.append(f"return {last}(a)" if last else "return a")
    return Problem(
        kind="pipeline",
        size=size,
        question=f"{question},code?",
        response=_program("a", lines),
        answer=_tests(inputs, results),
    )


# -- science -----------------------------------------------------------------------------------------------------------

# What is asked, what it is the product of, and the units of the three.
_LAWS = (
    ("d", "v", "t", "m", "m/s", "s"),
    ("F", "m", "a", "N", "kg", "m/s^2"),
    ("E", "F", "d", "J", "N", "m"),
    ("U", "R", "I", "V", "ohm", "A"),
    ("E", "P", "t", "J", "W", "s"),
    ("m", "n", "M", "g", "mol", "g/mol"),
)


def _round(rng: random.Random) -> int:
    """A digit above 1 with up to two zeros."""
    return rng.randint(2, 9) * rng.choice([1, 10, 100])


def law(rng: random.Random) -> Problem:
    """`v=40m/s,t=3s,d?` -> `d=v*t=40*3=120,\\boxed{120 m}`."""
    asked, one, other, unit, unit_one, unit_other = rng.choice(_LAWS)
    left, right = rng.sample([_round(rng), rng.randint(2, 5)], 2)
    known = [f"{one}={left}{unit_one}", f"{other}={right}{unit_other}"]
    rng.shuffle(known)
    answer = f"{left * right} {unit}"
    return Problem(
        kind="law",
        size=1,
        question=f"{','.join(known)},{asked}?",
        response=_boxed(f"{asked}={one}*{other}={left}*{right}={left * right},", answer),
        answer=answer,
    )


def journey(rng: random.Random) -> Problem:
    """`4m/s 3s,2m/s 2s,1m/s 3s,d?` -> `12+4+3=16+3=19,\\boxed{19 m}`: two to five legs."""
    size = rng.randint(2, 5)
    legs = [(rng.randint(1, 5), rng.randint(1, 3)) for _ in range(size)]
    distances = [speed * seconds for speed, seconds in legs]
    question = ",".join(f"{speed}m/s {seconds}s" for speed, seconds in legs) + ",d?"
    answer = f"{sum(distances)} m"
    return Problem(
        kind="journey", size=size, question=question, response=_boxed(f"{_sums(distances)},", answer), answer=answer
    )


def inverse(rng: random.Random) -> Problem:
    """`t=3s,d=120m,v?` -> `v=d/t=120/3=40,\\boxed{40 m/s}`."""
    product, asked, one, unit, unit_asked, unit_one = rng.choice(_LAWS)
    if rng.random() < 0.5:
        asked, one, unit_asked, unit_one = one, asked, unit_one, unit_asked
    result, given = _round(rng), rng.randint(2, 5)
    known = [f"{product}={result * given}{unit}", f"{one}={given}{unit_one}"]
    rng.shuffle(known)
    answer = f"{result} {unit_asked}"
    return Problem(
        kind="inverse",
        size=1,
        question=f"{','.join(known)},{asked}?",
        response=_boxed(f"{asked}={product}/{one}={result * given}/{given}={result},", answer),
        answer=answer,
    )


# -- general -----------------------------------------------------------------------------------------------------------


def backwards(rng: random.Random) -> Problem:
    problem = tasks.reverse_word(rng, 1)
    return Problem(
        kind="backwards", size=1, question=problem.question, response=problem.response, answer=problem.answer
    )


DOMAINS: dict[str, tuple[Callable[[random.Random], Problem], ...]] = {
    "math": (chain, equation, value),
    "code": (formula, pipeline),
    "science": (law, inverse, journey),
    "general": (backwards,),
}


def problems(domain: str, count: int, seed: str, without: Collection[str] = ()) -> list[Problem]:
    """`count` of them with questions that differ and are not in `without`, evenly over the domain's kinds; the same
    arguments, the same ones.

    ValueError when a kind has too few.
    """
    rng = random.Random(f"{domain} {seed}")
    kinds, seen, found = DOMAINS[domain], set(without), []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        for _ in range(_TRIES):
            problem = kind(rng)
            if problem.question not in seen:
                break
        else:
            raise ValueError(f"{kind.__name__} has fewer questions than {count} {domain} problems need; ask for fewer")
        seen.add(problem.question)
        found.append(problem)
    return found


def chat_row(domain: str, problem: Problem) -> dict[str, Any]:
    turns = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.response}]
    return {"messages": turns, "meta": {"domain": domain, "kind": problem.kind, "size": problem.size}}


def prompt_row(domain: str, problem: Problem) -> dict[str, Any]:
    meta = {"kind": problem.kind, "size": problem.size}
    return {"domain": domain, "prompt": problem.question, "answer": problem.answer, "meta": meta}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--worked", type=int, default=6000, help="solutions of each domain")
    parser.add_argument("--train", type=int, default=6000, help="prompts of each domain")
    parser.add_argument("--test", type=int, default=300, help="prompts of each domain")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        test = problems(domain, arguments.test, f"test {arguments.seed}")
        questions = {problem.question for problem in test}
        train = problems(domain, arguments.train, f"train {arguments.seed}", questions)
        worked = problems(domain, arguments.worked, f"worked {arguments.seed}", questions)
        for name, found, row in (
            ("test", test, prompt_row),
            ("train", train, prompt_row),
            ("worked", worked, chat_row),
        ):
            path = arguments.out / f"{domain}_{name}.jsonl"
            path.write_text("".join(json.dumps(row(domain, problem)) + "\n" for problem in found))
    counts = f"{arguments.train} prompts to train on, {arguments.test} to test on, {arguments.worked} solutions"
    print(f"{arguments.out}: {', '.join(DOMAINS)}, of each {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
