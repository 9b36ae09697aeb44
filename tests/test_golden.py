"""The published systems' own numbers: network, gradients, grids, optimizer, schedule, routing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import check_golden
import golden_kit
import numpy as np
import pytest
import torch
from test_model import arrays, naive_logits, random_ids, random_model

from train_gpt import (
    GPT,
    PRESETS,
    SINGULAR_VALUE_MAPS,
    Batch,
    BigramHash,
    Config,
    Muon,
    MuonSettings,
    Schedule,
    bits_of,
    build_optimizers,
    decay_scale,
    fake_quantized,
    gptq,
    gptq_simple,
    initialize,
    int8_rows,
    mile_weights,
    orthogonalize,
    qat_grids,
    rotary_tables,
    rotate,
    round_to_nearest,
    route_parameters,
    training_nats,
)

SYSTEMS = ("1361", "703")
TINY = {
    "vocab_size": 128,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 8,
    "bigram_vocab_size": 96,
    "bigram_dim": 24,
    "ve_dim": 16,
}


def numbers(name: str) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file as tensors."""
    return golden_kit.numbers(golden_kit.SYSTEMS, name)


def facts(name: str) -> dict:
    """The contents of a .json file."""
    return golden_kit.facts(golden_kit.SYSTEMS, name)


def published_model(system: str, **changes: object) -> GPT:
    """The small model of the golden numbers, with their weights."""
    model = GPT(Config(**{**PRESETS[f"pr{system}"], **TINY, **changes}))
    model.load_state_dict(
        {
            re.sub("^param(_unbanked)?/", "", key): value
            for key, value in numbers(f"model_{system}").items()
            if key.startswith("param")
        }
    )
    return model


def assert_near(ours: torch.Tensor, published: torch.Tensor, within: float) -> None:
    """Every element is at most `within` away."""
    torch.testing.assert_close(ours.detach(), published, rtol=0, atol=within)


# Model


@pytest.mark.parametrize("system", SYSTEMS)
def test_logits_and_nats(system: str) -> None:
    golden, model = numbers(f"model_{system}"), published_model(system)
    assert_near(model.logits(model.hidden(golden["input_ids"])), golden["logits"], 2e-4)
    assert_near(model(Batch(golden["input_ids"], golden["target_ids"]))[0], golden["nll"], 2e-4)


@pytest.mark.parametrize("system", SYSTEMS)
def test_logits_beyond_the_rotary_reference(system: str) -> None:
    golden, model = numbers(f"model_{system}"), published_model(system, rope_ntk_ref=24)
    logits = model.logits(model.hidden(golden["input_ids"]))
    assert_near(logits, golden["logits_ntk24"], 2e-4)
    assert (golden["logits"] - golden["logits_ntk24"]).abs().max() > 1


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_activation(system: str) -> None:
    """x0 is what each block is given beside the stream, the final norm is `hidden`."""
    golden, model = numbers(f"model_{system}"), published_model(system)
    seen = {}
    for layer, block in enumerate(model.blocks):

        def keep(block, inputs, output, layer=layer):
            stream, second = output
            assert second is None
            seen[f"block_{layer}"], seen["x0"] = stream, inputs[1]

        block.register_forward_hook(keep)
    seen["final_norm"] = model.hidden(golden["input_ids"])
    published = {key.removeprefix("act/"): value for key, value in golden.items() if "act/" in key}
    assert seen.keys() == published.keys()
    for name, value in published.items():
        ours = seen[name][..., :: golden_kit.step_of(golden_kit.SYSTEMS, f"act/{name}"), :]
        assert_near(ours / value.abs().max(), value / value.abs().max(), 2e-5)


