"""The published systems' own numbers: network, gradients, grids, optimizer, schedule, routing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import full_size

from train_gpt import (
    GPT,
    PRESETS,
    BigramHash,
    Config,
    Muon,
    Schedule,
    bits_of,
    decay_scale,
    gptq,
    int8_rows,
    orthogonalize,
    rotary_tables,
    rotate,
    round_to_nearest,
    route_parameters,
    training_nats,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers in {GOLDEN}")

# The published late QAT sees every linear at 6 bits, however small.
SMALL = {**PRESETS["pr1361"], "vocab_size": 128, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2,
         "rope_dims": 8, "bigram_vocab_size": 96, "bigram_dim": 24, "ve_dim": 16,
         "int8_keep_float_max_numel": 0, "bits": "mlp:6,attn:6,emb:8,aux:6"}


@functools.cache
def numbers(name: str) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files
                if arrays[key].dtype.kind != "U"}


@functools.cache
def facts(name: str) -> dict:
    """The contents of a .json file."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def published_model(**changes: object) -> GPT:
    """The small model of the golden numbers, with their weights."""
    model = GPT(Config(**{**SMALL, **changes}))
    model.load_state_dict({key.removeprefix("param/"): value
                           for key, value in numbers("model_1361").items() if "param/" in key})
    return model


def assert_near(ours: torch.Tensor, published: torch.Tensor, within: float) -> None:
    """Every element is at most `within` away."""
    torch.testing.assert_close(ours.detach(), published, rtol=0, atol=within)


# Model


def test_logits_and_nats() -> None:
    golden, model = numbers("model_1361"), published_model()
    assert_near(model.logits(model.hidden(golden["input_ids"])), golden["logits"], 2e-4)
    assert_near(model(golden["input_ids"], golden["target_ids"]), golden["nll"], 2e-4)


def test_logits_beyond_the_rotary_reference() -> None:
    golden, model = numbers("model_1361"), published_model(rope_ntk_ref=24)
    logits = model.logits(model.hidden(golden["input_ids"]))
    assert_near(logits, golden["logits_ntk24"], 2e-4)
    assert (golden["logits"] - golden["logits_ntk24"]).abs().max() > 1


def test_every_activation() -> None:
    """x0 is what each block is given beside the stream, the final norm is `hidden`."""
    golden, model = numbers("model_1361"), published_model()
    seen = {}
    for layer, block in enumerate(model.blocks):
        def keep(block, inputs, output, layer=layer):
            seen[f"block_{layer}"], seen["x0"] = output, inputs[1]
        block.register_forward_hook(keep)
    seen["final_norm"] = model.hidden(golden["input_ids"])
    published = {key.removeprefix("act/"): value for key, value in golden.items() if "act/" in key}
    assert seen.keys() == published.keys()
    for name, value in published.items():
        assert_near(seen[name] / value.abs().max(), value / value.abs().max(), 2e-5)


@pytest.mark.parametrize(("loss", "qat"), [("ce", False), ("ce_qat", True)])
def test_loss_and_every_gradient(loss: str, qat: bool) -> None:
    golden, model = numbers("model_1361"), published_model()
    mean = training_nats(model, golden["input_ids"], golden["target_ids"], qat).mean()
    mean.backward()
    assert_near(mean, golden[f"loss/{loss}"], 2e-5)
    for name, parameter in model.named_parameters():
        published = golden[f"grad/{loss}/{name}"]
        assert published.any(), name
        assert_near(parameter.grad, published, 1e-3 * float(published.abs().max()))


@pytest.mark.parametrize("buckets", [96, 1536, 2048, 3072, 10240])
def test_bigram_buckets(buckets: int) -> None:
    golden = numbers("hash_rope_1361")
    module = BigramHash(Config(bigram_vocab_size=buckets, bigram_bos_mask=False))
    assert torch.equal(module.buckets(golden["hash/tokens"]), golden[f"hash/idx_{buckets}"])


