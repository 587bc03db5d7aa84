"""Checks which package computes each part, for every combination of configuration, device and packages."""

import itertools

import pytest
from pydantic import ValidationError
from tiny_model import TINY_CONFIG

from megatron_rl.config.layout import Layout
from megatron_rl.config.model import ModelSection
from megatron_rl.families import architecture_of
from megatron_rl.model.backends import COSTS, Backends, Installed, choose, problems

BAILING = architecture_of(TINY_CONFIG)
HOPPER = Installed(compute_capability=(9, 0))
AMPERE = Installed(compute_capability=(8, 0))
TURING = Installed(compute_capability=(7, 5))
BLACKWELL = Installed(compute_capability=(10, 0), flash_attn_4=True, quack=True)
WITH_ENGINE = Installed(compute_capability=(9, 0), transformer_engine=True)
EVERYTHING = Installed(
    compute_capability=(9, 0), transformer_engine=True, flash_attn_4=True, quack=True, weight_gradient=True
)


def section(**options: str) -> ModelSection:
    return ModelSection.model_validate({"path": "unused", "dtype": "bfloat16"} | options)


def parts(installed: Installed, layout: Layout | None = None, **options: str) -> tuple[str, str, str]:
    chosen = choose(section(**options), BAILING, layout or Layout(world_size=1), installed)
    return chosen.layers, chosen.attention, chosen.experts


def test_the_best_that_has_been_measured_is_chosen() -> None:
    engine = "transformer_engine"
    assert parts(HOPPER) == parts(EVERYTHING) == parts(WITH_ENGINE) == ("local", "flash", "grouped")
    assert parts(EVERYTHING, layers=engine) == parts(EVERYTHING, fp8="e4m3") == (engine, engine, engine)
    assert parts(AMPERE) == ("local", "flash", "sequential")
    assert parts(TURING) == ("local", "sdpa", "sequential")
    assert parts(Installed()) == parts(Installed(transformer_engine=True)) == ("local", "sdpa", "sequential")
    assert parts(HOPPER, dtype="float32") == ("local", "sdpa", "sequential")
    assert parts(EVERYTHING, Layout(world_size=2, context=2)) == ("local", "sdpa", "grouped")
    assert parts(HOPPER, Layout(world_size=6, expert=6)) == ("local", "flash", "sequential")
    assert parts(Installed(), experts="grouped") == ("local", "sdpa", "grouped")
    narrow = BAILING.model_copy(update={"moe_intermediate_size": 20})  # rows of 40 bytes
    assert choose(section(), narrow, Layout(world_size=1), HOPPER).experts == "sequential"
    assert parts(EVERYTHING, attention="fa4") == parts(BLACKWELL, attention="fa4") == ("local", "fa4", "grouped")
    assert parts(EVERYTHING, experts="sequential") == ("local", "flash", "sequential")


def test_who_adds_up_the_gradients_of_weights() -> None:
    """Check who adds up the weight gradients of linear layers and of routed experts."""

    def gradients(installed: Installed, **options: str) -> tuple[str, str, str]:
        chosen = choose(section(**options), BAILING, Layout(world_size=1), installed)
        return chosen.permutation, chosen.weight_gradient, chosen.expert_weight_gradient

    engine, alone = "transformer_engine", ("torch", "separate", "separate")
    apex = Installed(compute_capability=(8, 0), weight_gradient=True)
    assert gradients(HOPPER) == gradients(WITH_ENGINE) == gradients(Installed(weight_gradient=True)) == alone
    assert gradients(WITH_ENGINE, layers=engine) == (engine, engine, engine)
    assert gradients(WITH_ENGINE, layers=engine, dtype="float32") == (engine, "separate", "separate")
    assert gradients(EVERYTHING, layers=engine) == (engine, "apex", "apex")
    assert gradients(apex) == ("torch", "apex", "apex")  # one expert after the other
    assert gradients(EVERYTHING) == ("torch", "apex", "separate")
    assert gradients(apex, dtype="float32") == alone
    assert gradients(EVERYTHING, expert_weight_gradient="quack") == ("torch", "apex", "quack")
    assert gradients(BLACKWELL, expert_weight_gradient="quack") == ("torch", "separate", "quack")


