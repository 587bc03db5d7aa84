"""Turns text into tokens through the chat template of the checkpoint.

A special token that a user's message has written out (`<|endoftext|>`) is text, unless it is asked for as the token.
In what an assistant says it is the token: reasoning and tool calls are marked by some.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.data.messages import REASONING, Conversation, Message, of_text, with_system
from megatron_rl.files import model_directory, model_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Roles whose messages the model itself does not write.
_OTHERS = ("user", "tool")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_AT_ONCE = 1000  # prompts, whose texts and tokens are in memory together
TEMPLATES = "additional_chat_templates"  # which transformers reads beside the files of the directory itself


def load_tokenizer(model_dir: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face directory from data only: no code of the directory runs.

    Raise ValueError when it does not load, has no vocabulary, no chat template or no eos token, or when a file leads
    out of the directory.
    """
    from transformers import AutoTokenizer

    directory = model_directory(model_dir)
    for folder in ("", TEMPLATES):
        if (directory / folder).is_dir():
            model_files(directory, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever a malformed file led to
        raise ValueError(
            f"{model_dir} holds no tokenizer that loads without remote code ({type(error).__name__}: {error}); "
            "it needs tokenizer.json or tokenizer.model, and tokenizer_config.json"
        ) from error
    # transformers makes a tokenizer of special tokens alone (Gemma's has a mask besides) where a class is named and its
    # vocabulary is not there.
    if len(tokenizer) - len(tokenizer.get_added_vocab()) <= 1:
        raise ValueError(
            f"{model_dir}: the tokenizer has special tokens alone, so it would leave all text out; fetch its "
            "vocabulary: tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        )
    if not tokenizer.chat_template:
        raise ValueError(f"{model_dir} has no chat template; put one into tokenizer_config.json or chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{model_dir}/tokenizer_config.json names no eos_token; responses could never end")
    return tokenizer


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, system: str = "", special_tokens: str = "text"
) -> list[int]:
    """Return the token ids of one user message, generation prompt included: what the server is asked to continue.

    special_tokens: as data.special_tokens.
    """
    messages = with_system(of_text(prompt).messages, system)
    return _render(tokenizer, Conversation(messages=messages), special_tokens, {}, add_generation_prompt=True)


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    chat: Conversation,
    special_tokens: str = "text",
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of any conversation that the model is to continue, generation prompt included. Raise
    ValueError where the template refuses it or has no place for a part of it."""
    return _render(tokenizer, chat, special_tokens, arguments or {}, add_generation_prompt=True)


def render_behind(
    tokenizer: "PreTrainedTokenizerBase",
    chat: Conversation,
    index: int,
    special_tokens: str = "text",
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of what the template writes after what the assistant says in the message at `index`: the end
    of its turn, all messages after it, and the generation prompt.

    Raise ValueError where the template does not write the message, or writes it differently once others follow.
    """
    arguments = arguments or {}
    _check_place(tokenizer, chat)
    hidden, texts = _hidden(chat, _special(tokenizer) if special_tokens == "text" else None)
    mark = _unused_character(hidden)
    before, said, after = hidden.messages[:index], hidden.messages[index], hidden.messages[index + 1 :]

    def written(answer: Message, goes_on: bool) -> str:
        part = replace(hidden, messages=(*before, answer, *(after if goes_on else ())))
        (text,) = _applied(tokenizer, [part], False, arguments, add_generation_prompt=goes_on)
        return str(text)

    plain = Message(role="assistant", content=mark)
    if '"tool_calls"' not in said.more:
        return _ids_with_texts(tokenizer, _behind(written(plain, True), mark), texts)
    # Calls stand after the text, or in its place: what follows them is what the whole has beyond its beginning.
    for answer in (replace(said, content=mark), said):
        whole, beginning = written(answer, True), written(answer, False)
        if answer is not said and mark in beginning:
            whole, beginning = _behind(whole, mark), _behind(beginning, mark)
        if whole.startswith(beginning):
            rest = _behind(written(plain, False), mark) + whole[len(beginning) :]
            return _ids_with_texts(tokenizer, rest, texts)
    raise ValueError("the chat template writes an assistant's calls of tools differently once other messages follow")


def _behind(text: str, mark: str) -> str:
    """Return the text after the mark. Raise ValueError unless the mark comes exactly once."""
    if text.count(mark) != 1:
        raise ValueError("the chat template does not write what an assistant says once, as it is")
    return text.rpartition(mark)[2]


def render_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Conversation],
    special_tokens: str = "text",
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[list[int]]:
    """Render every prompt as `render_prompt` does. The template and the tokenizer take many of them at once, which the
    tokenizer divides over the cores. arguments: as data.template_arguments.

    Raise ValueError where the template has no place for an argument, tools or calls of them."""
    arguments = arguments or {}
    check_arguments(tokenizer, arguments)
    special = _special(tokenizer) if special_tokens == "text" else None
    for start in range(0, len(prompts), _AT_ONCE):
        some = prompts[start : start + _AT_ONCE]
        # A prompt with special tokens in it is rendered by itself, and so is one that is more than a text.
        plain = [one.is_plain and (special is None or not special.search(one.messages[0].content)) for one in some]
        chats = list(compress(some, plain))
        rendered = iter(_applied(tokenizer, chats, True, arguments, add_generation_prompt=True) if chats else ())
        for prompt, is_plain in zip(some, plain, strict=True):
            if is_plain:
                yield next(rendered)
            else:
                yield _render(tokenizer, prompt, special_tokens, arguments, add_generation_prompt=True)


