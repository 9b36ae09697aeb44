"""Steps by deviation, corrections of low rank, protected columns: published, naive, in a run."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import golden_kit
import numpy as np
import pytest
import torch
from conftest import ROOT, TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import environment, events, tiny_job
from torch import Tensor

import train_gpt
from train_gpt import GPT, Config, Stored, gate_rows, gptq

sys.path.insert(0, str(ROOT / "benchmarks"))
import packing  # noqa: E402

BANKS = {
    "attn.c_q": ("qo_bank", 0),
    "attn.proj": ("qo_bank", 11),
    "attn.c_k": ("kv_bank", 0),
    "attn.c_v": ("kv_bank", 11),
    "mlp.fc": ("mlp_up_bank", 0),
    "mlp.proj": ("mlp_down_bank", 0),
}


def golden(archive: str, key: str) -> Tensor:
    """An array of the golden numbers."""
    return golden_kit.numbers(golden_kit.PR1855, archive)[key]


def golden_weight(name: str) -> Tensor:
    """The float weight that a golden quantised matrix stands for."""
    if name.startswith("tok_emb"):
        return golden("model", f"param/{name}").float()
    _, layer, *place, _ = name.split(".")
    bank, offset = BANKS[".".join(place)]
    return golden("model", f"param/{bank}")[offset + int(layer)].float()


PUBLISHED = Config(quant_clip="std_published")


def published_integers(W: Tensor, H: Tensor, bits: int, sigmas: float) -> tuple[Tensor, Tensor]:
    """Integers and scales in the published form."""
    made = gptq(W, H, bits, PUBLISHED, sigmas)
    return made.values, made.scale


# The published numbers


@pytest.mark.parametrize(
    "case, bits, sigmas", [("int6_k11.5", 6, 11.5), ("int7_k14", 7, 14), ("int6_k2_clips", 6, 2)]
)
def test_gptq_gives_the_published_integers_with_a_dead_column(case, bits, sigmas) -> None:
    W, H = golden("quant", "case/W"), golden("quant", "case/H")
    q, scales = published_integers(W, H, bits, sigmas)
    assert torch.equal(scales, golden("quant", f"case/{case}/scale"))
    assert torch.equal(q, golden("quant", f"case/{case}/q"))


@pytest.mark.parametrize("layer", [4, 8])
@pytest.mark.parametrize("place", ["attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc"])
def test_gptq_gives_the_published_integers_of_a_model(layer, place) -> None:
    name = f"blocks.{layer}.{place}.weight"
    source = name.replace("c_k", "c_q").replace("c_v", "c_q")
    sigmas = 11.5 if "mlp" in place else 13.0
    H = golden("quant", f"H/{source}")
    q, scales = published_integers(golden_weight(name), H, 6, sigmas)
    assert torch.equal(scales, golden("quant", f"stored/{name}.scale"))
    assert torch.equal(q, golden("quant", f"stored/{name}.q"))


def test_the_embedding_goes_through_gptq_at_seven_bits_and_gates_to_int8_rows() -> None:
    name = "tok_emb.weight"
    q, scales = published_integers(golden_weight(name), golden("quant", f"H/{name}"), 7, 14.0)
    assert torch.equal(scales, golden("quant", f"stored/{name}.scale"))
    assert torch.equal(q, golden("quant", f"stored/{name}.q"))
    gates = gate_rows(golden("quant", "gate/W"))
    assert torch.equal(gates.values, golden("quant", "gate/q"))
    assert torch.equal(gates.scale, golden("quant", "gate/scale"))


@pytest.mark.parametrize("group", [64, 32])
def test_lqer_has_the_published_integers(group: int) -> None:
    A, B = golden("quant", "lqer/A"), golden("quant", "lqer/B")
    made = train_gpt.quantize_factors(A, B, group)
    for value, key in (
        (made.left, "qA"),
        (made.left_scale, "sA"),
        (made.right, "qB"),
        (made.right_scales, "sB"),
    ):
        assert torch.equal(value, golden("quant", f"lqer/g{group}/{key}"))
    E = golden("quant", "lqer/E")
    case = golden_kit.facts(golden_kit.PR1855, "quant")["cases"][f"lqer_g{group}"]
    error = E - train_gpt.low_rank_correction(E, 4, group).product()
    assert float(error.norm()) == pytest.approx(case["err_after"], abs=1e-6)


def test_lqer_corrects_the_published_matrices_to_the_published_error() -> None:
    facts = golden_kit.facts(golden_kit.PR1855, "quant")
    top = [name for name, _ in facts["top6_error"]]
    errors = {}
    for name in top:
        q, scale = (golden("quant", f"stored/{name}.{part}") for part in ("q", "scale"))
        errors[name] = golden_weight(name) - q.float() * scale.float()[:, None]
    assert train_gpt.largest_errors(errors, 6) == top
    for name in top[:3]:
        made = train_gpt.low_rank_correction(errors[name], 4, 64)
        A, A_scale, B, B_scales = (
            golden("quant", f"stored/{name}.lq{key}_a") for key in ("A", "As", "B", "Bs")
        )
        published = train_gpt.LowRank(A, B, A_scale, B_scales, 64)
        assert torch.allclose(made.product(), published.product(), atol=1e-5)
        left = float((errors[name] - made.product()).norm())
        assert left == pytest.approx(facts["error_norm_final"][name], rel=1e-5)


def test_awq_lite_protects_the_published_group() -> None:
    archive = "awq_lite_1945"
    W, H, rms = (golden(archive, key) for key in ("W", "H", "act_rms"))
    name, group = train_gpt.protected_group({"small": W / 99, "w": W}, {"small": rms, "w": rms}, 16)
    assert (name, group.start, group.stop - group.start) == ("w", int(golden(archive, "start")), 16)
    made = gptq(W, H, 7, PUBLISHED, 14.0, group)
    assert torch.equal(made.values, golden(archive, "q"))
    assert torch.equal(made.protected.scale, golden(archive, "scale_hi"))
    assert torch.equal(published_integers(W, H, 7, 14.0)[0], golden(archive, "q_without"))


def naive_gptq(W: np.ndarray, H: np.ndarray, steps: np.ndarray, top: int) -> np.ndarray:
    """GPTQ by its definition, one weight at a time, in float64: OBQ in a fixed order.

    After a column is rounded, the columns left take the update that is best for them, with the
    inverse of their part of H computed anew.
    """
    W, q = W.astype(np.float64), np.zeros(W.shape)
    H = H + 0.01 * H.diagonal().mean() * np.eye(len(H))
    order = np.argsort(-H.diagonal(), kind="stable")
    for at, j in enumerate(order):
        left = order[at:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        q[:, j] = np.clip(np.rint(W[:, j] / steps), -top, top)
        error = (W[:, j] - q[:, j] * steps) / inverse[0, 0]
        W[:, left] -= np.outer(error, inverse[0])
    return q


def test_a_single_column_has_a_grid_though_it_has_no_deviation() -> None:
    W = torch.tensor([[0.7], [-2.0], [0.0]])
    (*_, scales) = train_gpt.clip_candidates(W, 6, PUBLISHED, sigmas=9.0)
    rounded = torch.round(W / scales[:, None])
    assert rounded.abs().max() <= 31
    assert ((rounded * scales[:, None] - W).abs() <= scales[:, None] / 2).all()


@pytest.mark.parametrize("columns", [24, 150])
def test_gptq_equals_its_definition(columns: int) -> None:
    rng = np.random.default_rng(columns)
    W = rng.standard_normal((9, columns)).astype(np.float32)
    mixing = rng.standard_normal((columns, columns)) / columns**0.5 + np.eye(columns)
    X = mixing @ rng.standard_normal((columns, 400))
    H = X @ X.T / 400
    made, scales = published_integers(torch.from_numpy(W), torch.from_numpy(H).float(), 6, 9.0)
    assert torch.equal(scales, train_gpt.deviation_scales(torch.from_numpy(W), 31, 9.0))
    expected = naive_gptq(W, H, scales.double().numpy(), 31)
    assert (made.numpy() != expected).mean() < 0.003  # quotients next to a half
    nearest = np.rint(W / scales.float().numpy()[:, None])

    def loss(q: np.ndarray) -> float:
        delta = W - q * scales.double().numpy()[:, None]
        return float((delta @ H * delta).sum())

    assert loss(made.numpy()) < 0.9 * loss(nearest)


def test_rows_of_zeros_and_of_almost_nothing_have_a_scale() -> None:
    W = torch.zeros(3, 8)
    W[1] = 1e-12 * torch.arange(8)
    W[2] = torch.arange(8.0)
    q, scales = published_integers(W, torch.eye(8), 6, 11.5)
    assert (scales > 0).all() and torch.equal(q[:2], torch.zeros(2, 8, dtype=torch.int8))
    assert train_gpt.low_rank_correction(torch.zeros(4, 8), 2, 8).product().abs().max() == 0
    gates = gate_rows(W)
    assert (gates.scale > 0).all() and gates.values[2, 7] == 127


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 70), st.integers(0, 99))
def test_a_low_rank_correction_is_its_factors_and_helps_where_the_error_is_low(
    rows: int, columns: int, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    E = np.outer(rng.standard_normal(rows), rng.standard_normal(columns)).astype(np.float32)
    made = train_gpt.low_rank_correction(torch.from_numpy(E), 1, group)
    left, right = made.left.numpy(), made.right.numpy()
    assert left.min() >= -2 and left.max() <= 1 and right.min() >= -8 and right.max() <= 7
    product = np.zeros(E.shape)
    for i in range(rows):
        for j in range(columns):
            a = float(made.left_scale) * left[i, 0]
            product[i, j] = a * float(made.right_scales[j // group]) * right[0, j]
    assert np.allclose(made.product().numpy(), product, atol=1e-5 * np.abs(E).max())
    assert np.linalg.norm(E - product) < np.linalg.norm(E)


def test_the_scheme_of_1855_orders_and_groups_as_published() -> None:
    facts = golden_kit.facts(golden_kit.PR1855, "quant")
    matrices = {
        name: golden("quant", f"stored/{name}.q").numpy() for name in facts["error_norm_after_gptq"]
    }
    groups, orders = packing.published_groups(matrices)
    made = {f"{kind}.q": hashlib.sha256(raw).hexdigest() for kind, raw in groups.items()}
    assert made == {kind: fact["sha256"] for kind, fact in facts["groups"].items()}
    assert hashlib.sha256(orders).hexdigest() == facts["permutation_sha256"]


def test_hidden_units_in_order_compute_the_same_and_take_fewer_bytes() -> None:
    cfg = Config(num_layers=2, xsa_last_n=0, ve_layers="1", model_dim=64, num_heads=2,
                 num_kv_heads=1, rope_dims=8, bigram_vocab_size=64, bigram_dim=8, ve_dim=8,
                 vocab_size=64, backout_mode="none", mlp_mult=8.0)  # fmt: skip
    torch.manual_seed(0)
    model = GPT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for block in model.blocks:
            block.mlp.fc.weight.mul_(torch.rand(512, 1) + 0.5)
    ids = torch.randint(2, 64, (2, 16))

    def size() -> int:
        scales = train_gpt.deviation_scales(model.blocks[0].mlp.fc.weight.detach(), 31, 11.5)
        body = train_gpt.encode_artifact(HEADER, {"s": Stored(scales)}, "range")
        return len(body)

    before, bytes_before = model.hidden(ids), size()
    train_gpt.order_hidden_units(model)
    assert torch.allclose(model.hidden(ids), before, rtol=1e-4, atol=1e-4)
    saved = 8 * (bytes_before - size())
    assert saved > 0.8 * math.lgamma(513) / math.log(2)  # bits of an order


# In the artifact

HEADER = {"settings": {}, "tokenizer": "", "validation": ""}


def corrected(rows: int, columns: int, rank: int, group: int, protects: bool, seed: int) -> Stored:
    """A random matrix with a correction, a protected group, or both."""
    torch.manual_seed(seed)
    low_rank = protected = None
    if rank:
        A, B = torch.randn(rows, rank), torch.randn(rank, columns)
        low_rank = train_gpt.quantize_factors(A, B, group)
    if protects:
        protected = train_gpt.ProtectedColumns(1, columns - 1, torch.rand(rows).half())
    values = torch.randint(-31, 32, (rows, columns), dtype=torch.int8)
    return Stored(values, torch.rand(rows).half(), protected, low_rank)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(2, 12),
    st.integers(0, 3),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from(["range", "lzma"]),
)
def test_corrections_and_protected_columns_come_back(
    rows: int, columns: int, rank: int, group: int, protects: bool, codec: str
) -> None:
    stored = {
        "a": corrected(rows, columns, rank, group, protects, 0),
        "b": corrected(columns, rows + 1, rank, 7, not protects, 1),
        "gain": Stored(torch.ones(3).half()),
    }
    _, read = train_gpt.decode_artifact(train_gpt.encode_artifact(HEADER, stored, codec))
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert (tensor.kind, tensor.numbers()) == (read[name].kind, read[name].numbers())
        for ours, theirs in zip(tensor.arrays(), read[name].arrays(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(tensor.restore(), read[name].restore())


def test_a_restored_matrix_is_the_sum_of_its_parts() -> None:
    tensor = corrected(5, 9, 2, 4, True, 3)
    restored = tensor.restore()
    for i in range(5):
        for j in range(9):
            step = tensor.scale[i] if j == 0 else tensor.protected.scale[i]
            expected = float(tensor.values[i, j]) * float(step)
            for k in range(2):
                right_scale = tensor.low_rank.right_scales[(k * 9 + j) // 4]
                left = float(tensor.low_rank.left_scale) * float(tensor.low_rank.left[i, k])
                expected += left * float(right_scale) * float(tensor.low_rank.right[k, j])
            assert float(restored[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "row",
    [
        ["w", "grid_low_rank", 4, 4, 0, 4],
        ["w", "grid_low_rank", 4, 4, 65, 4],
        ["w", "grid_low_rank", 4, 4, 2, 0],
        ["w", "grid_low_rank", 4, 4],
        ["w", "grid_protected", 4, 4, 2, 3],
        ["w", "grid_protected", 4, 4, 0, 0],
        ["w", "grid_protected_low_rank", 4, 4, 0, 2],
        ["w", "grid_low_rank_protected", 4, 4, 0, 2, 1, 1],
    ],
)
def test_rows_of_the_header_that_cannot_be_are_refused(row: list) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        train_gpt.tensor_row(row, 2)


# In a run

EVERYTHING = {
    "QUANT_CLIP": "std_published",
    "CLIP_SIGMAS": "mlp:11.5,attn:13,emb:14,aux:14",
    "BITS": "mlp:6,attn:6,emb:7,aux:7",
    "INT8_KEEP_FLOAT_MAX_NUMEL": "256",
    "LQER_TOP_K": "3",
    "LQER_RANK": "2",
    "LQER_GROUP": "32",
    "AWQ_COLUMNS": "8",
    "GATE_STORAGE": "int8",
    "CODEC": "range",
}


def test_a_run_with_everything_on_exports_reloads_and_scores_equally(
    tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(tiny_data, tmp_path, "all", **EVERYTHING)
    with environment(**job):
        assert train_gpt.main([]) == 0
    folder = tmp_path / "all"
    _, stored = train_gpt.read_artifact(folder / "artifact.bin")
    assert (folder / "artifact.bin").read_bytes()[10] == train_gpt.CODECS["range"]
    kinds = [tensor.kind for tensor in stored.values()]
    assert sum("low_rank" in kind for kind in kinds) == 3
    assert sum("protected" in kind for kind in kinds) == 1
    for tensor in stored.values():
        if tensor.protected is not None:
            assert (tensor.protected.scale < tensor.scale).all() and tensor.protected.width == 8
    for event in events(folder, "corrected"):
        assert 0 < event["left"] < event["error"]
    sizes = events(folder, "size")
    assert sum(event["corrected"] for event in sizes) == 3
    for mlp in range(int(job.get("NUM_LAYERS", 2))):
        scale = stored[f"blocks.{mlp}.mlp.fc.weight"].scale
        assert scale is None or bool((scale[1:] >= scale[:-1]).all())
    final = events(folder, "final")[-1]
    capsys.readouterr()
    with environment(DATA_PATH=job["DATA_PATH"], TOKENIZER_PATH=job["TOKENIZER_PATH"]):
        assert train_gpt.main(["--eval", str(folder / "artifact.bin")]) == 0
    assert f"val_bpb:{final['val_bpb']:.8f} " in capsys.readouterr().out


def test_everything_on_meets_a_target_and_never_passes_the_limit(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    job = tiny_job(tiny_data, tmp_path, "first", **EVERYTHING)
    with environment(**job):
        assert train_gpt.main([]) == 0
    first = events(tmp_path / "first", "artifact")[-1]
    foreseen = events(tmp_path / "first", "size_foreseen")[-1]
    assert foreseen["total"] < 1.02 * first["total"]
    target = first["total"] - first["model_bytes"] // 8
    limited = {**job, "RUN_ID": "second", "ARTIFACT_LIMIT_BYTES": str(target)}
    with environment(**limited):
        assert train_gpt.main([]) == 0
    second = events(tmp_path / "second", "artifact")[-1]
    assert 0.97 * target <= second["total"] <= target
    stored = train_gpt.read_artifact(tmp_path / "second" / "artifact.bin")[1]
    assert sum(tensor.low_rank is not None for tensor in stored.values()) == 3


def test_a_protected_group_needs_steps_by_deviation() -> None:
    for env in ({"QUANT_CLIP": "percentile"}, {"QUANT_CLIP": "std", "GPTQ_VARIANT": "off"}):
        with pytest.raises(train_gpt.Refusal, match="AWQ_COLUMNS=64 needs"):
            Config.from_env({"PRESET": "mini", "AWQ_COLUMNS": "64", **env})
