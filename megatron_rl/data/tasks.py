"""Generates tasks that a small character-level model learns with written-out steps.

Every kind is a function (rng, difficulty) -> Problem in TASK_KINDS. Difficulty 1 to 5 sets a range of lengths; a
response, `\\boxed{` counted as one token, stays under 60 tokens. Questions are short, their number is large (tens of
thousands at difficulty 1), and the answer is not guessable, so a rising reward means that the steps were learned.
"""

import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

from megatron_rl.data.prompts import Chat, Message, Prompt, prompt_id

MAX_DIFFICULTY = 5
_TRIES_PER_PROBLEM = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Holds a question, the steps of its solution and the answer. `generate` fills in kind and difficulty."""

    question: str
    steps: str
    answer: str
    kind: str = ""
    difficulty: int = 0

    @property
    def response(self) -> str:
        """Return the reference response."""
        return f"{self.steps}\\boxed{{{self.answer}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Holds problems without a common question between or within the two parts."""

    train: tuple[Problem, ...]
    test: tuple[Problem, ...]


def _letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def count_letter(rng: random.Random, difficulty: int) -> Problem:
    """Make `Cb:abbbcccb?` -> `a0b1b2b3c3c3c3b4;\\boxed{4}`: after each letter, how many of the asked one so far."""
    alphabet = "".join(rng.sample(string.ascii_lowercase, 3))
    asked = rng.choice(alphabet)
    word = _letters(rng, rng.randint(3 * difficulty, 3 * difficulty + 2), alphabet)
    counts = list(accumulate(int(letter == asked) for letter in word))
    steps = "".join(f"{letter}{count}" for letter, count in zip(word, counts, strict=True))
    return Problem(question=f"C{asked}:{word}?", steps=f"{steps};", answer=str(counts[-1]))


def insertion_sort(rng: random.Random, difficulty: int) -> Problem:
    """Make `Smcop?` -> `m,cm,cmo,cmop,\\boxed{cmop}`: the sorted prefix after each insertion."""
    word = _letters(rng, rng.randint(difficulty + 2, difficulty + 3))
    prefixes = ["".join(sorted(word[: end + 1])) for end in range(len(word))]
    return Problem(question=f"S{word}?", steps="".join(f"{prefix}," for prefix in prefixes), answer=prefixes[-1])


def reverse_word(rng: random.Random, difficulty: int) -> Problem:
    """Make `Rabc?` -> `a1b2c3;c3b2a1;\\boxed{cba}`: number the letters, then read them backwards."""
    word = _letters(rng, rng.randint(difficulty + 2, difficulty + 4))
    pairs = [f"{letter}{index}" for index, letter in enumerate(word, start=1)]
    return Problem(question=f"R{word}?", steps=f"{''.join(pairs)};{''.join(pairs[::-1])};", answer=word[::-1])


def filter_letters(rng: random.Random, difficulty: int) -> Problem:
    """Make `Fk:amzk?` -> `a-m+z+k-;\\boxed{mz}`: keep the letters that come after the given one in the alphabet."""
    bound = rng.choice("fghijklmnopqrst")
    word = _letters(rng, rng.randint(2 * difficulty + 1, 2 * difficulty + 3))
    if max(word) <= bound:  # an empty answer is not one that a box can hold
        word = word[:-1] + rng.choice("uvwxyz")
    steps = "".join(f"{letter}{'+' if letter > bound else '-'}" for letter in word)
    return Problem(
        question=f"F{bound}:{word}?", steps=f"{steps};", answer="".join(letter for letter in word if letter > bound)
    )


def merge_words(rng: random.Random, difficulty: int) -> Problem:
    """Make `Gacx,bdz?` -> `a1b2c1d2x1z2;\\boxed{abcdxz}`: each letter with its word, ties from the first."""
    first, second = ("".join(sorted(_letters(rng, rng.randint(difficulty + 1, difficulty + 2)))) for _ in range(2))
    merged = sorted([(letter, 1) for letter in first] + [(letter, 2) for letter in second])
    steps = "".join(f"{letter}{origin}" for letter, origin in merged)
    return Problem(question=f"G{first},{second}?", steps=f"{steps};", answer="".join(letter for letter, _ in merged))


