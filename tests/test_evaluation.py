"""Every target is scored exactly once, with the context promised, and so is the score."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    GPT,
    Adapter,
    Batch,
    Config,
    EvalResult,
    Run,
    Validation,
    evaluate,
    published_windows,
    train_then_score,
    training_nats,
    window_batch,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 300), st.integers(2, 40)).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.just(shape[1]), st.integers(0, shape[1]))
)


@pytest.fixture(autouse=True, scope="module")
def work_is_not_counted() -> Iterator[None]:
    """Toys have no operations; tests/test_work.py counts those of models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "scoring_operations", lambda *given, **named: 0)
        yield


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
    shape: tuple[int, int, int],
) -> None:
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


def toy_nats(model: None, batch: Batch) -> tuple[torch.Tensor, None]:
    """Nats that depend on the target and on all that its window shows up to it."""
    seen = torch.cumsum(batch.input_ids * torch.arange(1, 1 + batch.input_ids.size(1)), dim=1)
    seen = seen if batch.places is None else seen.gather(1, batch.places)
    return ((31 * seen + 17 * batch.target_ids) % 101).float() / 16, None


def random_split(num_tokens: int, seed: int = 0, vocab_size: int = 1000) -> Validation:
    """A validation split of random tokens and byte counts."""
    rng = np.random.default_rng(seed)
    return Validation(
        rng.integers(0, vocab_size, num_tokens).astype(np.uint16),
        rng.integers(0, 9, num_tokens - 1).astype(np.int16),
        "",
        "",
        1,
        0,
    )


def score(
    val: Validation, cfg: Config, stride: int, forward=toy_nats, model: GPT | None = None
) -> EvalResult:
    """What one process scores."""
    return evaluate("test", forward, model, val, Run(cfg, 0, 1, CPU), stride)


def evaluation(seq_len: int, **changed: object) -> Config:
    """Settings of an evaluation."""
    return Config(eval_seq_len=seq_len, eval_stride=0, **changed)


def one_by_one(
    val: Validation, num_targets: int, seq_len: int, stride: int, nats_of
) -> tuple[float, int]:
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
def test_the_loop_scores_as_target_by_target(
    shape: tuple[int, int, int], batch: int, truncate: bool, seed: int
) -> None:
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
def test_neither_batches_nor_ranks_change_the_score(
    shape: tuple[int, int, int], batch: int, world_size: int
) -> None:
    num_targets, seq_len, stride = shape
    val, cfg = random_split(num_targets + 1), evaluation(seq_len, eval_batch_seqs=batch)
    whole = score(val, evaluation(seq_len, eval_batch_seqs=1), stride)
    exchanged: list[torch.Tensor] = []
    for rank in range(world_size):
        run = Run(cfg, rank, world_size, CPU)
        run.ranks.add_up = lambda tensors: exchanged.append(tensors[0].clone())
        evaluate("test", toy_nats, None, val, run, stride)
    assert sum((sums != 0).any(1).int() for sums in exchanged).max() <= 1  # a batch, one rank
    nats, targets, num_bytes = sum(exchanged).sum(0).tolist()
    assert nats == pytest.approx(whole.nats, abs=1e-9)
    assert (targets, num_bytes) == (whole.targets, whole.num_bytes)