@pytest.mark.parametrize("length", [48, 2048])
def test_rotary_tables(length: int) -> None:
    golden = numbers("hash_rope_1361")
    cos, sin = rotary_tables(Config(), length, torch.device("cpu"))
    assert_near(cos, golden[f"rope/cos_T{length}"], 2e-4)
    assert_near(sin, golden[f"rope/sin_T{length}"], 2e-4)


def test_rotary_base_grows_with_the_row() -> None:
    """The second frequency of 8 is base^(-1/8)."""
    for length, base in numbers("hash_rope_1361")["rope/ntk_base_T"].tolist():
        cos, sin = rotary_tables(Config(), int(length), torch.device("cpu"))
        assert float(torch.atan2(sin, cos)[1, 1]) ** -8 == pytest.approx(base, rel=1e-5)


def test_rotation() -> None:
    """Published with 8 of 16 dimensions and the reference at half the row."""
    golden = numbers("hash_rope_1361")
    x = golden["rope/apply_in_BTHd"]
    tables = rotary_tables(Config(**SMALL | {"rope_ntk_ref": 24}), x.size(1), x.device)
    assert_near(rotate(x, tables), golden["rope/apply_out_BTHd"], 2e-6)


# Initial values


def test_initial_statistics() -> None:
    """Constants are equal, random tables have the moments, matrices the extreme singular values."""
    published, model = facts("init_1361")["as_constructed_fp32"], full_size()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == published.keys()
    for name, fact in published.items():
        p = parameters[name].detach()
        assert list(p.shape) == fact["shape"], name
        if fact["std"] == 0.0 or "resid_mix" in name:
            got = [float(f(p)) for f in (torch.min, torch.max, torch.mean)]
            assert got == pytest.approx([fact["min"], fact["max"], fact["mean"]], abs=1e-7), name
        else:
            assert float(p.std()) == pytest.approx(fact["std"], rel=0.02), name
            assert float(p.norm()) == pytest.approx(fact["fro"], rel=0.02), name
    for name in ("tok_emb.weight", "bigram.proj.weight", "ve_shared.proj.weight",
                 "blocks.3.attn.c_k.weight", "blocks.10.mlp.fc.weight"):
        largest, *_, smallest = torch.linalg.svdvals(parameters[name].detach()).tolist()
        within = 0.02 if name == "tok_emb.weight" else 1e-4
        assert largest == pytest.approx(published[name]["smax"], rel=within), name
        assert smallest == pytest.approx(published[name]["smin"], rel=within), name


# Optimizers and schedules


@pytest.mark.parametrize(("precision", "step_within", "end_within"),
                         [("fp32", 1e-6, 1e-6), ("bf16", 2e-3, 2e-3)])
