"""This module checks whether a choice of the model's parts computes the model: one step against one process in fp64 on
a CPU."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from parts import PartFailed
from test_gpu_training import BFLOAT16, assert_close, logprob_difference, worst
from training_runs import GIVEN, Run, TrainingRuns


def check_values(sections: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Compare choices with fp64. sections: keys of the model's section by name. Return the largest difference of a
    log-prob and of a tensor's gradient, each in bf16 with the experts given. PartFailed when one cannot be had, or is
    further off than tests/gpu allow."""
    runs = {"exact": Run(dtype="float64", on_cpu=True, experts=GIVEN)}
    runs |= {name: Run(dtype="bfloat16", experts=GIVEN, model=section) for name, section in sections.items()}
    found: dict[str, Any] = {}
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingRuns(Path(folder), runs)
        try:
            for name in sections:
                try:
                    values, exact = training(name), training("exact")
                    gradient, tensor = worst(values, exact, "grad/")
                    found[name] = {"logprob": round(logprob_difference(values, exact), 6)}
                    found[name] |= {"gradient": round(gradient, 6), "gradient_of": tensor}
                    assert_close(values, exact, BFLOAT16)
                except (AssertionError, pytest.skip.Exception) as error:
                    wrong.append(name)
                    found[name] = found.get(name, {}) | {"failed": str(error)[-1500:] or "too far off"}
        finally:
            training.close()
    if wrong:
        raise PartFailed(f"not the model, or not to be had: {', '.join(wrong)}", found)
    return found
