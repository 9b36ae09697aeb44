"""Each part of the network against its equation, written out naively in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import train_gpt
from train_gpt import BOS, GPT, PRESETS, Config, initialize, rms_norm, rotary_tables, rotate

SIZES = {
    "vocab_size": 64, "num_layers": 5, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2,
    "rope_dims": 4, "xsa_last_n": 3, "bigram_vocab_size": 48, "bigram_dim": 12, "ve_dim": 8,
    "ve_layers": "4,1",
}
VARIANTS = {
    "all": {}, "unmasked": {"smear_bos_mask": False, "bigram_bos_mask": False},
    "smear off": {"smear_enabled": False}, "bigram off": {"bigram_vocab_size": 0},
    "values off": {"ve_enabled": False}, "XSA off": {"xsa_last_n": 0},
    "XSA everywhere": {"xsa_last_n": 5}, "LN scale off": {"ln_scale": False},
    "untied": {"tie_embeddings": False}, "NTK": {"rope_ntk_ref": 4}, "no NTK": {"rope_ntk_ref": 0},
    "all rotated": {"rope_dims": 0}, "one kv head": {"num_kv_heads": 1},
    "no grouping": {"num_kv_heads": 4},
    "relu": {"leaky_slope": 0.0, "mlp_mult": 1.5}, "low softcap": {"logit_softcap": 2.0},
    "1 layer": {"num_layers": 1, "xsa_last_n": 1, "ve_layers": "0"},
    "2 layers": {"num_layers": 2, "xsa_last_n": 1, "ve_layers": "1"},
    "3 layers": {"num_layers": 3, "ve_layers": "0,2"}, "6 layers": {"num_layers": 6},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only make a second thread wait, for long where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def naive_attention(p: dict, h: np.ndarray, extra_v: np.ndarray, exclusive: bool,
                    cfg: Config) -> np.ndarray:
    """(T, D) -> (T, D), with extra_v (T, G*K) added to the values."""
    length, width = len(h), cfg.model_dim // cfg.num_heads
    v_flat, out = h @ p["c_v.weight"].T + extra_v, np.zeros_like(h)
    for head in range(cfg.num_heads):
        group = head // (cfg.num_heads // cfg.num_kv_heads)
        mine = slice(head * width, (head + 1) * width)
        theirs = slice(group * width, (group + 1) * width)
        turn = functools.partial(naive_rotate, seq_len=length, cfg=cfg)
        q = [turn(naive_rms(p["c_q.weight"][mine] @ h[i]), i) * p["q_gain"][head]
             for i in range(length)]
        k = [turn(naive_rms(p["c_k.weight"][theirs] @ h[i]), i) for i in range(length)]
        v = v_flat[:, theirs]
        for i in range(length):
            weights = np.exp([q[i] @ k[j] / math.sqrt(width) for j in range(i + 1)])
            y = sum(w * v[j] for j, w in enumerate(weights / weights.sum()))
            if exclusive:
                y = y - (y @ v[i]) / (v[i] @ v[i]) * v[i]
            out[i, mine] = y
    return out @ p["proj.weight"].T


def naive_mlp(p: dict, h: np.ndarray, cfg: Config) -> np.ndarray:
    z = h @ p["fc.weight"].T
    return np.where(z > 0, z, cfg.leaky_slope * z) ** 2 @ p["proj.weight"].T


def naive_bucket(ids: list[int], i: int, cfg: Config) -> int:
    last = cfg.bigram_vocab_size - 1
    if i == 0 or (cfg.bigram_bos_mask and ids[i] == BOS):
        return last
    return ((36313 * ids[i]) ^ (27191 * ids[i - 1])) % last


def naive_smear(gate: np.ndarray, x: np.ndarray, ids: list[int], cfg: Config) -> np.ndarray:
    out = np.empty_like(x)
    for i in range(len(x)):
        share = 1 / (1 + np.exp(-gate)) * (not (cfg.smear_bos_mask and ids[i] == BOS))
        out[i] = (1 - share) * x[i] + share * (x[i - 1] if i else 0)
    return out


def naive_logits(p: dict, ids: list[int], cfg: Config) -> np.ndarray:
    """The whole network on one row: (T,) token ids -> (T, V)."""
    x, values, stack = p["tok_emb.weight"][ids], np.zeros((len(ids), 1)), []
    if cfg.bigram_vocab_size:
        rows = p["bigram.embed.weight"][[naive_bucket(ids, i, cfg) for i in range(len(ids))]]
        x = x + p["bigram.scale"] * (rows @ p["bigram.proj.weight"].T)
    x = naive_rms(x)
    x0 = x = naive_smear(p["smear.gate"], x, ids, cfg) if cfg.smear_enabled else x
    value_layers = [int(n) for n in cfg.ve_layers.split(",")] if cfg.ve_enabled else []
    if value_layers:
        values = p["ve_shared.scale"] * (p["ve_shared.embed.weight"][ids]
                                         @ p["ve_shared.proj.weight"].T)
    for layer in range(cfg.num_layers):
        of = {name.removeprefix(f"blocks.{layer}."): value for name, value in p.items()
              if name.startswith(f"blocks.{layer}.")}
        attn, mlp = ({name.removeprefix(part): value for name, value in of.items()}
                     for part in ("attn.", "mlp."))
        if layer >= cfg.num_layers // 2 and stack:
            x = x + p["skip_weights"][layer - cfg.num_layers // 2] * stack.pop()
        extra = values * p[f"ve_layer_scales.{value_layers.index(layer)}"] \
            if layer in value_layers else 0
        scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1
        x = of["resid_mix"][0] * x + of["resid_mix"][1] * x0
        xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        x = x + of["attn_scale"] * naive_attention(attn, scale * naive_rms(x), extra, xsa, cfg)
        x = x + of["mlp_scale"] * naive_mlp(mlp, scale * naive_rms(x), cfg)
        if layer < cfg.num_layers // 2:
            stack.append(x)
    z = naive_rms(x) @ p["tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"].T
    return cfg.logit_softcap * np.tanh(z / cfg.logit_softcap)


# The network against them.


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_is_its_equations(variant: str) -> None:
    cfg = Config(**{**SIZES, **VARIANTS[variant]})
    model, ids = random_model(cfg), random_ids(cfg, rows=2, length=9)
    with torch.no_grad():
        logits = model.logits(model.hidden(ids)).numpy()
    expected = np.stack([naive_logits(arrays(model), row, cfg) for row in ids.tolist()])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_nats_are_the_negative_log_probability_of_each_target() -> None:
    cfg = Config(**SIZES)
    model, ids = random_model(cfg), random_ids(cfg, 2, 7)
    targets = random_ids(cfg, 2, 7, seed=1)
    nats = model(ids, targets).detach().numpy()
    for row in range(2):
        p = np.exp(naive_logits(arrays(model), ids[row].tolist(), cfg))
        expected = [-math.log(p[i, target] / p[i].sum()) for i, target in enumerate(targets[row])]
        np.testing.assert_allclose(nats[row], expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_is_its_equation_for_small_and_large_rows() -> None:
    x = torch.randn(4, 32, dtype=torch.float64) * torch.tensor([[1e-6], [1e-3], [1.0], [1e3]])
    np.testing.assert_allclose(rms_norm(x).numpy(), naive_rms(x.numpy()), rtol=1e-12)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_is_its_equation(heads: tuple[int, int], exclusive: bool) -> None:
    cfg = Config(**{**SIZES, "num_heads": heads[0], "num_kv_heads": heads[1]})
    torch.manual_seed(0)
    attention = train_gpt.Attention(cfg, train_gpt.sdpa_attention, exclusive).double()
    nn.init.normal_(attention.q_gain, mean=1.0)
    h = torch.randn(1, 8, 32, dtype=torch.float64)
    extra_v = torch.randn(1, 8, heads[1] * cfg.head_dim, dtype=torch.float64)
    y = attention(h, rotary_tables(cfg, 8, h.device), extra_v)[0].detach().numpy()
    expected = naive_attention(arrays(attention), h[0].numpy(), extra_v[0].numpy(), exclusive, cfg)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


def test_exclusive_attention_leaves_nothing_along_the_own_value() -> None:
    torch.manual_seed(0)
    y, v = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(2, 5, 3, 8).double()
    kept = train_gpt.ExclusiveSelfAttention()(y, v)
    own = v.repeat_interleave(2, dim=2)
    assert (kept * own).sum(-1).abs().max() < 1e-12
    along = ((y - kept) * own).sum(-1).abs() / ((y - kept).norm(dim=-1) * own.norm(dim=-1))
    torch.testing.assert_close(along, torch.ones_like(along))


def test_rotation_makes_scores_depend_on_distance_alone() -> None:
    cfg = Config(**{**SIZES, "rope_dims": 6})
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 40, 1, 8)
    tables = rotary_tables(cfg, 40, q.device)
    scores = (rotate(q, tables)[0, :, 0] @ rotate(k, tables)[0, :, 0].T).numpy()
    for distance in range(-39, 40):
        np.testing.assert_allclose(np.diag(scores, distance), np.diag(scores, distance)[0],
                                   atol=1e-5)
    assert np.ptp(scores[0]) > 0.1
    turned = rotate(q, tables)
    assert torch.equal(turned[..., 6:], q[..., 6:])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


def test_rows_beyond_the_reference_stretch_the_rotary_base() -> None:
    published = [1.0, 0.28641497, 0.08203354, 0.02349563, 0.0067295, 0.00192743, 0.00055204,
                 0.00015811]
    angles = {length: torch.atan2(*rotary_tables(Config(), length, torch.device("cpu"))[::-1])[1]
              for length in (1024, 2048)}
    np.testing.assert_allclose(angles[2048], published, rtol=1e-4)
    np.testing.assert_allclose(angles[1024], 10000.0 ** -np.arange(0, 1, 1 / 8), rtol=1e-5)


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
    cfg = Config(**{**SIZES, "vocab_size": 65536, "bigram_vocab_size": buckets,
                    "bigram_bos_mask": masked})
    ids = random_ids(cfg, 4, 50)
    expected = [[naive_bucket(row, i, cfg) for i in range(50)] for row in ids.tolist()]
    assert train_gpt.BigramHash(cfg).buckets(ids).tolist() == expected


@pytest.mark.parametrize(("buckets", "expected"), [
    (3072, [0, 2467, 1470, 542, 301, 2736]), (2048, [None, 435, None, 638, 977, 1315]),
    (10240, [None, 2446, None, 6551, 1817, 6776])])
def test_bigram_buckets_are_the_published_ones(buckets: int, expected: list[int | None]) -> None:
    hash_of = train_gpt.BigramHash(Config(bigram_vocab_size=buckets, bigram_bos_mask=False)).buckets
    pairs = torch.tensor([(0, 0), (1, 2), (2, 1), (1, 17), (1023, 1023), (500, 731)])
    first, second = hash_of(pairs).T.tolist()
    assert first == [buckets - 1] * 6
    assert [None if e is None else s for s, e in zip(second, expected, strict=True)] == expected


@pytest.mark.parametrize(("layers", "skips"), [
    (1, {}), (2, {1: 0}), (3, {1: 0}), (10, {5: 4, 6: 3, 7: 2, 8: 1, 9: 0}),
    (11, {5: 4, 6: 3, 7: 2, 8: 1, 9: 0})])
def test_late_layers_take_early_outputs_in_reverse(layers: int, skips: dict[int, int]) -> None:
    """Stand-in blocks put out a unit vector each, so that an input shows what went into it."""
    class Unit(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, x0, rotation, extra_v):
            received[self.layer] = x[0, 0].tolist()
            return torch.eye(32)[self.layer].expand_as(x)

    received: dict[int, list[float]] = {}
    cfg = Config(**{**SIZES, "num_layers": layers, "xsa_last_n": 0, "ve_layers": ""})
    model = GPT(cfg)
    model.blocks = nn.ModuleList(Unit(layer) for layer in range(layers))
    nn.init.constant_(model.skip_weights, 7.0)
    model.hidden(random_ids(cfg, 1, 3))
    for layer in range(1, layers):
        terms = {n: value for n, value in enumerate(received[layer]) if value}
        assert terms == {layer - 1: 1.0} | ({skips[layer]: 7.0 + (skips[layer] == layer - 1)}
                                            if layer in skips else {})


# Properties of the whole.


@pytest.mark.parametrize("length", [2, 7, 33, 65])
def test_no_later_token_changes_an_earlier_logit(length: int) -> None:
    """Row i of a batch differs from the others at position i alone; compared bit for bit."""
    cfg = Config(**{**SIZES, "num_layers": 6, "xsa_last_n": 6, "rope_ntk_ref": 16})
    model, ids = random_model(cfg, dtype=torch.float32), random_ids(cfg, 1, length)
    rows, at = ids.repeat(length, 1), torch.arange(length)
    for new in (BOS, 5):
        changed = rows.clone()
        changed[at, at] = torch.where(ids[0] == new, 7, new)
        with torch.inference_mode():
            before, after = (model.logits(model.hidden(x)) for x in (rows, changed))
        for i in range(length):
            assert torch.equal(before[i, :i], after[i, :i])
            assert not torch.equal(before[i, i], after[i, i])


def test_the_published_system_has_its_published_size() -> None:
    with torch.device("meta"):
        model = GPT(Config(**PRESETS["pr1361"]))
    assert sum(p.numel() for p in model.parameters()) == 27_067_484


def test_before_training_every_token_is_about_equally_likely() -> None:
    """Averaged over all targets there are, so that no sample of text matters."""
    model = full_size()
    with torch.inference_mode():
        log_odds = model.logits(model.hidden(random_ids(model.cfg, 1, 64))).log_softmax(-1)
    assert abs(-log_odds.mean() - math.log(1024)) < 0.02


@pytest.mark.parametrize("variant", ["all", "untied", "2 layers", "3 layers"])
def test_a_gradient_reaches_every_parameter(variant: str) -> None:
    """At once where all is random, and from the third step on where blocks start as identity."""
    cfg = Config(**{**SIZES, **VARIANTS[variant]})
    ids, model = random_ids(cfg, 4, 17), random_model(cfg, dtype=torch.float32)
    for steps in (0, 2):
        for _ in range(steps + 1):
            model.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
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
    assert all(torch.equal(block(x, x0, rotation, None), x) for block in model.blocks)


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
