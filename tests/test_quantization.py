"""Grids, fake quantisation, Hessians and GPTQ against naive statements in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import SIZES, random_ids, random_model
from torch import Tensor

import train_gpt
from train_gpt import (
    GPT,
    Config,
    Run,
    Stored,
    TrainingRows,
    bits_of,
    collect_hessians,
    fake_quantized,
    gptq,
    int8_rows,
    inverse_factor,
    largest_integer,
    quantize,
    round_to_nearest,
    training_nats,
    weighted_error,
)

BITS = "mlp:5,attn:6,emb:8,aux:8"
seeds = st.integers(0, 2**20)


def some_matrix(rows: int, cols: int, seed: int) -> Tensor:
    """Heavy-tailed rows of very different sizes, the first of them zero."""
    rng = np.random.default_rng(seed)
    W = rng.standard_t(4, (rows, cols)) * 10.0 ** rng.uniform(-3, 1, (rows, 1))
    W[0] = 0
    return torch.tensor(W, dtype=torch.float32)


def some_hessian(cols: int, seed: int) -> Tensor:
    """The mean x x^T of inputs that go together, as those of a trained network do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * cols, cols)) @ (rng.normal(size=(cols, cols)) / cols**0.5)
    x = x * rng.uniform(0.3, 3, cols) + rng.normal(size=(4 * cols, 1))
    return torch.tensor(x.T @ x / len(x), dtype=torch.float32)


def cpu_run(cfg: Config) -> Run:
    """A run of one process."""
    return Run(cfg, rank=0, world_size=1, device=torch.device("cpu"))


def nearest_of(W: Tensor, bits: int, **changed: object) -> Stored:
    """Nearest integers under settings."""
    return round_to_nearest(W, bits, Config(**changed))


def solved(W: Tensor, H: Tensor, bits: int, block: int = 128, **changed: object) -> Stored:
    """GPTQ's integers under settings."""
    return gptq(W, H, bits, Config(gptq_block_size=block, **changed))


def hessians_of(model: GPT, rows: TrainingRows, first: int, batches: int, run: Run) -> dict:
    """Hessians of batches of eight rows from row `first` on."""
    return collect_hessians(model, lambda n: rows.batch(first + 8 * n, 8)[0], batches, math.inf,
                            run)


# Late QAT


