"""This module runs parts of the objective that are functions of the user's own, and checks what they return.

Each is called with what its parameters name: `OF_ADVANTAGE`, `OF_SURROGATE`, `OF_CORRECTION`. They run inside the
trainer, advantages on rank 0 and the others on every rank, so they are tried on small tensors before a model is built.
Legend: K responses of a group, N judged ones of a phase, T tokens of a micro-batch that carry loss.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.own_functions import last_lines, load_function, parameters_of

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rl.c3po.surrogate import Surrogate

log = logging.getLogger(__name__)

OF_ADVANTAGE = {
    "rewards": "float64 [K], of the responses to one prompt, with the over-long punishment; with `groups` [N]",
    "response_tokens": "int64 [K], tokens that the policy sampled for each response",
    "is_truncated": "bool [K], responses that ended at rollout.max_response_tokens",
    "groups": "int64 [N], the prompt of each response; who takes it gets all judged responses of a phase at once",
}
OF_SURROGATE = {
    "logprobs": "[T], log-probabilities under the present weights, differentiable",
    "old": "[T], log-probabilities that the ratio exp(logprobs - old) refers to",
    "advantages": "[T], the advantage of each token: its response's, and what a teacher adds (docs/joint.md)",
    "low": "float, algorithm.clip_low",
    "high": "float, algorithm.clip_high",
}
OF_CORRECTION = {
    "old": "[T], log-probabilities of the trainer under the weights that sampled",
    "rollout": "[T], those that the sampler recorded",
    "mean_log_ratio": "[T], the mean of old - rollout over the tokens of each token's response, or its segment",
    "response_tokens": "[T], how many loss tokens each token's response has, or its segment",
}
_TRIED = ((0.0, 1.0, 1.0, 0.25), (0.5, 0.5, 0.5, 0.5), (-3.0, 40.0))


class OwnPart:
    """Holds a function with the names of what it is called with."""

    def __init__(self, name: str, where: str, known: Mapping[str, str]) -> None:
        """Load the function. ValueError where it cannot be loaded, or asks for a value that does not exist."""
        self._name, self._where = name, where
        self._function = load_function(name, where)
        self.parameters = parameters_of(self._function, known, where)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Call the function. ValueError with the last lines of what it raised."""
        try:
            return self._function(**{name: values[name] for name in self.parameters if name in values})
        except Exception as error:
            raise self.wrong(f"raised {last_lines(error, (__file__,))}") from error

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self._where}: {self._name} {what}")


@functools.cache
def own_advantage(name: str) -> OwnPart:
    return OwnPart(name, "algorithm.advantage", OF_ADVANTAGE)


def own_advantages(name: str, values: Mapping[str, Any]) -> np.ndarray:
    """Compute advantages by a function of the user's own: float64, one for each reward. ValueError for another shape,
    and for numbers that are not finite."""
    part, count = own_advantage(name), len(values["rewards"])
    returned = part(values)
    try:
        found = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError):
        raise part.wrong(f"returned {returned!r:.80}; it must return an array of {count} advantages") from None
    if found.shape != (count,):
        raise part.wrong(f"returned shape {list(found.shape)} for {count} rewards; it must return one for each")
    if not np.isfinite(found).all():
        rewards = np.asarray(values["rewards"]).tolist()
        raise part.wrong(f"returned {found.tolist()!r:.80} for the rewards {rewards!r:.80}; they must be finite")
    return found


@functools.cache
def own_surrogate(name: str) -> Callable[["Tensor", "Tensor", "Tensor", float, float], "Surrogate"]:
    """Wrap a function of the user's own as one of `surrogate.SURROGATES`. One that returns a tensor says nothing of
    clipping."""
    import torch

    from megatron_rl.c3po.surrogate import Surrogate

    part = OwnPart(name, "algorithm.surrogate", OF_SURROGATE)

    def surrogate(logprobs: "Tensor", old: "Tensor", advantages: "Tensor", low: float, high: float) -> Surrogate:
        values = {"logprobs": logprobs, "old": old, "advantages": advantages, "low": low, "high": high}
        found = part(values)
        if isinstance(found, torch.Tensor):
            nothing = torch.zeros_like(logprobs, dtype=torch.bool)
            ratio = torch.exp(logprobs.detach() - old)
            found = Surrogate(values=found, ratio=ratio, clipped_low=nothing, clipped_high=nothing)
        if not isinstance(found, Surrogate):
            raise part.wrong(f"returned {type(found).__name__}; it must return a tensor [T] or a Surrogate")
        if found.values.shape != logprobs.shape:
            raise part.wrong(f"returned shape {list(found.values.shape)} for {list(logprobs.shape)} tokens")
        return found

    return surrogate


@functools.cache
def own_correction(name: str) -> Callable[[Mapping[str, "Tensor"]], "Tensor"]:
    """Wrap a function of the user's own as one that takes the values of `OF_CORRECTION` and gives weights [T],
    constant."""
    import torch

    part = OwnPart(name, "algorithm.correction", OF_CORRECTION)

    def correction(values: Mapping[str, "Tensor"]) -> "Tensor":
        found = part(values)
        if not isinstance(found, torch.Tensor) or found.shape != values["old"].shape:
            got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise part.wrong(f"returned {got}; it must return a tensor of weights, one for each token")
        return found.detach()

    return correction


def check_advantage(name: str) -> None:
    """Raise ValueError where small groups have no finite advantages. Log what differs from the built-in ones."""
    for rewards in _TRIED:
        count = len(rewards)
        values = {
            "rewards": np.array(rewards),
            "response_tokens": np.arange(1, count + 1),
            "is_truncated": np.arange(count) == count - 1,
            "groups": np.arange(count) // 2,
        }
        found = own_advantages(name, values)
        moved = own_advantages(name, values | {"rewards": np.array(rewards) + 1.0})
        if not np.allclose(found, moved):
            log.info("%s: its advantages change when 1 is added to every reward; the built-in ones do not", name)
            return


def check_surrogate(name: str) -> None:
    """Raise ValueError where the surrogate has no gradient, or one that is not finite."""
    import torch

    logprobs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -0.6, -1.5]), torch.tensor([1.0, -1.0, 0.5])
    found = own_surrogate(name)(logprobs, old, advantages, 0.2, 0.2)
    if found.values.requires_grad:
        found.values.sum().backward()
    gradient = logprobs.grad
    if gradient is None or not gradient.any():
        raise ValueError(
            f"algorithm.surrogate: {name} has no gradient in logprobs, so nothing would be learned; use `logprobs` "
            "without detach() or no_grad()"
        )
    if not (torch.isfinite(found.values).all() and torch.isfinite(gradient).all()):
        raise ValueError(
            f"algorithm.surrogate: {name} gives {found.values.tolist()} with the gradient {gradient.tolist()} for the "
            f"log-probs {logprobs.tolist()}; both must be finite"
        )


def check_correction(name: str) -> None:
    """Raise ValueError for weights that are not finite."""
    import torch

    old, rollout = torch.tensor([-1.0, -0.5, -20.0]), torch.tensor([-1.0, -8.0, -0.1])
    of_response = torch.tensor([2.0, 2.0, 1.0])
    mean = torch.tensor([3.75, 3.75, -19.9])
    values = {"old": old, "rollout": rollout, "mean_log_ratio": mean, "response_tokens": of_response}
    weights = own_correction(name)(values)
    if not torch.isfinite(weights).all():
        raise ValueError(f"algorithm.correction: {name} gives the weights {weights.tolist()}; they must be finite")
