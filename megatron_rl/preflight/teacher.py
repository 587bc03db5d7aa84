"""This module checks that a teacher policy reads the policy's tokens as the policy does: with the same vocabulary and
the same chat template."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.config.distillation import DistillationSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, render_prompts
from megatron_rl.data.messages import Conversation, of_text, with_system
from megatron_rl.families import load_architecture
from megatron_rl.gpus import visible_gpus
from megatron_rl.preflight.registry import Start
from megatron_rl.rollout.rollout_file import NO_TEACHER_IN_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers divide such text differently: words, numbers, white space, letters of other scripts, code.
_PROBE = "What is 12345 + 678?\n\n  def f(x):\treturn x**2  # Größe, 数学, \U0001f600 e^{-i\\pi}"
_SHOWN_CHARACTERS = 80


def teacher_problems(start: Start) -> Iterator[str]:
    """Yield what speaks against the teacher of a run that is about to start."""
    config = start.config
    if not (start.trains and isinstance(config, RlConfig) and config.distillation is not None):
        return
    section = config.distillation
    if start.rollouts is not None:
        yield NO_TEACHER_IN_FILE
        return
    if section.advantage == "alone" and chosen_algorithm(config.algorithm).dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling drops groups whose rewards are all equal, and with distillation.advantage "
            "'alone' no reward teaches anything; set algorithm.dynamic_sampling = false"
        )
    is_crowded = config.rollout.engine == "sglang" and visible_gpus() and not section.urls and not config.rollout.urls
    for name, arguments in (
        ("rollout", config.rollout.sglang_arguments),
        ("distillation", section.sglang_arguments),
    ):
        if is_crowded and not any(one.startswith("--mem-fraction-static") for one in arguments):
            yield (
                f"{name}.sglang_arguments names no --mem-fraction-static: the servers of the policy and of the teacher "
                "are on the same GPUs, and by default each takes most of the memory; give each its share, or run the "
                "teacher elsewhere (distillation.urls)"
            )
    yield from _model_problems(config, section, start.architecture.vocab_size)


def _model_problems(config: RlConfig, section: DistillationSection, vocab_size: int) -> Iterator[str]:
    """Yield where the teacher's model or tokenizer does not fit the policy's. vocab_size: that of the policy."""
    where = f"distillation.path {section.path}"
    architecture = load_architecture(section.path)
    if architecture.vocab_size < vocab_size:
        yield (
            f"{where} has {architecture.vocab_size} token ids and the policy {vocab_size}, so it could not read all of "
            "them; take a teacher with the policy's tokenizer"
        )
    own, other = load_tokenizer(config.model.path), load_tokenizer(section.path)
    yield from vocabulary_problems(own, other, where)
    if not section.other_template:
        yield from template_problems(own, other, where, config.data.template_arguments)


def vocabulary_problems(own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", where: str) -> Iterator[str]:
    """Yield where the teacher's ids mean other texts, or where it divides a text otherwise. where: names the
    teacher."""
    mine, theirs = own.get_vocab(), other.get_vocab()
    remedy = "take a teacher with the policy's tokenizer, or SFT on what it answers (docs/distillation.md)"
    differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if differing:
        token = differing[0]
        yield (
            f"{where} has another vocabulary than the policy: {len(differing)} tokens differ, the first is {token!r} "
            f"({_id(mine, token)} for the policy, {_id(theirs, token)} for the teacher); {remedy}"
        )
    elif own.encode(_PROBE, add_special_tokens=False) != other.encode(_PROBE, add_special_tokens=False):
        yield f"{where} has the policy's vocabulary and divides texts into other tokens of it; {remedy}"


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "missing"


def template_problems(
    own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", where: str, arguments: Mapping[str, Any]
) -> Iterator[str]:
    """Yield where the teacher's chat template would give a prompt other tokens than it gets."""
    for system in ("", "You are a tool."):
        chat = Conversation(messages=with_system(of_text("What is 1 + 1?").messages, system))
        found = [_rendered(tokenizer, chat, arguments) for tokenizer in (own, other)]
        if found[0] is not None and found[0] != found[1]:  # the policy's own refusals are for its prompts
            texts = [repr(one)[-_SHOWN_CHARACTERS:] for one in found]
            yield (
                f"{where} has another chat template: a prompt ends ...{texts[0]} for the policy and ...{texts[1]} for "
                "the teacher, which would read what it was not trained on; give it the policy's template if it knows "
                "that, or set distillation.other_template = true"
            )
            return


def _rendered(tokenizer: "PreTrainedTokenizerBase", chat: Conversation, arguments: Mapping[str, Any]) -> str | None:
    """Return the text of a prompt; None where the template refuses it, or has no place for an argument."""
    try:
        (ids,) = render_prompts(tokenizer, [chat], arguments=arguments)
    except ValueError:
        return None
    return str(tokenizer.decode(ids))
