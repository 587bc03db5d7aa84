"""Tests the name table and its reshapes against tensors laid out by hand."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TINY_CONFIG, tiny_tensors, write_tiny_model

from megatron_rl.checkpoint.hf import HfCheckpoint
from megatron_rl.checkpoint.layout import Chunked, GateUp, GroupedQkv, Replicated, TensorLayout, Vocabulary
from megatron_rl.checkpoint.names import canonical_name, name_table
from megatron_rl.families import architecture_of


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "model")
    opened = Path.open

    def open_or_refuse(path: Path, *arguments: Any, **options: Any) -> Any:  # root may read whatever its mode is
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_or_refuse)
    with pytest.raises(
        ValueError, match=r"^.*model\.safetensors cannot be opened: Permission denied; mend that first$"
    ):
        HfCheckpoint(model, architecture_of(TINY_CONFIG))


def test_query_key_value_rows_are_grouped_by_key_value_head() -> None:
    # 4 query heads, 2 key-value heads, head_dim 1: rows q0 q1 q2 q3 k0 k1 v0 v1
    rows = torch.tensor([[0.0], [1], [2], [3], [10], [11], [20], [21]])
    layout = GroupedQkv(dim=0, num_query_heads=4, num_kv_heads=2, head_dim=1)
    full = layout.merge([rows])
    assert full.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert layout.shard(full, 1, 2).flatten().tolist() == [2, 3, 11, 21]


def test_each_rank_holds_its_gate_rows_above_its_up_rows() -> None:
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    full = GateUp().merge([gate, up])
    assert GateUp().shard(full, 0, 2).flatten().tolist() == [0, 1, 10, 11]
    assert GateUp().shard(full, 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zero_rows() -> None:
    full = torch.ones(5, 2)
    assert Vocabulary(5).shard(full, 1, 2).tolist() == [[1, 1], [1, 1], [0, 0]]
    assert Vocabulary(5).shard(full, 3, 4).tolist() == [[0, 0], [0, 0]]


@settings(deadline=None)
@given(size=st.sampled_from([1, 2, 4]), d=st.integers(1, 3), per_group=st.integers(1, 3), h=st.integers(1, 3))
def test_every_layout_comes_back_bit_for_bit(size: int, d: int, per_group: int, h: int) -> None:
    heads = 4
    qkv = GroupedQkv(dim=0, num_query_heads=heads * per_group, num_kv_heads=heads, head_dim=d)
    cases: list[tuple[TensorLayout, list[torch.Tensor]]] = [
        (qkv, [torch.randn((per_group + 2) * heads * d, h)]),
        (GateUp(), [torch.randn(8, h), torch.randn(8, h)]),
        (GateUp(separate=False), [torch.randn(16, h)]),
        (Chunked(dim=1), [torch.randn(h, 8)]),
        (Vocabulary(9), [torch.randn(9, h)]),
        (Replicated(), [torch.randn(h)]),
    ]
    for layout, tensors in cases:
        full = layout.merge(tensors)
        back = layout.unshard([layout.shard(full, rank, size) for rank in range(size)])
        for found, expected in zip(layout.split(back), tensors, strict=True):
            assert torch.equal(found, expected), layout


def test_the_table_names_every_tensor_of_the_model_once_with_its_shape() -> None:
    table = name_table(architecture_of(TINY_CONFIG))
    named = [pair for entry in table.values() for pair in zip(entry.hf, entry.hf_shapes, strict=True)]
    assert sorted(named) == sorted((name, tuple(t.shape)) for name, t in tiny_tensors(TINY_CONFIG).items())


@pytest.mark.parametrize(
    ("local", "canonical"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.3.self_attention.linear_qkv.weight"),
        ("decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight", "decoder.layers.4.mlp.experts.10.linear_fc1.weight"),  # noqa: E501
        ("decoder.layers.1.mlp.experts.linear_fc2.weight2", "decoder.layers.4.mlp.experts.10.linear_fc2.weight"),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)  # fmt: skip
def test_a_ranks_names_become_global(local: str, canonical: str) -> None:
    assert canonical_name(local, layer_offset=3, expert_offset=8) == canonical


def test_missing_left_over_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = write_tiny_model(tmp_path / "m")
    config = architecture_of(TINY_CONFIG)
    tensors = load_file(model / "model.safetensors")
    broken = dict(tensors)
    broken["extra.weight"] = broken.pop("model.norm.weight")
    save_file(broken, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(model.norm.weight\); 1 unexpected \(extra.weight\)"):
        HfCheckpoint(model, config)
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 64)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(3, 64\); config.json says \(96, 64\)"):
        HfCheckpoint(model, config)
