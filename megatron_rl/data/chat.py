"""Text to tokens, through the chat template of the checkpoint.

A special token that a user's message has written out (`<|endoftext|>`) is text, unless it is asked for as the token.
In what an assistant says it is the token: reasoning and tool calls are marked by some.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_rl.data.prompts import Message
from megatron_rl.files import model_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_AT_ONCE = 1000  # prompts, whose texts and tokens are in memory together
TEMPLATES = "additional_chat_templates"  # which transformers reads beside the files of the directory itself


def load_tokenizer(
    model_dir: str | Path, template_arguments: Mapping[str, bool | int | str] = MappingProxyType({})
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory, from data only: no code of the directory runs.

    template_arguments: see TextSection; from here on the chat template has these values. ValueError when it does not
    load, has no chat template, one that does not read an argument, or no eos token, or when a file leads out of the
    directory.
    """
    from transformers import AutoTokenizer

    if not Path(model_dir).is_dir():
        raise ValueError(f"model directory {model_dir} does not exist; make one with tools/make_tiny_model.py")
    for folder in ("", TEMPLATES):
        if (Path(model_dir) / folder).is_dir():
            model_files(Path(model_dir), folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever a malformed file led to
        raise ValueError(
            f"{model_dir} holds no tokenizer that loads without remote code ({type(error).__name__}: {error}); "
            "it needs tokenizer.json or tokenizer.model, and tokenizer_config.json"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(f"{model_dir} has no chat template; put one into tokenizer_config.json or chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{model_dir}/tokenizer_config.json names no eos_token; responses could never end")
    for name, value in template_arguments.items():
        _set_argument(tokenizer, name, value, model_dir)
    return tokenizer


def _set_argument(
    tokenizer: "PreTrainedTokenizerBase", name: str, value: bool | int | str, model_dir: str | Path
) -> None:
    """Begin the chat template with the value, so that whoever applies it, or digests it, has it."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(f"template_arguments need one chat template, and {model_dir} has several; leave one there")
    reads, sets = (re.search(before + rf"\b{name}\b", template) for before in ("", r"\{%[-+]?\s*set\s+"))
    if not reads or sets:
        raise ValueError(
            f"template_arguments.{name}: the chat template of {model_dir} "
            f"{'sets it itself' if sets else 'has no such name'}; leave it out, or change the template"
        )
    # The empty text keeps a line break behind it, which one behind a statement would lose.
    tokenizer.chat_template = f"{{% set {name} = {json.dumps(value)} %}}{{{{ '' }}}}{template}"


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, system: str | None = None, special_tokens: str = "text"
) -> list[int]:
    """Token ids of one user message, generation prompt included: what the server is asked to continue.

    special_tokens: as data.special_tokens.
    """
    messages = [Message(role="user", content=prompt)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return _render(tokenizer, messages, special_tokens, add_generation_prompt=True)


def render_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], special_tokens: str = "text"
) -> Iterator[list[int]]:
    """Render every prompt as `render_prompt` does. The template and the tokenizer take many of them at once, which the
    tokenizer divides over the cores."""
    special = _special(tokenizer) if special_tokens == "text" else None
    for start in range(0, len(prompts), _AT_ONCE):
        some = prompts[start : start + _AT_ONCE]
        # What has special tokens in it goes by itself.
        plain = [special is None or not special.search(prompt) for prompt in some]
        chats = [[Message(role="user", content=prompt)] for prompt in compress(some, plain)]
        rendered = iter(_applied(tokenizer, chats, True, add_generation_prompt=True) if chats else ())
        for prompt, is_plain in zip(some, plain, strict=True):
            yield next(rendered) if is_plain else render_prompt(tokenizer, prompt, special_tokens=special_tokens)


def response_decoder(tokenizer: "PreTrainedTokenizerBase", end_ids: Collection[int]) -> Callable[[Sequence[int]], str]:
    """Text of a response's token ids [n], without the one of `end_ids` that ends it: what rewards judge, and what
    files of responses hold. Other special tokens stay visible. Warns of a tokenizer that ends responses otherwise."""

    if told := other_end_token(tokenizer, end_ids):
        log.warning("%s", told)

    def decode(ids: Sequence[int]) -> str:
        ended = bool(ids) and ids[-1] in end_ids
        return str(tokenizer.decode(list(ids[:-1] if ended else ids)))

    return decode


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    special_tokens: str = "text",
) -> tuple[list[int], list[bool]]:
    """(token ids, loss mask) of one conversation; the mask is over the ids themselves, not their predecessors.

    Loss is on what the model would have to generate: for every assistant message, the tokens after the generation
    prompt, up to and including its last eos token of the tokenizer where the template writes one. Template text after
    that carries no loss. A conversation that ends in an assistant message without one (Ling-lite's template) gets one
    appended.

    The spans come from rendering prefixes of the conversation; ValueError where the template, or a token merged
    across a boundary, makes a prefix render differently from the whole: such a mask would be a guess.
    """
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("messages hold no assistant message, so there is nothing to learn; drop the conversation")
    if messages[0].role == "assistant":
        raise ValueError("messages begin with an assistant message; put the question before it")
    ids = _render(tokenizer, messages, special_tokens, add_generation_prompt=False)
    mask = [False] * len(ids)
    eos = tokenizer.eos_token_id
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = _prefix_length(tokenizer, messages, index, special_tokens, ids, add_generation_prompt=True)
        end = _prefix_length(tokenizer, messages, index + 1, special_tokens, ids, add_generation_prompt=False)
        if ends := [at for at in range(start, end) if ids[at] == eos]:
            end = ends[-1] + 1
        elif end == len(ids):
            ids, mask = [*ids, eos], [*mask, False]
            end += 1
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], special_tokens: str, add_generation_prompt: bool
) -> list[int]:
    if special_tokens == "text":
        hidden, texts = _hidden(messages, _special(tokenizer))
        if texts:
            (text,) = _applied(tokenizer, [hidden], False, add_generation_prompt)
            return _ids_with_texts(tokenizer, str(text), texts)
    (ids,) = _applied(tokenizer, [messages], True, add_generation_prompt)
    return list(ids)


def _applied(
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Sequence[Message]],
    tokenize: bool,
    add_generation_prompt: bool,
) -> list[Any]:
    """Apply the chat template to each conversation: its token ids, or its text."""
    from jinja2 import TemplateError

    rows: Any = [[{"role": message.role, "content": message.content} for message in chat] for chat in chats]
    try:
        found: Any = tokenizer.apply_chat_template(
            rows,
            tokenize=tokenize,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            tokenizer_kwargs={"return_attention_mask": False, "return_token_type_ids": False},
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in chats[0])  # of several all have the same
        raise ValueError(f"the chat template refuses a conversation of roles {roles}: {error}") from error
    return list(found)


@lru_cache(maxsize=8)
def _special(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Any special token; the longest one where one begins with another."""
    names = sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t)}, key=len)
    return re.compile("|".join(map(re.escape, reversed(names)))) if names else None