def test_bits_per_byte_of_three_tokens_by_hand() -> None:
    # BOS, "a" and " b": 1 byte and 2 bytes; their probabilities are 1/4 and 1/16.
    val = Validation(np.array([1, 5, 6], np.uint16), np.array([1, 2], np.int16), "", "", 1, 3)
    nats = {5: math.log(4), 6: math.log(16)}

    def forward(model: None, batch: Batch) -> tuple[torch.Tensor, None]:
        return torch.tensor([[nats[int(t)] for t in row] for row in batch.target_ids]), None

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
    net = GPT(
        Config(
            vocab_size=32,
            num_layers=3,
            xsa_last_n=2,
            ve_layers="1,2",
            model_dim=16,
            num_heads=4,
            num_kv_heads=2,
            rope_dims=4,
            bigram_vocab_size=32,
            bigram_dim=8,
            ve_dim=8,
        )
    )
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
    scores = [
        score(val, evaluation(16, eval_batch_seqs=batch), 4, training_nats, model).nats
        for batch in (1, 7, 64)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


@torch.inference_mode()
def test_the_probabilities_of_all_tokens_add_up_to_one(model: GPT) -> None:
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    for_each_token = torch.stack(
        [model(Batch(ids, torch.full_like(ids, token)))[0] for token in range(32)]
    )
    assert torch.exp(-for_each_token.double()).sum(0).numpy() == pytest.approx(1.0, abs=1e-6)
    assert (for_each_token > 0).all()


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_the_head_sees_no_more_than_a_stride_of_each_window(model: GPT, stride: int) -> None:
    """The first window, which scores all its targets, comes once for each stride of them."""
    val, net, seen = random_split(72, vocab_size=32), copy.deepcopy(model), Counter()
    inside, head = net.hidden, net.logits

    def hidden(ids: torch.Tensor, *more: object) -> torch.Tensor:
        seen["windows"] += len(ids)
        return inside(ids, *more)

    def logits(hidden: torch.Tensor, *more: object) -> torch.Tensor:
        seen["logits"] += hidden[..., 0].numel()
        return head(hidden, *more)

    net.hidden, net.logits = hidden, logits
    score(val, evaluation(16, eval_batch_seqs=1), stride, training_nats, net)
    assert seen["windows"] == len(windows(71, 16, stride)) - 1 + 16 // stride
    assert seen["logits"] == stride * seen["windows"]


@given(SHAPES.filter(lambda shape: shape[2] > 0), st.sampled_from(["cover", "published_s1"]))
@settings(deadline=None, max_examples=100)
def test_a_strip_holds_what_its_window_scores(shape: tuple[int, int, int], form: str) -> None:
    num_targets, seq_len, stride = shape
    val, cfg = random_split(num_targets + 1), evaluation(seq_len)
    rows = np.array(
        [
            (start, at, min(at + stride, end))
            for start, first, end in (
                windows(*shape) if form == "cover" else published_windows(*shape, form)
            )
            for at in range(first, end, stride)
        ]
    )
    batch = window_batch(val, rows, len(rows) + 1, stride, cfg)
    ids, targets, scored = batch.input_ids, batch.target_ids, batch.scored
    whole = torch.arange(seq_len).expand_as(ids)
    places = whole if batch.places is None else batch.places
    assert not scored[-1].any()  # padding
    assert ((places >= 0) & (places < seq_len)).all()
    for n, (start, first, end) in enumerate(rows):
        kept = scored[n].bool()
        at = start + places[n][kept].numpy()
        assert at.tolist() == list(range(first, end))
        assert ids[n][places[n]][kept].tolist() == val.tokens[at].tolist()
        assert targets[n][kept].tolist() == val.tokens[at + 1].tolist()
        assert batch.target_bytes[n][kept].tolist() == val.target_bytes[at].tolist()


# The published forms


@settings(max_examples=200, deadline=None)
@given(SHAPES)
def test_published_windows_are_those_of_the_scripts(shape: tuple[int, int, int]) -> None:
    """S1: a window at every stride, cut at the end; S3: full windows and one anchored at the
    end. Both score the last `stride` targets of all but the first."""
    num_targets, seq_len, stride = shape
    assume(stride > 0)
    first = [(start, min(start + seq_len, num_targets)) for start in range(0, num_targets, stride)]
    expected = [(start, max(end - stride, start) if start else 0, end) for start, end in first]
    assert published_windows(*shape, "published_s1").tolist() == [list(row) for row in expected]
    if num_targets > seq_len:
        starts = list(range(0, num_targets - seq_len + 1, stride))
        starts += [num_targets - seq_len] * (starts[-1] != num_targets - seq_len)
        expected = [
            [start, start + seq_len - stride if start else 0, start + seq_len] for start in starts
        ]
        assert published_windows(*shape, "published_s3").tolist() == expected


@given(st.integers(2, 20), st.integers(1, 6), st.integers(1, 8))
def test_the_forms_agree_where_windows_cover_exactly(stride: int, per_row: int, rows: int) -> None:
    """But for S1's cut windows, which score the last targets once more each."""
    seq_len, num_targets = stride * per_row, stride * (per_row + rows)
    cover = windows(num_targets, seq_len, stride).tolist()
    assert published_windows(num_targets, seq_len, stride, "published_s3").tolist() == cover
    s1 = published_windows(num_targets, seq_len, stride, "published_s1").tolist()
    assert s1[: len(cover)] == cover
    assert all(end == num_targets and end - first == stride for _, first, end in s1[len(cover) :])
    assert len(s1) - len(cover) == per_row - 1


# Test-time training

TTT = {
    "eval_stride": 8,
    "eval_batch_seqs": 3,
    "ttt_mode": "score_first",
    "ttt_chunk_tokens": 20,
    "ttt_lr": 0.05,
    "ttt_epochs": 2,
    "ttt_batch_seqs": 2,
    "ttt_freeze_blocks": 1,
    "ttt_grad_clip": 0.5,
    "eval_wallclock_seconds": 1e6,
    "num_layers": 3,
    "ve_layers": "1,2",
    "xsa_last_n": 2,
}


def adapted(
    model: GPT, val: Validation, ranks: int = 1, rank: int = 0, **changed: object
) -> tuple[GPT, EvalResult, Run]:
    """A copy of the model after scoring with adaptation, its score, and the run."""
    cfg, copy_of = Config(eval_seq_len=16, **{**TTT, **changed}), copy.deepcopy(model)
    run = Run(cfg, rank, ranks, CPU)
    adapter = Adapter(training_nats, copy_of, val, run)
    with run.ledger.scoring_clock.running():
        result = evaluate("test", training_nats, copy_of, val, run, 8, learner=adapter)
    return copy_of, result, run


def naive_score_first(model: GPT, val: Validation, cfg: Config) -> tuple[GPT, float]:
    """Chunk after chunk: add up its windows' nats, then SGD on its rows, by hand."""
    model, nats, num_targets = copy.deepcopy(model), 0.0, len(val.tokens) - 1
    spans, chunk = windows(num_targets, 16, 8), cfg.ttt_chunk_tokens
    parameters = {
        name: p for name, p in model.named_parameters() if not name.startswith("blocks.0.")
    }
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    chunks = int(spans[-1, 1]) // chunk + 1
    for number in range(chunks):
        for start, first, end in spans.tolist():
            if number * chunk <= first < (number + 1) * chunk:
                with torch.no_grad():
                    ids = torch.from_numpy(val.tokens[start : end + 1].astype(int))[None]
                    nats += float(
                        model(Batch(ids[:, :-1], ids[:, 1:]))[0][0, first - start :].sum()
                    )
        if number == chunks - 1:
            break
        rate = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (chunks - 1)))
        starts = range(number * chunk, (number + 1) * chunk, 16)
        rows = [(start, min(start + 16, (number + 1) * chunk)) for start in starts]
        for _ in range(cfg.ttt_epochs):
            for at in range(0, len(rows), cfg.ttt_batch_seqs):
                batch, total = rows[at : at + cfg.ttt_batch_seqs], 0
                model.zero_grad()
                for start, end in batch:
                    ids = torch.from_numpy(val.tokens[start : end + 1].astype(int))[None]
                    model(Batch(ids[:, :-1], ids[:, 1:]))[0].sum().backward()
                    total += end - start
                norm = math.sqrt(
                    sum(float((p.grad / total).square().sum()) for p in parameters.values())
                )
                for name, p in parameters.items():
                    g = p.grad / total * min(1.0, cfg.ttt_grad_clip / (norm + 1e-6))
                    momentum[name] = cfg.ttt_momentum * momentum[name] + g
                    p.data -= rate * momentum[name]
    return model, nats