def test_the_log_says_what_is_missing_and_what_it_costs() -> None:
    cpu = choose(section(), BAILING, Layout(world_size=1), Installed())
    lines = list(cpu.lines())
    assert lines[3] == f"experts: sequential ({COSTS['experts', 'sequential']})"
    assert all(line.endswith(")") for line in lines)
    asked = section(attention="fa4", expert_weight_gradient="quack")
    new = list(choose(asked, BAILING, Layout(world_size=1), EVERYTHING).lines())
    assert new[1] == "attention: fa4 (not run on a GPU yet)"
    assert new[2] == "norm: fused"
    assert new[-1] == "expert weight gradient: quack (not run on a GPU yet)"


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"layers": "transformer_engine"}, {"context": 2}, "parallel.context = 2 exclude each other"),
        ({"layers": "transformer_engine", "experts": "grouped"}, {}, "model.experts = 'grouped' exclude each other"),
        ({"fp8": "hybrid", "layers": "local"}, {}, "model.fp8 = 'hybrid' and model.layers = 'local' exclude"),
        ({"attention": "flash"}, {"context": 2}, "got bfloat16, 2 and 16; set model.attention = 'sdpa'"),
        ({"attention": "flash", "dtype": "float32"}, {}, "got float32, 1 and 16"),
        ({"attention": "fa4", "dtype": "float32"}, {}, "'fa4' needs bfloat16, parallel.context = 1"),
        ({"attention": "fa4"}, {"context": 2}, "got bfloat16, 2 and 16; set model.attention = 'sdpa'"),
        ({"attention": "fa4", "layers": "transformer_engine"}, {}, "model.attention = 'fa4' exclude each other"),
        ({"experts": "grouped"}, {"expert": 6}, "got 6 over parallel.expert = 6 in bfloat16"),
        ({"expert_weight_gradient": "quack"}, {"expert": 6}, "'quack' needs bfloat16, and several experts on a rank"),
        ({"expert_weight_gradient": "quack", "dtype": "float32"}, {}, "in float32"),
        ({"expert_weight_gradient": "quack", "experts": "sequential"}, {}, "'sequential' exclude each other"),
        ({"expert_weight_gradient": "quack", "fp8": "e4m3"}, {}, "expert_weight_gradient = 'quack' exclude each other"),
        ({"experts": "grouped"}, {"expert_tensor": 6}, "moe_intermediate_size 32 over 6; set model.experts"),
    ],
)
def test_contradictions_are_found_without_a_machine(options: dict, layout: dict, message: str) -> None:
    layout = Layout(world_size=6, **layout)
    (problem,) = problems(section(**options), BAILING, layout)
    assert message in problem
    with pytest.raises(ValueError) as error:
        choose(section(**options), BAILING, layout, EVERYTHING)
    assert str(error.value) == problem


def test_transformer_engine_cannot_norm_all_heads_together() -> None:
    joined = BAILING.model_copy(update={"qk_norm": True, "qk_norm_joins_heads": True})
    (problem,) = problems(section(layers="transformer_engine"), joined, Layout(world_size=1))
    assert "has not the norms of this model" in problem
    assert not list(problems(section(), joined, Layout(world_size=1)))


