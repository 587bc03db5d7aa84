"""Tests tools/make_tiny_model.py, run as the script that people run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from megatron_rl.families import load_architecture, tensor_shapes

SCRIPT = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"
FACTS = Path(__file__).parents[2] / "shared" / "data" / "ling" / "ling_lite_tokenizer_facts.json"
SMALL = ["--hidden-size", "32", "--layers", "3", "--heads", "4", "--kv-heads", "2", "--experts", "4"]
SMALL += ["--moe-intermediate-size", "24", "--shared-experts", "2", "--first-k-dense-replace", "1", "--seed", "7"]

# head_dim 8: rows of query_key_value are (4 + 2 + 2) * 8; the shared expert is one MLP of width 2 * 24; layer 0 is
# dense with the default width 2 * 32; 102 tokens are padded to 128.
EXPECTED_LAYER = {
    "input_layernorm.weight": (32,),
    "attention.query_key_value.weight": (64, 32),
    "attention.dense.weight": (32, 32),
    "post_attention_layernorm.weight": (32,),
}
EXPECTED_MOE = {
    "mlp.gate.weight": (4, 32),
    **{f"mlp.experts.{e}.{p}_proj.weight": (24, 32) for e in range(4) for p in ("gate", "up")},
    **{f"mlp.experts.{e}.down_proj.weight": (32, 24) for e in range(4)},
    "mlp.shared_experts.gate_proj.weight": (48, 32),
    "mlp.shared_experts.up_proj.weight": (48, 32),
    "mlp.shared_experts.down_proj.weight": (32, 48),
}
EXPECTED_DENSE = {
    "mlp.gate_proj.weight": (64, 32),
    "mlp.up_proj.weight": (64, 32),
    "mlp.down_proj.weight": (32, 64),
}
EXPECTED = {
    "model.word_embeddings.weight": (128, 32),
    **{f"model.layers.{n}.{name}": shape for n in range(3) for name, shape in EXPECTED_LAYER.items()},
    **{f"model.layers.0.{name}": shape for name, shape in EXPECTED_DENSE.items()},
    **{f"model.layers.{n}.{name}": shape for n in (1, 2) for name, shape in EXPECTED_MOE.items()},
    "model.norm.weight": (32,),
    "lm_head.weight": (128, 32),
}


def make(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return forked.run([sys.executable, SCRIPT, out, *flags])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    result = make(out, *SMALL, "--norm-head")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)


def test_every_tensor_of_the_architecture_is_there_with_its_shape(model_dir):
    tensors = load_file(model_dir / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == EXPECTED


def test_the_package_reads_the_config_and_counts_the_same_parameters(model_dir):
    config = load_architecture(model_dir)
    tensors = load_file(model_dir / "model.safetensors")
    assert config.num_parameters() == sum(tensor.size for tensor in tensors.values())
    assert config.norm_head is True
    assert (config.head_dim, config.vocab_size, config.dense_layers) == (8, 128, (0,))


def test_weights_have_the_standard_deviations_asked_for(model_dir):
    tensors = load_file(model_dir / "model.safetensors")
    assert np.all(tensors["model.layers.1.input_layernorm.weight"] == 1.0)
    assert tensors["lm_head.weight"].std() == pytest.approx(0.02, rel=0.06)
    # written into the residual stream: 0.02 / sqrt(2 * 3 layers)
    down = np.stack([tensors[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert down.std() == pytest.approx(0.02 / 6**0.5, rel=0.06)


def test_the_same_flags_give_the_same_bytes_and_another_seed_does_not(model_dir, tmp_path):
    assert make(tmp_path / "again", *SMALL, "--norm-head").returncode == 0
    assert make(tmp_path / "other", *SMALL, "--norm-head", "--seed", "8").returncode == 0
    names = sorted(path.name for path in model_dir.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (model_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    weights = "model.safetensors"
    assert (model_dir / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_bfloat16_weights_are_the_rounded_float32_weights(model_dir, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    assert make(tmp_path / "bf16", *SMALL, "--norm-head", "--dtype", "bfloat16").returncode == 0
    rounded = load_torch(tmp_path / "bf16" / "model.safetensors")
    exact = load_torch(model_dir / "model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].to(torch.bfloat16)) for name in EXPECTED)


@pytest.mark.parametrize("family", ["bailing_moe_v2", "glm4_moe", "qwen3_moe"])
def test_newer_families_with_experts_are_written_as_they_are_read(family, tmp_path):
    flags = {
        "bailing_moe_v2": ["--expert-groups", "2", "--shared-experts", "2"],
        "glm4_moe": ["--expert-groups", "2", "--routed-scaling-factor", "2.5"],
        "qwen3_moe": ["--shared-experts", "0"],
    }
    assert make(tmp_path / "model", *SMALL, "--dtype", "bfloat16", "--family", family, *flags[family]).returncode == 0
    found = load_architecture(tmp_path / "model")
    assert (found.family, found.dense_layers, found.num_experts, found.qk_norm) == (family, (0,), 4, True)
    with safe_open(tmp_path / "model/model.safetensors", framework="np") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dict
        assert set(types) == set(tensor_shapes(found))
        wide = {name for name, dtype in types.items() if dtype != "BF16"}
        assert wide == {name for name in types if name.endswith(("expert_bias", "e_score_correction_bias"))}
        assert len(wide) == (0 if family == "qwen3_moe" else 2)
        assert all(np.ptp(file.get_tensor(name)) > 0.01 for name in wide)
    refused = make(tmp_path / "none", "--family", "qwen3_moe", "--expert-groups", "2")
    assert "--expert-groups is for --family bailing_moe_v2 and glm4_moe, got qwen3_moe" in refused.stderr


def test_other_families_are_written_as_they_are_read(tmp_path):
    flags = ["--layers", "2", "--hidden-size", "64", "--experts", "4", "--moe-intermediate-size", "48"]
    for family, widths in (
        ("mistral", (128, 0)),
        ("mixtral", (0, 48)),
        ("olmo2", (128, 0)),
        ("olmoe", (0, 48)),
        ("phi3", (128, 0)),
    ):
        assert make(tmp_path / family, *flags, "--kv-heads", "4", "--family", family).returncode == 0
        found = load_architecture(tmp_path / family)
        assert (found.family, found.intermediate_size, found.moe_intermediate_size) == (family, *widths)
        with safe_open(tmp_path / family / "model.safetensors", framework="np") as file:
            assert set(file.keys()) == set(tensor_shapes(found))
    for flag in ("--shared-experts", "--first-k-dense-replace"):
        refused = make(tmp_path / "none", "--family", "mixtral", flag, "1")
        assert f"{flag} must be 0 for --family mixtral" in refused.stderr
    assert (
        "--kv-heads must be --heads 4 for --family olmoe, got 2" in make(tmp_path / "none", "--family", "olmoe").stderr
    )


def test_an_existing_directory_is_named_and_replaced_only_with_force(model_dir, tmp_path):
    out = tmp_path / "model"
    assert make(out, *SMALL).returncode == 0
    refused = make(out, *SMALL)
    assert refused.returncode == 2
    assert str(out) in refused.stderr
    assert "--force" in refused.stderr
    assert make(out, *SMALL, "--norm-head", "--force").returncode == 0
    assert json.loads((out / "config.json").read_text())["norm_head"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("not a model")
    assert make(notes, "--force").returncode == 2
    assert (notes / "mine.txt").read_text() == "not a model"


def test_sizes_that_do_not_fit_are_refused_with_the_flag_to_change(tmp_path):
    for flags, word in ((["--heads", "3"], "--hidden-size"), (["--vocab-size", "90"], "--vocab-size")):
        refused = make(tmp_path / "none", *flags)
        assert refused.returncode == 2
        assert word in refused.stderr
    assert not (tmp_path / "none").exists()


def test_the_tokenizer_has_one_token_per_character_and_loses_nothing(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n  a b , . 's \n\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    answer = tokenizer.encode("\\boxed{4}")
    assert len(answer) == 3
    assert tokenizer.decode(answer) == "\\boxed{4}"


def test_unknown_characters_become_the_unknown_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("aé漢b")) == ["a", "<unk>", "<unk>", "b"]


def test_ids_of_the_padding_rows_decode_without_an_error(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), 127]) == "ab"


def test_roles_are_single_special_tokens_and_eos_is_pad(model_dir, tokenizer):
    config = load_architecture(model_dir)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
    assert config.eos_token_ids == (tokenizer.eos_token_id,)
    assert tokenizer.convert_ids_to_tokens([*config.eos_token_ids]) == ["<|endoftext|>"]
    for role in ("SYSTEM", "HUMAN", "ASSISTANT"):
        ids = tokenizer.encode(f"<role>{role}</role>")
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_the_chat_template_is_ling_lites_and_renders_its_example(tokenizer):
    if not FACTS.is_file():
        pytest.skip(f"{FACTS} is not on this machine")
    facts = json.loads(FACTS.read_text())
    example = facts["chat_example"]
    assert tokenizer.chat_template == facts["chat_template"]
    text = tokenizer.apply_chat_template(example["messages"], tokenize=False, add_generation_prompt=True)
    assert text == example["expected"]


def test_auto_config_opens_the_directory_with_its_own_configuration_module(model_dir, tmp_path):
    code = (
        "import json, sys; from transformers import AutoConfig;"
        "c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "print(json.dumps([type(c).__name__, c.num_experts, c.rope_theta, c.rope_parameters, c.norm_head, c.head_dim]))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "USE_TORCH": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, model_dir], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    assert json.loads(result.stdout) == ["BailingMoeConfig", 4, 10000.0, rope, True, 8]