def check_arguments(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that the chat template never reads, or sets itself: it would change nothing, and
    nobody would see."""
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise ValueError(
                f"data.template_arguments sets {name!r}, which the model's chat template never mentions; take it out, "
                "or write what it should do into the prompts"
            )
        if re.search(rf"\{{%[-+]?\s*set\s+{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise ValueError(
                f"data.template_arguments sets {name!r}, which the model's chat template sets itself; take it out, or "
                "change the template"
            )


def mentions(tokenizer: "PreTrainedTokenizerBase", *names: str) -> bool:
    """Tell whether the chat template contains one of these names."""
    template = str(tokenizer.chat_template)
    return any(re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9_])", template) for name in names)


def _check_place(tokenizer: "PreTrainedTokenizerBase", chat: Conversation) -> None:
    """Raise ValueError where the chat template would leave out tools, calls of them, or reasoning without a word."""
    if chat.tools and not mentions(tokenizer, "tools"):
        raise ValueError("there are 'tools', and the model's chat template never mentions tools; drop them")
    for message in chat.messages:
        more = json.loads(message.more) if message.more else {}
        if "tool_calls" in more and not mentions(tokenizer, "tool_calls"):
            raise ValueError(
                "a message has 'tool_calls', which the model's chat template never mentions; write the calls into the "
                "content as the model is to write them"
            )
        if (reasoning := {*REASONING} & more.keys()) and not mentions(tokenizer, *REASONING):
            raise ValueError(
                f"a message has {min(reasoning)!r}, and the model's chat template mentions none of "
                f"{', '.join(REASONING)}; write the reasoning into the content, as in <think>...</think>"
            )


def response_decoder(tokenizer: "PreTrainedTokenizerBase", end_ids: Collection[int]) -> Callable[[Sequence[int]], str]:
    """Return a function that gives the text of a response's token ids [n], without the one of `end_ids` that ends it.
    That is what rewards judge and files of responses hold. Other special tokens stay visible. Warns of a tokenizer that
    ends responses otherwise."""

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
    end_ids: Sequence[int] = (),
    *,
    tools: str = "",
    arguments: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Return (token ids, loss mask) of one conversation; the mask is over the ids themselves, not their predecessors.

    end_ids: what ends a response of the model, beside the tokenizer's eos token; the model's eos_token_ids.
    tools: as of a `Conversation`. arguments: as data.template_arguments.

    Where the template marks what assistants say ({% generation %}), loss is on that. Otherwise it is on what the model
    would have to generate: for every assistant message, the tokens after the generation prompt, up to and including its
    last end token where the template writes one. Template text after that carries no loss. A
    conversation that ends in an assistant message without one (Ling-lite's template) gets one appended.

    These spans come from rendering prefixes of the conversation; ValueError where the template, or a token merged
    across a boundary, makes a prefix render differently from the whole: such a mask would be a guess.
    """
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("messages hold no assistant message, so there is nothing to learn; drop the conversation")
    if messages[0].role == "assistant":
        raise ValueError("messages begin with an assistant message; put the question before it")
    arguments = arguments or {}
    check_arguments(tokenizer, arguments)
    chat = Conversation(messages=tuple(messages), tools=tools)
    if _GENERATION.search(str(tokenizer.chat_template)):
        return _marked(tokenizer, chat, special_tokens, arguments)
    ids = _render(tokenizer, chat, special_tokens, arguments, add_generation_prompt=False)
    mask = [False] * len(ids)
    eos = tokenizer.eos_token_id
    ending = {eos, *end_ids}
    appended = eos if eos in end_ids or not end_ids else end_ids[0]
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = _prefix_length(tokenizer, chat, index, special_tokens, arguments, ids, add_generation_prompt=True)
        end = _prefix_length(tokenizer, chat, index + 1, special_tokens, arguments, ids, add_generation_prompt=False)
        if ends := [at for at in range(start, end) if ids[at] in ending]:
            end = ends[-1] + 1
        elif end == len(ids):
            ids, mask = [*ids, appended], [*mask, False]
            end += 1
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _marked(
    tokenizer: "PreTrainedTokenizerBase", chat: Conversation, special_tokens: str, arguments: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """Return ids and mask by the template's own marks. A token carries loss where all of its text is marked."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _check_place(tokenizer, chat)
    hidden, texts = _hidden(chat, _special(tokenizer) if special_tokens == "text" else None)
    tools = json.loads(chat.tools) if chat.tools else None
    with _told_of_template(chat):
        found: Any = render_jinja_template(
            [[message.as_dict() for message in hidden.messages]],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **arguments},
        )
    ((rendered,), (spans,)) = found
    ids: list[int] = []
    mask: list[bool] = []
    # Cut where marks begin and end: what the model generates begins and ends with a token, too.
    for start, end in pairwise(sorted({0, len(rendered), *(end for span in spans for end in span)})):
        part = _ids_with_texts(tokenizer, rendered[start:end], texts)
        ids += part
        mask += [any(first <= start < last for first, last in spans)] * len(part)
    if not any(mask):
        raise ValueError(
            "the chat template has {% generation %}, and marks nothing of a conversation of roles "
            f"{', '.join(message.role for message in chat.messages)}, so there is nothing to learn; mend the template, "
            "or drop the conversation"
        )
    return ids, mask


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    chat: Conversation,
    special_tokens: str,
    arguments: Mapping[str, Any],
    add_generation_prompt: bool,
) -> list[int]:
    _check_place(tokenizer, chat)
    if special_tokens == "text":
        hidden, texts = _hidden(chat, _special(tokenizer))
        if texts:
            (text,) = _applied(tokenizer, [hidden], False, arguments, add_generation_prompt)
            return _ids_with_texts(tokenizer, str(text), texts)
    (ids,) = _applied(tokenizer, [chat], True, arguments, add_generation_prompt)
    return list(ids)


def _applied(
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Conversation],
    tokenize: bool,
    arguments: Mapping[str, Any],
    add_generation_prompt: bool,
) -> list[Any]:
    """Apply the chat template to each conversation, which all have the same tools: its token ids, or its text."""
    rows: Any = [[message.as_dict() for message in chat.messages] for chat in chats]
    with _told_of_template(chats[0]):
        found: Any = tokenizer.apply_chat_template(
            rows,
            tools=json.loads(chats[0].tools) if chats[0].tools else None,
            tokenize=tokenize,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            tokenizer_kwargs={"return_attention_mask": False, "return_token_type_ids": False},
            **arguments,
        )
    return list(found)


@contextmanager
def _told_of_template(chat: Conversation) -> Iterator[None]:
    """Raise ValueError for what the template refuses."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        roles = ", ".join(message.role for message in chat.messages)  # of several all have the same
        raise ValueError(f"the chat template refuses a conversation of roles {roles}: {error}") from error


@lru_cache(maxsize=8)
def _special(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Return a pattern that matches any special token, the longest one where one begins with another."""
    names = sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t)}, key=len)
    return re.compile("|".join(map(re.escape, reversed(names)))) if names else None


def _hidden(chat: Conversation, special: re.Pattern[str] | None) -> tuple[Conversation, Mapping[str, str]]:
    """Replace every special token in what users and tools say by a stand-in; return the conversation and what each
    stand-in stands for."""
    texts: dict[str, str] = {}
    if special is None or not any(m.role in _OTHERS and special.search(m.content) for m in chat.messages):
        return chat, texts
    mark = _unused_character(chat)

    def hide(found: re.Match[str]) -> str:
        name = f"{mark}{len(texts)}{mark}"
        texts[name] = found[0]
        return name

    hidden = [replace(m, content=special.sub(hide, m.content)) if m.role in _OTHERS else m for m in chat.messages]
    return replace(chat, messages=tuple(hidden)), texts


def _unused_character(chat: Conversation) -> str:
    """Return a private-use character that nobody in the conversation has written."""
    whole = json.dumps(chat.parts(), ensure_ascii=False)
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in whole)


def _ids_with_texts(tokenizer: "PreTrainedTokenizerBase", rendered: str, texts: Mapping[str, str]) -> list[int]:
    """Encode what the template made piece by piece: its own special tokens, and between them text, where what was
    hidden is put back and nothing is special. Tokenizers divide a text at special tokens too, so pieces are theirs."""
    if not texts:
        return list(tokenizer.encode(rendered, add_special_tokens=False))
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
    chat: Conversation,
    count: int,
    special_tokens: str,
    arguments: Mapping[str, Any],
    ids: Sequence[int],
    add_generation_prompt: bool,
) -> int:
    """Count the tokens of the first `count` messages, checked to be the beginning of `ids`."""
    part = replace(chat, messages=chat.messages[:count])
    prefix = _render(tokenizer, part, special_tokens, arguments, add_generation_prompt)
    if prefix != list(ids[: len(prefix)]):
        what = f"the first {count} of {len(chat.messages)} messages"
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
