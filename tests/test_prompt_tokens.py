"""Tests token ids of prompts, rendered many at a time and kept for the next start: they equal those of one prompt."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers import EOS, KINDS, TEMPLATE
from tiny_model import TINY_CONFIG

from megatron_rl.data import chat, prompt_tokens
from megatron_rl.data.chat import load_tokenizer, render_prompt, render_prompts
from megatron_rl.data.fitting import Limit, rendered_prompts
from megatron_rl.data.messages import Conversation, of_text
from megatron_rl.data.prompts import Prompt

# A template, a tokenizer or the search for special tokens may fail on these pieces of text.
PIECES = [
    EOS,
    "</s>",
    "<unk>",
    "<role>HUMAN</role>",
    "\ue0000\ue000",
    " ",
    "\n\n",
    "1 2345",
    "naïve π≠3 🙂",
    "{{ x }}",
    "e\u0301",
]


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | {"vocab_size": 1000}))
    (folder / "model.safetensors").write_bytes(b"weights")
    KINDS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return load_tokenizer(directory)


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(id=f"p{i}", domain="math", prompt=text, answer="1") for i, text in enumerate(texts)]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=5).map("".join), max_size=9
    ),
    special_tokens=st.sampled_from(["text", "token"]),
    at_once=st.integers(1, 5),
)
def test_many_prompts_become_what_each_becomes_by_itself(
    tokenizer: Any, prompts: list[str], special_tokens: str, at_once: int
) -> None:
    one_by_one = [render_prompt(tokenizer, prompt, special_tokens=special_tokens) for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "_AT_ONCE", at_once)
        assert list(render_prompts(tokenizer, list(map(of_text, prompts)), special_tokens)) == one_by_one
    told = rendered_prompts(prompts_of(*prompts), tokenizer, Limit(tokens=10**6, key="k"), special_tokens)
    assert [list(told[f"p{i}"]) for i in range(len(prompts))] == one_by_one
    assert [told.num_tokens(f"p{i}") for i in range(len(prompts))] == list(map(len, one_by_one))
    assert list(told) == [f"p{i}" for i in range(len(prompts))]


def test_prompts_that_are_too_long_are_left_out_and_the_others_keep_their_tokens(tokenizer: Any) -> None:
    prompts = prompts_of("1+1?", "what is " * 50, "2+2?")
    told = rendered_prompts(prompts, tokenizer, Limit(tokens=40, key="k", too_long="drop"))
    assert dict(told) == {p.id: tuple(render_prompt(tokenizer, p.prompt)) for p in prompts[::2]}
    assert ("p1" in told, len(told)) == (False, 2)


def test_a_prompt_of_tokens_that_the_model_has_no_embedding_for_is_refused(directory: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(directory, tmp_path / "model"))
    tokenizer = load_tokenizer(model)
    ids = render_prompt(tokenizer, "1+1?")
    largest = max(ids)

    def start(vocab_size: int) -> Any:
        (model / "config.json").write_text(json.dumps(TINY_CONFIG | {"vocab_size": vocab_size}))
        return rendered_prompts(prompts_of("1+1?"), tokenizer, Limit(tokens=99, key="k"))

    assert dict(start(largest + 1)) == {"p0": tuple(ids)}
    with pytest.raises(
        ValueError, match=rf"^prompt p0: the tokenizer of .*model makes token {largest} .*vocab_size .* is {largest};"
    ):
        start(largest)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of prompts of each rendering."""
    counts: list[int] = []

    def render(tokenizer: Any, prompts: list[Conversation], special_tokens: str, arguments: dict[str, Any]) -> Any:
        counts.append(len(prompts))
        return render_prompts(tokenizer, prompts, special_tokens, arguments)

    monkeypatch.setattr(prompt_tokens, "render_prompts", render)
    return counts


def test_the_next_start_reads_what_the_first_has_made(tokenizer: Any, tmp_path: Path, counted: list[int]) -> None:
    prompts, kept = prompts_of("1+1?", "", f"say {EOS}", "2+2?"), tmp_path / "kept"
    first, second = (rendered_prompts(prompts, tokenizer, Limit(tokens=99, key="k"), kept=kept) for _ in range(2))
    assert dict(first) == dict(second) == {p.id: tuple(render_prompt(tokenizer, p.prompt)) for p in prompts}
    assert counted == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_the_tokens_depend_on_makes_them_anew(directory: Path, tmp_path: Path, counted: list[int]) -> None:
    model = Path(shutil.copytree(directory, tmp_path / "model"))
    kept = tmp_path / "kept"

    def start(*texts: str, special_tokens: str = "text", template: str | None = None) -> None:
        tokenizer = load_tokenizer(model)
        if template is not None:
            tokenizer.chat_template = template
        prompts = prompts_of(*texts)
        told = rendered_prompts(prompts, tokenizer, Limit(tokens=99, key="k"), special_tokens, kept)
        expected = {p.id: tuple(render_prompt(tokenizer, p.prompt, special_tokens=special_tokens)) for p in prompts}
        assert dict(told) == expected

    for change in (
        {"texts": ("12", "3")},
        {"texts": ("1", "23")},  # the same letters
        {"texts": ("1", "23", "")},
        {"texts": ("23", "1")},
        {"texts": ("23", "1"), "special_tokens": "token"},
        {"texts": ("23", "1"), "template": TEMPLATE.replace("HUMAN", "USER")},
    ):
        before = len(counted)
        texts = change.pop("texts")
        for _ in range(2):
            start(*texts, **change)  # type: ignore[arg-type]
        assert len(counted) == before + 1
    (model / "model.safetensors").write_bytes(b"others")
    start("23", "1", template=TEMPLATE.replace("HUMAN", "USER"))
    assert len(counted) == 6
    (model / "added_tokens.json").write_text("{}")
    start("23", "1", template=TEMPLATE.replace("HUMAN", "USER"))
    assert len(counted) == 7


def test_a_file_that_is_not_what_was_written_is_made_anew(tokenizer: Any, tmp_path: Path, counted: list[int]) -> None:
    kept, rng = tmp_path / "kept", random.Random(3)
    prompts = prompts_of("1+1?", "what is the sum?")
    limit = Limit(tokens=99, key="k")
    expected = dict(rendered_prompts(prompts, tokenizer, limit, kept=kept))
    whole = kept.read_bytes()
    damaged = [
        b"",
        b"\x80\x04.",
        whole[:63],
        whole[:64],
        whole[:-4],
        whole[:-1],
        whole + b"\0\0\0\0",
        bytes(len(whole)),
    ]
    for _ in range(60):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        assert dict(rendered_prompts(prompts, tokenizer, limit, kept=kept)) == expected
        assert kept.read_bytes() == whole
    assert counted == [2] * (1 + len(damaged))


def test_without_room_for_the_file_a_run_goes_on(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    told = rendered_prompts(prompts_of("1+1?"), tokenizer, Limit(tokens=99, key="k"), kept=kept)
    assert told["p0"] == tuple(render_prompt(tokenizer, "1+1?"))
    assert f"{kept} is not written (Is a directory); the next start makes" in caplog.text


def test_the_file_has_nothing_but_numbers(tokenizer: Any, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    rendered_prompts(prompts_of("1+1?", "2?"), tokenizer, Limit(tokens=99, key="k"), kept=kept)
    ids = [render_prompt(tokenizer, text) for text in ("1+1?", "2?")]
    numbers = np.frombuffer(kept.read_bytes()[64:], "<i4").tolist()
    assert numbers == [*map(len, ids), *ids[0], *ids[1]]
