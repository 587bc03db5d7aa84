"""Tests both kinds of tokenizers that Ling-lite directories come with, trained here, and Ling-lite's own facts."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from test_convert import there_and_back
from tiny_model import write_tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_rl.data.chat import load_tokenizer, render_chat, render_prompt
from megatron_rl.data.prompts import Message

FACTS = Path(__file__).parents[2] / "shared/data/ling/ling_lite_tokenizer_facts.json"
# As in the facts, so that the test runs without them too.
TEMPLATE = (
    "{% for message in messages %}{% set role = message['role'] | lower %}{% if role == 'user' %}"
    "{% set role = 'HUMAN' %}{% endif %}{% set role = role | upper %}"
    "{{ '<role>' + role + '</role>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)
PRE_TOKENIZER = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
EOS = "<|endoftext|>"


def corpus() -> list[str]:
    rng = random.Random(0)
    words = ["the", "sum", "of", "is", "prime", "answer", "let", "x", "y", "Hello", "assistant", "question", "role"]
    return [" ".join(rng.choices(words, k=8)) + f" {rng.randrange(10**6)}." for _ in range(400)]


def byte_level(directory: Path) -> None:
    """Write a tokenizer.json as Ling-lite's: byte-level BPE, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[AddedToken(EOS)]
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))


def sentence_piece(directory: Path) -> None:
    """Write a tokenizer.model of a sentencepiece BPE with byte fallback, and the template in a file of its own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


KINDS = {"tokenizer.json": byte_level, "tokenizer.model": sentence_piece}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = write_tiny_model(tmp_path / "hf", vocab_size=512)
    KINDS[request.param](directory)
    return directory


def test_a_directory_with_either_tokenizer_loads_and_keeps_the_text(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    for text in ("Hello, what is the sum of 12345 and 7?", "two  spaces\nand a line", "naïve π ≠ 3 🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 512
    assert (
        len(tokenizer.encode("98765", add_special_tokens=False)) - len(tokenizer.encode("9", add_special_tokens=False))
        == 4
    )


def test_prompts_and_chats_are_rendered_by_ling_lites_template(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(render_prompt(tokenizer, "1+1?")) == "<role>HUMAN</role>1+1?<role>ASSISTANT</role>"
    chat = [Message(role="user", content="1+1?"), Message(role="assistant", content="it is 2")]
    ids, mask = render_chat(tokenizer, chat)
    learned = [token for token, carries in zip(ids, mask, strict=True) if carries]
    assert tokenizer.decode(learned, skip_special_tokens=True) == "it is 2"
    assert learned[-1] == tokenizer.eos_token_id


def test_a_conversion_carries_the_tokenizer_along(model: Path, tmp_path: Path) -> None:
    back = there_and_back(model, tmp_path)
    names = {path.name for path in model.iterdir() if not path.name.endswith(".safetensors")}
    assert names == {path.name for path in back.iterdir()} - {"model-00000.safetensors", "model.safetensors.index.json"}
    for name in names:
        assert (back / name).read_bytes() == (model / name).read_bytes()
    assert render_prompt(load_tokenizer(back), "Hello 42") == render_prompt(load_tokenizer(model), "Hello 42")


@pytest.mark.skipif(not FACTS.exists(), reason=f"{FACTS} is not there")
def test_ling_lites_chat_is_rendered_as_expected(tmp_path: Path) -> None:
    facts = json.loads(FACTS.read_text())
    assert (facts["chat_template"], facts["pre_tokenizer_regex_from_tokenizer_json"]) == (TEMPLATE, PRE_TOKENIZER)
    byte_level(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    example = facts["chat_example"]
    text = tokenizer.apply_chat_template(
        example["messages"], tokenize=False, add_generation_prompt=example["add_generation_prompt"]
    )
    assert text == example["expected"]