def test_score_first_is_scoring_then_sgd_chunk_by_chunk(model: GPT) -> None:
    val = random_split(72, vocab_size=32)
    ours, result, run = adapted(model, val)
    theirs, nats = naive_score_first(model, val, run.cfg)
    assert result.targets == 71
    assert result.nats == pytest.approx(nats, rel=1e-4)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-3, msg=name)
        same = torch.equal(mine, model.get_parameter(name))
        assert same == name.startswith("blocks.0."), name
    chunks = int(windows(71, 16, 8)[-1, 1]) // 20
    assert dict(run.ledger.activity) == dict(run.ledger.occasions) == {"ttt": chunks}


def test_what_comes_later_changes_no_score_before_it(model: GPT) -> None:
    """Nats of each window as they are summed; a chunk's text changes no window before it ends."""

    def window_nats(val: Validation) -> list[tuple[int, float]]:
        seen = []

        def forward(net, batch):
            nats, weights = training_nats(net, batch)
            if not torch.is_grad_enabled():
                seen.extend(nats.double().sum(1).tolist())
            return nats, weights

        cfg, net = Config(eval_seq_len=16, **{**TTT, "eval_batch_seqs": 1}), copy.deepcopy(model)
        run = Run(cfg, 0, 1, CPU)
        evaluate("test", forward, net, val, run, 8, learner=Adapter(forward, net, val, run))
        return seen

    one, other = random_split(72, vocab_size=32), random_split(72, vocab_size=32)
    other.tokens[45:] = (other.tokens[45:] + 1) % 32
    starts = [0, *windows(71, 16, 8)[:, 0]]  # the first window scores two strides
    for start, before, after in zip(starts, window_nats(one), window_nats(other), strict=True):
        assert (before == after) == (start + 16 < 45), start


def test_the_first_chunk_is_scored_without_adaptation(model: GPT) -> None:
    val = random_split(72, vocab_size=32)
    plain = score(val, evaluation(16, eval_batch_seqs=3), 8, training_nats, model)
    assert adapted(model, val, ttt_chunk_tokens=1000)[1].nats == plain.nats
    assert adapted(model, val)[1].nats != plain.nats