@pytest.mark.parametrize(
    ("options", "installed", "message"),
    [
        ({"layers": "transformer_engine"}, HOPPER, "install megatron_rl[gpu]"),
        ({"fp8": "e4m3"}, Installed(transformer_engine=True), "model.fp8 = 'e4m3' needs a CUDA device"),
        ({"attention": "flash"}, TURING, "compute capability 8.0 or later; set model.attention = 'sdpa'"),
        (
            {"attention": "fa4"},
            HOPPER,
            "and the package flash-attn-4 (pip install flash-attn-4), got compute capability 9.0 without",
        ),
        ({"attention": "fa4"}, Installed(flash_attn_4=True), "got a CPU; set model.attention = 'auto'"),
        ({"attention": "fa4"}, Installed(compute_capability=(8, 9), flash_attn_4=True), "capability 8.9; set"),
        ({"attention": "fa4"}, Installed(compute_capability=(12, 0), flash_attn_4=True), "capability 12.0; set"),
        ({"expert_weight_gradient": "quack"}, HOPPER, "9.0 or later and the package quack-kernels (pip install quack-"),
        ({"expert_weight_gradient": "quack"}, Installed(quack=True), "got a CPU; set model.expert_weight_gradient"),
        (
            {"expert_weight_gradient": "quack", "experts": "grouped"},
            Installed(compute_capability=(8, 0), quack=True),
            "got compute capability 8.0; set",
        ),
    ],
)
def test_what_this_machine_has_not_is_refused(options: dict, installed: Installed, message: str) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device") as error:
        choose(section(**options), BAILING, Layout(world_size=1), installed)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("head_dim", "hopper", "blackwell"),
    [(8, True, True), (128, True, True), (136, True, False), (192, True, False), (256, True, True)],
)
def test_heads_that_flash_attention_4_takes(head_dim: int, hopper: bool, blackwell: bool) -> None:
    for installed, fits in ((EVERYTHING, hopper), (BLACKWELL, blackwell)):
        asked = section(attention="fa4"), BAILING.model_copy(update={"head_dim": head_dim}), Layout(world_size=1)
        if fits:
            assert choose(*asked, installed).attention == "fa4"
        else:
            with pytest.raises(
                ValueError, match=rf"up to 128, or 256, on compute capability 10.0, got {head_dim}; set"
            ):
                choose(*asked, installed)


@pytest.mark.parametrize("name", ["router_dtype", "head_dtype", "fp8"])
def test_a_part_is_not_narrower_than_the_model_in_float32(name: str) -> None:
    value = "e4m3" if name == "fp8" else "bfloat16"
    with pytest.raises(ValidationError, match=f"{name} = '{value}' needs dtype = 'bfloat16', got 'float32'"):
        section(**{name: value, "dtype": "float32"})


def test_every_combination_is_refused_or_is_what_was_asked_for() -> None:
    machines = [Installed(), TURING, AMPERE, HOPPER, BLACKWELL, WITH_ENGINE, EVERYTHING]
    layouts = [Layout(world_size=6), Layout(world_size=6, context=2), Layout(world_size=6, expert=6)]
    names = ("layers", "attention", "experts", "expert_weight_gradient", "dtype", "fp8")
    values = itertools.product(
        ("auto", "local", "transformer_engine"),
        ("auto", "flash", "fa4", "sdpa"),
        ("auto", "grouped", "sequential"),
        ("torch", "quack"),
        ("float32", "bfloat16"),
        ("none", "hybrid"),
    )
    found: set[Backends] = set()
    for options in (dict(zip(names, value, strict=True)) for value in values):
        if options["fp8"] != "none" and options["dtype"] == "float32":
            continue
        for installed, layout in itertools.product(machines, layouts):
            try:
                chosen = choose(section(**options), BAILING, layout, installed)
            except ValueError:
                continue
            found.add(chosen)
            engine = chosen.layers == "transformer_engine"
            assert engine == (chosen.attention == "transformer_engine") == (chosen.experts == "transformer_engine")
            for name in ("layers", "attention", "experts"):
                assert options[name] in ("auto", getattr(chosen, name))
            assert engine == (options["fp8"] != "none" or options["layers"] == "transformer_engine")
            assert not engine or (installed.transformer_engine and layout.context == 1)
            if chosen.attention == "flash":
                assert (installed.compute_capability or (0, 0)) >= (8, 0)
                assert (options["dtype"], layout.context) == ("bfloat16", 1)
            if chosen.attention == "fa4":
                assert options["attention"] == "fa4"
                assert installed.flash_attn_4
                assert (options["dtype"], layout.context) == ("bfloat16", 1)
            assert (chosen.expert_weight_gradient == "quack") == (options["expert_weight_gradient"] == "quack")
            if chosen.expert_weight_gradient == "quack":
                assert installed.quack
                assert (chosen.experts, options["dtype"]) == ("grouped", "bfloat16")
            assert chosen.experts != "grouped" or layout.expert == 1
    assert len(found) > 15