@pytest.mark.parametrize(
    ("system", "loss", "qat", "gamma"),
    [
        ("1361", "ce", False, None),
        ("1361", "ce_qat", True, None),
        ("703", "ce", False, None),
        ("703", "ce_qat", True, None),
        ("703", "mile_1.1", False, 1.1),
        ("703", "mile_0.55", False, 0.55),
        ("703", "mile_1.10156", False, 1.1015625),
        ("703", "mile_0.550781", False, 0.55078125),
    ],
)
def test_loss_and_every_gradient(system: str, loss: str, qat: bool, gamma: float | None) -> None:
    golden, model = numbers(f"model_{system}"), published_model(system)
    nats, weights = training_nats(
        model,
        Batch(golden["input_ids"], golden["target_ids"]),
        qat_grids(model) if qat else None,
        None if gamma is None else torch.tensor(gamma),
    )
    mean = (weights * nats).sum() / weights.sum()
    mean.backward()
    assert_near(mean, golden[f"loss/{loss}"], 2e-5)
    gradients = golden_kit.gradients(golden, loss)
    rounded = loss in ("mile_1.10156", "mile_0.550781")  # given without gradients
    assert len(gradients) == (121 if system == "1361" else 0 if rounded else 66)
    for name, (published, is_sums) in gradients.items():
        assert published.any(), name
        ours = model.get_parameter(name).grad
        assert golden_kit.gradient_error(ours, published, is_sums) <= 1e-3, name


