"""Each part of the network against its equation, written out naively in float64."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import train_gpt
from train_gpt import (
    BOS,
    GPT,
    PRESETS,
    Batch,
    Config,
    initialize,
    mile_weights,
    rms_norm,
    rotary_tables,
    rotate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 64,
    "num_layers": 5,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "xsa_last_n": 3,
    "bigram_vocab_size": 48,
    "bigram_dim": 12,
    "ve_dim": 8,
    "ve_layers": "4,1",
}
VARIANTS = {
    "all": {},
    "unmasked": {"smear_bos_mask": False, "bigram_bos_mask": False},
    "smear off": {"smear_enabled": False},
    "bigram off": {"bigram_vocab_size": 0},
    "values off": {"ve_enabled": False},
    "XSA off": {"xsa_last_n": 0},
    "XSA everywhere": {"xsa_last_n": 5},
    "LN scale off": {"ln_scale": "0"},
    "untied": {"tie_embeddings": False},
    "NTK": {"rope_ntk_ref": 4},
    "no NTK": {"rope_ntk_ref": 0},
    "all rotated": {"rope_dims": 0},
    "one kv head": {"num_kv_heads": 1},
    "no grouping": {"num_kv_heads": 4},
    "relu": {"leaky_slope": 0.0, "mlp_mult": 1.5},
    "low softcap": {"logit_softcap": 2.0},
    "1 layer": {"num_layers": 1, "xsa_last_n": 1, "ve_layers": "0"},
    "2 layers": {"num_layers": 2, "xsa_last_n": 1, "ve_layers": "1"},
    "3 layers": {"num_layers": 3, "ve_layers": "0,2"},
    "6 layers": {"num_layers": 6},
    "relu2": {"mlp_act": "relu2"},
    "LN scale learned": {"ln_scale": "learned"},
    "sum hash": {"bigram_hash": "sum"},
    "scalar skips": {"skip_per_dim": "0"},
    "no skips": {"skip_per_dim": "off"},
    "sum hash unmasked": {"bigram_hash": "sum", "bigram_bos_mask": False},
    "VRL add": {"vrl_mode": "add", "ve_layers": "0,4"},
    "VRL mix": {"vrl_mode": "mix", "ve_layers": "0,4"},
    "backout": {"backout_mode": "mid"},
    "cache late": {"backout_mode": "cache", "cache_layer": 3},
    "cache early": {"backout_mode": "cache", "cache_layer": 0, "vrl_mode": "add"},
    "loop": {"num_loops": 2, "loop_start": 1, "loop_end": 3},
    "loop of the first": {"num_loops": 1, "loop_start": 0, "loop_end": 1, "vrl_mode": "add"},
    "loop of the last": {"num_loops": 3, "loop_start": 4, "loop_end": 4, "vrl_mode": "mix"},
    "loop, cached": {
        "num_loops": 1,
        "loop_start": 2,
        "loop_end": 3,
        "backout_mode": "cache",
        "cache_layer": 2,
    },
    "two lanes": {"parallel_start_layer": 3},
    "two lanes that skip": {"parallel_start_layer": 1, "skip_gates": True},
    "two lanes in a loop": {
        "parallel_start_layer": 3,
        "num_loops": 1,
        "loop_start": 2,
        "loop_end": 3,
        "backout_mode": "mid",
    },
    "skip gates": {"skip_gates": True},
    "scalar skip gates": {"skip_gates": True, "skip_per_dim": "0"},
    "sparse gate": {"attn_gate": "sparse", "attn_gate_scale": 0.5},
    "out gate": {"attn_gate": "out", "gate_window": 32},
    "input smear": {"smear_form": "input"},
    "input smear unmasked": {"smear_form": "input", "smear_bos_mask": False, "gate_window": 1},
    "documents": {"attn_docs": True},
    # The published systems, their layers and techniques kept.
    **{
        system: {
            **preset,
            **SIZES,
            "num_layers": preset.get("num_layers", 11),
            "xsa_last_n": preset.get("xsa_last_n", 11),
            "ve_layers": "9,8",
            "rope_dims": 0 if preset.get("rope_dims") == 64 else 4,
        }
        for system, preset in PRESETS.items()
        if system.startswith("pr")
    },
}


def random_model(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    """A model whose every parameter is random, so that no part hides behind its initial value."""
    torch.manual_seed(seed)
    model = GPT(cfg, dtype=dtype).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(0.5 if parameter.ndim < 2 else 0.0)
    return model


def random_ids(cfg: Config, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids of several documents in a row: (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(cfg.vocab_size, (rows, length), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.2, BOS, ids)


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """A module's parameters by name, in float64."""
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


@functools.cache
def full_size() -> GPT:
    """The published system at its size, initialised."""
    cfg = Config(**PRESETS["pr1361"])
    model = GPT(cfg)
    initialize(model, cfg)
    return model


# The equations. Positions, heads and layers are loops; only sums over channels are vectorised.


def naive_rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)


