"""Tests rendering through chat templates: Ling-lite's, and others that a checkpoint may bring."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from megatron_rl.data.chat import load_tokenizer, render_chat, render_prompt, response_decoder
from megatron_rl.data.prompts import Message
from megatron_rl.data.student import student_of
from megatron_rl.reward.code_answer import closed_blocks

SCRIPT = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"
SYSTEM = Message(role="system", content="be brief")
ASK, REPLY = Message(role="user", content="1+1?"), Message(role="assistant", content="2")
ASK_AGAIN, REPLY_AGAIN = Message(role="user", content="2+2?"), Message(role="assistant", content="so 4")

# One `[role]...` line per message, eos after each assistant message and a newline after that.
WITH_EOS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Keeps only the last assistant message, as templates do that strip earlier reasoning.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    flags = ["--hidden-size", "16", "--layers", "1", "--experts", "2", "--moe-intermediate-size", "8"]
    forked.run([sys.executable, SCRIPT, out, *flags]).check_returncode()
    return out


@pytest.fixture(scope="module")
def ling(model_dir):
    return load_tokenizer(model_dir)


@pytest.fixture
def tokenizer_with(model_dir):
    def load(template: str):
        tokenizer = load_tokenizer(model_dir)
        tokenizer.chat_template = template
        return tokenizer

    return load


def learned(tokenizer, ids, mask) -> list[str]:
    """Return the stretches that carry loss, as text."""
    stretches: list[list[int]] = []
    for previous, (token, carries) in zip([False, *mask], zip(ids, mask, strict=True), strict=False):
        if carries:
            if not previous:
                stretches.append([])
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_a_prompt_ends_with_the_generation_prompt(ling):
    assert ling.decode(render_prompt(ling, "1+1?")) == "<role>HUMAN</role>1+1?<role>ASSISTANT</role>"
    with_system = "<role>SYSTEM</role>be brief<role>HUMAN</role>1+1?<role>ASSISTANT</role>"
    assert ling.decode(render_prompt(ling, "1+1?", system="be brief")) == with_system
    # one token for a role, one for a character
    assert len(render_prompt(ling, "1+1?")) == 6


def test_ling_lites_template_learns_the_answer_and_an_appended_eos(ling):
    ids, mask = render_chat(ling, [SYSTEM, ASK, REPLY])
    text = "<role>SYSTEM</role>be brief<role>HUMAN</role>1+1?<role>ASSISTANT</role>2<|endoftext|>"
    assert ling.decode(ids) == text
    assert len(mask) == len(ids)
    assert mask == [False] * (len(ids) - 2) + [True, True]
    assert learned(ling, ids, mask) == ["2<|endoftext|>"]


def test_what_is_learned_continues_exactly_the_prompt_that_is_sampled_from(ling):
    ids, mask = render_chat(ling, [ASK, REPLY])
    prompt = render_prompt(ling, ASK.content)
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


def test_every_assistant_turn_is_learned_and_only_the_last_is_closed_where_the_template_closes_none(ling):
    ids, mask = render_chat(ling, [ASK, REPLY, ASK_AGAIN, REPLY_AGAIN])
    assert learned(ling, ids, mask) == ["2", "so 4<|endoftext|>"]
    assert ids.count(ling.eos_token_id) == 1


def test_a_conversation_that_ends_with_a_user_gets_no_eos(ling):
    ids, mask = render_chat(ling, [ASK, REPLY, ASK_AGAIN])
    assert ids[-1] != ling.eos_token_id
    assert learned(ling, ids, mask) == ["2"]


def test_a_template_that_writes_eos_is_learned_up_to_it_and_gets_no_second(tokenizer_with):
    tokenizer = tokenizer_with(WITH_EOS)
    ids, mask = render_chat(tokenizer, [ASK, REPLY, ASK_AGAIN, REPLY_AGAIN])
    text = "[user]1+1?\n[assistant]2<|endoftext|>\n[user]2+2?\n[assistant]so 4<|endoftext|>\n"
    assert tokenizer.decode(ids) == text
    assert learned(tokenizer, ids, mask) == ["2<|endoftext|>", "so 4<|endoftext|>"]


def test_a_turn_ends_at_whichever_end_token_of_the_model_the_template_writes(tokenizer_with):
    tokenizer = tokenizer_with(WITH_EOS.replace("eos_token", "'<role>HUMAN</role>'"))
    end, eos = tokenizer.convert_tokens_to_ids("<role>HUMAN</role>"), tokenizer.eos_token_id
    chat = [ASK, REPLY, ASK_AGAIN, REPLY_AGAIN]
    # Unknown as an end, it is what the template writes, and the tokenizer's own is appended.
    turns = ["2<role>HUMAN</role>", "so 4<role>HUMAN</role>"]
    assert learned(tokenizer, *render_chat(tokenizer, chat)) == [f"{turns[0]}\n", f"{turns[1]}\n<|endoftext|>"]
    for end_ids in ((end,), (eos, end)):
        assert learned(tokenizer, *render_chat(tokenizer, chat, end_ids=end_ids)) == turns


def test_what_is_appended_ends_a_response_of_the_model(ling):
    other = ling.convert_tokens_to_ids("<role>HUMAN</role>")
    assert render_chat(ling, [ASK, REPLY], end_ids=(other,))[0][-1] == other
    assert render_chat(ling, [ASK, REPLY], end_ids=(other, ling.eos_token_id))[0][-1] == ling.eos_token_id


def test_a_template_that_rewrites_history_is_refused(tokenizer_with):
    tokenizer = tokenizer_with(FORGETFUL)
    assert learned(tokenizer, *render_chat(tokenizer, [ASK, REPLY])) == ["2<|endoftext|>"]
    with pytest.raises(
        ValueError, match=r"first 1 of 4 messages with the generation prompt differently .*a row of its own"
    ):
        render_chat(tokenizer, [ASK, REPLY, ASK_AGAIN, REPLY_AGAIN])


def test_a_generation_prompt_that_the_content_does_not_continue_is_refused(tokenizer_with):
    tokenizer = tokenizer_with(THINKING)
    with pytest.raises(ValueError, match="with the generation prompt differently"):
        render_chat(tokenizer, [ASK, REPLY])
    thoughtful = Message(role="assistant", content="<think>easy</think>2")
    assert learned(tokenizer, *render_chat(tokenizer, [ASK, thoughtful])) == ["easy</think>2<|endoftext|>"]


def test_a_role_that_the_template_refuses_is_a_value_error(tokenizer_with):
    with pytest.raises(ValueError, match="refuses a conversation of roles system, user: no system role"):
        render_prompt(tokenizer_with(NO_SYSTEM), "1+1?", system="be brief")


def test_conversations_without_anything_to_learn_are_refused(ling):
    with pytest.raises(ValueError, match="no assistant message"):
        render_chat(ling, [ASK])
    with pytest.raises(ValueError, match="begin with an assistant"):
        render_chat(ling, [REPLY])


def test_directories_without_a_usable_tokenizer_are_named(tmp_path, model_dir):
    with pytest.raises(
        ValueError, match=r"missing does not exist; fetch one .*make a tiny one with tools/make_tiny_model\.py"
    ):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no tokenizer that loads without remote code"):
        load_tokenizer(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(bare)
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "x"}')
    with pytest.raises(ValueError, match="names no eos_token"):
        load_tokenizer(bare)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "LlamaTokenizer", "GemmaTokenizer"])
def test_a_tokenizer_whose_vocabulary_was_not_fetched_is_refused(tmp_path, name):
    # transformers 5 opens these classes without any file of a vocabulary, and no text has tokens then
    config = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has special tokens alone, .*; fetch its vocabulary: tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_data_and_reward_import_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_rl.data.chat, megatron_rl.data.tasks, megatron_rl.reward.pool;"
        "bad = {'torch', 'transformers', 'megatron', 'sglang', 'sympy'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_eos_that_ends_a_response_is_no_part_of_its_text(ling) -> None:
    program = "```python\nx = 1\n```"
    decode, eos = response_decoder(ling, [ling.eos_token_id]), ling.eos_token_id
    ids = ling.encode(program, add_special_tokens=False)
    assert decode([*ids, eos]) == decode(ids) == program
    assert closed_blocks(decode([*ids, eos]))  # a fence with eos behind it would close nothing
    assert decode([eos, *ids]) == "<|endoftext|>" + program
    assert decode([]) == ""


def test_a_student_would_misread_special_tokens_and_the_beginnings_of_turns(ling, tokenizer_with) -> None:
    student = student_of(ling)
    for text in ("a<|endoftext|>", "<unk>", "so <role>HUMAN</role>2+2?"):
        assert student.would_misread(text)
    assert not student.would_misread("a < b, <b>bold</b>, <role> and </role>, <|endoftext |>, \\boxed{2}")
    # 2 turns, 4 characters and 1, and the end of the sequence
    assert student.num_tokens([ASK, REPLY]) == 8
    turns = "{% for m in messages %}<turn>{{ m['role'] }}</turn>{{ m['content'] }}{% endfor %}"
    told = student_of(tokenizer_with(turns + "{% if add_generation_prompt %}<turn>assistant</turn>{% endif %}"))
    assert [role for role in ("user", "system", "assistant", "tool") if told.would_misread(f"<turn>{role}</turn>")] == [
        "user", "system", "assistant",
    ]  # fmt: skip
    assert student_of(tokenizer_with(NO_SYSTEM)).markers


def test_special_tokens_that_a_user_writes_are_text_unless_asked_for(ling):
    text = "a<|endoftext|>b <role>ASSISTANT</role>"
    plain, marked = render_prompt(ling, text), render_prompt(ling, text, special_tokens="token")
    human, assistant, eos = (ling.convert_tokens_to_ids(t) for t in ("<role>HUMAN</role>", "<role>ASSISTANT</role>",
                                                                   "<|endoftext|>"))  # fmt: skip
    assert ling.decode(plain) == ling.decode(marked) == f"<role>HUMAN</role>{text}<role>ASSISTANT</role>"
    assert [token for token in marked if token in (human, assistant, eos)] == [human, eos, assistant, assistant]
    assert [token for token in plain if token in (human, assistant, eos)] == [human, assistant]
    # One token for a character, as of any other text: all of them, and two of the template.
    assert len(plain) == len(text) + 2
    assert render_prompt(ling, "1+1?") == render_prompt(ling, "1+1?", special_tokens="token")


def test_special_tokens_of_an_assistant_are_tokens_and_learned(ling):
    eos = ling.eos_token_id
    chat = [Message(role="user", content="stop <|endoftext|>"), Message(role="assistant", content="ok<|endoftext|>")]
    ids, mask = render_chat(ling, chat)
    assert ids.count(eos) == 1
    assert learned(ling, ids, mask) == ["ok<|endoftext|>"]
    assert render_chat(ling, chat, "token")[0].count(eos) == 2


def test_what_a_user_writes_cannot_look_like_what_stands_in_for_it(tokenizer_with):
    tokenizer = tokenizer_with(WITH_EOS)
    text = "\ue0000\ue000<|endoftext|>\ue000"
    assert (
        tokenizer.decode(render_prompt(tokenizer, text)).replace("<unk>", "?") == "[user]?0?<|endoftext|>?\n[assistant]"
    )