def test_mile_weights() -> None:
    golden = numbers("model_703")
    for gamma in ("1.1", "0.55"):
        ours = mile_weights(golden["logits"], torch.tensor(float(gamma)), 0.1)
        assert_near(ours, golden[f"mile_weights/{gamma}"], 1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_weights_that_late_qat_shows(system: str) -> None:
    """On all test matrices, ties and tiny rows included."""
    golden, seen = numbers(f"quant_{system}"), 0
    for key in [key for key in golden if key.startswith("W/")]:
        W = golden[key]
        model = GPT(Config(**{**PRESETS[f"pr{system}"], **TINY}))
        model.bigram.proj.weight = torch.nn.Parameter(W)
        shown = fake_quantized(model, qat_grids(model))["bigram.proj.weight"]
        assert_near(shown, golden[key.replace("W/", "ste/")], 1e-6)
        seen += not torch.equal(shown, W)
    assert seen > 3


@pytest.mark.parametrize("folder", ["golden", "changed", "empty", "other"])
def test_the_checking_script(folder: str, tmp_path: Path, capsys) -> None:
    if folder in ("changed", "other"):
        kept = golden_kit.raw_numbers(golden_kit.SYSTEMS, "model_703")
        if folder == "changed":
            kept["logits"] = kept["logits"] + 1e-3 * np.eye(*kept["logits"].shape[1:])
        else:
            del kept["param_unbanked/smear.gate"]
        np.savez(tmp_path / "model_703.npz", **kept)
    arguments = [] if folder == "golden" else [str(tmp_path)]
    assert check_golden.main(arguments) == {"golden": 0, "changed": 1}.get(folder, 2)
    out, err = capsys.readouterr()
    assert err.count("\n") == (folder in ("empty", "other"))
    assert ("pr703 logits" in out) == (folder in ("golden", "changed"))


@pytest.mark.parametrize("system", ["pr569", "pr334", "pr295"])
def test_the_checking_script_on_the_other_systems(system: str, tmp_path: Path) -> None:
    """With logits of the naive network, and a gradient by finite differences."""
    sizes = {**TINY, "rope_dims": PRESETS[system].get("rope_dims", 8) % 64 or 16}
    sizes["num_layers"] = PRESETS[system].get("num_layers", 11)
    cfg = Config(**{**PRESETS[system], **sizes})
    model, ids = random_model(cfg), random_ids(cfg, 1, 9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)

    def loss() -> tuple[np.ndarray, float]:
        logits = naive_logits(arrays(model), ids[0, :-1].tolist(), cfg)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits, -log_p[np.arange(8), ids[0, 1:].numpy()].mean()

    logits, mean = loss()
    kept = {f"param/{name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    slopes = np.zeros(4)
    for at in range(4):
        q_gain = model.blocks[6].attn.q_gain.data
        for sign in (1, -1):
            q_gain[at] += sign * 1e-4
            slopes[at] += sign * loss()[1] / 2e-4
            q_gain[at] -= sign * 1e-4
    np.savez(
        tmp_path / f"model_{system[2:]}.npz",
        config_json=json.dumps({"constructor": sizes}),
        input_ids=ids[:, :-1].numpy(),
        target_ids=ids[:, 1:].numpy(),
        logits=logits[None],
        **kept,
        **{"loss/ce": mean, "grad/ce/blocks.6.attn.q_gain": slopes},
    )
    assert check_golden.main([str(tmp_path)]) == 0


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("buckets", [96, 1536, 2048, 3072, 10240])
def test_bigram_buckets(buckets: int, system: str) -> None:
    golden = numbers(f"hash_rope_{system}")
    module = BigramHash(Config(bigram_vocab_size=buckets, bigram_bos_mask=False))
    assert torch.equal(module.buckets(golden["hash/tokens"]), golden[f"hash/idx_{buckets}"])


@pytest.mark.parametrize("length", [48, 2048])
def test_rotary_tables(length: int) -> None:
    golden = numbers("hash_rope_1361")
    cos, sin = rotary_tables(Config(), length, torch.device("cpu"))
    for ours, name, sign in ((cos, "cos", 1), (sin, "sin", -1)):  # both halves of the pairs
        published = golden[f"rope/{name}_T{length}"]
        step = golden_kit.step_of(golden_kit.SYSTEMS, f"rope/{name}_T{length}")
        assert_near(ours[::step], torch.cat([published, sign * published], dim=1), 2e-4)


def test_rotary_base_grows_with_the_row() -> None:
    """The second frequency of 8 is base^(-1/8)."""
    for length, base in numbers("hash_rope_1361")["rope/ntk_base_T"].tolist():
        cos, sin = rotary_tables(Config(), int(length), torch.device("cpu"))
        assert float(torch.atan2(sin, cos)[1, 1]) ** -8 == pytest.approx(base, rel=1e-5)


def test_rotation() -> None:
    """Published with 8 of 16 dimensions and the reference at half the row."""
    golden = numbers("hash_rope_1361")
    x = golden["rope/apply_in_BTHd"]
    cfg = Config(**{**PRESETS["pr1361"], **TINY, "rope_ntk_ref": 24})
    tables = rotary_tables(cfg, x.size(1), x.device)
    assert_near(rotate(x, tables), golden["rope/apply_out_BTHd"], 2e-6)


# Initial values


def unbanked(name: str, fact: dict) -> list[tuple[str, dict]]:
    """The matrices that a bank of #703 stacks, with what is known of each slice."""
    first, second = {
        "qo_bank": ("attn.c_q", "attn.proj"),
        "kv_bank": ("attn.c_k", "attn.c_v"),
        "mlp_up_bank": ("mlp.fc", ""),
        "mlp_down_bank": ("mlp.proj", ""),
    }[name]
    return [
        (
            f"blocks.{piece['i'] % 11}.{first if piece['i'] < 11 else second}.weight",
            {**piece, "shape": fact["shape"][1:]},
        )
        for piece in fact["slices"]
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_initial_statistics(system: str) -> None:
    """Constants are equal, random tables have the moments, matrices the extreme singular values."""
    cfg = Config(**PRESETS[f"pr{system}"])
    initialize(model := GPT(cfg), cfg)
    parameters, seen = {name: p.detach() for name, p in model.named_parameters()}, set()
    for key, whole in facts(f"init_{system}")["as_constructed_fp32"].items():
        pieces = unbanked(key, whole) if key.endswith("_bank") else [(key, whole)]
        for name, fact in pieces:
            p = parameters[name]
            seen.add(name)
            assert list(p.shape) == fact["shape"], name
            assert float(p.norm()) == pytest.approx(fact["fro"], rel=0.02), name
            if fact.get("std") == 0.0 or "resid_mix" in name:
                got = [float(f(p)) for f in (torch.min, torch.max, torch.mean)]
                assert got == pytest.approx([fact["min"], fact["max"], fact["mean"]], abs=1e-7)
            if name in (
                "tok_emb.weight",
                "bigram.proj.weight",
                "ve_shared.proj.weight",
                "blocks.3.attn.c_k.weight",
                "blocks.10.mlp.fc.weight",
            ):
                largest, *_, smallest = torch.linalg.svdvals(p).tolist()
                within = 0.02 if name == "tok_emb.weight" else 1e-4
                assert largest == pytest.approx(fact["smax"], rel=within), name
                assert smallest == pytest.approx(fact["smin"], rel=within), name
    assert seen == parameters.keys()


# Optimizers and schedules


@pytest.mark.parametrize(
    ("precision", "step_within", "end_within"), [("fp32", 1e-6, 1e-6), ("bf16", 2e-3, 2e-3)]
)
def test_five_steps_of_muon(precision: str, step_within: float, end_within: float) -> None:
    """All shapes at once; A's five steps are at the momenta of a ramp."""
    golden = numbers("muon_1361")
    meta = json.loads(str(golden_kit.raw_numbers(golden_kit.SYSTEMS, "muon_1361")["meta"]))
    shapes = [key.removeprefix("W0/") for key in golden if key.startswith("W0/")]
    assert len(shapes) == 3
    weights = [torch.nn.Parameter(golden[f"W0/{shape}"].clone()) for shape in shapes]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rule = MuonSettings(muon_backend_steps=meta["ns_steps"])
    muon = Muon([{"params": weights, "weight_decay": meta["wd"]}], rule, dtype)
    for k, momentum in enumerate(meta["A_momentum"]):
        for shape, weight in zip(shapes, weights, strict=True):
            weight.grad = golden[f"G/{k}/{shape}"]
        muon.param_groups[0].update(lr=meta["lr"], momentum=momentum)
        muon.step()
        if k not in (0, 4):
            continue  # the numbers of these steps alone are kept
        for shape, weight in zip(shapes, weights, strict=True):
            at = f"{precision}/A/{k}/{shape}"
            assert_near(weight, golden[f"{at}/W"], end_within if k == 4 else step_within)
            assert_near(muon.state[weight]["momentum"][0][0], golden[f"{at}/M"], 1e-5)


def test_newton_schulz() -> None:
    golden = numbers("muon_1361")
    inputs = [key for key in golden if key.startswith("fp32/") and key.endswith("/ns_in")]
    assert len(inputs) == 3
    for key in inputs:
        published = golden[key.replace("ns_in", "ns_out")]
        assert_near(orthogonalize(golden[key], 5), published, 1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_momentum_ramp(system: str) -> None:
    published, cfg = facts(f"sched_{system}"), Config(**PRESETS[f"pr{system}"])
    for row in published["rows"]:
        assert Schedule(cfg).at(row[0], 0.0).momentum == pytest.approx(row[3], rel=1e-15)
    for step, _, momentum in published["no_cap_rows"]:
        assert Schedule(cfg).at(step, 0.0).momentum == pytest.approx(momentum, rel=1e-15)


@pytest.mark.parametrize("system", SYSTEMS)
def test_warmdown_by_the_clock(system: str) -> None:
    """The published rule, which takes the mean step so far for the step time."""
    iters = Config(**PRESETS[f"pr{system}"]).warmdown_iters
    for step, elapsed_ms, lr_scale, *_ in facts(f"sched_{system}")["rows"]:
        warmdown = iters * elapsed_ms / max(step, 1)
        ours = decay_scale(600_000 - elapsed_ms, warmdown, "linear")
        assert ours == pytest.approx(lr_scale, rel=1e-12)


@pytest.mark.parametrize("system", SYSTEMS)
def test_warmdown_by_steps(system: str) -> None:
    """Rows from the last iteration on are left out: there is no such step, and the published
    script goes back to full rate there."""
    cfg = Config(**PRESETS[f"pr{system}"], max_wallclock_seconds=0.0)
    rows = [row for row in facts(f"sched_{system}")["no_cap_rows"] if row[0] < cfg.iterations]
    assert len(rows) >= 6
    for step, lr_scale, _ in rows:
        assert Schedule(cfg).at(step, 0.0).lr_scale == pytest.approx(lr_scale, rel=1e-12)


def test_mile_gamma_follows_the_rate() -> None:
    """A step-driven run that decays from its first step on passes every published scale."""
    cfg = Config(
        **PRESETS["pr703"] | {"iterations": 1000, "warmdown_iters": 1000}, max_wallclock_seconds=0.0
    )
    for scale, gamma, _ in facts("sched_703")["mile_gamma_of_scale"]:
        moment = Schedule(cfg).at(round(1000 * (1 - scale)), 0.0)
        assert moment.lr_scale == pytest.approx(scale, abs=1e-12)
        assert moment.mile_gamma == pytest.approx(gamma, abs=1e-6)


@pytest.mark.parametrize("system", SYSTEMS)
def test_optimizer_of_every_parameter(system: str) -> None:
    with torch.device("meta"):
        model = GPT(Config(**PRESETS[f"pr{system}"]))
    published = facts(f"optgroups_{system}")
    assert not published["in_no_optimizer"]
    expected = {
        name: (group["opt"].lower().removesuffix("w"), group["lr"], group["weight_decay"])
        for group in published["groups"]
        for name in group["params"]
    }
    banks = {name: expected.pop(name) for name in list(expected) if name.endswith("_bank")}
    matrices = [
        name
        for name, p in model.named_parameters()
        if name.startswith("blocks") and p.ndim == 2 and "resid_mix" not in name
    ]
    if banks:
        assert len(set(banks.values())) == 1
        expected |= dict.fromkeys(matrices, banks["qo_bank"])
    ours = {
        name: (group["optimizer"], group["base_lr"], group["weight_decay"])
        for group in route_parameters(model.cfg, model)
        for name in group["names"]
    }
    assert ours == expected


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_five_steps_of_muon_of_1855(precision: str, within: float) -> None:
    """Rows normed, Polar Express; rate and momentum change from step to step."""
    golden = golden_kit.numbers(golden_kit.PR1855, "muon")
    meta = json.loads(str(golden_kit.raw_numbers(golden_kit.PR1855, "muon")["meta"]))
    cfg = Config(**PRESETS["pr1855"])
    banks = list(meta["scale"])
    weights = {
        bank: [torch.nn.Parameter(W.clone()) for W in golden[f"W0/{bank}"]] for bank in banks
    }
    group = {"params": sum(weights.values(), []), "weight_decay": cfg.muon_wd}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    muon = Muon([group], cfg, dtype)
    for k, (lr, momentum) in enumerate(zip(meta["lr"], meta["momentum"], strict=True)):
        for bank in banks:
            for weight, gradient in zip(weights[bank], golden[f"G/{k}/{bank}"], strict=True):
                weight.grad = gradient.float()
        muon.param_groups[0].update(lr=lr, momentum=momentum)
        muon.step()
        if k not in (0, 4):
            continue  # the numbers of these steps alone are kept
        for bank in banks:
            at = f"{precision}/{k}/{bank}"
            kept = muon.state[weights[bank][0]]["momentum"][0]
            assert_near(torch.stack(list(weights[bank])), golden[f"{at}/W"], within)
            assert_near(kept, golden[f"{at}/M"], 1e-6 if precision == "fp32" else 1e-2)


def test_polar_express() -> None:
    """Its values, its product, and what it makes of single values."""
    meta = json.loads(str(golden_kit.raw_numbers(golden_kit.PR1855, "muon")["meta"]))
    assert [list(row) for row in SINGULAR_VALUE_MAPS["polar"]] == meta["polar_express"]
    golden = golden_kit.numbers(golden_kit.PR1855, "muon")
    inputs = [key for key in golden if key.startswith("fp32/") and key.endswith("/ns_in")]
    assert len(inputs) == 8
    for key in inputs:
        published = golden[key.replace("ns_in", "ns_out")]
        assert_near(orthogonalize(golden[key], 5, "polar"), published, 1e-5)
    for given, made in meta["singular_value_map_after_frobenius"]:
        rest = (1.0 - given**2) ** 0.5
        values = orthogonalize(torch.diag(torch.tensor([given, rest])), 5, "polar").diag()
        assert values[0] == pytest.approx(made, rel=1e-3)


def test_rates_and_momentum_of_1855() -> None:
    published = golden_kit.facts(golden_kit.PR1855, "schedule_loops_groups")
    cfg = Config(**PRESETS["pr1855"])
    assert cfg.max_wallclock_seconds == 600.0
    schedule = Schedule(cfg, reserve=0.5)
    for row in published["schedule_wallclock_600s_reserve_0_5"]:
        moment = schedule.at(row["step"], row["elapsed_ms"] / 1000)
        assert moment.lr_scale == pytest.approx(row["lr_mul"], rel=1e-12), row
        assert moment.momentum == pytest.approx(row["muon_momentum"], rel=1e-15), row
        assert moment.looping == row["looping"], row
    schedule = Schedule(Config(**PRESETS["pr1855"], max_wallclock_seconds=0.0, iterations=20000))
    for row in published["schedule_step_driven_20000"]:
        assert schedule.at(row["step"], 0.0).lr_scale == pytest.approx(row["lr_mul"], rel=1e-12)


def test_optimizer_groups_of_1855() -> None:
    published = {
        group["optimizer"]: group
        for group in golden_kit.facts(golden_kit.PR1855, "schedule_loops_groups")[
            "optimizer_groups"
        ]
    }
    cfg = Config(**PRESETS["pr1855"])
    with torch.device("meta"):
        model = GPT(cfg)
    of_kind = {"token table": "tok", "attention matrix": "muon", "mlp matrix": "muon"}
    groups = route_parameters(cfg, model)
    for group in groups:
        for name in group["names"]:
            group_there = published[of_kind.get(model.kinds[name].name, "scalar")]
            assert group["base_lr"] == group_there["lr"], name
            assert group["weight_decay"] == group_there["weight_decay"], name
            assert (group["optimizer"] == "muon") == (group_there["optimizer"] == "muon"), name
    adam, muon = build_optimizers(cfg, groups, torch.float32)
    assert {tuple(group["betas"]) for group in adam.param_groups} == {(0.9, 0.99)}
    assert cfg.muon_momentum == published["muon"]["momentum"]


# Quantization


@pytest.mark.parametrize(
    ("scheme", "quantizer"),
    [("int6_percentile", lambda W: round_to_nearest(W, 6, Config())), ("int8", int8_rows)],
)
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
@pytest.mark.parametrize(("system", "solver"), [("703", gptq), ("1361", gptq_simple)])
def test_gptq_integers_and_scales(problem: str, system: str, solver: Callable) -> None:
    golden = numbers(f"quant_{system}")
    ours = solver(golden[f"gptq/{problem}/W"], golden[f"gptq/{problem}/H"], 6, Config())
    assert torch.equal(ours.values, golden[f"gptq/{problem}/direct/q"])
    assert torch.equal(ours.scale, golden[f"gptq/{problem}/direct/scale"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_storage_of_every_parameter(system: str) -> None:
    with torch.device("meta"):
        model = GPT(Config(**PRESETS[f"pr{system}"]))
    published = {
        name: 0 if str(kept["meta"]).startswith("passthrough") else int(kept["meta"]["type"][3:])
        for name, kept in facts(f"init_{system}")["export_category"].items()
    }
    assert set(published.values()) == {0, 6, 8}
    ours = {name: bits_of(model, name) for name in model.kinds}
    assert ours == published


# The pack


def test_a_pack_gives_back_what_was_packed(tmp_path: Path) -> None:
    """All but matrices' gradients, which it keeps as sums, and activations, which it thins."""
    rng = np.random.default_rng(1)
    bank, square = rng.standard_normal((3, 20, 30)), rng.standard_normal((20, 20))
    kept = {
        "param/a": bank.astype(np.float16),
        "grad/ce/a": bank.astype(np.float32),
        "grad/ce/b": square[0],
        "H/a": (square @ square.T).astype(np.float32),
        "act/x0": bank,
        "ids": np.arange(7, dtype=np.int16),
        "q": rng.integers(-31, 32, (20, 20)).astype(np.int8),
        "scalar": np.float32(0.3),
    }
    (tmp_path / "kit").mkdir()
    np.savez(tmp_path / "kit" / "some.npz", **kept)
    (tmp_path / "kit" / "more.json").write_text('{"x": [1.5]}')
    golden_kit.pack(tmp_path / "kit", tmp_path / "packed")
    read = golden_kit.raw_numbers(tmp_path / "packed", "some")
    for name in kept.keys() - {"grad/ce/a", "act/x0"}:
        np.testing.assert_array_equal(read[name], kept[name], strict=True)
    np.testing.assert_array_equal(read["act/x0"], bank[:, ::6])
    assert golden_kit.facts(tmp_path / "packed", "more") == {"x": [1.5]}
    published, is_sums = golden_kit.gradients(
        golden_kit.numbers(tmp_path / "packed", "some"), "ce"
    )["a"]
    ours = torch.from_numpy(kept["grad/ce/a"])
    assert is_sums
    assert golden_kit.gradient_error(ours, published, is_sums) < 1e-6
    for at in np.ndindex(3, 20, 30):  # one wrong element is seen wherever it is
        wrong = ours.clone()
        wrong[at] += 2e-3 * ours.abs().max()
        assert golden_kit.gradient_error(wrong, published, is_sums) > 1e-3
    transposed = ours.clone()
    transposed[1, :20, :20] = ours[1, :20, :20].T
    assert golden_kit.gradient_error(transposed, published, is_sums) > 1e-2