def test_weights_in_late_qat_are_on_the_export_grid() -> None:
    """Linears that export makes integers, and no other parameter; bigram.proj is too small."""
    cfg = Config(**SIZES, bits=BITS, int8_keep_float_max_numel=400)
    model = random_model(cfg, dtype=torch.float32)
    seen = fake_quantized(model)
    assert seen.keys() == {f"blocks.{layer}.{part}.weight" for layer in range(5) for part in (
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")}
    for name, W in seen.items():
        levels = 15 if ".mlp." in name else 31
        original = model.get_parameter(name).detach()
        scale = original.abs().amax(1, keepdim=True).clamp(min=1) / levels
        q = W.detach() / scale
        assert (q - q.round()).abs().max() < 1e-4
        assert q.abs().max() < levels + 0.5
        assert (W.detach() - original).abs().div(scale).max() < 0.5 + 1e-4
        assert len(q.round().unique()) > levels / 2


def test_gradients_pass_through_late_qat_unchanged() -> None:
    model = random_model(Config(**SIZES, int8_keep_float_max_numel=0), dtype=torch.float32)
    for name, W in fake_quantized(model).items():
        slopes = torch.randn_like(W)
        (gradient,) = torch.autograd.grad((W * slopes).sum(), model.get_parameter(name))
        assert torch.equal(gradient, slopes)


@pytest.mark.parametrize("tied", [True, False])
def test_late_qat_trains_on_the_weights_it_shows(tied: bool) -> None:
    cfg = Config(**SIZES, bits=BITS, int8_keep_float_max_numel=400, tie_embeddings=tied)
    model, ids = random_model(cfg, dtype=torch.float32), random_ids(cfg, 2, 12)
    batch = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        plain, shown = (training_nats(model, *batch, qat)[0] for qat in (False, True))
        assert torch.equal(plain, model(*batch)[0])
        model.load_state_dict(fake_quantized(model), strict=False)
        torch.testing.assert_close(shown, model(*batch)[0], rtol=0, atol=1e-5)
    assert (shown - plain).abs().max() > 0.01


# Nearest


@given(seed=seeds, rows=st.integers(1, 9), cols=st.integers(2, 60), bits=st.integers(2, 8))
@settings(deadline=None, max_examples=40)
def test_nearest_takes_the_best_clip_of_the_matrix(seed: int, rows: int, cols: int,
                                                   bits: int) -> None:
    W, levels = some_matrix(rows, cols, seed), 2 ** (bits - 1) - 1
    stored = nearest_of(W, bits)
    W = W.numpy().astype(np.float64)
    errors = {}
    for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = np.quantile(np.abs(W), share, axis=1)
        s = np.maximum(clip / levels, 1 / levels).astype(np.float16).astype(np.float64)[:, None]
        q = np.clip(np.round(W / s), -levels, levels)
        errors[share] = ((W - q * s) ** 2).mean(), s[:, 0], q
    error, s, q = min(errors.values(), key=lambda candidate: candidate[0])
    np.testing.assert_allclose(stored.scale.double(), s, rtol=2e-3)
    ours = stored.restore().double().numpy()
    assert ((W - ours) ** 2).mean() <= error * 1.02 + 1e-9
    assert np.abs(stored.values.numpy() - q).max() <= 1
    assert np.abs(stored.values.numpy()).max() <= levels


@given(seed=seeds, rows=st.integers(1, 9), cols=st.integers(2, 60))
@settings(deadline=None, max_examples=40)
def test_int8_rows_are_rounded_below_their_quantile(seed: int, rows: int, cols: int) -> None:
    W = some_matrix(rows, cols, seed)
    stored, W = int8_rows(W), W.numpy().astype(np.float64)
    clip = np.quantile(np.abs(W), 0.9999984, axis=1)[:, None]
    s = np.maximum(clip, 1) / 127
    np.testing.assert_allclose(stored.scale.double(), s[:, 0], rtol=1e-3)
    exact = np.clip(W, -clip, clip) / s
    assert np.abs(stored.values.numpy() - exact).max() <= 0.5 + 1e-3


def test_int8_rows_cut_off_their_few_largest_weights() -> None:
    W = torch.linspace(-0.6, 0.6, 2_000_000)[None]
    W[0, :2] = 50.0
    stored = int8_rows(W)
    assert float(stored.scale) == pytest.approx(1 / 127, rel=1e-3)
    assert stored.values[0, :3].tolist() == [76, 76, -76]  # cut at the third largest weight


@pytest.mark.parametrize("quantizer", [
    int8_rows, lambda W: nearest_of(W, 6), lambda W: solved(W, some_hessian(24, 0), 6, 8)])
def test_a_row_of_zeros_stays_zero(quantizer) -> None:
    stored = quantizer(some_matrix(5, 24, seed=1))
    assert not stored.values[0].any()
    assert stored.scale[0] > 0
    assert stored.values.dtype == torch.int8
    assert stored.scale.dtype == torch.float16
    assert stored.restore().isfinite().all()


@pytest.mark.parametrize(("name", "shape", "bits"), [
    ("blocks.3.mlp.fc.weight", (11, 10), 4), ("blocks.10.attn.c_k.weight", (11, 10), 5),
    ("tok_emb.weight", (11, 10), 7), ("lm_head.weight", (11, 10), 7),
    ("bigram.embed.weight", (11, 10), 0), ("ve_shared.proj.weight", (11, 10), 0),
    ("blocks.3.mlp.fc.weight", (10, 10), 0), ("blocks.3.attn_scale", (999,), 0)])
def test_the_integers_of_a_tensor_follow_its_role_and_size(name: str, shape: tuple[int, ...],
                                                          bits: int) -> None:
    cfg = Config(bits="mlp:4,attn:5,emb:7,aux:fp16", int8_keep_float_max_numel=100)
    assert bits_of(cfg, name, torch.empty(shape)) == bits


# GPTQ


def naive_gptq(W: Tensor, H: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales by optimal brain surgery, one column at a time.

    After each column the inverse is recomputed for those that remain.
    """
    levels, best = largest_integer(bits), None
    W, H = W.double().numpy(), H.double().numpy().copy()
    H += np.eye(len(H)) * 0.01 * np.diag(H).mean()
    order = np.argsort(-np.diag(H), kind="stable")
    for scales in train_gpt.clip_candidates(
            torch.tensor(W, dtype=torch.float32), bits, Config()).half():
        s, rest, Q = scales.double().numpy(), W.copy(), np.zeros_like(W)
        for at, col in enumerate(order):
            left = order[at:]
            inverse = np.linalg.inv(H[np.ix_(left, left)])
            Q[:, col] = np.clip(np.round(rest[:, col] / s), -levels, levels)
            error = rest[:, col] - Q[:, col] * s
            rest[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        squared = ((W - Q * s[:, None]) ** 2).mean()
        if best is None or squared < best[0]:
            best = squared, Q, s
    return best[1:]


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("shape", [(8, 20), (30, 12), (16, 16), (1, 9)])
def test_gptq_is_optimal_brain_surgery_by_columns(shape: tuple[int, int], bits: int) -> None:
    for seed in range(3):
        W, H = some_matrix(*shape, seed), some_hessian(shape[1], seed)
        stored = solved(W, H, bits, block=7)
        Q, s = naive_gptq(W, H, bits)
        np.testing.assert_array_equal(stored.scale.double(), s)
        assert (stored.values.numpy() != Q).mean() < 0.01  # float32 rounds a few ties elsewhere


@given(seed=seeds, rows=st.integers(1, 12), cols=st.integers(2, 40))
@settings(deadline=None, max_examples=40)
def test_gptq_of_unrelated_inputs_is_nearest(seed: int, rows: int, cols: int) -> None:
    W = some_matrix(rows, cols, seed)
    for H in (torch.eye(cols), torch.rand(cols).add(0.1).diag()):
        ours, nearest = solved(W, H, 6, block=16), nearest_of(W, 6)
        assert torch.equal(ours.values, nearest.values)
        assert torch.equal(ours.scale, nearest.scale)


@given(seed=seeds, rows=st.integers(8, 24), cols=st.integers(24, 48), bits=st.integers(4, 8))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_gptq_beats_nearest_at_its_own_objective(seed: int, rows: int, cols: int,
                                                 bits: int) -> None:
    """Not a theorem, as clips are chosen by the error of the weights, but so on many of them."""
    W, H = some_matrix(rows, cols, seed), some_hessian(cols, seed)
    nearest = weighted_error(W, nearest_of(W, bits), H)
    assert weighted_error(W, solved(W, H, bits, block=16), H) <= nearest


@pytest.mark.parametrize("block", [1, 7, 32, 200])
def test_blocks_of_gptq_change_nothing(block: int) -> None:
    W, H = some_matrix(20, 50, 3), some_hessian(50, 3)
    whole, blocked = solved(W, H, 6, block=50), solved(W, H, 6, block=block)
    assert torch.equal(whole.scale, blocked.scale)
    assert (whole.values != blocked.values).float().mean() < 0.005


def test_gptq_does_not_depend_on_the_order_of_columns() -> None:
    W, H, shuffled = some_matrix(20, 50, 4), some_hessian(50, 4), torch.randperm(50)
    straight = solved(W, H, 6, block=16)
    turned = solved(W[:, shuffled], H[shuffled][:, shuffled], 6, block=16)
    assert (turned.values != straight.values[:, shuffled]).float().mean() < 0.005


def test_columns_that_no_input_reaches_become_zero() -> None:
    """... and take no part in the others' errors."""
    W, H, dead = some_matrix(12, 20, 5), some_hessian(20, 5), [3, 7, 19]
    H[dead], H[:, dead] = 0, 0
    stored = solved(W, H, 6, block=8)
    assert not stored.values[:, dead].any()
    assert weighted_error(W, stored, H) < weighted_error(W, nearest_of(W, 6), H)


@pytest.mark.parametrize(("smallest", "damping"),
                         [(0.05, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-40.0, 100.0)])
def test_damping_grows_until_the_hessian_can_be_inverted(smallest: float, damping: float) -> None:
    """H has a diagonal of ones and `smallest` as its smallest eigenvalue."""
    H = torch.full((10, 10), (smallest - 1) / 9).fill_diagonal_(1.0)
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ (H + damping * torch.eye(10)), torch.eye(10), rtol=0,
                               atol=1e-4)


def test_a_hopeless_hessian_is_an_error_and_export_rounds_to_nearest(capsys) -> None:
    cfg = Config(**SIZES, int8_keep_float_max_numel=400)
    model, name = random_model(cfg, dtype=torch.float32), "blocks.0.mlp.fc"
    for hopeless in (-torch.eye(32), torch.full((32, 32), torch.nan)):
        with pytest.raises(torch.linalg.LinAlgError):
            inverse_factor(hopeless)
        stored = quantize(model, {name: hopeless}, cpu_run(cfg))[f"{name}.weight"]
        nearest = nearest_of(model.get_parameter(f"{name}.weight").detach(), 6)
        assert torch.equal(stored.values, nearest.values)
        assert "fallbacks:1" in capsys.readouterr().out


def test_the_objective_is_the_error_of_the_outputs() -> None:
    W, x = some_matrix(6, 10, 0), torch.randn(50, 10)
    stored = nearest_of(W, 4)
    outputs = (x @ (W - stored.restore()).T).double()
    assert weighted_error(W, stored, x.T @ x) == pytest.approx(float(outputs.square().sum()), 1e-4)


# Calibration and export of a model


@pytest.fixture
def calibrated(tiny_data):
    """Settings, model, rows and run on the tiny data."""
    def make(**changes: object) -> tuple[Config, GPT, TrainingRows, Run]:
        sizes = {**SIZES, "vocab_size": 320, "train_seq_len": 16, "train_batch_tokens": 64,
                 "data_path": str(tiny_data.data_path), "int8_keep_float_max_numel": 0}
        cfg = Config(**{**sizes, **changes})
        return cfg, random_model(cfg, dtype=torch.float32), TrainingRows(cfg), cpu_run(cfg)
    return make


def test_hessians_are_those_of_the_inputs_of_each_linear(calibrated, monkeypatch) -> None:
    cfg, model, rows, run = calibrated(int8_keep_float_max_numel=200)
    hessians = hessians_of(model, rows, 3, 2, run)
    inputs: dict[str, np.ndarray] = {}
    names = {id(module.weight): name for name, module in model.named_modules()
             if isinstance(module, train_gpt.Linear)}

    def recording(module, x):
        inputs[names[id(module.weight)]] = x.detach().double().flatten(0, -2).numpy()
        return torch.nn.functional.linear(x, module.weight)

    monkeypatch.setattr(train_gpt.Linear, "forward", recording)
    model.hidden(rows.batch(3, 16)[0])
    expected = {name for name in inputs if name != "ve_shared.proj"
                and not name.endswith(("c_k", "c_v"))}
    assert hessians.keys() == expected
    for name, x in inputs.items():
        source = name.replace("c_k", "c_q").replace("c_v", "c_q")
        np.testing.assert_array_equal(x, inputs[source])
        if source in hessians:
            np.testing.assert_allclose(hessians[source], x.T @ x / len(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", ["mlp:6,attn:6,emb:8,aux:8", "mlp:5,attn:6,emb:6,aux:fp16"])
def test_every_exported_tensor_stands_for_its_parameter(calibrated, bits: str, tied: bool) -> None:
    cfg, model, rows, run = calibrated(bits=bits, tie_embeddings=tied)
    stored = quantize(model, hessians_of(model, rows, 0, 4, run), run)
    parameters = dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    for name, p in parameters.items():
        wanted = bits_of(cfg, name, p)
        assert (stored[name].scale is None) == (wanted == 0), name
        if wanted:
            assert stored[name].values.abs().max() <= largest_integer(wanted)
        error = (stored[name].restore() - p.detach()).norm() / p.detach().norm()
        assert error < (0.2 if wanted else 1e-3), name


def test_gptq_at_export_is_worth_its_while(calibrated) -> None:
    """Each linear's own objective, with Hessians of the data."""
    cfg, model, rows, run = calibrated()
    hessians = hessians_of(model, rows, 0, 8, run)
    stored, better = quantize(model, hessians, run), []
    for name, H in hessians.items():
        W, bits = model.get_parameter(f"{name}.weight").detach(), 8 if "blocks" not in name else 6
        better.append(weighted_error(W, stored[f"{name}.weight"], H)
                      / weighted_error(W, nearest_of(W, bits), H))
    assert max(better) <= 1
    assert np.median(better) < 0.8
