"""Computes the models and the C3PO loss a second time, plainly, in fp64 with autograd.

Derived from the model's description and the paper's Eq. 2; shares no code with the package.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.records import Segment


def load_reference(model_dir: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((model_dir / "config.json").read_text())
    tensors = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        tensors |= load_file(file)
    return config, {name: t.double().requires_grad_() for name, t in tensors.items()}


def forward(
    config: dict[str, Any],
    w: dict[str, Tensor],
    ids: list[int],
    routers: dict[int, list[Tensor]] | None = None,
    routed: Any = None,
) -> Tensor:
    """Return the logits [n, V] of one sequence.

    routers: by layer, where the router's logits [n, E] are put down. routed: [n - 1][layers][topk], the experts to use
    in place of the router's choice; the last token keeps it.
    """
    h = w[_embedding(w)][ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = h + _attention(config, w, p, _norm(config, h, w[p + "input_layernorm.weight"]))
        x = _norm(config, h, w[p + "post_attention_layernorm.weight"])
        if p + "mlp.gate.weight" not in w:
            h = h + _mlp(w, p + "mlp.", x)
        else:
            given = None if routed is None else [experts[layer] for experts in routed]
            h = h + _moe(config, w, p + "mlp.", x, given)
            if routers is not None:
                routers.setdefault(layer, []).append(x @ w[p + "mlp.gate.weight"].T)
    head = w[_embedding(w) if config.get("tie_word_embeddings") else "lm_head.weight"]
    if config.get("norm_head"):
        head = head / (head.detach().norm(dim=0, keepdim=True) + 1e-7)
    return _norm(config, h, w["model.norm.weight"]) @ head.T


def _embedding(w: dict[str, Tensor]) -> str:
    return next(name for name in ("model.word_embeddings.weight", "model.embed_tokens.weight") if name in w)


def routed_by(model_dir: Path, ids: list[int]) -> Any:
    """Return the experts that each token goes to, int64 [n, layers, topk]: ascending, and 0 in dense layers."""
    config, weights = load_reference(model_dir)
    routers: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        forward(config, weights, ids, routers)
    chosen = torch.zeros(len(ids), config["num_hidden_layers"], config["num_experts_per_tok"], dtype=torch.int64)
    for layer, (logits,) in routers.items():
        bias = weights.get(f"model.layers.{layer}.mlp.gate.expert_bias")
        for t, row in enumerate(logits):
            chosen[t, layer] = torch.tensor(sorted(_choose(config, _scores(config, row), bias)))
    return chosen.numpy()


def _norm(config: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def _attention(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    n, nq, nk = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // nq
    if p + "attention.query_key_value.weight" in w:
        rows = x @ w[p + "attention.query_key_value.weight"].T
        q, k, v = rows[:, : nq * d], rows[:, nq * d : (nq + nk) * d], rows[:, (nq + nk) * d :]
    else:
        q, k, v = (x @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        if p + "self_attn.q_proj.bias" in w:
            q, k, v = (y + w[f"{p}self_attn.{name}_proj.bias"] for name, y in (("q", q), ("k", k), ("v", v)))
    for norms in ("self_attn.q_norm", "self_attn.k_norm"), ("attention.query_layernorm", "attention.key_layernorm"):
        if p + norms[0] + ".weight" in w:
            q, k = (
                _norm(config, y.unflatten(1, (-1, d)), w[f"{p}{name}.weight"]).flatten(1)
                for name, y in zip(norms, (q, k), strict=True)
            )
    part = int(d * config.get("partial_rotary_factor", 1.0))
    theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
    angle = torch.outer(
        torch.arange(n, dtype=torch.float64), theta ** (-torch.arange(0, part, 2, dtype=torch.float64) / part)
    )
    heads = []
    for i in range(nq):
        g = i // (nq // nk)
        qi, ki = (_rotate(y, angle) for y in (q[:, i * d : (i + 1) * d], k[:, g * d : (g + 1) * d]))
        score = (qi @ ki.T / d**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        heads.append(score.softmax(-1) @ v[:, g * d : (g + 1) * d])
    output = next(p + name for name in ("attention.dense.weight", "self_attn.o_proj.weight") if p + name in w)
    return torch.cat(heads, -1) @ w[output].T


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the first 2r of the d dimensions. x [n, d], angle [n, r]."""
    r = angle.shape[1]
    a, b = x[:, :r], x[:, r : 2 * r]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[:, 2 * r :]], -1)