def test_five_steps_of_muon(precision: str, step_within: float, end_within: float) -> None:
    """All shapes at once; A's five steps are at the momenta of a ramp."""
    golden = numbers("muon_1361")
    with np.load(GOLDEN / "muon_1361.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
    shapes = [f"{rows}x{cols}" for rows, cols in meta["shapes"]]
    weights = [torch.nn.Parameter(golden[f"W0/{shape}"].clone()) for shape in shapes]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    muon = Muon([{"params": weights, "weight_decay": meta["wd"]}], meta["ns_steps"], dtype)
    for k, momentum in enumerate(meta["A_momentum"]):
        for shape, weight in zip(shapes, weights, strict=True):
            weight.grad = golden[f"G/{k}/{shape}"]
        muon.param_groups[0].update(lr=meta["lr"], momentum=momentum)
        muon.step()
        for shape, weight in zip(shapes, weights, strict=True):
            at = f"{precision}/A/{k}/{shape}"
            assert_near(weight, golden[f"{at}/W"], end_within if k == 4 else step_within)
            assert_near(muon.state[weight]["momentum"][0], golden[f"{at}/M"], 1e-5)


def test_newton_schulz() -> None:
    golden = numbers("muon_1361")
    for key in [key for key in golden if key.startswith("fp32/") and key.endswith("/ns_in")]:
        published = golden[key.replace("ns_in", "ns_out")]
        assert_near(orthogonalize(golden[key], 5), published, 1e-5)


def test_momentum_ramp() -> None:
    published, cfg = facts("sched_1361"), Config(**PRESETS["pr1361"])
    for step, *_, momentum in (*published["rows"], *published["no_cap_rows"]):
        assert Schedule(cfg).at(step, 0.0).momentum == pytest.approx(momentum, rel=1e-15)


def test_warmdown_by_the_clock() -> None:
    """The published rule, which takes the mean step so far for the step time."""
    for step, elapsed_ms, lr_scale, _ in facts("sched_1361")["rows"]:
        warmdown = 3200 * elapsed_ms / max(step, 1)
        ours = decay_scale(600_000 - elapsed_ms, warmdown, "linear")
        assert ours == pytest.approx(lr_scale, rel=1e-12)


def test_warmdown_by_steps() -> None:
    """Rows from the last iteration on are left out: there is no such step, and the published
    script goes back to full rate there."""
    cfg = Config(**PRESETS["pr1361"], max_wallclock_seconds=0.0)
    rows = [row for row in facts("sched_1361")["no_cap_rows"] if row[0] < cfg.iterations]
    assert len(rows) == 6
    for step, lr_scale, _ in rows:
        assert Schedule(cfg).at(step, 0.0).lr_scale == pytest.approx(lr_scale, rel=1e-12)


def test_optimizer_of_every_parameter() -> None:
    with torch.device("meta"):
        model = GPT(Config(**PRESETS["pr1361"]))
    published = facts("optgroups_1361")
    assert not published["in_no_optimizer"]
    expected = {name: (group["opt"].lower().removesuffix("w"), group["lr"], group["weight_decay"])
                for group in published["groups"] for name in group["params"]}
    ours = {name: (group["optimizer"], group["base_lr"], group["weight_decay"])
            for group in route_parameters(model.cfg, model) for name in group["names"]}
    assert ours == expected


# Quantization


@pytest.mark.parametrize(("scheme", "quantizer"), [
    ("int6_percentile", lambda W: round_to_nearest(W, 6)), ("int8", int8_rows)])
@pytest.mark.parametrize("system", ["1361", "703"])
def test_nearest_integers_and_scales(system: str, scheme: str, quantizer: Callable) -> None:
    golden = numbers(f"quant_{system}")
    names = [key.split("/")[1] for key in golden if key.startswith("W/")]
    assert len(names) == 7
    for name in names:
        ours = quantizer(golden[f"W/{name}"])
        assert torch.equal(ours.values, golden[f"{scheme}/{name}/q"]), name
        assert torch.equal(ours.scale, golden[f"{scheme}/{name}/scale"]), name


@pytest.mark.parametrize("problem", ["w96x64", "w96x64_small", "w48x300", "dead_cols"])
def test_full_gptq_integers_and_scales(problem: str) -> None:
    golden = numbers("quant_703")
    ours = gptq(golden[f"gptq/{problem}/W"], golden[f"gptq/{problem}/H"], bits=6, block=128)
    assert torch.equal(ours.values, golden[f"gptq/{problem}/direct/q"])
    assert torch.equal(ours.scale, golden[f"gptq/{problem}/direct/scale"])


def test_storage_of_every_parameter() -> None:
    with torch.device("meta"):
        model = GPT(Config(**PRESETS["pr1361"]))
    published = {name: 0 if kept["meta"] == "passthrough" else int(kept["meta"]["type"][3:])
                 for name, kept in facts("init_1361")["export_category"].items()}
    assert set(published.values()) == {0, 6, 8}
    ours = {name: bits_of(model.cfg, name, p) for name, p in model.named_parameters()}
    assert ours == published
