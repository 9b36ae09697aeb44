"""Every choice together with every other: a pairwise cover of the settings, at tiny size."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from conftest import VOCAB_SIZE, TinyData
from test_model import random_ids

from train_gpt import (
    GPT,
    Batch,
    Config,
    Moment,
    Run,
    TrainingRows,
    artifact_header,
    build_optimizers,
    collect_hessians,
    decode_artifact,
    encode_artifact,
    initialize,
    load_validation,
    qat_grids,
    quantize,
    rebuild_model,
    route_parameters,
    train_step,
    training_nats,
)

SIZES = {
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "bigram_dim": 12,
    "ve_dim": 8,
    "ve_layers": "1,0",
    "train_seq_len": 16,
    "train_batch_tokens": 64,
    "iterations": 4,
    "max_wallclock_seconds": 0.0,
    "eval_seq_len": 16,
    "eval_stride": 0,
    "cache_layer": 0,
    "gptq_block_size": 8,
    "vocab_size": VOCAB_SIZE,
}
CHOICES = {
    "num_layers": (3, 4, 5),
    "mlp_act": ("leaky2", "relu2"),
    "vrl_mode": ("off", "add", "mix"),
    "backout_mode": ("none", "mid", "cache"),
    "skip_per_dim": ("1", "0", "off"),
    "ln_scale": ("1", "0", "learned"),
    "bigram_vocab_size": (48, 0),
    "bigram_hash": ("xor", "sum"),
    "bigram_init": ("zero_embed", "zero_proj"),
    "smear_enabled": (True, False),
    "smear_bos_mask": (True, False),
    "bigram_bos_mask": (True, False),
    "ve_enabled": (True, False),
    "xsa_last_n": (2, 1, 0),
    "rope_dims": (4, 0),
    "rope_ntk_ref": (8, 0),
    "tie_embeddings": (True, False),
    "proj_init": ("zero", "ortho_mup"),
    "emb_svd_init": (False, True),
    "resid_mix_init": ("identity", "phase"),
    "qat_mode": ("late", "always", "off"),
    "qat_clip": ("absmax", "quantile"),
    "qat_targets": ("stored", "linears", "aux"),
    "bits": (
        "mlp:6,attn:6,emb:8,aux:8",
        "mlp:5,attn:6,emb:fp16,aux:6,blocks.1.attn.c_k:fp16",
        "mlp:fp16,attn:4,emb:7,aux:fp16",
    ),
    "int8_keep_float_max_numel": (300, 0),
    "q_scale_floor": ("inv_clip", "tiny"),
    "clip_search": ("matrix", "row", "absmax"),
    "gptq_variant": ("full", "simple", "off"),
    "gptq_actorder": (True, False),
    "gptq_select": ("mse", "hessian"),
    "prune_frac": (0.0, 0.3),
    "prune_pct": (0.0, 0.2),
    "codec": ("zstd", "lzma", "best"),
    "optimizer_routing": ("standard", "banks", "by_ndim"),
    "muon_quant_momentum": (False, True),
    "muon_wd_order": ("before", "after"),
    "mile_gamma": (0.0, 1.1),
    "clip_before_reduce": (False, True),
    "loader": ("shuffled", "sequential"),
}


def pairs_of(combination: dict) -> set[tuple]:
    """Every two choices of a combination."""
    return set(itertools.combinations(sorted((n, str(v)) for n, v in combination.items()), 2))


def pairwise_cover(seed: int = 0) -> list[dict]:
    """Combinations that hold every two choices of different settings at least once.

    Each is grown greedily from a pair that is still missing.
    """
    rng = random.Random(seed)
    missing = set().union(
        *(
            pairs_of({a: x, b: y})
            for a, b in itertools.combinations(CHOICES, 2)
            for x in CHOICES[a]
            for y in CHOICES[b]
        )
    )
    values = {(name, str(value)): value for name in CHOICES for value in CHOICES[name]}
    cover = []
    while missing:
        combination = {name: values[name, text] for name, text in min(missing)}
        names = [name for name in CHOICES if name not in combination]
        rng.shuffle(names)
        for name in names:
            gains = [
                len(
                    missing
                    & {
                        tuple(sorted(((name, str(value)), (n, str(v)))))
                        for n, v in combination.items()
                    }
                )
                + rng.random()
                for value in CHOICES[name]
            ]
            combination[name] = CHOICES[name][gains.index(max(gains))]
        missing -= pairs_of(combination)
        cover.append(combination)
    return cover


def at_random(count: int, seed: int) -> list[dict]:
    """Random combinations."""
    rng = random.Random(seed)
    return [{name: rng.choice(values) for name, values in CHOICES.items()} for _ in range(count)]


COVER = pairwise_cover()


def test_the_cover_holds_every_pair() -> None:
    covered = set().union(*map(pairs_of, COVER))
    for a, b in itertools.combinations(CHOICES, 2):
        for x, y in itertools.product(CHOICES[a], CHOICES[b]):
            assert tuple(sorted(((a, str(x)), (b, str(y))))) in covered
    assert len(COVER) < 100


def check(combination: dict, data: TinyData) -> None:
    """Initialise, train, look at loss, gradients and causality, export and read back."""
    torch.manual_seed(0)
    cfg = Config(
        **SIZES,
        **combination,
        data_path=str(data.data_path),
        tokenizer_path=str(data.tokenizer_path),
    )
    rows, run = TrainingRows(cfg), Run(cfg, 0, 1, torch.device("cpu"))
    model = GPT(cfg)
    initialize(model, cfg)
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), torch.float32)
    moment = Moment(1.0, 0.9, cfg.qat_mode != "off", False, cfg.mile_gamma)
    for step in range(2):
        stats = train_step(training_nats, model, optimizers, rows, step, moment, run)
        assert stats.isfinite().all()
        assert 1 < stats[0] < 9
    with torch.no_grad():  # nothing hides behind its initial value
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    ids = random_ids(cfg, 3, 17)
    gamma = torch.tensor(cfg.mile_gamma) if cfg.mile_gamma else None
    nats, weights = training_nats(
        model, Batch(ids[:, :-1], ids[:, 1:]), qat_grids(model) if moment.qat else None, gamma
    )
    (nats * weights).mean().backward()
    silent = [
        name
        for name, p in model.named_parameters()
        if p.numel() and (p.grad is None or not p.grad.any())
    ]
    assert not silent
    with torch.no_grad():
        changed = ids.clone()
        changed[:, 12:] = (changed[:, 12:] + 5) % VOCAB_SIZE
        before, after = (model.logits(model.hidden(x)) for x in (ids, changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])
    hessians = (
        {}
        if cfg.gptq_variant == "off"
        else collect_hessians(model, lambda n: rows.batch(8 * n, 8).input_ids, 2, float("inf"), run)
    )
    stored = quantize(model, hessians, run)
    header = artifact_header(cfg, load_validation(cfg))
    settings, read = decode_artifact(encode_artifact(header, stored, cfg.codec))
    twin = rebuild_model(Config.from_env(settings["settings"])[0], read, run)
    for name, p in twin.named_parameters():
        assert torch.equal(p, stored[name].restore()), name
        kept = model.get_parameter(name).detach()
        assert (p - kept).norm() <= 0.9 * kept.norm() + 1e-6, name
    with torch.no_grad():
        assert twin(Batch(ids[:, :-1], ids[:, 1:]))[0].isfinite().all()


@pytest.mark.parametrize("number", range(len(COVER)))
def test_choices_compose_in_pairs(number: int, tiny_data: TinyData) -> None:
    check(COVER[number], tiny_data)


@pytest.mark.parametrize(
    "number", [*range(75), *(pytest.param(n, marks=pytest.mark.slow) for n in range(75, 600))]
)
def test_choices_compose_at_random(number: int, tiny_data: TinyData) -> None:
    check(at_random(1, seed=number)[0], tiny_data)