def test_ranks_share_the_rows_of_an_adaptation_step(model: GPT) -> None:
    """Contributions of three ranks add up to the one process's gradient; one has no row."""
    val, cfg = random_split(72, vocab_size=32), Config(eval_seq_len=16, **TTT)
    shares: dict[int, list] = {1: [], 3: []}
    for ranks, kept in shares.items():
        for rank in range(ranks):
            net = copy.deepcopy(model)
            run = Run(cfg, rank, ranks, CPU)
            run.ranks.agree, sums = (lambda value: value), []
            run.ranks.add_up = lambda tensors, sums=sums: sums.append([t.clone() for t in tensors])
            adapter = Adapter(training_nats, net, val, run)
            adapter.optimizer.step = lambda: None
            assert adapter.learn(0, 20, 0.1, math.inf) == 1
            kept.append(sums[0])
    total = [sum(parts) for parts in zip(*shares[3], strict=True)]
    for ours, whole in zip(total, shares[1][0], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
    assert not any(part.any() for part in shares[3][2])


def test_adaptation_stops_for_the_budget_and_scoring_does_not(model: GPT) -> None:
    val = random_split(72, vocab_size=32)
    net, result, run = adapted(model, val, eval_wallclock_seconds=0.0)
    plain = score(val, evaluation(16, eval_batch_seqs=3), 8, training_nats, model)
    assert result.nats == pytest.approx(plain.nats, rel=1e-9)
    assert (run.ledger.activity["ttt"], run.ledger.occasions["ttt"]) == (0, 3)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in net.named_parameters())


def test_a_single_chunk_leaves_adaptation_nothing_and_the_log_says_so(
    model: GPT, capsys: pytest.CaptureFixture[str]
) -> None:
    run = adapted(model, random_split(72, vocab_size=32), ttt_chunk_tokens=71)[2]
    run.ledger.log_activity()
    assert "warning: ttt was configured and never acted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "least", "most"),
    [
        (1e6, 9, 9),
        (40.0, 9, 9),
        (20.0, 3, 5),
        (14.0, 0, 2),
        (13.0, 0, 1),
        (12.5, 0, 1),
        (9.0, 0, 0),
    ],
)
def test_adaptation_leaves_the_rest_of_the_scoring_its_time(
    budget: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of our own: ten chunks take about a second to score and two to learn from.

    Nine chunks can be learnt from. A budget of 20 s has room for four or five of them, of which
    the reserve may leave some; it is never passed unless scoring alone passes it.
    """
    now = [0.0]
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    cfg = Config(
        eval_seq_len=16,
        **{
            **TTT,
            "eval_wallclock_seconds": budget,
            "ttt_epochs": 1,
            "ttt_chunk_tokens": 16,
            "eval_batch_seqs": 1,
        },
    )
    run, val = Run(cfg, 0, 1, CPU), random_split(161, vocab_size=32)
    run.ledger.scoring_clock = train_gpt.Clock(lambda: now[0])

    def forward(model, batch):
        now[0] += 0.5
        shape = batch.target_ids.shape
        return torch.zeros(shape), torch.ones(shape)

    stand_in = torch.nn.Linear(2, 2)
    stand_in.blocks = torch.nn.ModuleList()
    adapter = Adapter(forward, stand_in, val, run)
    adapter.learn = lambda *how: now.__setitem__(0, now[0] + 2.0)
    with run.ledger.scoring_clock.running():
        evaluate("test", forward, None, val, run, 8, learner=adapter)
    assert run.ledger.occasions["ttt"] == 9
    assert least <= run.ledger.activity["ttt"] <= most
    scoring = now[0] - 2.0 * run.ledger.activity["ttt"]
    assert 9 <= scoring <= 11
    assert now[0] <= max(budget, scoring)


def test_train_then_score_learns_from_all_of_it_first(model: GPT) -> None:
    val = random_split(72, vocab_size=32)
    cfg = Config(eval_seq_len=16, **{**TTT, "ttt_mode": "train_then_score", "ttt_batch_seqs": 1})
    run, net = Run(cfg, 0, 1, CPU), copy.deepcopy(model)
    train_then_score(Adapter(training_nats, net, val, run), 0.0)
    assert dict(run.ledger.activity) == dict(run.ledger.occasions) == {"ttt": 2 * 5}
    for name, p in net.named_parameters():
        frozen = name.startswith(("blocks.0.", "tok_emb.", "bigram.", "smear."))
        assert torch.equal(p, model.get_parameter(name)) == frozen, name
    late = Run(Config(**{**vars(cfg), "eval_wallclock_seconds": 0.0}), 0, 1, CPU)
    with late.ledger.scoring_clock.running():
        train_then_score(Adapter(training_nats, copy.deepcopy(model), val, late), 0.0)
    assert (late.ledger.activity["ttt"], late.ledger.occasions["ttt"]) == (0, 10)
