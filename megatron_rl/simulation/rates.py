"""This module holds the rates of what takes time on a cluster, measured or assumed."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from megatron_rl.config.section import Section

Seconds = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]


class HostPart(Section):
    """Holds what one part of the work of rank 0's processor takes in a step."""

    when: Literal["rollout", "between", "beside"] = Field(
        description='When the work is done. "rollout": beside generation; GPUs wait for what is left at its end. '
        '"between": while all GPUs wait. "beside": while they train, so none waits.'
    )
    token_seconds: Seconds = Field(default=0.0, description="Seconds per sampled token.")
    response_seconds: Seconds = Field(default=0.0, description="Seconds per response. A response is one request.")

    def seconds(self, num_tokens: float, num_responses: float) -> float:
        return self.token_seconds * num_tokens + self.response_seconds * num_responses


class Rates(Section):
    """Holds the rates, which are read from TOML. Whatever is not given costs nothing."""

    decode: tuple[tuple[Annotated[int, Field(gt=0)], Above0], ...] = Field(
        min_length=1,
        description="Decoding speed of one engine: pairs of [concurrent responses, tokens/s of all of them], for one "
        "or more numbers of responses. Between and beyond them the time of an iteration is linear. With one pair it "
        "is constant.",
    )
    engine_gpus: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Number of GPUs of the engine that `decode` is of. 0: as many as the configuration has.",
    )
    response_seconds: Seconds = Field(
        default=0.0, description="Seconds per response on its engine beside decoding: prefill, HTTP, the reward."
    )
    train_flops: Above0 = Field(description="Training throughput of one GPU, in FLOP/s of the model's own FLOPs.")
    micro_batch_seconds: Seconds = Field(default=0.0, description="Seconds per micro-batch beside its FLOPs.")
    optimizer_seconds: Seconds = Field(default=0.0, description="Seconds per optimizer step.")
    sync_seconds: Seconds = Field(default=0.0, description="Seconds per transfer of the weights to the engines.")
    switch_seconds: Seconds = Field(
        default=0.0,
        description="Seconds to switch from generation to training and back, on GPUs that do both. Other GPUs have 0.",
    )
    host: dict[str, HostPart] = Field(
        default={}, description="Work of rank 0's processor by part, as `tools/bench_host.py --rates` measures it."
    )
    step_seconds: Seconds = Field(default=0.0, description="Seconds per step beside all these: logging, checkpoints.")

    @model_validator(mode="after")
    def _check(self) -> "Rates":
        numbers = [number for number, _ in self.decode]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"decode must go from few to many responses, got {numbers}")
        seconds = [number / speed for number, speed in self.decode]
        if seconds != sorted(seconds):
            raise ValueError(
                f"decode: an iteration of more responses takes no less time, got {seconds} s for {numbers}; a speed of "
                "all responses can at most grow as their number does"
            )
        return self

    def iteration_seconds(self, running: np.ndarray) -> np.ndarray:
        """Return the seconds of an iteration, in which an engine advances so many responses, at least 1, by a token."""
        numbers = np.array([number for number, _ in self.decode], float)
        seconds = numbers / np.array([speed for _, speed in self.decode])
        if len(numbers) == 1:
            return np.full(np.shape(running), seconds[0])
        slopes = np.diff(seconds) / np.diff(numbers)
        part = np.clip(np.searchsorted(numbers, running, side="right") - 1, 0, len(slopes) - 1)
        line = seconds[part] + slopes[part] * (running - numbers[part])
        # Left of the first point it may fall below what as many responses as there take.
        return np.where(running < numbers[0], np.maximum(line, seconds[0] * running / numbers[0]), line)

    def host_waits(self, rollout_seconds: float, num_tokens: float, num_responses: float) -> dict[str, float]:
        """Return the seconds, by part, that GPUs wait for rank 0's processor in a step.

        The processor's work during generation is done response after response, as they come evenly over the phase. So
        after the last one it has at least that one left, and more when all of the work takes longer than the phase.
        """
        whole = {name: part.seconds(num_tokens, num_responses) for name, part in self.host.items()}
        busy = sum(seconds for name, seconds in whole.items() if self.host[name].when == "rollout")
        left = max(busy / max(1.0, num_responses), busy - rollout_seconds)
        shares = {"rollout": left / busy if busy else 0.0, "between": 1.0, "beside": 0.0}
        return {name: seconds * shares[self.host[name].when] for name, seconds in whole.items()}

    def full_speed(self, slots: int) -> float:
        """Return the tokens/s of an engine whose slots are all busy."""
        return slots / float(self.iteration_seconds(np.array([slots]))[0])
