"""Tests templates of Ling 2.0 and Qwen3 with thinking on and off: what is sampled from, and what fine-tuning learns.

The templates here are ours, and short; what they render for these conversations is what the vendors' render.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from test_data_chat import SCRIPT, learned

from megatron_rl.data.chat import load_tokenizer, render_chat, render_prompts
from megatron_rl.data.messages import Conversation, Message

# The thinking of an answer is kept where no question follows.
_PARTS = """
{%- macro parts(text, keep) %}
    {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in text else '' %}
    {%- set said = text.split('</think>')[-1].lstrip('\\n') %}
    {%- if keep and (thought or always) %}{{ before + '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
    {{- said }}
{%- endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
"""
LING = (
    "{% set thinking_option = 'off' %}{% set always = false %}{% set before = '\\n' %}"
    + _PARTS
    + """
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{{- 'detailed thinking ' + thinking_option + '<|role_end|>' }}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}{{ '<role>HUMAN</role>' + m.content }}
    {%- else %}{{ '<role>ASSISTANT</role>' + parts(m.content, loop.last) }}{% endif %}
    {{- '<|role_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""
)
QWEN = (
    "{% set always = true %}{% set before = '' %}"
    + _PARTS
    + """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{{ parts(m.content, loop.index0 > ns.last) }}{% else %}{{ m.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
)
SPECIAL = {
    "ling": (LING, "<|role_end|>", ["<role>SYSTEM</role>", "<role>HUMAN</role>", "<role>ASSISTANT</role>"]),
    "qwen3": (QWEN, "<|im_end|>", ["<|im_start|>"]),
}
ASK = Message(role="user", content="1+1?")
PLAIN = Message(role="assistant", content="2")
THOUGHT = Message(role="assistant", content="<think>\none and one\n</think>\n\n2")
SYSTEM = Message(role="system", content="be brief")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a model directory with each vendor's special tokens and template."""
    folder = tmp_path_factory.mktemp("thinking")
    flags = ["--hidden-size", "16", "--layers", "1", "--experts", "2", "--moe-intermediate-size", "8"]
    forked.run([sys.executable, SCRIPT, folder / "model", *flags]).check_returncode()
    for name, (template, eos, others) in SPECIAL.items():
        shutil.copytree(folder / "model", folder / name)
        tokenizer = load_tokenizer(folder / name)
        tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": others})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in SPECIAL}


def prompt(tokenizer: Any, system: str | None = None, **arguments: Any) -> str:
    asked = (ASK,) if system is None else (Message(role="system", content=system), ASK)
    (ids,) = render_prompts(tokenizer, [Conversation(messages=asked)], arguments=arguments)
    return str(tokenizer.decode(ids))


def test_ling_says_in_the_system_turn_whether_it_thinks(folders: dict[str, Path], tmp_path: Path) -> None:
    ling = load_tokenizer(folders["ling"])
    start = (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>1+1?<|role_end|><role>ASSISTANT</role>"
    )
    assert prompt(ling) == start
    briefly = start.replace("detailed", "be brief\ndetailed")
    assert prompt(ling, "be brief") == briefly
    for answer, told in ((PLAIN, "2"), (THOUGHT, "\n<think>\none and one\n</think>\n\n2")):
        ids, mask = render_chat(ling, [SYSTEM, ASK, answer])
        assert ling.decode(ids) == briefly + told + "<|role_end|>"
        assert learned(ling, ids, mask) == [told + "<|role_end|>"]
    # Another template thinks: the first line says so.
    shutil.copytree(folders["ling"], tmp_path / "ring")
    (tmp_path / "ring/chat_template.jinja").write_text(LING.replace("'off'", "'on'"))
    assert prompt(load_tokenizer(tmp_path / "ring")) == start.replace("off", "on")


def test_qwen_thinks_unless_it_is_told_not_to(folders: dict[str, Path]) -> None:
    start, empty = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    qwen, silent = load_tokenizer(folders["qwen3"]), {"enable_thinking": False}
    for arguments in ({}, {"enable_thinking": True}):
        assert prompt(qwen, **arguments) == start
        ids, mask = render_chat(qwen, [ASK, THOUGHT], arguments=arguments)
        assert learned(qwen, ids, mask) == ["<think>\none and one\n</think>\n\n2<|im_end|>"]
        # An answer without a thought has an empty one, which is learned: the model has to write it.
        ids, mask = render_chat(qwen, [ASK, PLAIN], arguments=arguments)
        assert learned(qwen, ids, mask) == [empty + "2<|im_end|>"]
    assert prompt(qwen, **silent) == start + empty
    ids, mask = render_chat(qwen, [ASK, PLAIN], arguments=silent)
    assert qwen.decode(ids) == start + empty + "2<|im_end|>\n"
    assert learned(qwen, ids, mask) == ["2<|im_end|>"]
    with pytest.raises(ValueError, match="renders the first 1 of 2 messages with the generation prompt differently"):
        render_chat(qwen, [ASK, THOUGHT], arguments=silent)


def test_thoughts_of_earlier_answers_are_no_guess(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        tokenizer = load_tokenizer(folder)
        with pytest.raises(ValueError, match="give each assistant turn a row of its own"):
            render_chat(tokenizer, [ASK, THOUGHT, ASK, PLAIN])


def test_arguments_that_a_template_does_not_read_are_refused(folders: dict[str, Path]) -> None:
    for name, argument, told in (
        ("qwen3", "thinking", "never mentions; take it out"),
        ("ling", "thinking_option", "sets itself; take it out"),
    ):
        with pytest.raises(ValueError, match=f"template_arguments sets '{argument}', which .* template {told}"):
            render_chat(load_tokenizer(folders[name]), [ASK, PLAIN], arguments={argument: False})
