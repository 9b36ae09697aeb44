"""Adaptation by document: published numbers, a naive statement of it, order, ranks and budget."""

from __future__ import annotations

import copy
import math
import os
import random
import re
import signal
import time
from dataclasses import replace

import golden_kit
import numpy as np
import pytest
import torch
from conftest import TinyData
from golden_1855 import build
from golden_kit import PR1855
from jobs import environment, events, launch, tiny_job
from torch.nn import functional as F

import train_gpt
from train_gpt import (
    BOS,
    GPT,
    Batch,
    Config,
    DocumentDeltas,
    DocumentScorer,
    Refusal,
    Run,
    Validation,
    document_queue,
    evaluate_documents,
    training_nats,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def split_of(tokens: np.ndarray, target_bytes: np.ndarray) -> Validation:
    """A validation split of these tokens."""
    return Validation(tokens.astype(np.uint16), target_bytes.astype(np.int16), "", "", 1, 0)


# The published numbers

PUBLISHED_NAMES = {
    "q": "q_loras.{place}",
    "k": "k_loras.{place}",
    "v": "v_loras.{place}",
    "o": "o_loras.{place}",
    "mlp": "mlp_loras.{place}",
    "head": "lm_head_lora",
}


def published_settings(base: Config) -> Config:
    """The kit's settings of adaptation, with the network of `base`."""
    return replace(
        base,
        ttt_mode="lora",
        eval_seq_len=32,
        eval_stride=0,
        eval_truncate=False,
        eval_wallclock_seconds=1e6,
        lora_rank=2,
        lora_alpha=3.6,
        lora_lr=0.01,
        lora_chunk_tokens=8,
        lora_batch_docs=3,
        lora_lanes=1,
        lora_phases=2,
        lora_phase_docs=4,
        lora_phase_lr=0.01,
        lora_phase_chunk_tokens=64,
        lora_phase_row_tokens=64,
    )


def test_documents_adapt_as_in_1855(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = golden_kit.numbers(PR1855, "ttt")
    facts = golden_kit.facts(PR1855, "ttt")
    model_numbers = golden_kit.numbers(PR1855, "model")
    model = build(model_numbers, golden_kit.facts(PR1855, "model"))
    cfg = published_settings(model.cfg)
    val = split_of(numbers["val_tokens"].numpy(), numbers["val_bytes"].numpy()[1:])
    run = Run(cfg, 0, 1, CPU)

    queue = [[[int(a), int(b - a) + 1] for a, b in batch] for batch in document_queue(val, cfg)]
    assert queue == [[span for _, span in batch] for _, batch in facts["queue"]]

    drawn = 0

    class PublishedDraw(DocumentDeltas):
        """Deltas that begin with the published A."""

        def __init__(self, *given) -> None:
            super().__init__(*given)
            nonlocal drawn
            drawn += 1
            for place, deltas in enumerate(self.layers):
                for name, (down, _) in deltas.items():
                    published = f"{PUBLISHED_NAMES[name]}.A".format(place=place)
                    down.data.copy_(numbers[f"lora_init/{drawn}/{published}"])
            down, _ = self.head
            down.data.copy_(numbers[f"lora_init/{drawn}/lm_head_lora.A"])

    errors, sgd, bases = [], [], []
    score = train_gpt.nats_and_scores

    def recorded(net: GPT, batch: Batch, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        if len(rest) == 1:  # without deltas: what scoring takes is measured
            return score(net, batch, *rest)
        assert drawn == facts["calls"][len(errors)]["lora"]
        nats, scores = score(net, batch, *rest)
        published = numbers[f"call/{len(errors):02}/loss"][-len(nats) :]
        ours, theirs = nats.detach(), published.gather(1, batch.places)
        errors.append(float(((ours - theirs) * batch.scored).abs().max()))
        return nats, scores

    def forward(net: GPT, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        nats, weights = training_nats(net, batch)
        sgd.append((batch.input_ids.flatten().tolist(), float(nats.detach().mean())))
        return nats, weights

    learn = DocumentScorer.learn_together

    def then_kept(scorer: DocumentScorer, documents: np.ndarray) -> None:
        learn(scorer, documents)
        bases.append({n: p.detach().clone() for n, p in model.named_parameters()})

    monkeypatch.setattr(train_gpt, "DocumentDeltas", PublishedDraw)
    monkeypatch.setattr(train_gpt, "nats_and_scores", recorded)
    monkeypatch.setattr(DocumentScorer, "learn_together", then_kept)
    result = evaluate_documents("test", forward, model, val, run)

    assert len(errors) == len(facts["calls"])
    assert max(errors) < 1e-4
    shown = [tokens for tokens, _ in sgd]
    streams = facts["global_sgd_tokens"]
    assert shown == [streams[0][:64], streams[1][:64], streams[1][64:128]]
    for (_, loss), step in zip(sgd, facts["global_sgd_steps"], strict=True):
        assert loss == pytest.approx(step["loss"], abs=1e-4)
    for phase, base in enumerate(bases, start=1):
        for name in ("skip_weights", "tok_emb.weight"):
            published = numbers[f"after_global_sgd/{phase}/{name}"]
            torch.testing.assert_close(base[name], published, rtol=0, atol=1e-5)
    assert (result.targets, result.num_bytes) == (facts["tokens_scored"], facts["bytes"])
    assert result.loss == pytest.approx(facts["val_loss"], abs=1e-5)
    assert result.bpb == pytest.approx(facts["val_bpb"], abs=1e-5)


# A naive statement


@pytest.fixture(scope="module")
def model() -> GPT:
    """A small model with a loop and shared first values, whose every parameter is random."""
    torch.manual_seed(0)
    net = GPT(small_settings())
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net


def small_settings(**changed: object) -> Config:
    """Settings of the small model and its adaptation; some documents are longer than a window."""
    settings = {
        "vocab_size": 32,
        "num_layers": 3,
        "num_loops": 1,
        "loop_start": 0,
        "loop_end": 1,
        "vrl_mode": "mix",
        "xsa_last_n": 2,
        "ve_layers": "1,2",
        "model_dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_dims": 4,
        "rope_ntk_ref": 8,
        "bigram_vocab_size": 32,
        "bigram_dim": 8,
        "ve_dim": 8,
        "eval_seq_len": 16,
        "eval_stride": 8,
        "eval_batch_seqs": 2,
        "eval_wallclock_seconds": 1e6,
        "ttt_mode": "lora",
        "lora_rank": 2,
        "lora_alpha": 3.0,
        "lora_lr": 0.05,
        "lora_chunk_tokens": 4,
        "lora_batch_docs": 3,
        "lora_lanes": 2,
    }
    return Config(**{**settings, **changed})


LENGTHS = (5, 23, 3, 9, 40, 11, 6, 4, 17, 2, 13)


def small_split(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Validation:
    """Documents of random tokens, each after a BOS."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 32, sum(lengths))
    tokens[np.cumsum((0, *lengths[:-1]))] = BOS
    return split_of(tokens, rng.integers(0, 9, len(tokens) - 1))


def scored_by(
    model: GPT, val: Validation, cfg: Config, rank: int = 0, ranks: int = 1, forward=training_nats
) -> tuple[train_gpt.EvalResult, Run]:
    """A copy of the model scored document by document, and the run."""
    run = Run(cfg, rank, ranks, CPU)
    run.ranks.agree = run.ranks.largest = lambda value: value
    run.ranks.add_up = lambda tensors: None
    run.ledger.scoring_clock = train_gpt.Clock(time.perf_counter)
    with run.ledger.scoring_clock.running():
        return evaluate_documents("test", forward, copy.deepcopy(model), val, run), run


def naive_nats(
    model: GPT, val: Validation, cfg: Config, drawn: list[dict[str, torch.Tensor]]
) -> float:
    """Documents one by one: dense weights W + s B A in each layer of the plan, Adam by hand.

    drawn: the A of every new set of deltas, in the order in which sets are made, by place and name.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for block in model.blocks:  # another kernel, so that every matrix is a module that is called
        block.attn.kernel = lambda *qkv: train_gpt.sdpa_attention(*qkv)
    tokens = torch.from_numpy(val.tokens.astype(int))
    starts = [*np.flatnonzero(val.tokens[:-1] == BOS).tolist(), len(tokens) - 1]
    documents = sorted(zip(starts, starts[1:], strict=False), key=lambda d: d[1] - d[0])
    size = cfg.lora_batch_docs
    batches = [documents[n : n + size] for n in range(0, len(documents), size)][::-1]
    kept: dict[int, list[dict[str, torch.Tensor]]] = {}
    drawn = list(drawn)
    total = 0.0
    for number, batch in enumerate(batches):
        lane = number % cfg.lora_lanes
        if lane not in kept or len(kept[lane]) != len(batch):
            new = drawn.pop(0)
            kept[lane] = [{n: a[row].clone() for n, a in new.items()} for row in range(len(batch))]
        steps = (batch[-1][1] - batch[-1][0] - 1) // cfg.lora_chunk_tokens
        for row, (first, end) in enumerate(batch):
            total += naive_document(model, tokens, first, end, kept[lane][row], steps, cfg)
    assert not drawn
    return total


def naive_document(
    model: GPT,
    tokens: torch.Tensor,
    first: int,
    end: int,
    downs: dict[str, torch.Tensor],
    steps: int,
    cfg: Config,
) -> float:
    """Nats of one document, and `downs` as they are after all `steps` of its batch."""
    widths = {"k": 8, "v": 8, "head": 32}
    ups = {n: torch.zeros(widths.get(n.split("/")[-1], 16), 2) for n in downs}
    pairs = [(n, which) for n in downs for which in (downs, ups)]
    squares = [torch.zeros_like(which[n]) for n, which in pairs]
    total, chunk = 0.0, cfg.lora_chunk_tokens
    for step in range(steps + 1):
        at = first + step * chunk
        learns = at + chunk < end
        grads = [torch.zeros_like(which[n]) for n, which in pairs]
        if at < end:
            stop = min(at + chunk, end)
            start = max(first, stop - cfg.eval_seq_len)
            ids = F.pad(tokens[start:stop], (0, cfg.eval_seq_len - (stop - start)))[None]
            for n, which in pairs:
                which[n].requires_grad_(True)
            with_dense_deltas(model, downs, ups, cfg)
            log_probs = torch.log_softmax(dense_logits(model, ids, downs, ups, cfg), -1)[0]
            nats = -log_probs[torch.arange(at - start, stop - start), tokens[at + 1 : stop + 1]]
            total += float(nats.detach().double().sum())
            if learns:
                grads = torch.autograd.grad(
                    nats.mean(), [which[n] for n, which in pairs], materialize_grads=True
                )
            for n, which in pairs:
                which[n].requires_grad_(False)
        if step == steps:
            break
        for index, (n, which) in enumerate(pairs):
            squares[index] = 0.99 * squares[index] + 0.01 * grads[index] ** 2
            unbiased = squares[index] / (1 - 0.99 ** (step + 1))
            decayed = which[n] * (1 - cfg.lora_lr * cfg.lora_decay)
            which[n] = decayed - cfg.lora_lr * grads[index] / (unbiased.sqrt() + 1e-10)
    return total


HOOKS: list = []


def with_dense_deltas(model: GPT, downs: dict, ups: dict, cfg: Config) -> None:
    """Let every module of the model add s (B A) x at the place of the plan that it is at."""
    for hook in HOOKS:
        hook.remove()
    HOOKS.clear()
    scale = cfg.lora_alpha / cfg.lora_rank
    at = {"place": -1}

    def dense(name: str, place: int) -> torch.Tensor:
        key = f"{place}/{name}"
        return scale * ups[key] @ downs[key]

    def begins(module, given) -> None:
        at["place"] += 1

    def of(name: str):
        def added(module, given, y):
            # Before the first layer, layer 0's values are asked for by themselves.
            delta = given[0] @ dense(name, max(at["place"], 0)).T
            gain = given[1] if name in ("o", "mlp") else 1.0  # of what a layer adds to the stream
            return y + gain * delta

        return added

    for block in model.blocks:
        HOOKS.append(block.register_forward_pre_hook(begins))
        modules = {
            "q": block.attn.c_q,
            "k": block.attn.c_k,
            "v": block.attn.c_v,
            "o": block.attn,
            "mlp": block.mlp,
        }
        for name, module in modules.items():
            HOOKS.append(module.register_forward_hook(of(name)))


def dense_logits(
    model: GPT, ids: torch.Tensor, downs: dict, ups: dict, cfg: Config
) -> torch.Tensor:
    """Logits of a row, the head's weight being W + s B A."""
    hidden = model.hidden(ids)
    for hook in HOOKS:
        hook.remove()
    weight = model.head.weight + cfg.lora_alpha / cfg.lora_rank * ups["head"] @ downs["head"]
    return cfg.logit_softcap * torch.tanh(hidden @ weight.T / cfg.logit_softcap)


def test_documents_adapt_as_dense_weights_would(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, val = small_settings(), small_split()
    drawn: list[dict[str, torch.Tensor]] = []

    class Recorded(DocumentDeltas):
        """Deltas whose A is kept when they are made."""

        def __init__(self, *given) -> None:
            super().__init__(*given)
            own = {
                f"{place}/{name}": down.detach().clone()
                for place, deltas in enumerate(self.layers)
                for name, (down, _) in deltas.items()
            }
            drawn.append(own | {"head": self.head[0].detach().clone()})

    monkeypatch.setattr(train_gpt, "DocumentDeltas", Recorded)
    result, run = scored_by(model, val, cfg)
    assert result.targets == sum(LENGTHS) - 1
    assert result.num_bytes == val.target_bytes.sum()
    assert result.nats == pytest.approx(naive_nats(model, val, cfg, drawn), rel=2e-5)
    still, _ = scored_by(model, val, replace(cfg, lora_lr=0.0))
    assert abs(result.nats - still.nats) > 1.0
    lengths = sorted([*LENGTHS[:-1], LENGTHS[-1] - 1])
    batches = [lengths[n : n + 3] for n in range(0, len(lengths), 3)]
    assert run.ledger.activity["ttt"] == sum((batch[-1] - 1) // 4 for batch in batches)


# Scores come before updates

Nats = dict[int, tuple[int, float]]  # by target: the number of the call that scored it, its nats


def nats_by_target(
    model: GPT, val: Validation, cfg: Config, scorer: type[DocumentScorer] = DocumentScorer
) -> Nats:
    """What each target costs and when it was scored."""
    found: Nats = {}
    calls = 0
    plain = scorer.score_chunk

    def recorded(self, documents, at, width, *rest):
        nonlocal calls
        calls += 1
        sums, nats = plain(self, documents, at, width, *rest)
        for row, (first, end) in zip(nats.tolist(), documents.tolist(), strict=True):
            for target in range(first + at, min(first + at + width, end)):
                assert target not in found
                found[target] = calls, row[target - first - at]
        return sums, nats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "score_chunk", recorded)
        patch.setattr(train_gpt, "DocumentScorer", scorer)
        result, _ = scored_by(model, val, cfg)
    assert sorted(found) == list(range(val.num_targets(cfg)))
    assert result.nats == pytest.approx(sum(nats for _, nats in found.values()), rel=1e-6)
    return found


def earlier_scores_stay(
    model: GPT, cfg: Config, scorer: type[DocumentScorer] = DocumentScorer
) -> bool:
    """Whether no token changes the score of a target that was scored before it."""
    val = small_split(lengths=(3, 13, 6, 9))
    before = nats_by_target(model, val, cfg, scorer)
    acted = False
    for changed in range(1, len(val.tokens) - 1, 2):
        if val.tokens[changed] == BOS:
            continue
        other = copy.deepcopy(val)
        other.tokens[changed] = 2 + (val.tokens[changed] - 1) % 30
        after = nats_by_target(model, other, cfg, scorer)
        call = before[changed - 1][0]
        numbers = np.cumsum(val.tokens == BOS)
        document = np.flatnonzero(val.tokens[:changed] == BOS)[-1]
        for target, (scored_at, nats) in before.items():
            same_document = document <= target < changed - 1
            beside = scored_at == call and numbers[target] != numbers[changed]
            earlier = scored_at < call or beside
            if (same_document or earlier) and after[target][1] != nats:
                return False
            elsewhere = numbers[target] != numbers[changed]
            acted |= scored_at > call and elsewhere and after[target][1] != nats
    assert acted  # a later batch begins with the A that this document has shaped
    return True


class LearnsFirst(DocumentScorer):
    """A scorer that learns from a chunk and then scores it."""

    def score_and_learn(self, documents, first, at, chunk, deltas):
        own, rows = documents[first:], slice(first, len(documents))
        goes_on = torch.from_numpy(own[:, 1] - own[:, 0] > at + chunk)
        if goes_on.any():
            batch = train_gpt.chunk_batch(self.val, own, at, chunk, self.run.cfg, self.hints)
            row_deltas = deltas.of_rows(rows, torch.float32)
            nats, _ = train_gpt.nats_and_scores(self.model, batch, 0.0, row_deltas)
            deltas.learn((nats * goes_on[:, None]).sum() / chunk)
        return self.score_chunk(own, at, chunk, deltas, rows)[0]


def test_a_chunk_is_scored_before_it_is_learned(model: GPT) -> None:
    cfg = small_settings(lora_lanes=1, lora_batch_docs=2, lora_places="v,head")
    assert earlier_scores_stay(model, cfg)
    assert not earlier_scores_stay(model, cfg, LearnsFirst)


def test_phases_learn_only_from_documents_that_are_scored(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_settings(
        lora_lanes=1,
        lora_phases=2,
        lora_phase_docs=8,
        lora_phase_chunk_tokens=16,
        lora_phase_row_tokens=8,
        lora_phase_lr=0.1,
    )
    val, seen = small_split(), []
    scored: list[int] = []
    learn, score = DocumentScorer.learn_together, DocumentScorer.score

    def then_noted(self, documents, lane):
        scored.extend(documents[:, 0].tolist())
        return score(self, documents, lane)

    def watched(self, documents):
        seen.append((set(documents[:, 0].tolist()) <= set(scored), len(documents)))
        learn(self, documents)

    monkeypatch.setattr(DocumentScorer, "score", then_noted)
    monkeypatch.setattr(DocumentScorer, "learn_together", watched)
    result, run = scored_by(model, val, cfg)
    assert seen == [(True, 4), (True, 8)]
    assert run.ledger.activity["ttt_phases"] == run.ledger.occasions["ttt_phases"] > 3
    without, _ = scored_by(model, val, replace(cfg, lora_phases=0))
    assert result.nats != without.nats


# Ranks, the budget, refusals


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up_to_the_one_process(model: GPT, ranks: int) -> None:
    cfg, val = small_settings(lora_lanes=3), small_split()
    one, _ = scored_by(model, val, cfg)
    parts = [scored_by(model, val, cfg, rank, ranks)[0] for rank in range(ranks)]
    assert all(part.targets for part in parts[: min(ranks, 3)])
    assert sum(part.targets for part in parts) == one.targets
    assert sum(part.nats for part in parts) == pytest.approx(one.nats, rel=1e-12)


def test_what_the_budget_does_not_hold_is_scored_without_learning(model: GPT, capsys) -> None:
    cfg, val = small_settings(eval_wallclock_seconds=0.0), small_split()
    result, run = scored_by(model, val, cfg)
    assert result.targets == sum(LENGTHS) - 1
    assert (run.ledger.activity["ttt"], run.ledger.occasions["ttt"]) == (0, 15)
    assert re.search(r"warning: 8 of 11 documents were adapted to less", capsys.readouterr().out)
    plain, _ = scored_by(model, val, replace(cfg, eval_wallclock_seconds=1e6, lora_lr=0.0))
    assert result.nats == pytest.approx(plain.nats, rel=0.02)  # windows of long documents differ


class ImaginedMachine:
    """A clock of seconds that a call of the network, its places and learning steps take.

    From `slows_at` seconds on everything takes half as long again.
    """

    def __init__(self, call: float, place: float, deltas: float, learning: float) -> None:
        self.call, self.place, self.deltas, self.learning = call, place, deltas, learning
        self.now, self.slows_at = 0.0, math.inf

    def spend(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds * (1.5 if self.now > self.slows_at else 1.0)

    def evaluate(self, model: GPT, budget: float) -> tuple[float, Run]:
        """Seconds that the scoring of the small split takes, and the run."""
        score, learn = train_gpt.nats_and_scores, DocumentDeltas.learn
        self.now = 0.0

        def slow_score(net, batch, tilt, adapters=None):
            places = batch.input_ids.numel() * (1.0 if adapters is None else self.deltas)
            self.spend(self.call + self.place * places)
            return score(net, batch, tilt, adapters)

        def slow_learn(deltas, loss):
            self.spend(self.learning)
            learn(deltas, loss)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: self.now)
            patch.setattr(train_gpt, "nats_and_scores", slow_score)
            patch.setattr(DocumentDeltas, "learn", slow_learn)
            cfg = small_settings(eval_wallclock_seconds=budget)
            result, run = scored_by(model, small_split(), cfg)
        assert result.targets == sum(LENGTHS) - 1
        return self.now, run


@pytest.mark.parametrize("seed", range(8))
def test_learning_ends_when_the_rest_needs_the_time(model: GPT, seed: int) -> None:
    """A budget that holds the scoring is kept, and what learning would need is not wasted.

    Also where the machine slows down in the middle.
    """
    draw = random.Random(seed)
    call, place, deltas = draw.uniform(0, 1), draw.uniform(0.001, 0.1), draw.uniform(1, 3)
    learning, share, slows = draw.uniform(0, 10), draw.uniform(0, 1.5), seed % 2 == 1
    machine = ImaginedMachine(call, place, deltas, learning)
    least, run = machine.evaluate(model, 0.0)
    assert run.ledger.activity["ttt"] == 0
    most, run = machine.evaluate(model, 1e9)
    assert run.ledger.activity["ttt"] == run.ledger.occasions["ttt"] == 15
    if slows:
        machine.slows_at = 0.5 * least
        least *= 1.5
        most *= 1.5
    budget = 1.5 * least + share * (most - least)
    seconds, run = machine.evaluate(model, budget)
    assert seconds <= 1.02 * budget
    if run.ledger.activity["ttt"] < 15:
        assert seconds > 0.6 * budget


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"counts": "scored"}, "COUNTS"),
        ({"lora_places": "q,w"}, "LORA_PLACES"),
        ({"lora_places": "q,q"}, "LORA_PLACES"),
        ({"lora_short_chunks": "256"}, "LORA_SHORT_CHUNKS"),
        ({"lora_short_chunks": "256:32"}, "EVAL_SEQ_LEN"),
        ({"lora_chunk_tokens": 17}, "EVAL_SEQ_LEN"),
        ({"lora_phase_row_tokens": 64, "lora_phase_chunk_tokens": 32}, "LORA_PHASE_ROW_TOKENS"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict, complaint: str) -> None:
    with pytest.raises(Refusal, match=complaint):
        small_settings(**changed)


def test_short_documents_have_short_chunks(model: GPT) -> None:
    cfg = small_settings(lora_short_chunks="6:2,12:3", lora_lanes=1)
    calls: dict[int, int] = {}
    for call, _ in nats_by_target(model, small_split(), cfg).values():
        calls[call] = calls.get(call, 0) + 1
    batches = [(23, 40), (11, 12, 17), (5, 6, 9), (2, 3, 4)]
    widths = [4, 4, 3, 2]
    expected = [
        sum(min(max(length - at, 0), width) for length in batch)
        for batch, width in zip(batches, widths, strict=True)
        for at in range(0, batch[-1], width)
    ]
    assert [calls[n + 1] for n in range(len(calls))] == expected


# Hints in the order of scoring


def test_no_hint_comes_from_a_document_that_is_scored_later() -> None:
    cfg = small_settings(ngram_tilt=1.0, ngram_order=3, ngram_threshold=0.0)
    val = small_split()
    val.tokens[:] = np.where(val.tokens == BOS, BOS, 2 + val.tokens % 3)
    queue = document_queue(val, cfg)
    order = np.concatenate([np.arange(*document) for batch in queue for document in batch])
    run = Run(cfg, 0, 1, CPU)
    hints = train_gpt.hints_in_order(val, order, run)
    when = np.argsort(order)  # at which place a target is scored
    assert (hints >= 0).sum() > 20
    for changed in np.flatnonzero(val.tokens != BOS)[:-1]:
        other = copy.deepcopy(val)
        other.tokens[changed] = 5 - (val.tokens[changed] - 2)
        others = train_gpt.hints_in_order(other, order, run)
        same = when <= when[changed - 1]
        assert np.array_equal(hints[same], others[same])
    in_text = train_gpt.hints_in_order(val, None, run)
    assert not np.array_equal(hints, in_text)


def test_the_score_is_tilted_and_the_learning_is_not(model: GPT) -> None:
    cfg = small_settings(ngram_order=2, ngram_threshold=0.0)
    val = small_split()
    val.tokens[:] = np.where(val.tokens == BOS, BOS, 2 + val.tokens % 3)
    plain = nats_by_target(model, val, cfg)
    tilted, run = scored_by(model, val, replace(cfg, ngram_tilt=2.0))
    with_tilt = nats_by_target_untilted(model, val, replace(cfg, ngram_tilt=2.0))
    assert with_tilt == {target: nats for target, (_, nats) in plain.items()}
    assert tilted.nats != pytest.approx(sum(with_tilt.values()), rel=1e-3)
    assert run.ledger.activity["ngram_tilt"] > 20


def nats_by_target_untilted(model: GPT, val: Validation, cfg: Config) -> dict[int, float]:
    """The nats that are learned from, by target."""
    found: dict[int, float] = {}
    plain = DocumentScorer.score_chunk

    def recorded(self, documents, at, width, *rest):
        sums, nats = plain(self, documents, at, width, *rest)
        for row, (first, end) in zip(nats.tolist(), documents.tolist(), strict=True):
            for target in range(first + at, min(first + at + width, end)):
                found[target] = row[target - first - at]
        return sums, nats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DocumentScorer, "score_chunk", recorded)
        scored_by(model, val, cfg)
    return found


# Whole runs

ADAPTED = {
    "TTT_MODE": "lora",
    "LORA_RANK": "4",
    "LORA_ALPHA": "8",
    "LORA_LR": "0.01",
    "LORA_CHUNK_TOKENS": "16",
    "LORA_BATCH_DOCS": "2",
    "LORA_PHASES": "1",
    "LORA_PHASE_DOCS": "6",
    "LORA_PHASE_CHUNK_TOKENS": "128",
    "LORA_PHASE_LR": "0.01",
    "NGRAM_TILT": "2.625",
    "NGRAM_ORDER": "4",
    "ITERATIONS": "8",
}


def test_several_processes_give_the_score_of_one(tiny_data: TinyData, tmp_path, capsys) -> None:
    job = tiny_job(tiny_data, tmp_path, "one", **ADAPTED)
    with environment(**job):
        assert train_gpt.main([]) == 0
    folder, (final,) = tmp_path / "one", events(tmp_path / "one", "final")
    scores = {e["name"]: e["val_bpb"] for e in events(folder, "eval")}
    assert final["val_bpb"] == scores["artifact_documents"] != scores["artifact_sliding_no_ttt"]
    acted = {e["name"]: (e["steps"], e["of"]) for e in events(folder, "activity")}
    for name in ("ttt", "ttt_phases"):
        assert acted[name][0] == acted[name][1] > 0, name
    assert acted["ngram_tilt"][0] > 0
    capsys.readouterr()
    data = {"DATA_PATH": job["DATA_PATH"], "TOKENIZER_PATH": job["TOKENIZER_PATH"]}
    with environment(**data):
        assert train_gpt.main(["--eval", str(folder / "artifact.bin")]) == 0
    assert f"val_bpb:{final['val_bpb']:.8f} " in capsys.readouterr().out
    for processes in (2, 3):
        done = launch("--eval", str(folder / "artifact.bin"), processes=processes, **data)
        assert done.returncode == 0, done.stderr
        score = float(re.search(r"^val_bpb:(\S+)", done.stdout, re.M)[1])
        assert score == pytest.approx(final["val_bpb"], abs=2e-5)


def test_a_signal_ends_the_adaptation_cleanly(tiny_data: TinyData, tmp_path, monkeypatch) -> None:
    learn = DocumentDeltas.learn

    def then_asked(self, loss) -> None:
        learn(self, loss)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DocumentDeltas, "learn", then_asked)
    with (
        environment(**tiny_job(tiny_data, tmp_path, "cut", **ADAPTED)),
        pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)),
    ):
        train_gpt.main([])
    folder = tmp_path / "cut"
    assert (folder / "artifact.bin").stat().st_size > 0
    assert not events(folder, "final")
    data = {
        "DATA_PATH": str(tiny_data.data_path),
        "TOKENIZER_PATH": str(tiny_data.tokenizer_path),
    }
    done = launch("--eval", str(folder / "artifact.bin"), **data, TTT_MODE="off")
    assert done.returncode == 0, done.stderr
