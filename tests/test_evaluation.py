"""Every target is scored exactly once, with the context promised, and so is the score."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train_gpt import (
    GPT,
    Config,
    EvalResult,
    Run,
    Validation,
    evaluate,
    training_nats,
    windows,
)

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 300), st.integers(2, 40)).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.just(shape[1]), st.integers(0, shape[1])))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, which is faster than two for tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Windows


@settings(max_examples=400, deadline=None)
@given(SHAPES)
def test_every_target_is_scored_exactly_once(shape: tuple[int, int, int]) -> None:
    num_targets, seq_len, stride = shape
    scored = np.zeros(num_targets, int)
    for start, first, end in windows(*shape):
        assert 0 <= start <= first < end <= min(start + seq_len, num_targets)
        scored[first:end] += 1
    assert (scored == 1).all()


@settings(max_examples=400, deadline=None)
@given(SHAPES)
def test_sliding_windows_start_a_stride_apart_and_the_last_ends_the_split(
        shape: tuple[int, int, int]) -> None:
    num_targets, seq_len, stride = shape
    assume(stride > 0 and num_targets > seq_len)
    *starts, last = windows(*shape)[:, 0].tolist()
    assert starts == list(range(0, stride * len(starts), stride))
    assert last == num_targets - seq_len
    assert 0 < last - starts[-1] <= stride
    for start, first, _ in windows(*shape)[1:]:
        assert first - start >= seq_len - stride


@given(st.integers(1, 20), st.integers(2, 40))
def test_a_stride_of_one_row_gives_chunks(num_rows: int, seq_len: int) -> None:
    num_targets = num_rows * seq_len
    chunks = windows(num_targets, seq_len, 0)
    assert chunks[:, 0].tolist() == chunks[:, 1].tolist() == list(range(0, num_targets, seq_len))
    assert windows(num_targets, seq_len, seq_len).tolist() == chunks.tolist()


# The loop over windows


def toy_nats(model: None, input_ids: torch.Tensor, target_ids: torch.Tensor,
             qat: bool) -> tuple[torch.Tensor, None]:
    """Nats that depend on the target and on all that its window shows up to it."""
    seen = torch.cumsum(input_ids * torch.arange(1, 1 + input_ids.size(1)), dim=1)
    return ((31 * seen + 17 * target_ids) % 101).float() / 16, None


def random_split(num_tokens: int, seed: int = 0, vocab_size: int = 1000) -> Validation:
    """A validation split of random tokens and byte counts."""
    rng = np.random.default_rng(seed)
    return Validation(rng.integers(0, vocab_size, num_tokens).astype(np.uint16),
                      rng.integers(0, 9, num_tokens - 1).astype(np.int16), "", "", 1, 0)


def score(val: Validation, cfg: Config, stride: int, forward=toy_nats,
          model: GPT | None = None) -> EvalResult:
    """What one process scores."""
    return evaluate("test", forward, model, val, Run(cfg, 0, 1, CPU), stride)


def evaluation(seq_len: int, **changed: object) -> Config:
    """Settings of an evaluation."""
    return Config(eval_seq_len=seq_len, eval_stride=0, **changed)


def one_by_one(val: Validation, num_targets: int, seq_len: int, stride: int,
               nats_of) -> tuple[float, int]:
    """Nats and bytes, each target looked up in the first window that shows it."""
    nats, num_bytes = 0.0, 0
    for target in range(num_targets):
        if stride == 0 or num_targets <= seq_len:
            start = target - target % seq_len
        else:
            starts = [*range(0, num_targets - seq_len, stride), num_targets - seq_len]
            start = next(start for start in starts if target < start + seq_len)
        shown = val.tokens[start : target + 1].astype(int).tolist()
        nats += nats_of(shown, int(val.tokens[target + 1]))
        num_bytes += int(val.target_bytes[target])
    return nats, num_bytes


def toy_nats_of(shown: list[int], target: int) -> float:
    """toy_nats() of one target, in whole numbers."""
    seen = sum(place * token for place, token in enumerate(shown, 1))
    return (31 * seen + 17 * target) % 101 / 16


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(1, 5), st.booleans(), st.integers(0, 9))
def test_the_loop_scores_as_target_by_target(shape: tuple[int, int, int], batch: int,
                                             truncate: bool, seed: int) -> None:
    num_targets, seq_len, stride = shape
    assume(num_targets >= seq_len or not truncate)
    val = random_split(num_targets + 1, seed)
    cfg = evaluation(seq_len, eval_batch_seqs=batch, eval_truncate=truncate)
    kept = num_targets - num_targets % seq_len if truncate else num_targets
    result = score(val, cfg, stride)
    assert (result.nats, result.num_bytes) == one_by_one(val, kept, seq_len, stride, toy_nats_of)
    assert result.targets == kept


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 9), st.integers(1, 5))
def test_neither_batches_nor_ranks_change_the_score(shape: tuple[int, int, int], batch: int,
                                                    world_size: int) -> None:
    num_targets, seq_len, stride = shape
    val, cfg = random_split(num_targets + 1), evaluation(seq_len, eval_batch_seqs=batch)
    whole = score(val, evaluation(seq_len, eval_batch_seqs=1), stride)
    exchanged: list[torch.Tensor] = []
    for rank in range(world_size):
        run = Run(cfg, rank, world_size, CPU)
        run.add_up = lambda tensors: exchanged.append(tensors[0].clone())
        evaluate("test", toy_nats, None, val, run, stride)
    assert sum((sums != 0).any(1).int() for sums in exchanged).max() <= 1  # a batch, one rank
    nats, targets, num_bytes = sum(exchanged).sum(0).tolist()
    assert nats == pytest.approx(whole.nats, abs=1e-9)
    assert (targets, num_bytes) == (whole.targets, whole.num_bytes)


def test_bits_per_byte_of_three_tokens_by_hand() -> None:
    # BOS, "a" and " b": 1 byte and 2 bytes; their probabilities are 1/4 and 1/16.
    val = Validation(np.array([1, 5, 6], np.uint16), np.array([1, 2], np.int16), "", "", 1, 3)
    nats = {5: math.log(4), 6: math.log(16)}

    def forward(model: None, input_ids: torch.Tensor, target_ids: torch.Tensor,
                qat: bool) -> tuple[torch.Tensor, None]:
        return torch.tensor([[nats[int(t)] for t in row] for row in target_ids]), None

    for stride in (0, 1, 2):
        result = score(val, evaluation(2), stride, forward)
        assert result.bpb == pytest.approx((2 + 4) / 3, rel=1e-6)
        assert result.loss == pytest.approx(math.log(8), rel=1e-6)
        assert (result.targets, result.num_bytes) == (2, 3)


# The real model


@pytest.fixture(scope="module")
def model() -> GPT:
    """A small model whose every parameter is random."""
    torch.manual_seed(0)
    net = GPT(Config(vocab_size=32, num_layers=3, xsa_last_n=2, ve_layers="1,2", model_dim=16,
                     num_heads=4, num_kv_heads=2, rope_dims=4, bigram_vocab_size=32, bigram_dim=8,
                     ve_dim=8))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net


@torch.inference_mode()
def nats_by_model(model: GPT, shown: list[int], target: int) -> float:
    """Nats of one target after nothing but what its window shows before it."""
    return -float(model.logits(model.hidden(torch.tensor([shown])))[0, -1].log_softmax(0)[target])


@pytest.mark.parametrize("stride", [0, 1, 5, 16])
def test_the_model_is_scored_as_target_by_target(model: GPT, stride: int) -> None:
    val = random_split(72, vocab_size=32)
    result = score(val, evaluation(16, eval_batch_seqs=3), stride, training_nats, model)
    nats, num_bytes = one_by_one(val, 71, 16, stride, lambda *at: nats_by_model(model, *at))
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_the_batch_size_does_not_change_the_models_score(model: GPT) -> None:
    val = random_split(200, vocab_size=32)
    scores = [score(val, evaluation(16, eval_batch_seqs=batch), 4, training_nats, model).nats
              for batch in (1, 7, 64)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


@torch.inference_mode()
def test_the_probabilities_of_all_tokens_add_up_to_one(model: GPT) -> None:
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    for_each_token = torch.stack([model(ids, torch.full_like(ids, token))[0]
                                  for token in range(32)])
    assert torch.exp(-for_each_token.double()).sum(0).numpy() == pytest.approx(1.0, abs=1e-6)
    assert (for_each_token > 0).all()