def _hidden(
    messages: Sequence[Message], special: re.Pattern[str] | None
) -> tuple[Sequence[Message], Mapping[str, str]]:
    """The messages with something in place of every special token in what users say, and what it stands for."""
    texts: dict[str, str] = {}
    if special is None or not any(m.role == "user" and special.search(m.content) for m in messages):
        return messages, texts
    # Of the private-use characters one that nobody has written.
    whole = "".join(message.content for message in messages)
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in whole)

    def hide(found: re.Match[str]) -> str:
        name = f"{mark}{len(texts)}{mark}"
        texts[name] = found[0]
        return name

    hidden = [Message(role=m.role, content=special.sub(hide, m.content)) if m.role == "user" else m for m in messages]
    return hidden, texts


def _ids_with_texts(tokenizer: "PreTrainedTokenizerBase", rendered: str, texts: Mapping[str, str]) -> list[int]:
    """Encode what the template made piece by piece: its own special tokens, and between them text, where what was
    hidden is put back and nothing is special. Tokenizers divide a text at special tokens too, so pieces are theirs."""
    special = _special(tokenizer)
    assert special is not None
    hidden = re.compile("|".join(map(re.escape, texts)))
    ids: list[int] = []
    start = 0
    for found in [*special.finditer(rendered), None]:
        piece = rendered[start : found.start() if found else len(rendered)]
        text = hidden.sub(lambda name: texts[name[0]], piece)
        if text:
            ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=text != piece)
        if found:
            ids.append(int(tokenizer.convert_tokens_to_ids(found[0])))
            start = found.end()
    return ids


def _prefix_length(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    count: int,
    special_tokens: str,
    ids: Sequence[int],
    add_generation_prompt: bool,
) -> int:
    """Tokens of the first `count` messages, checked to be the beginning of `ids`."""
    prefix = _render(tokenizer, messages[:count], special_tokens, add_generation_prompt)
    if prefix != list(ids[: len(prefix)]):
        what = f"the first {count} of {len(messages)} messages"
        what += " with the generation prompt" if add_generation_prompt else ""
        same = next(i for i, token in enumerate(prefix) if i >= len(ids) or token != ids[i])
        raise ValueError(
            f"the chat template renders {what} differently from the whole conversation, from token {same} on "
            f"({tokenizer.decode(prefix[same : same + 8])!r} against {tokenizer.decode(ids[same : same + 8])!r}), "
            "so the loss mask is undefined; give each assistant turn a row of its own, and begin its content with "
            "what the generation prompt does not already write"
        )
    return len(prefix)


def other_end_token(tokenizer: "PreTrainedTokenizerBase", end_ids: Collection[int]) -> str | None:
    """Word the warning that the tokenizer's eos token ends no response of the model; None where it does."""
    if tokenizer.eos_token_id in end_ids:
        return None
    mine = ", ".join(f"{one} ({tokenizer.convert_ids_to_tokens(one)!r})" for one in end_ids)
    return (
        f"the tokenizer's eos token is {tokenizer.eos_token_id} ({tokenizer.eos_token!r}), but responses end at {mine}"
        ", the eos_token_id of config.json and generation_config.json; if the chat template ends a turn with the "
        "tokenizer's, add that to generation_config.json, or responses go on to rollout.max_response_tokens"
    )
