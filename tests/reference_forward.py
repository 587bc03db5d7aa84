"""Computes a BailingMoE forward pass in plain fp64 loops. It shares no code with the package."""

import math

import numpy as np
from safetensors.torch import load_file


def reference_logprobs(directory, config, ids):
    """Return the log-probs [L, V] in fp64, computed token by token, head by head and expert by expert."""
    w = {name: tensor.double().numpy() for name, tensor in load_file(directory / "model.safetensors").items()}
    h, nq, nkv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    d, eps = config.get("head_dim") or h // nq, config["rms_norm_eps"]

    def norm(x, weight):
        return x / math.sqrt((x * x).mean() + eps) * weight

    def rotate(x, position):
        out = np.empty(d)
        for i in range(d // 2):
            angle = position * config["rope_theta"] ** (-2 * i / d)
            a, b = x[i], x[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def mlp(prefix, x):
        gate = w[f"{prefix}.gate_proj.weight"] @ x
        return w[f"{prefix}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"{prefix}.up_proj.weight"] @ x))

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    xs = [w["model.word_embeddings.weight"][i] for i in ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        qkv = [
            (w[f"{p}.attention.query_key_value.weight"] @ norm(x, w[f"{p}.input_layernorm.weight"])).reshape(-1, d)
            for x in xs
        ]
        keys = [[rotate(row[nq + j], t) for j in range(nkv)] for t, row in enumerate(qkv)]
        for t, row in enumerate(qkv):
            heads = []
            for i in range(nq):
                j = i // (nq // nkv)
                q = rotate(row[i], t)
                p_t = softmax(np.array([q @ keys[s][j] / math.sqrt(d) for s in range(t + 1)]))
                heads.append(sum(p_t[s] * qkv[s][nq + nkv + j] for s in range(t + 1)))
            xs[t] = xs[t] + w[f"{p}.attention.dense.weight"] @ np.concatenate(heads)
        for t, x in enumerate(xs):
            y = norm(x, w[f"{p}.post_attention_layernorm.weight"])
            if layer < config["first_k_dense_replace"]:
                xs[t] = x + mlp(f"{p}.mlp", y)
                continue
            probs = softmax(w[f"{p}.mlp.gate.weight"] @ y)
            chosen = np.argsort(-probs)[: config["num_experts_per_tok"]]
            total = probs[chosen].sum() if config["norm_topk_prob"] else 1.0
            xs[t] = x + sum(probs[e] / total * mlp(f"{p}.mlp.experts.{e}", y) for e in chosen)
            if config["num_shared_experts"]:
                xs[t] = xs[t] + mlp(f"{p}.mlp.shared_experts", y)
    head = w["lm_head.weight"]
    if config["norm_head"]:
        head = head / (np.sqrt((head * head).sum(0, keepdims=True)) + 1e-7)
    logits = np.stack([head @ norm(x, w["model.norm.weight"]) for x in xs])
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))
