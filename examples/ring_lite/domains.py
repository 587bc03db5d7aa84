"""Make the miniature's problems: three verifiable domains that one small character-level model has to share.

    python examples/ring_lite/domains.py runs/ring_lite/data --seed 1

- **math**: sums of many terms, linear equations, values of functions, counted out step by step.
- **code**: programs, which the reward runs in the sandbox.
- **science**: products and sums of quantities, with units.

They interfere on purpose: the same formula is evaluated in one domain and programmed in another, the letters that are
quantities in one are unknowns in another, and only a unit tells a physical product from a plain one. The answer is a
bare number, a program or a number with its unit. Responses have from 8 to 139 tokens.

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
    """Holds one problem. response: a right one, with its steps. answer: what the domain's reward compares with or runs.
    size: of what makes the problem long, such as the number of terms."""

    kind: str
    size: int
    question: str
    response: str
    answer: str


def _boxed(steps: str, answer: object) -> str:
    return f"{steps}\\boxed{{{answer}}}"


# -- math --------------------------------------------------------------------------------------------------------------


def _count(start: int, step: int, times: int) -> str:
    """Write `4.1 8.2 12.3,` for (0, 4, 3): every value on the way, with the number of steps so far."""
    return " ".join(f"{start + step * i}.{i}" for i in range(1, times + 1)) + ","


def chain(rng: random.Random) -> Problem:
    """Make `7-2+3=?` -> `6.1 5.2,6.1 7.2 8.3,\\boxed{8}`: one to six sums, by counting; never below 0 or above 20."""
    size = rng.randint(1, 6)
    total = rng.randint(1, 15)
    question, steps = str(total), ""
    for _ in range(size):
        term = rng.choice([n for n in range(-5, 6) if n and 0 <= total + n <= 20])
        question += f"{term:+d}"
        steps += _count(total, 1 if term > 0 else -1, abs(term))
        total += term
    return Problem(kind="chain", size=size, question=f"{question}=?", response=_boxed(steps, total), answer=str(total))


def equation(rng: random.Random) -> Problem:
    """Make `3k+2=14,k?` -> `13.1 12.2,3.1 6.2 9.3 12.4,\\boxed{4}`: back by the term, then how often the factor goes
    in."""
    x, root, factor, term = rng.choice(_LETTERS), rng.randint(2, 9), rng.randint(2, 5), rng.randint(1, 5)
    product = root * factor
    steps = _count(product + term, -1, term) + _count(0, factor, root)
    question = f"{factor}{x}+{term}={product + term},{x}?"
    return Problem(kind="equation", size=1, question=question, response=_boxed(steps, root), answer=str(root))


def value(rng: random.Random) -> Problem:
    """Make `f(k)=3k+2,f(4)?` -> `3.1 6.2 9.3 12.4,13.1 14.2,\\boxed{14}`."""
    x, factor, term, at = rng.choice(_LETTERS), rng.randint(2, 5), rng.randint(1, 5), rng.randint(2, 9)
    result = factor * at + term
    steps = _count(0, factor, at) + _count(factor * at, 1, term)
    question = f"f({x})={factor}{x}+{term},f({at})?"
    return Problem(kind="value", size=1, question=question, response=_boxed(steps, result), answer=str(result))


# -- code --------------------------------------------------------------------------------------------------------------


def _program(parameter: str, lines: list[str]) -> str:
    return "```python\n" + "\n".join([f"def f({parameter}):", *(f" {line}" for line in lines)]) + "\n```"


def _tests(inputs: list[Any], results: list[Any]) -> str:
    return json.dumps({"type": "function_io", "fn_name": "f", "inputs": [[x] for x in inputs], "outputs": results})


def formula(rng: random.Random) -> Problem:
    """Make `f(k)=3k+4,code?` or `f(k)=2k^2+3k+4,code?` -> a function of one line."""
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
    """Choose an operation. Return its name in the question, its line in the program, and what it does to a list."""
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
    """Make `sum(add4(odd(a))),code?` -> a line for each operation, the innermost first: one to four of them."""
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

# Each law is a quantity, the two factors it is the product of, and the units of all three.
_LAWS = (
    ("d", "v", "t", "m", "m/s", "s"),
    ("F", "m", "a", "N", "kg", "m/s^2"),
    ("E", "F", "d", "J", "N", "m"),
    ("U", "R", "I", "V", "ohm", "A"),
    ("E", "P", "t", "J", "W", "s"),
    ("m", "n", "M", "g", "mol", "g/mol"),
)


def _shuffled(rng: random.Random, *known: str) -> str:
    return ",".join(rng.sample(known, len(known)))


def law(rng: random.Random) -> Problem:
    """Make `t=3s,v=40m/s,d?` -> `d=v*t,40.1 80.2 120.3,\\boxed{120 m}`."""
    asked, one, other, unit, unit_one, unit_other = rng.choice(_LAWS)
    left, right = rng.randint(2, 9) * rng.choice([1, 10, 100, 1000]), rng.randint(2, 7)
    known = _shuffled(rng, f"{one}={left}{unit_one}", f"{other}={right}{unit_other}")
    answer = f"{left * right} {unit}"
    response = _boxed(f"{asked}={one}*{other},{_count(0, left, right)}", answer)
    return Problem(kind="law", size=right, question=f"{known},{asked}?", response=response, answer=answer)


def inverse(rng: random.Random) -> Problem:
    """Make `d=120m,v=40m/s,t?` -> `t=d/v,40.1 80.2 120.3,\\boxed{3 s}`: how often one goes into the product."""
    product, asked, one, unit, unit_asked, unit_one = rng.choice(_LAWS)
    if rng.random() < 0.5:
        asked, one, unit_asked, unit_one = one, asked, unit_one, unit_asked
    result, given = rng.randint(2, 7), rng.randint(2, 9) * rng.choice([1, 10, 100, 1000])
    known = _shuffled(rng, f"{product}={result * given}{unit}", f"{one}={given}{unit_one}")
    answer = f"{result} {unit_asked}"
    response = _boxed(f"{asked}={product}/{one},{_count(0, given, result)}", answer)
    return Problem(kind="inverse", size=result, question=f"{known},{asked}?", response=response, answer=answer)


def journey(rng: random.Random) -> Problem:
    """Make `4m/s 3s,2m/s 2s,d?` -> `4.1 8.2 12.3,14.1 16.2,\\boxed{16 m}`: where it is after every second of two to
    five legs."""
    size = rng.randint(2, 5)
    legs = [(rng.randint(1, 5), rng.randint(1, 4)) for _ in range(size)]
    steps, total = "", 0
    for speed, seconds in legs:
        steps += _count(total, speed, seconds)
        total += speed * seconds
    question = ",".join(f"{speed}m/s {seconds}s" for speed, seconds in legs) + ",d?"
    answer = f"{total} m"
    return Problem(kind="journey", size=size, question=question, response=_boxed(steps, answer), answer=answer)


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
    """Make `count` problems with questions that differ and are not in `without`, evenly over the domain's kinds. The
    same arguments make the same problems.

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
    parser.add_argument("--test", type=int, default=600, help="prompts of each domain")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    try:
        write(arguments)
    except ValueError as error:
        parser.error(str(error))
    counts = f"{arguments.train} prompts to train on, {arguments.test} to test on, {arguments.worked} solutions"
    print(f"{arguments.out}: {', '.join(DOMAINS)}, of each {counts}")
    return 0


def write(arguments: argparse.Namespace) -> None:
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
            path.write_text("".join(json.dumps(row(domain, problem)) + "\n" for problem in found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
