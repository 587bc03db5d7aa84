"""Makes a tokenizer of bytes with a chat template for tools and thinking, and servers that say what they are told."""

import json
import sys
import tempfile
from pathlib import Path

import forked
import numpy as np
from inputs import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_rl.data.chat import load_tokenizer
from megatron_rl.rollout.client import Completion, SampleRequest

START, END = "<|start|>", "<|end|>"
# As Qwen3's: thinking is left out of what came before the last message of the user.
TEMPLATE = (
    "{%- if tools %}{{- '<|start|>system\nTools: ' + tools | tojson + '<|end|>\n' }}{% endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{{- '<|start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content and loop.index0 > ns.last %}"
    "{{- '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{- m.content }}"
    '{%- for call in m.tool_calls or [] %}{{- \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ call.function.arguments | tojson + '}</tool_call>' }}{% endfor %}"
    "{{- '<|end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{% endif %}"
)


def write_chat_tokenizer(folder: Path, template: str = TEMPLATE) -> int:
    """Write it into a model directory; returns the size of its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (START, END)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer.get_vocab_size()


def write_chat_model(folder: Path, *flags: str) -> int:
    """Write a tiny model with this tokenizer; returns the size of its vocabulary. flags: of make_tiny_model.py."""
    with tempfile.TemporaryDirectory() as scratch:
        count = write_chat_tokenizer(Path(scratch))
    made = forked.run([sys.executable, ROOT / "tools/make_tiny_model.py", folder, "--vocab-size", str(count), *flags])
    made.check_returncode()
    write_chat_tokenizer(folder)
    end = load_tokenizer(folder).eos_token_id
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": end, "pad_token_id": end}
        (folder / name).write_text(json.dumps(values))
    return count


def chat_tokenizer(folder: Path, template: str = TEMPLATE):
    write_chat_tokenizer(folder, template)
    return load_tokenizer(folder)


class Scripted:
    """Stands in for servers: each answer is the next text, with the end token unless the text says otherwise.

    say: the texts, or a function from what the policy reads to what it says. held: tokens after which a request waits
    to be cut short.
    """

    num_slots = 8

    def __init__(self, tokenizer, say):
        self.tokenizer, self.asked, self.held = tokenizer, [], None
        texts = None if callable(say) else iter(say)
        self._say = say if callable(say) else lambda _: next(texts)
        self.aborted = False

    async def abort_all(self):
        self.aborted = True

    async def generate(self, wanted: SampleRequest, temperature, may_abort, place) -> Completion:
        import asyncio

        self.asked.append(wanted)
        ids = self.tokenizer.encode(self._say(self.tokenizer.decode(list(wanted.input_ids))), add_special_tokens=False)
        ids = ids if ids and ids[-1] == self.tokenizer.eos_token_id else [*ids, self.tokenizer.eos_token_id]
        for count in range(1, len(ids) + 1):
            if any(stop in self.tokenizer.decode(ids[:count]) for stop in wanted.stop):
                ids = ids[:count]
        reason = "stop" if len(ids) <= wanted.max_new_tokens else "length"
        ids = ids[: wanted.max_new_tokens]
        if self.held is not None and self.held < len(ids):
            while not self.aborted:
                await asyncio.sleep(0.01)
            ids, reason = ids[: self.held], "abort"
        return Completion(
            output_ids=np.array(ids, np.int32),
            logprobs=-np.arange(1, len(ids) + 1, dtype=np.float32),
            finish_reason=reason,
            weight_versions=("0",),
        )