def running_maximum(rng: random.Random, difficulty: int) -> Problem:
    """Make `M37,85,12?` -> `37,85,85;\\boxed{85}`: the largest two-digit number so far."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(difficulty + 1, difficulty + 3))]
    maxima = ",".join(map(str, accumulate(numbers, max)))
    return Problem(question=f"M{','.join(map(str, numbers))}?", steps=f"{maxima};", answer=str(max(numbers)))


def add_numbers(rng: random.Random, difficulty: int) -> Problem:
    """Make `A47+85?` -> `750=12,481=13;\\boxed{132}`: from the last column on, digit, digit, carry = two-digit sum."""
    digits = difficulty + 1
    left, right = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    columns, carry = [], 0
    for a, b in zip(str(left)[::-1], str(right)[::-1], strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}{b}{carry}={total:02d}")
        carry = total // 10
    return Problem(question=f"A{left}+{right}?", steps=f"{','.join(columns)};", answer=str(left + right))


TASK_KINDS: dict[str, Callable[[random.Random, int], Problem]] = {
    "count": count_letter,
    "sort": insertion_sort,
    "reverse": reverse_word,
    "filter": filter_letters,
    "merge": merge_words,
    "maximum": running_maximum,
    "add": add_numbers,
}


def generate(kind: str, rng: random.Random, difficulty: int) -> Problem:
    """Generate one problem of `kind`; advances `rng`."""
    if kind not in TASK_KINDS:
        raise ValueError(f"task kind must be one of {', '.join(TASK_KINDS)}, got {kind!r}")
    if not 1 <= difficulty <= MAX_DIFFICULTY:
        raise ValueError(f"difficulty must be from 1 to {MAX_DIFFICULTY}, got {difficulty}")
    return replace(TASK_KINDS[kind](rng, difficulty), kind=kind, difficulty=difficulty)


def make_dataset(
    kinds: Sequence[str], difficulties: Iterable[int], num_train: int, num_test: int, seed: int
) -> Dataset:
    """Generate problems with distinct questions, evenly over kinds and difficulties; the same arguments give the same
    ones.

    The test part is drawn first: it does not depend on num_train.
    """
    cells = list(product(kinds, difficulties))
    if not cells:
        raise ValueError("make_dataset needs at least one kind and one difficulty")
    if num_train < 0 or num_test < 0:
        raise ValueError(f"num_train and num_test must not be negative, got {num_train} and {num_test}")
    rng = random.Random(f"tasks {seed}")
    seen: set[str] = set()
    test = tuple(_new_problem(*cells[index % len(cells)], rng, seen) for index in range(num_test))
    train = tuple(_new_problem(*cells[index % len(cells)], rng, seen) for index in range(num_train))
    return Dataset(train=train, test=test)


def as_prompt(problem: Problem) -> Prompt:
    """Return the row that reinforcement learning trains on: the answer, not the steps."""
    return Prompt(
        id=prompt_id("tasks", problem.question, problem.answer),
        domain="tasks",
        prompt=problem.question,
        answer=problem.answer,
        meta={"kind": problem.kind, "difficulty": problem.difficulty},
    )


def as_chat(problem: Problem) -> Chat:
    """Return the row that supervised fine-tuning imitates: the question and the reference response."""
    prompt = as_prompt(problem)
    messages = (Message(role="user", content=problem.question), Message(role="assistant", content=problem.response))
    return Chat(id=prompt.id, messages=messages, meta=prompt.meta)


def _new_problem(kind: str, difficulty: int, rng: random.Random, seen: set[str]) -> Problem:
    for _ in range(_TRIES_PER_PROBLEM):
        problem = generate(kind, rng, difficulty)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise ValueError(
        f"kind {kind!r} at difficulty {difficulty} has too few distinct questions for this dataset; "
        "ask for fewer problems or add a higher difficulty"
    )
