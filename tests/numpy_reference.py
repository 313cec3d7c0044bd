"""The whole model in NumPy float64: one rule of visibility for windows, memory and crossbatch, no code shared.

A query at position t has a window that starts at `start`. Keys from there on are local: the rotary angle between the
two is their distance. Keys before it are memory, keys of other rows contexts: they count as position 0, so the angle is
t - start. Plain layers see local keys only. Nothing here knows of caches, blocks, spills or merges, which is the point.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from fot_jax import model


def random_params(config, seed=0):
    """float32 parameters far enough from initial values, norms and temperatures too, for a mistake to show."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        name = path[-1].key
        noise = rng.standard_normal(like.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.3 * noise
        if name == "temperature":
            return 2 + 0.5 * noise
        if name == "embedding":
            return 0.3 * noise  # little, so that a token's successor follows from its context and not from itself
        fan_in = config.n_heads * config.head_size if name == "o" else config.d_ff if name == "down" else config.d_model
        return 2.0 * noise / math.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(leaf, model.abstract_params(config))


def blocks(config, params):
    """One layer's parameters after another, float64, by the documented layout of the tree."""
    out, number = [], 0
    while f"segment_{number}" in params:
        segment = params[f"segment_{number}"]
        plain, memory = segment.get("plain"), segment.get("memory")
        repeats = len(jax.tree.leaves(segment)[0])
        for r in range(repeats):
            if plain is not None:
                for p in range(np.shape(jax.tree.leaves(plain)[0])[1]):
                    out.append(jax.tree.map(lambda x, r=r, p=p: np.asarray(x, np.float64)[r, p], plain))
            if memory is not None:
                out.append(jax.tree.map(lambda x, r=r: np.asarray(x, np.float64)[r], memory))
        number += 1
    assert len(out) == config.n_layers
    return out


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def softmax(s):
    """Over the last axis; all zeros where every score is -inf."""
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isinf(top), 0, top))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def attend_rows(
    q_BTHK, k_BTHK, v_BTHK, theta, scale, start_BT, valid_BT, segment_BT, memory_layer=True, context_rows=None, k=None
):
    """What a layer's queries read, [B, T, H, K]; un-rotated keys, as many as query heads; see `forward`."""
    B, T, H, K = q_BTHK.shape
    t = np.arange(T)
    as_complex = lambda a: a[..., : K // 2] + 1j * a[..., K // 2 :]
    o = np.zeros_like(q_BTHK)
    for b in range(B):
        inside = t[None, :] >= start_BT[b][:, None]
        same = segment_BT[b][:, None] == segment_BT[b][None, :]
        seen = (t[None, :] <= t[:, None]) & valid_BT[b][None, :] & same
        seen = seen if memory_layer else seen & inside
        to_start = np.broadcast_to((t - start_BT[b])[:, None], (T, T))
        distance = np.where(inside, t[:, None] - t[None, :], to_start)
        rows = [b]
        for row in context_rows[b] if context_rows is not None else ():
            if row >= 0:
                rows.append(row)
                seen = np.concatenate([seen, np.broadcast_to(segment_BT[row] > 0, (T, T))], axis=1)
                distance = np.concatenate([distance, to_start], axis=1)
        all_keys, all_values = (np.concatenate([a[row] for row in rows]) for a in (k_BTHK, v_BTHK))
        turn = np.exp(1j * distance[..., None] * theta)
        s = np.einsum("thc,shc,tsc->hts", as_complex(q_BTHK[b]), as_complex(all_keys).conj(), turn).real
        seen = np.broadcast_to(seen, s.shape).copy()
        if memory_layer and k is not None:
            for head, query in np.ndindex(H, T):
                candidates = np.flatnonzero(seen[head, query, :T] & ~inside[query])
                order = np.argsort(-s[head, query, candidates], kind="stable")
                seen[head, query, candidates[order[k:]]] = False
        o[b] = np.einsum("hts,shk->thk", softmax(np.where(seen, s * scale, -np.inf)), all_values)
    return o


def forward(
    config,
    params,
    tokens_BT,
    *,
    start_BT=None,
    valid_BT=None,
    segment_BT=None,
    context_rows=None,
    k=None,
    with_head=True,
):
    """Logits, float64 [B, T, V]; without the head, what it would be given.

    start_BT: where each token's window starts. valid_BT: False for tokens nobody sees. segment_BT: local attention
    stays in a segment, 0 is seen by nobody from outside. context_rows: for each row, the rows whose whole windows it
    reads (-1: none). k: memory keys a query of a head retrieves; None: all.
    """
    tokens_BT = np.asarray(tokens_BT)
    B, T = tokens_BT.shape
    K, repeats = config.head_size, config.n_heads // config.n_kv_heads
    start_BT = np.zeros((B, T), int) if start_BT is None else np.asarray(start_BT)
    valid_BT = np.ones((B, T), bool) if valid_BT is None else np.asarray(valid_BT, bool)
    segment_BT = np.ones((B, T), int) if segment_BT is None else np.asarray(segment_BT)
    theta = config.rope_base ** (-2 * np.arange(K // 2) / K)
    x = np.asarray(params["embed"]["embedding"], np.float64)[tokens_BT]
    for number, block in enumerate(blocks(config, params)):
        memory_layer = number in config.mem_layers
        h = rms_norm(x, block["attention_norm"]["scale"], config.norm_eps)
        w = block["attention"]
        q, keys, values = (np.einsum("btd,dhk->bthk", h, w[name]) for name in "qkv")
        scale = K**-0.5
        if config.qk_norm:
            q = q / np.linalg.norm(q, axis=-1, keepdims=True) * w["temperature"][:, None]
            keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
            scale = 1.0
        keys, values = (np.repeat(a, repeats, axis=2) for a in (keys, values))
        turns = not memory_layer or config.mem_positionals
        o = attend_rows(
            q,
            keys,
            values,
            theta if turns else np.zeros_like(theta),
            scale,
            start_BT,
            valid_BT,
            segment_BT,
            memory_layer,
            context_rows if memory_layer else None,
            k,
        )
        x = x + np.einsum("bthk,hkd->btd", o, w["o"])
        h = rms_norm(x, block["mlp_norm"]["scale"], config.norm_eps)
        gate = h @ block["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["mlp"]["up"])) @ block["mlp"]["down"]
    x = rms_norm(x, params["norm"]["scale"], config.norm_eps)
    if not with_head:
        return x
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    return x @ (embedding.T if config.tie_embeddings else np.asarray(params["head"]["kernel"], np.float64))


def window_starts(prompt, total, window, last_context_length, spill="block"):
    """[total] where each token's window starts: windows of a prompt's prefix, then the open one, spilled when full."""
    prefix = max(prompt - last_context_length, 0)
    starts = [t // window * window for t in range(prefix)]
    begin = prefix
    for t in range(prefix, total):
        if t - begin == window:
            begin = t if spill == "block" else begin + max(1, window // 8)
        starts.append(begin)
    return np.array(starts)


def attention(q_BHTK, k_BGSK, v_BGSK, seen_BTS, scale):
    """float64 (o, lse) of plain attention; zeros and -inf where nothing is seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BHTK, k_BGSK, v_BGSK))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = np.where(np.asarray(seen_BTS)[:, None], np.einsum("bhtk,bhsk->bhts", q, k) * scale, -np.inf)
    with np.errstate(divide="ignore"):
        top = np.max(s, axis=-1, initial=-1e30)
        lse = np.log(np.exp(s - top[..., None]).sum(-1)) + top
    p = softmax(s) if s.shape[-1] else s
    return np.einsum("bhts,bhsk->bhtk", p, v), lse
