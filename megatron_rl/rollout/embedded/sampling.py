"""Computes log-probs and samples, row by row: no row's result depends on another row.

Shapes: R rows, V vocabulary. A row's random number is a hash of (its seed, the position of the token to draw), so
there is no generator state, and a sequence continued from its own prefix with the same seed draws the same numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Holds what sampling needs of each row."""

    temperature: np.ndarray  # [R] float32; 0 = greedy
    top_p: np.ndarray  # [R] float64
    top_k: np.ndarray  # [R] int64; V or more = all
    seeds: np.ndarray  # [R] uint64
    positions: np.ndarray  # [R] int64: position of the token to draw


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64 (Steele et al. 2014), elementwise on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return one float64 in [0, 1) for each (seed, position)."""
    bits = splitmix64(splitmix64(seeds) ^ positions.astype(np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def derive_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds of the samples of a prompt; the first keeps the given seed."""
    seed %= 2**64
    if count == 1:
        return [seed]
    mixed = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ splitmix64(np.arange(1, count, dtype=np.uint64)))
    return [seed, *mixed.tolist()]


def sample(logits: Tensor, rows: SamplingRows) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row of logits [R, V]; returns (tokens int64 [R], log-probs float32 [R]).

    Log-probs are of the full distribution log_softmax(logits / temperature), before top-k and top-p; a greedy row
    has those of the unscaled logits.
    """
    greedy = rows.temperature == 0
    scale = np.where(greedy, np.float32(1), rows.temperature)
    logprobs = log_softmax(logits, scale)
    if greedy.all():
        tokens = logprobs.argmax(1)
    else:
        probs = np.exp(logprobs, dtype=np.float64)
        probs = keep_top(probs, rows.top_k, rows.top_p)
        tokens = draw(probs, uniforms(rows.seeds, rows.positions))
        if greedy.any():
            tokens = np.where(greedy, logprobs.argmax(1), tokens)
    return tokens, logprobs[np.arange(len(tokens)), tokens]


def log_softmax(logits: Tensor, scale: np.ndarray) -> np.ndarray:
    """Compute log_softmax(logits / scale[:, None]) in fp32, [R, V]."""
    if (scale != 1).any():
        logits = logits / torch.from_numpy(scale).unsqueeze(1)
    return logits.log_softmax(-1).numpy()


def keep_top(probs: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    """Zero what top-k or top-p leaves out; [R, V], not renormalised; changes and returns `probs`.

    As in SGLang both look at the full distribution: a token stays when fewer than k tokens are more probable, and
    their probabilities sum to less than p. Tokens as probable as the last one kept stay too.
    """
    vocab = probs.shape[1]
    filtered = np.flatnonzero((top_k < vocab) | (top_p < 1))
    if not len(filtered):
        return probs
    rows, p = probs[filtered], top_p[filtered][:, None]
    descending = -np.sort(-rows, axis=1)
    before = np.cumsum(descending, axis=1) - descending
    nucleus = np.where(p < 1, before < p, True).sum(1)
    kept = np.minimum(nucleus, np.minimum(top_k[filtered], vocab))
    threshold = descending[np.arange(len(filtered)), kept - 1]
    probs[filtered] = np.where(rows >= threshold[:, None], rows, 0)
    return probs


def draw(probs: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draw tokens by the inverse of the cumulative distribution: the first token whose cumulative probability exceeds
    u, [R]."""
    cumulative = torch.from_numpy(probs).cumsum(1)
    total = cumulative[:, -1].numpy()
    # Rounding could lift u * total to total itself, where no token is left.
    target = np.minimum(u * total, np.nextafter(total, 0))
    return torch.searchsorted(cumulative, torch.from_numpy(target).unsqueeze(1), right=True).squeeze(1).numpy()