def _mlp(w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    gate, up = x @ w[p + "gate_proj.weight"].T, x @ w[p + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ w[p + "down_proj.weight"].T


def _moe(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor, given: list[list[int]] | None) -> Tensor:
    probs = _scores(config, x @ w[p + "gate.weight"].T)
    bias = w.get(p + "gate.expert_bias")
    chosen = torch.tensor([_choose(config, row, bias) for row in probs])
    if given is not None:
        chosen = torch.cat([torch.tensor(given, dtype=torch.int64).reshape(-1, chosen.shape[1]), chosen[-1:]])
    top = probs.gather(-1, chosen)
    if config["norm_topk_prob"] and config["num_experts_per_tok"] > 1:
        top = top / top.sum(-1, keepdim=True)
    top = top * config.get("routed_scaling_factor", 1.0)
    rows = []
    for t in range(len(x)):
        rows.append(sum(top[t, j] * _mlp(w, f"{p}experts.{int(chosen[t, j])}.", x[t]) for j in range(top.shape[1])))
    out = torch.stack(rows)
    return out + _mlp(w, p + "shared_experts.", x) if config.get("num_shared_experts") else out


def _scores(config: dict[str, Any], logits: Tensor) -> Tensor:
    """Return the softmax over experts, or for BailingMoeV2 the sigmoid of each logit."""
    return 1 / (1 + (-logits).exp()) if _is_v2(config) else logits.softmax(-1)


def _is_v2(config: dict[str, Any]) -> bool:
    return config["architectures"] == ["BailingMoeV2ForCausalLM"]


def _choose(config: dict[str, Any], scores: Tensor, bias: Tensor | None) -> list[int]:
    """Return the experts of one token by its scores [E], best first; among equal ones, the first.

    The bias moves the choice. Of the groups those count whose two best add up to most.
    """
    ranked = [float(s) for s in (scores if bias is None else scores + bias).detach()]
    size = len(ranked) // max(1, config.get("n_group", 0))
    groups = [range(start, start + size) for start in range(0, len(ranked), size)]
    groups.sort(key=lambda group: -sum(sorted((ranked[e] for e in group), reverse=True)[:2]))
    allowed = sorted(e for group in groups[: max(1, config.get("topk_group", 0))] for e in group)
    return sorted(allowed, key=lambda e: -ranked[e])[: config["num_experts_per_tok"]]


def logprobs_and_entropy(config: dict[str, Any], w: dict[str, Tensor], row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of the tokens behind the prompt, or of those at "loss_positions", [m] each."""
    ids = row["token_ids"]
    at = loss_positions(row)
    logits = forward(config, w, ids, routed=row.get("routed_experts"))
    logp = logits.log_softmax(-1)[[position - 1 for position in at]]
    return logp[range(len(at)), [ids[position] for position in at]], -(logp.exp() * logp).sum(-1)


def segment_logprobs(config: dict[str, Any], w: dict[str, Tensor], segment: Segment) -> np.ndarray:
    """Return the log-probs of the tokens of a segment that the policy sampled, [m]."""
    prompt = segment.prompt_ids.tolist()
    row = {
        "num_prompt_tokens": len(prompt),
        "token_ids": [*prompt, *segment.output_ids.tolist()],
        "loss_positions": [len(prompt) + int(place) for place in np.flatnonzero(segment.policy_mask)],
    }
    return logprobs_and_entropy(config, w, row)[0].detach().numpy()


def loss_positions(row: dict[str, Any]) -> list[int]:
    return list(row.get("loss_positions", range(row["num_prompt_tokens"], len(row["token_ids"]))))


def rows_by_sample(spec: dict[str, Any]) -> dict[int, list[int]]:
    """Return the sequences of each sample, by the first of them. A sequence without "sample" is one by itself."""
    found: dict[int, list[int]] = {}
    for i, row in enumerate(spec["sequences"]):
        found.setdefault(row.get("sample", i), []).append(i)
    return found


def policy_loss(
    config: dict[str, Any], w: dict[str, Tensor], spec: dict[str, Any], algorithm: dict[str, Any]
) -> Tensor:
    """Return the loss of C3PO, GRPO or GSPO as their papers write it, with an entropy bonus and a k3 KL to `w`.

    A teacher adds beta * (log p_teacher - log p_student) to a token's advantage. For that GSPO's paper has GSPO-token,
    whose gradient is GSPO's if all tokens have one advantage.

    The present weights are `reference_scale` times `w`. The old log-probs of a response's stale tokens are those
    that were recorded, of the others the present ones. A sample of several sequences has the mean over them of each
    one's mean (GRPO) or ratio's term (GSPO).
    """
    present = {name: t * spec.get("reference_scale", 1.0) for name, t in w.items()}
    responses = []
    for row in spec["sequences"]:
        logp, entropy = logprobs_and_entropy(config, present, row)
        recorded = torch.tensor(row["rollout_logprobs"], dtype=torch.float64)
        old = torch.where(torch.arange(len(logp)) < row["num_stale_tokens"], recorded, logp.detach())
        reference = logprobs_and_entropy(config, w, row)[0].detach()
        kl = (reference - logp).exp() - (reference - logp) - 1
        extra = algorithm.get("kl_coefficient", 0.0) * kl - algorithm["entropy_coefficient"] * entropy
        low, high = 1 - algorithm["clip_low"], 1 + algorithm["clip_high"]
        ratio = (logp - old).exp()
        if algorithm["name"] == "gspo":
            ratio = (logp - old).mean().exp().detach() * (logp - logp.detach()).exp()
        advantage = torch.full_like(recorded, row["advantage"])
        if "teacher_logprobs" in row:
            teacher = torch.tensor(row["teacher_logprobs"], dtype=torch.float64)
            advantage = advantage + row["teacher_coefficient"] * (teacher - recorded)
        responses.append(-torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage) + extra)
    if algorithm["name"] == "c3po":
        return torch.stack([r.sum() for r in responses]).sum() / spec["budget"]
    means = [torch.stack([responses[i].mean() for i in rows]).mean() for rows in rows_by_sample(spec).values()]
    return torch.stack(means).mean()


def router_losses(
    config: dict[str, Any], w: dict[str, Tensor], spec: dict[str, Any], micro_batches: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Return the router losses, summed over layers.

    They are the balance loss, a token-weighted mean over micro-batches, and the z-loss, a mean over tokens.

    micro_batches: indices of the sequences of each. The balance loss of one with T tokens, N_i of whose T * topk
    choices fell on expert i of E, and with probabilities p, is E * sum_i N_i / (T * topk) * mean_t p_ti. Sigmoids
    become probabilities by their sum, and the largest count as chosen, whatever a bias and groups make of it.
    """
    balance = z = torch.zeros((), dtype=torch.float64)
    num_experts, topk = config["num_experts"], config["num_experts_per_tok"]
    for members in micro_batches:
        routers: dict[int, list[Tensor]] = {}
        for i in members:
            forward(config, w, spec["sequences"][i]["token_ids"], routers)
        for parts in routers.values():
            logits = torch.cat(parts)
            probs = _scores(config, logits)
            probs = probs / probs.sum(-1, keepdim=True)
            chosen = probs.topk(topk, -1).indices.flatten()
            share = chosen.bincount(minlength=num_experts) / len(chosen)
            balance = balance + len(logits) * num_experts * (share * probs.mean(0)).sum()
            z = z + (logits.logsumexp(-1) ** 2).sum()
    total = sum(len(row["token_ids"]) for row in spec["sequences"])
    return balance / total, z / total