def naive_rotate(x: np.ndarray, position: int, seq_len: int, cfg: Config) -> np.ndarray:
    """One head's vector (K,) turned to its position."""
    dims, base, y = cfg.rope_dims or len(x), cfg.rope_base, x.copy()
    if cfg.rope_ntk_ref and seq_len > cfg.rope_ntk_ref:
        base *= (seq_len / cfg.rope_ntk_ref) ** (dims / (dims - 2))
    for i in range(dims // 2):
        j, angle = i + dims // 2, position * base ** (-2 * i / dims)
        y[i] = math.cos(angle) * x[i] + math.sin(angle) * x[j]
        y[j] = math.cos(angle) * x[j] - math.sin(angle) * x[i]
    return y


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def naive_documents(ids: list[int], longest: int) -> list[int]:
    """The number of each token's document."""
    numbers, began = [0], 0
    for i in range(1, len(ids)):
        begins = ids[i] == BOS or i - began == longest
        numbers.append(numbers[-1] + begins)
        began = i if begins else began
    return numbers


def naive_attention(
    p: dict,
    h: np.ndarray,
    v_flat: np.ndarray,
    exclusive: bool,
    cfg: Config,
    documents: list[int] | None = None,
) -> np.ndarray:
    """(T, D) -> (T, D), with values v_flat (T, G*K); by default a row is one document."""
    documents = documents or [0] * len(h)
    length, width = len(h), cfg.model_dim // cfg.num_heads
    out = np.zeros_like(h)
    for head in range(cfg.num_heads):
        group = head // (cfg.num_heads // cfg.num_kv_heads)
        mine = slice(head * width, (head + 1) * width)
        theirs = slice(group * width, (group + 1) * width)
        turn = functools.partial(naive_rotate, seq_len=length, cfg=cfg)
        q = [
            turn(naive_rms(p["c_q.weight"][mine] @ h[i]), i) * p["q_gain"][head]
            for i in range(length)
        ]
        k = [turn(naive_rms(p["c_k.weight"][theirs] @ h[i]), i) for i in range(length)]
        v = v_flat[:, theirs]
        for i in range(length):
            seen = [j for j in range(i + 1) if documents[j] == documents[i]]
            weights = np.exp([q[i] @ k[j] / math.sqrt(width) for j in seen])
            y = sum(w * v[j] for j, w in zip(seen, weights / weights.sum(), strict=True))
            if exclusive:
                y = y - (y @ v[i]) / (v[i] @ v[i]) * v[i]
            if cfg.attn_gate != "none":
                open_by = sigmoid(cfg.attn_gate_scale * p["gate"][head] @ h[i, : cfg.gate_window])
                y = y * open_by * {"sparse": 1, "out": 2}[cfg.attn_gate]
            out[i, mine] = y
    return out @ p["proj.weight"].T


def naive_mlp(p: dict, h: np.ndarray, cfg: Config) -> np.ndarray:
    z = h @ p["fc.weight"].T
    slope = cfg.leaky_slope if cfg.mlp_act == "leaky2" else 0
    return np.where(z > 0, z, slope * z) ** 2 @ p["proj.weight"].T


def naive_bucket(ids: list[int], i: int, cfg: Config) -> int:
    last, alone = cfg.bigram_vocab_size - 1, i == 0 or (cfg.bigram_bos_mask and ids[i] == BOS)
    if cfg.bigram_hash == "sum":
        return 0 if alone else (36313 * ids[i] + 27191 * ids[i - 1]) % (last + 1)
    return last if alone else ((36313 * ids[i]) ^ (27191 * ids[i - 1])) % last


def naive_smear(gate: np.ndarray, x: np.ndarray, ids: list[int], cfg: Config) -> np.ndarray:
    out = np.empty_like(x)
    for i in range(len(x)):
        share = 1 / (1 + np.exp(-gate)) * (not (cfg.smear_bos_mask and ids[i] == BOS))
        out[i] = (1 - share) * x[i] + share * (x[i - 1] if i else 0)
    return out


def naive_smear_by_input(p: dict, x: np.ndarray, ids: list[int], cfg: Config) -> np.ndarray:
    out = x.copy()
    for i in range(1, len(x)):
        if not (cfg.smear_bos_mask and ids[i] == BOS):
            gate = sigmoid(p["smear.weight"] @ x[i, : cfg.gate_window])
            out[i] = x[i] + p["smear.scale"] * gate * x[i - 1]
    return out


def naive_order(cfg: Config, looping: bool) -> list[int]:
    """Which layer is executed when."""
    order = []
    for layer in range(cfg.num_layers):
        order.append(layer)
        if looping and cfg.num_loops and layer == cfg.loop_end:
            for _ in range(cfg.num_loops):
                order += range(cfg.loop_start, cfg.loop_end + 1)
    return order


def naive_logits(
    p: dict,
    ids: list[int],
    cfg: Config,
    looping: bool = True,
    documents: list[int] | None = None,
) -> np.ndarray:
    """The whole network on one row: (T,) token ids -> (T, V)."""
    x, values, stack = p["tok_emb.weight"][ids], np.zeros((len(ids), 1)), []
    if cfg.bigram_vocab_size:
        rows = p["bigram.embed.weight"][[naive_bucket(ids, i, cfg) for i in range(len(ids))]]
        x = x + p["bigram.scale"] * (rows @ p["bigram.proj.weight"].T)
    if cfg.smear_enabled and cfg.smear_form == "input":
        x0 = x = naive_rms(naive_smear_by_input(p, x, ids, cfg))
    else:
        x = naive_rms(x)
        x0 = x = naive_smear(p["smear.gate"], x, ids, cfg) if cfg.smear_enabled else x
    value_layers = [int(n) for n in cfg.ve_layers.split(",")] if cfg.ve_enabled else []
    if value_layers:
        values = p["ve_shared.scale"] * (
            p["ve_shared.embed.weight"][ids] @ p["ve_shared.proj.weight"].T
        )
    v0, kept = None, None
    middle = {"mid": cfg.num_layers // 2, "cache": cfg.cache_layer, "none": None}[cfg.backout_mode]
    order = naive_order(cfg, looping)
    half, second = len(order) // 2, None
    for place, layer in enumerate(order):
        has_lanes = 0 < cfg.parallel_start_layer <= layer
        if has_lanes and second is None:
            second = x
        if not has_lanes and second is not None:
            x, second = (x + second) / 2, None
        of = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in p.items()
            if name.startswith(f"blocks.{layer}.")
        }
        attn, mlp = (
            {name.removeprefix(part): value for name, value in of.items()}
            for part in ("attn.", "mlp.")
        )
        if place >= half and stack and cfg.skip_per_dim != "off":
            skip = p["skip_weights"][place - half] * stack.pop()
            if cfg.skip_gates:
                keep = sigmoid(p["skip_gates"][place - half])
                x = keep * x + (1 - keep) * skip
            else:
                x = x + skip
        scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale == "1" else 1
        seen = of["resid_mix"][0] * x + of["resid_mix"][1] * x0
        before, x = x, seen
        if cfg.backout_mode == "cache" and kept is not None and place >= half:
            seen = of["resid_mix"][0] * kept + of["resid_mix"][1] * x0
        h = scale * naive_rms(seen)
        v = own = h @ attn["c_v.weight"].T
        if layer in value_layers:
            v = v + values * p[f"ve_layer_scales.{value_layers.index(layer)}"]
        if layer == 0:
            v0 = (own if cfg.vrl_mode == "add" else v) if v0 is None else v0
        elif cfg.vrl_mode == "add":
            v = v + v0 / (1 + np.exp(-p[f"vrl_alphas.{layer - 1}"]))
        elif cfg.vrl_mode == "mix":
            v = attn["vr_lambda"][0] * v0 + attn["vr_lambda"][1] * v
        xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        attended = of["attn_scale"] * naive_attention(attn, h, v, xsa, cfg, documents)
        if has_lanes:
            thought = of["mlp_scale"] * naive_mlp(mlp, scale * naive_rms(second), cfg)
            keep, write = p["lanes.keep"][layer], p["lanes.write"][layer]
            x = keep[0] * before + write[0] * attended + write[2] * thought
            second = keep[1] * second + write[1] * attended + write[3] * thought
        else:
            x = x + attended
            x = x + of["mlp_scale"] * naive_mlp(mlp, scale * naive_rms(x), cfg)
        output = x if second is None else (x + second) / 2
        if place < half:
            stack.append(output)
        if layer == middle and layer not in order[place + 1 :]:
            kept = output
    x = output
    if kept is not None:
        x = x - p["backout_lambda"] * kept
    z = naive_rms(x) @ p["tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"].T
    return cfg.logit_softcap * np.tanh(z / cfg.logit_softcap)


# The network against them.


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_is_its_equations(variant: str) -> None:
    cfg = Config(**{**SIZES, **VARIANTS[variant]})
    model, ids = random_model(cfg), random_ids(cfg, rows=2, length=9)
    documents = [[0] * 9] * 2
    batch = Batch(ids, ids)
    if cfg.attn_docs:
        documents = [naive_documents(row, 4) for row in ids.tolist()]
        batch = batch.by_document(4)
    for looping in (True, False) if cfg.num_loops else (True,):
        with torch.no_grad():
            hidden = model.hidden(ids, batch.documents, batch.boundaries, looping)
            logits = model.logits(hidden).numpy()
        expected = np.stack(
            [
                naive_logits(arrays(model), row, cfg, looping, numbers)
                for row, numbers in zip(ids.tolist(), documents, strict=True)
            ]
        )
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_nats_are_the_negative_log_probability_of_each_target() -> None:
    cfg = Config(**SIZES)
    model, ids = random_model(cfg), random_ids(cfg, 2, 7)
    targets = random_ids(cfg, 2, 7, seed=1)
    nats, weights = (y.detach().numpy() for y in model(Batch(ids, targets)))
    assert (weights == 1).all()
    for row in range(2):
        p = np.exp(naive_logits(arrays(model), ids[row].tolist(), cfg))
        expected = [-math.log(p[i, target] / p[i].sum()) for i, target in enumerate(targets[row])]
        np.testing.assert_allclose(nats[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [None, 1.1])
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("cap", [0.5, 30.0, 200.0])
def test_the_loss_with_its_own_gradient_is_cross_entropy(
    rows: int, cap: float, gamma: float | None
) -> None:
    """Nats, weights and both gradients, for every way that chunks of rows can end."""
    torch.manual_seed(0)
    hidden = 9 * torch.randn(rows, 16, 12, dtype=torch.float64)
    hidden[0, 0], head = 0.0, torch.randn(40, 12, dtype=torch.float64)
    targets, share = torch.randint(40, (rows, 16)), torch.randn(rows, 16, dtype=torch.float64)
    gamma, found = gamma and torch.tensor(gamma), []
    for own in (True, False):
        h, W = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if own:
            nats, weights = train_gpt.HeadNats.apply(h, W, targets, cap, gamma, 0.1, targets, None)
        else:
            logits = cap * torch.tanh(h @ W.t() / cap)
            nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            weights = mile_weights(logits, gamma, 0.1)
        assert not weights.requires_grad
        (share * weights * nats).sum().backward()
        found.append([nats.detach(), weights, h.grad, W.grad])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_a_model_that_learns_scores_as_one_that_does_not() -> None:
    """In float32 the loss of training is another code than that of evaluation."""
    cfg = Config(**{**SIZES, "mile_gamma": 1.1})
    model, ids = random_model(cfg, dtype=torch.float32), random_ids(cfg, 3, 65)
    given = Batch(ids[:, :-1], ids[:, 1:]), torch.tensor(cfg.mile_gamma)
    trained = [y.detach() for y in model(*given)]
    with torch.no_grad():
        for ours, plain in zip(trained, model(*given), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_rms_norm_is_its_equation_for_small_and_large_rows() -> None:
    x = torch.randn(4, 32, dtype=torch.float64) * torch.tensor([[1e-6], [1e-3], [1.0], [1e3]])
    np.testing.assert_allclose(rms_norm(x).numpy(), naive_rms(x.numpy()), rtol=1e-12)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_is_its_equation(
    heads: tuple[int, int], exclusive: bool, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it scores, and in training, where HeadsAttention stands in for the parts."""
    monkeypatch.setattr(train_gpt.HeadsAttention, "QUERIES", 3)
    cfg = Config(**{**SIZES, "num_heads": heads[0], "num_kv_heads": heads[1]})
    torch.manual_seed(0)
    cfg = replace(cfg, xsa_last_n=cfg.num_layers if exclusive else 0)
    attention = train_gpt.Attention(
        cfg, train_gpt.plan_layers(cfg)[0], train_gpt.sdpa_attention
    ).double()
    nn.init.normal_(attention.q_gain, mean=1.0)
    h = torch.randn(1, 8, 32, dtype=torch.float64)
    extra_v = torch.randn(1, 8, heads[1] * cfg.head_dim, dtype=torch.float64)
    gain = torch.randn(32, dtype=torch.float64)
    with torch.set_grad_enabled(trains):
        y = attention(h, gain, rotary_tables(cfg, 8, h.device), extra_v, None)[0].detach().numpy()
    v = (attention.c_v(h) + extra_v)[0].detach().numpy()
    expected = naive_attention(arrays(attention), h[0].numpy(), v, exclusive, cfg)
    np.testing.assert_allclose(y, expected * gain.numpy(), rtol=1e-6, atol=1e-6)


def plain_heads(
    qk: torch.Tensor,
    v: torch.Tensor,
    gains: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    exclusive: bool,
) -> torch.Tensor:
    """What HeadsAttention stands for, by the functions that scoring uses."""
    order = train_gpt.pairs_together(cos.size(-1), qk.size(-1)).argsort()
    q, k = qk[..., order].tensor_split([len(gains)], dim=2)
    q = rotate(rms_norm(q), (cos, sin)) * gains[:, None]
    y = train_gpt.sdpa_attention(q, rotate(rms_norm(k), (cos, sin)), v)
    return train_gpt.exclude_own_value(y, v) if exclusive else y


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("T", [1, 6, 7])
def test_heads_attention_is_the_plain_expression_and_so_are_its_gradients(
    T: int, heads: tuple[int, int], exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and gradients against finite differences, with blocks that end inside a row."""
    monkeypatch.setattr(train_gpt.HeadsAttention, "QUERIES", 3)
    torch.manual_seed(T)
    (H, G), K, R = heads, 6, 4
    angles = torch.randn(T, R // 2, dtype=torch.float64)
    tables = angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], dim=-1)
    shapes = [(2, T, H + G, K), (2, T, G, K), (H,)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    apply = train_gpt.HeadsAttention.apply
    torch.testing.assert_close(
        apply(*leaves, *tables, exclusive, torch.float64), plain_heads(*leaves, *tables, exclusive)
    )
    assert torch.autograd.gradcheck(
        lambda *given: apply(*given, *tables, exclusive, torch.float64), leaves
    )


@pytest.mark.parametrize("where", ["scoring", "long rows", "another kernel", "odd heads"])
def test_heads_attention_is_for_training_in_short_rows(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the plain functions run, and a gradient still arrives."""
    calls = []
    apply = train_gpt.HeadsAttention.apply
    monkeypatch.setattr(
        train_gpt.HeadsAttention, "apply", lambda *given: calls.append(1) or apply(*given)
    )
    cfg = Config(**SIZES)
    kernel = train_gpt.sdpa_attention
    attention = train_gpt.Attention(cfg, train_gpt.plan_layers(cfg)[0], kernel)
    given = torch.randn(1, 8, 32), torch.ones(32), rotary_tables(cfg, 8, torch.device("cpu"))
    attention(*given, None, None).sum().backward()
    assert calls == [1]
    if where == "long rows":
        monkeypatch.setattr(train_gpt.HeadsAttention, "LONGEST", 7)
    if where == "odd heads":
        odd = replace(cfg, model_dim=20)
        attention = train_gpt.Attention(odd, train_gpt.plan_layers(odd)[0], kernel)
        given = torch.randn(1, 8, 20), torch.ones(20), rotary_tables(odd, 8, torch.device("cpu"))
    if where == "another kernel":
        attention.kernel = functools.partial(kernel)
    with torch.set_grad_enabled(where != "scoring"):
        attention(*given, None, None)
    assert calls == [1]


def test_exclusive_attention_leaves_nothing_along_the_own_value() -> None:
    torch.manual_seed(0)
    y, v = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(2, 5, 3, 8).double()
    kept = train_gpt.exclude_own_value(y, v)
    own = v.repeat_interleave(2, dim=2)
    assert (kept * own).sum(-1).abs().max() < 1e-12
    along = ((y - kept) * own).sum(-1).abs() / ((y - kept).norm(dim=-1) * own.norm(dim=-1))
    torch.testing.assert_close(along, torch.ones_like(along))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rms_norm_is_its_equation_and_so_are_its_gradients(scale: float) -> None:
    """Rows of zeros, tiny and large ones too; the gradient against finite differences."""
    x = torch.randn(3, 5, 8, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    x[1, 2] = 0.0
    expected = scale * x / (x.square().mean(-1, keepdim=True) + train_gpt.RMS_EPS).sqrt()
    torch.testing.assert_close(train_gpt.rms_norm(x, scale), expected)
    near = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: train_gpt.rms_norm(x, scale), near)


def test_rotation_makes_scores_depend_on_distance_alone() -> None:
    cfg = Config(**{**SIZES, "rope_dims": 6})
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 40, 1, 8)
    tables = rotary_tables(cfg, 40, q.device)
    scores = (rotate(q, tables)[0, :, 0] @ rotate(k, tables)[0, :, 0].T).numpy()
    for distance in range(-39, 40):
        np.testing.assert_allclose(
            np.diag(scores, distance), np.diag(scores, distance)[0], atol=1e-5
        )
    assert np.ptp(scores[0]) > 0.1
    turned = rotate(q, tables)
    assert torch.equal(turned[..., 6:], q[..., 6:])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


def test_rows_beyond_the_reference_stretch_the_rotary_base() -> None:
    published = [
        1.0,
        0.28641497,
        0.08203354,
        0.02349563,
        0.0067295,
        0.00192743,
        0.00055204,
        0.00015811,
    ]
    angles = {
        length: torch.atan2(*reversed(rotary_tables(Config(), length, torch.device("cpu"))))
        for length in (1024, 2048)
    }
    np.testing.assert_allclose(angles[2048][1, :8], published, rtol=1e-4)
    np.testing.assert_allclose(angles[1024][1, :8], 10000.0 ** -np.arange(0, 1, 1 / 8), rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_smear_gate_is_its_equation(masked: bool) -> None:
    cfg = Config(**{**SIZES, "smear_bos_mask": masked})
    smear, ids = train_gpt.SmearGate(cfg).double(), random_ids(cfg, 1, 30)
    nn.init.normal_(smear.gate)
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    expected = naive_smear(arrays(smear)["gate"], x[0].numpy(), ids[0].tolist(), cfg)
    np.testing.assert_allclose(smear(x, ids)[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("buckets", [2, 7, 3072])
def test_bigram_buckets_are_the_hash_in_plain_integers(buckets: int, masked: bool) -> None:
    cfg = Config(
        **{**SIZES, "vocab_size": 65536, "bigram_vocab_size": buckets, "bigram_bos_mask": masked}
    )
    ids = random_ids(cfg, 4, 50)
    expected = [[naive_bucket(row, i, cfg) for i in range(50)] for row in ids.tolist()]
    assert train_gpt.BigramHash(cfg).buckets(ids).tolist() == expected


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        (3072, [0, 2467, 1470, 542, 301, 2736]),
        (2048, [None, 435, None, 638, 977, 1315]),
        (10240, [None, 2446, None, 6551, 1817, 6776]),
    ],
)
def test_bigram_buckets_are_the_published_ones(buckets: int, expected: list[int | None]) -> None:
    hash_of = train_gpt.BigramHash(Config(bigram_vocab_size=buckets, bigram_bos_mask=False)).buckets
    pairs = torch.tensor([(0, 0), (1, 2), (2, 1), (1, 17), (1023, 1023), (500, 731)])
    first, second = hash_of(pairs).T.tolist()
    assert first == [buckets - 1] * 6
    assert [None if e is None else s for s, e in zip(second, expected, strict=True)] == expected


def test_sum_buckets_are_the_published_ones() -> None:
    hash_of = train_gpt.BigramHash(
        Config(bigram_vocab_size=2048, bigram_bos_mask=False, bigram_hash="sum")
    ).buckets
    pairs = torch.tensor([(1, 2), (1, 17), (1023, 1023), (500, 731)])
    assert hash_of(pairs).tolist() == [[0, 1513], [0, 1440], [0, 2032], [0, 1551]]


def test_mile_weights_are_their_equation() -> None:
    """The published vector is the weight of a distribution by its entropy alone."""
    logits = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 4
    for gamma, least in ((1.1, 0.1), (0.55, 0.3), (0.0, 0.1)):
        ours = mile_weights(logits, torch.tensor(gamma), least)
        for at in np.ndindex(3, 5):
            p = np.exp(logits[at].double().numpy())
            p /= p.sum()
            expected = max((1 - math.exp((p * np.log(p + 1e-8)).sum())) ** gamma, least)
            assert ours[at] == pytest.approx(expected, abs=1e-5)
    for nats, weight in (
        (0.05, 0.1),
        (0.1, 0.1),
        (0.5, 0.3584),
        (1, 0.6038),
        (2, 0.8522),
        (3, 0.9454),
        (5, 0.9926),
    ):
        # Two-level distributions reach any entropy: find the one of this many nats.
        low, high = 0.0, 30.0
        for _ in range(60):
            top = torch.zeros(1, 1, 1024, dtype=torch.float64)
            top[..., 0] = (low + high) / 2
            p = top.softmax(-1)
            entropy = -(p * p.log()).sum()
            low, high = (top[0, 0, 0], high) if entropy > nats else (low, top[0, 0, 0])
        assert mile_weights(top, torch.tensor(1.1), 0.1).item() == pytest.approx(weight, abs=2e-4)


@pytest.mark.parametrize(
    ("layers", "skips"),
    [
        (1, {}),
        (2, {1: 0}),
        (3, {1: 0}),
        (10, {5: 4, 6: 3, 7: 2, 8: 1, 9: 0}),
        (11, {5: 4, 6: 3, 7: 2, 8: 1, 9: 0}),
    ],
)
def test_late_layers_take_early_outputs_in_reverse(layers: int, skips: dict[int, int]) -> None:
    """Stand-in blocks put out a unit vector each, so that an input shows what went into it."""

    class Unit(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, *context):
            received[self.layer] = x[0][0, 0].tolist()
            return torch.eye(32)[self.layer].expand_as(x[0]), None

    received: dict[int, list[float]] = {}
    cfg = Config(**{**SIZES, "num_layers": layers, "xsa_last_n": 0, "ve_layers": ""})
    model = GPT(cfg)
    model.blocks = nn.ModuleList(Unit(layer) for layer in range(layers))
    nn.init.constant_(model.skip_weights, 7.0)
    model.hidden(random_ids(cfg, 1, 3))
    for layer in range(1, layers):
        terms = {n: value for n, value in enumerate(received[layer]) if value}
        assert terms == {layer - 1: 1.0} | (
            {skips[layer]: 7.0 + (skips[layer] == layer - 1)} if layer in skips else {}
        )


@pytest.mark.parametrize(("layers", "variant"), [(1, {}), (4, {}), (11, {"vrl_mode": "add"})])
def test_the_plan_is_what_the_settings_say(layers: int, variant: dict) -> None:
    """Every layer has weights of its own; a layer reads only what is there before it."""
    cfg = Config(**{**SIZES, "num_layers": layers, "xsa_last_n": 1, "ve_layers": "0"} | variant)
    plan = train_gpt.plan_layers(cfg.for_model())
    assert [layer.block for layer in plan] == list(range(layers))
    assert [layer.exclusive for layer in plan] == [False] * (layers - 1) + [True]
    assert [layer.value_scale for layer in plan] == [0] + [None] * (layers - 1)
    gates = [layer.value_gate for layer in plan]
    assert gates == ([None, *range(layers - 1)] if variant else [None] * layers)
    rows = [layer.skip_row for layer in plan if layer.skip_row is not None]
    assert rows == list(range(layers // 2))
    for place, layer in enumerate(plan):
        assert layer.skip_from is None or layer.skip_from < place


@pytest.mark.parametrize("rows", [1, 3])
def test_a_delta_adds_a_matrix_of_low_rank_for_each_row(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = train_gpt.Linear(6, 4, train_gpt.ATTENTION_MATRIX).double()
    x, down, up = (
        torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 6), (2, 6), (4, 2))
    )
    given = linear(x, (down, up)).detach()
    for row in range(rows):
        whole = linear.weight.detach() + up[row] @ down[row]
        torch.testing.assert_close(given[row], x[row] @ whole.T)
    assert torch.equal(linear(x), x @ linear.weight.T)


# Properties of the whole.


def logits_of(
    model: GPT, ids: torch.Tensor, looping: bool = True, by_mask: bool = False
) -> torch.Tensor:
    """Logits of rows, with attention inside documents where the settings say so."""
    batch = Batch(ids, ids)
    batch = batch.by_document(ids.size(1)) if model.cfg.attn_docs else batch
    boundaries = None if by_mask else batch.boundaries
    return model.logits(model.hidden(ids, batch.documents, boundaries, looping))


EVERYTHING = {**SIZES, "num_layers": 6, "xsa_last_n": 6, "rope_ntk_ref": 16}


@pytest.mark.parametrize(
    "techniques",
    [
        {},
        {"vrl_mode": "add", "backout_mode": "mid"},
        {"vrl_mode": "mix", "backout_mode": "cache", "cache_layer": 3, "bigram_hash": "sum"},
        {"num_loops": 2, "loop_start": 1, "loop_end": 2},
        {"parallel_start_layer": 2, "num_loops": 1, "loop_start": 2, "loop_end": 3},
        {"skip_gates": True, "attn_gate": "sparse", "smear_form": "input", "attn_docs": True},
    ],
    ids=["defaults", "VRL and backout", "mixed and cached", "loop", "lanes", "gates, documents"],
)
@pytest.mark.parametrize("looping", [True, False])
@pytest.mark.parametrize("length", [2, 7, 33, 65])
def test_no_later_token_changes_an_earlier_logit(
    length: int, looping: bool, techniques: dict
) -> None:
    """Row i of a batch differs from the others at position i alone; compared bit for bit."""
    cfg = Config(**{**EVERYTHING, **techniques})
    model, ids = random_model(cfg, dtype=torch.float32), random_ids(cfg, 1, length)
    rows, at = ids.repeat(length, 1), torch.arange(length)
    for new in (BOS, 5):
        changed = rows.clone()
        changed[at, at] = torch.where(ids[0] == new, 7, new)
        with torch.inference_mode():
            # A mask, as a new document changes how many places a kernel adds up over.
            before, after = (logits_of(model, x, looping, by_mask=True) for x in (rows, changed))
        for i in range(length):
            assert torch.equal(before[i, :i], after[i, :i])
            assert not torch.equal(before[i, i], after[i, i])


@pytest.mark.parametrize("longest", [3, 7, 64])
@pytest.mark.parametrize("seed", range(4))
def test_ways_of_attention_inside_documents_agree(longest: int, seed: int) -> None:
    """By length, and by a mask as in compiled graphs: outputs and all three gradients."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(3, 24, generator=generator) < 0.15, BOS, 5)
    batch = Batch(ids, ids).by_document(longest)
    assert batch.documents is not None
    assert [row.unique().numel() for row in batch.documents] == [
        naive_documents(row, longest)[-1] + 1 for row in ids.tolist()
    ]
    given = [
        torch.randn(3, 24, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    found = []
    for in_graph in (False, True):
        inside = train_gpt.document_extents(batch.documents, batch.boundaries, in_graph)
        assert inside.ndim == (4 if in_graph else 1)
        q, k, v = (x.clone().requires_grad_() for x in given)
        y = train_gpt.document_attention(q, k, v, inside)
        y.square().sum().backward()
        found.append([y.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_a_document_never_sees_the_one_before(seed: int) -> None:
    """With all that reaches back kept inside documents, no logit depends on an earlier one."""
    masks = {"attn_docs": True, "smear_bos_mask": True, "bigram_bos_mask": True}
    variant = [{}, {"num_loops": 2, "loop_start": 1, "loop_end": 2}, {"parallel_start_layer": 2}]
    cfg = Config(**{**SIZES, **masks, **variant[seed % 3], "vrl_mode": "add"})
    model = random_model(cfg, seed, torch.float32)
    ids = random_ids(cfg, 2, 24, seed)
    ids[:, 10] = BOS
    changed = ids.clone()
    changed[:, 9] = torch.where(ids[:, 9] == 7, 8, 7)
    ids[:, 9] = torch.where(ids[:, 9] == BOS, 9, ids[:, 9])
    with torch.inference_mode():
        before, after = (logits_of(model, x) for x in (ids, changed))
    assert torch.equal(before[:, 10:], after[:, 10:])
    assert not torch.equal(before[:, 9], after[:, 9])


def test_the_published_systems_have_their_published_sizes() -> None:
    for system, size in (
        ("pr1361", 27_067_484),
        ("pr569", 26_993_766),
        ("pr703", 26_928_221),
        ("pr334", 26_666_073),
        ("pr295", 25_517_138),
    ):
        with torch.device("meta"):
            model = GPT(Config(**PRESETS[system]))
        assert sum(p.numel() for p in model.parameters()) == size, system


def test_before_training_every_token_is_about_equally_likely() -> None:
    """Averaged over all targets there are, so that no sample of text matters."""
    model = full_size()
    with torch.inference_mode():
        log_odds = model.logits(model.hidden(random_ids(model.cfg, 1, 64))).log_softmax(-1)
    assert abs(-log_odds.mean() - math.log(1024)) < 0.02


@pytest.mark.parametrize(
    "variant",
    [
        "all",
        "untied",
        "2 layers",
        "3 layers",
        "VRL add",
        "VRL mix",
        "backout",
        "cache late",
        "cache early",
        "scalar skips",
        "pr569",
        "pr703",
        "pr334",
        "pr295",
    ],
)
def test_a_gradient_reaches_every_parameter(variant: str) -> None:
    """At once where all is random, and from the third step on where blocks start as identity."""
    cfg = Config(**{**SIZES, **VARIANTS[variant]})
    ids, model = random_ids(cfg, 4, 17), random_model(cfg, dtype=torch.float32)
    for steps in (0, 2):
        for _ in range(steps + 1):
            model.zero_grad()
            model(Batch(ids[:, :-1], ids[:, 1:]))[0].mean().backward()
            for p in model.parameters():
                p.data -= 0.1 * p.grad
        silent = [name for name, p in model.named_parameters() if not p.grad.any()]
        assert not silent, f"after {steps} steps"
        model = GPT(cfg)
        initialize(model, cfg)


@pytest.mark.parametrize("variant", ["all", "untied", "1 layer", "bigram off", "values off"])
def test_blocks_start_as_the_identity(variant: str) -> None:
    cfg = Config(**{**SIZES, **VARIANTS[variant]})
    model = GPT(cfg)
    initialize(model, cfg)
    x, x0 = torch.randn(2, 1, 6, 32)
    rotation = rotary_tables(cfg, 6, x.device)
    for block in model.blocks:
        stream, second = block((x, None), x0, None, rotation, None, None, None, None, 1.0)
        assert torch.equal(stream, x) and second is None


def initial(**changes: object) -> GPT:
    """A model of tiny sizes as training finds it."""
    cfg = Config(**{**SIZES, **changes})
    initialize(model := GPT(cfg), cfg)
    return model


def test_the_shares_of_stream_and_embedding_start_by_depth() -> None:
    """The published values of eleven layers, to the digits given."""
    shares = (0.1824, 0.2315, 0.2891, 0.3543, 0.4256, 0.5, 0.5744, 0.6457, 0.7109, 0.7685, 0.8176)
    for block, share in zip(
        initial(num_layers=11, resid_mix_init="phase").blocks, shares, strict=True
    ):
        np.testing.assert_allclose(block.resid_mix[0].detach(), share, atol=5e-5)
        np.testing.assert_allclose(block.resid_mix.detach().sum(0), 1.0, atol=1e-6)
    for block in initial().blocks:
        assert block.resid_mix.detach().unique(dim=1).tolist() == [[1.0], [0.0]]


def test_the_spectral_embedding_keeps_its_directions() -> None:
    plain, ours = (
        initial(emb_svd_init=on).tok_emb.weight.detach().double().numpy() for on in (False, True)
    )
    U, S, Vh = np.linalg.svd(plain, full_matrices=False)
    np.testing.assert_allclose(
        np.linalg.svd(ours)[1], S[0] / np.sqrt(1 + np.arange(len(S))), rtol=1e-4
    )
    turned = U.T @ ours @ Vh.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-6)


def orthogonality(W: nn.Parameter) -> float:
    """The common length of the rows or columns of a matrix with orthogonal ones; else nan."""
    W = W.detach().double()
    gram = W @ W.T if W.size(0) <= W.size(1) else W.T @ W
    even = torch.allclose(gram, gram[0, 0] * torch.eye(len(gram), dtype=gram.dtype), atol=1e-5)
    return float(gram[0, 0].sqrt()) if even else math.nan


@pytest.mark.parametrize(
    ("proj_init", "routing", "bigram_init"),
    [
        ("zero", "standard", "zero_embed"),
        ("ortho_mup", "banks", "zero_embed"),
        ("ortho_mup", "by_ndim", "zero_proj"),
    ],
)
def test_matrices_start_orthogonal_some_scaled_some_zero(
    proj_init: str, routing: str, bigram_init: str
) -> None:
    model = initial(
        proj_init=proj_init,
        optimizer_routing=routing,
        bigram_init=bigram_init,
        backout_mode="mid",
        backout_init=0.3,
        tie_embeddings=False,
    )
    scaled = 1 / math.sqrt(10)
    for name, p in model.named_parameters():
        if name.startswith("blocks") and p.ndim == 2 and "resid_mix" not in name:
            output = name.endswith("proj.weight")
            expected = 1.0 if not output else scaled if proj_init == "ortho_mup" else 0.0
            assert orthogonality(p) == pytest.approx(expected, abs=1e-5), name
    assert orthogonality(model.ve_shared.proj.weight) == pytest.approx(
        1.0 if routing == "banks" else scaled, abs=1e-5
    )
    zero, other = (model.bigram.embed.weight, model.bigram.proj.weight)[
        :: 1 if bigram_init == "zero_embed" else -1
    ]
    assert not zero.any()
    assert orthogonality(other) == pytest.approx(
        1.0 if bigram_init == "zero_proj" or routing == "banks" else scaled, abs=1e-5
    )
    assert model.backout_lambda.item() == pytest.approx(0.3)
    assert not model.lm_head.weight.any()


def test_a_learned_scale_starts_as_the_fixed_one() -> None:
    model = initial(ln_scale="learned")
    for layer, block in enumerate(model.blocks):
        for gain in (block.attn_scale, block.mlp_scale):
            np.testing.assert_allclose(gain.detach(), 1 / math.sqrt(layer + 1), rtol=1e-6)
        assert model.plan[layer].depth_scale == 1.0


def test_initial_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed, surroundings in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(surroundings)
        cfg = Config(**SIZES, seed=seed)
        initialize(model := GPT(cfg), cfg)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
        assert torch.initial_seed() == surroundings
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
