"""Who computes each part, for every combination of configuration, device and packages."""

import itertools

import pytest
from pydantic import ValidationError
from tiny_model import TINY_CONFIG

from megatron_rl.config.bailing import BailingConfig
from megatron_rl.config.schema import ModelSection
from megatron_rl.layout import Layout
from megatron_rl.model.providers import COSTS, Installed, Providers, choose, problems

BAILING = BailingConfig.model_validate(TINY_CONFIG)
HOPPER = Installed(compute_capability=(9, 0))
AMPERE = Installed(compute_capability=(8, 0))
TURING = Installed(compute_capability=(7, 5))
WITH_ENGINE = Installed(compute_capability=(9, 0), transformer_engine=True)
EVERYTHING = Installed(compute_capability=(9, 0), transformer_engine=True, apex=True, weight_gradient=True)


def section(**options: str) -> ModelSection:
    return ModelSection.model_validate({"path": "unused", "dtype": "bfloat16"} | options)


def parts(installed: Installed, layout: Layout | None = None, **options: str) -> tuple[str, str, str]:
    chosen = choose(section(**options), BAILING, layout or Layout(world_size=1), installed)
    return chosen.layers, chosen.attention, chosen.experts


def test_the_best_that_is_there_is_chosen() -> None:
    engine = "transformer_engine"
    assert parts(EVERYTHING) == (engine, engine, engine)
    assert parts(HOPPER) == ("local", "flash", "grouped")
    assert parts(AMPERE) == ("local", "flash", "sequential")
    assert parts(TURING) == ("local", "sdpa", "sequential")
    assert parts(Installed()) == parts(Installed(transformer_engine=True)) == ("local", "sdpa", "sequential")
    assert parts(HOPPER, dtype="float32") == ("local", "sdpa", "sequential")
    assert parts(EVERYTHING, Layout(world_size=2, context=2)) == ("local", "sdpa", "grouped")
    assert parts(HOPPER, Layout(world_size=6, expert=6)) == ("local", "flash", "sequential")
    assert parts(Installed(), experts="grouped") == ("local", "sdpa", "grouped")
    narrow = BAILING.model_copy(update={"moe_intermediate_size": 20})  # rows of 40 bytes
    assert choose(section(), narrow, Layout(world_size=1), HOPPER).experts == "sequential"
    # What local layers alone have is a choice of local layers.
    assert parts(EVERYTHING, attention="flash") == ("local", "flash", "grouped")
    assert parts(EVERYTHING, experts="sequential") == ("local", "flash", "sequential")


def test_what_megatron_uses_by_itself_is_told() -> None:
    def fused(installed: Installed, **options: str) -> tuple[str, str, str]:
        chosen = choose(section(**options), BAILING, Layout(world_size=1), installed)
        return chosen.permutation, chosen.weight_gradient, chosen.optimizer

    engine, alone = "transformer_engine", ("torch", "separate", "torch")
    apex = Installed(compute_capability=(8, 0), apex=True, weight_gradient=True)
    assert fused(EVERYTHING, layers="local") == (engine, "apex", engine)
    assert fused(WITH_ENGINE) == (engine, "separate", engine)
    assert fused(apex) == ("torch", "apex", "apex")
    assert fused(apex, dtype="float32") == ("torch", "separate", "apex")
    assert fused(HOPPER) == fused(Installed(apex=True, weight_gradient=True)) == alone


def test_the_log_says_what_is_missing_and_what_it_costs() -> None:
    cpu = choose(section(), BAILING, Layout(world_size=1), Installed())
    lines = list(cpu.lines())
    assert lines[3] == f"experts: sequential ({COSTS['experts', 'sequential']})"
    assert lines[-1] == "optimizer: torch"  # fused, by megatron_rl/train/trainer.py
    assert all(line.endswith(")") for line in lines[:-1])
    best = list(choose(section(), BAILING, Layout(world_size=1), EVERYTHING).lines())
    assert best[:2] == ["layers: transformer engine", "attention: transformer engine"]
    assert not any("(" in line for line in best)


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"layers": "transformer_engine"}, {"context": 2}, "parallel.context = 2 exclude each other"),
        ({"layers": "transformer_engine", "experts": "grouped"}, {}, "model.experts = 'grouped' exclude each other"),
        ({"fp8": "hybrid", "layers": "local"}, {}, "model.fp8 = 'hybrid' and model.layers = 'local' exclude"),
        ({"attention": "flash"}, {"context": 2}, "got bfloat16, 2 and 16; set model.attention = 'sdpa'"),
        ({"attention": "flash", "dtype": "float32"}, {}, "got float32, 1 and 16"),
        ({"experts": "grouped"}, {"expert": 6}, "got 6 over parallel.expert = 6 in bfloat16"),
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


@pytest.mark.parametrize(
    ("options", "installed", "message"),
    [
        ({"layers": "transformer_engine"}, HOPPER, "install megatron_rl[gpu]"),
        ({"fp8": "e4m3"}, Installed(transformer_engine=True), "model.fp8 = 'e4m3' needs a CUDA device"),
        ({"attention": "flash"}, TURING, "compute capability 8.0 or later; set model.attention = 'sdpa'"),
    ],
)
def test_what_this_machine_has_not_is_refused(options: dict, installed: Installed, message: str) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device") as error:
        choose(section(**options), BAILING, Layout(world_size=1), installed)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["router_dtype", "head_dtype", "fp8"])
def test_a_part_is_not_narrower_than_the_model_in_float32(name: str) -> None:
    value = "e4m3" if name == "fp8" else "bfloat16"
    with pytest.raises(ValidationError, match=f"{name} = '{value}' needs dtype = 'bfloat16', got 'float32'"):
        section(**{name: value, "dtype": "float32"})


def test_every_combination_is_refused_or_is_what_was_asked_for() -> None:
    machines = [Installed(), TURING, AMPERE, HOPPER, WITH_ENGINE, EVERYTHING]
    layouts = [Layout(world_size=6), Layout(world_size=6, context=2), Layout(world_size=6, expert=6)]
    names = ("layers", "attention", "experts", "dtype", "fp8")
    values = itertools.product(
        ("auto", "local", "transformer_engine"),
        ("auto", "flash", "sdpa"),
        ("auto", "grouped", "sequential"),
        ("float32", "bfloat16"),
        ("none", "hybrid"),
    )
    found: set[Providers] = set()
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
            assert engine or options["fp8"] == "none"
            assert not engine or (installed.transformer_engine and layout.context == 1)
            if chosen.attention == "flash":
                assert (installed.compute_capability or (0, 0)) >= (8, 0)
                assert (options["dtype"], layout.context) == ("bfloat16", 1)
            assert chosen.experts != "grouped" or layout.expert == 1
    assert len(found) > 15
