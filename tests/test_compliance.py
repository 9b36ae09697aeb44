"""The rules of a legal score, each tried on models and scorers made to break it."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "records"))
import compliance

import train_gpt

VOCAB, LENGTH = 32, 24


class Averages(nn.Module):
    """A model that knows the mean of the embeddings so far; `leak` lets it see others too."""

    def __init__(self, leak: str = "", stretch: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.leak, self.stretch = leak, stretch

    def hidden(self, ids: Tensor) -> Tensor:
        """ids: (B, T) -> (B, T, D)."""
        x = self.embed(ids)
        counts = torch.arange(1, ids.size(1) + 1)[:, None]
        so_far = x.cumsum(1) / counts
        if self.leak == "next":
            so_far = so_far + F.pad(x[:, 1:], (0, 0, 0, 1))
        if self.leak == "mean":
            so_far = so_far + x.mean(1, keepdim=True)
        if self.leak == "nothing":  # as a model that cannot see its input at all
            so_far = torch.zeros_like(x)
        return so_far

    def logits(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> (B, T, V)."""
        return x @ self.embed.weight.T

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """ids and targets: (B, T) -> nats (B, T)."""
        logits = self.logits(self.hidden(ids))
        if self.leak == "target":
            logits = logits + F.one_hot(targets, VOCAB)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return self.stretch * nats.view_as(targets), None


def is_a_distribution(model: Averages, vocab_size: int = VOCAB) -> bool:
    score = compliance.scorer_of(SimpleNamespace(), model)
    return compliance.is_a_distribution(model, score, vocab_size, LENGTH)


def test_a_sound_model_passes() -> None:
    assert compliance.is_causal(Averages(), VOCAB, LENGTH)
    assert is_a_distribution(Averages())


@pytest.mark.parametrize("leak", ["next", "mean", "nothing"])
def test_a_model_that_sees_later_tokens_or_none_is_found(leak: str) -> None:
    assert not compliance.is_causal(Averages(leak), VOCAB, LENGTH)


@pytest.mark.parametrize("model", [Averages("target"), Averages(stretch=0.9)])
def test_a_score_that_is_no_distribution_is_found(model: Averages) -> None:
    assert not is_a_distribution(model)


def test_a_vocabulary_of_which_only_a_part_has_probability_is_found() -> None:
    assert not is_a_distribution(Averages(), VOCAB - 1)


@pytest.mark.parametrize(("first_of_second", "sound"), [(8, True), (7, False), (9, False)])
def test_a_target_scored_twice_or_never_is_found(first_of_second: int, sound: bool) -> None:
    def windows(num_targets: int, length: int, stride: int) -> np.ndarray:
        return np.array([(0, 0, 8), (4, first_of_second, num_targets)])

    assert compliance.scores_once(windows, 8, 4, 12) == sound


# A scorer as train_gpt.py has one, in a few lines: chunks are scored, then learned from.


@dataclass(frozen=True)
class Settings:
    """What a script's settings give, some of them in a part of their own."""

    vocab_size: int = VOCAB
    ttt_mode: str = "score_first"
    evaluation: SimpleNamespace = field(default_factory=SimpleNamespace)


class Scorer:
    """The names of a script that compliance.py uses; `ahead` chunks are learned too early."""

    def __init__(self, ttt_mode: str = "score_first", ahead: int = 0, learns: bool = True) -> None:
        self.Config = SimpleNamespace(from_env=lambda env: (Settings(ttt_mode=ttt_mode), []))
        self.Run = self.Validation = lambda *_: SimpleNamespace()
        self.training_nats = None
        self.ahead, self.learns = ahead, learns

    def score_windows(self, forward, net, val, spans) -> None:
        """Nothing needs to be scored: what counts is when."""

    def Adapter(self, forward, model, val, run) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(learn=lambda first, end: 0)

    def evaluate(self, name, forward, model, val, run, stride, form, adapter) -> None:
        chunk = 16
        for first in range(0, 64, chunk):
            self.score_windows(forward, model, val, np.array([(first, first, first + chunk)]))
            if adapter and self.learns:
                adapter.learn(first, first + chunk * (1 + self.ahead))
            elif self.learns:
                with torch.no_grad():
                    model.embed.weight.add_(1.0)


def before_update(scorer: Scorer) -> bool:
    return compliance.scores_before_update(scorer, {"EVAL_SEQ_LEN": "8"}, Averages())


def test_learning_before_scoring_is_found() -> None:
    assert before_update(Scorer())
    assert not before_update(Scorer(ahead=1))
    assert not before_update(Scorer(learns=False))  # configured, and never acted
    assert before_update(Scorer(ttt_mode="off", learns=False))
    assert not before_update(Scorer(ttt_mode="off"))  # weights moved without being said to


# What is added to the windows, by train_gpt.py itself: documents that adapt, counts that grow.

NETWORK = {
    "VOCAB_SIZE": str(VOCAB),
    "NUM_LAYERS": "2",
    "MODEL_DIM": "16",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "ROPE_DIMS": "4",
    "XSA_LAST_N": "1",
    "BIGRAM_VOCAB_SIZE": "0",
    "VE_ENABLED": "0",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "0",
}
BY_DOCUMENT = {
    "TTT_MODE": "lora",
    "LORA_RANK": "2",
    "LORA_LR": "0.01",
    "LORA_CHUNK_TOKENS": "8",
    "LORA_PHASES": "1",
    "LORA_PHASE_CHUNK_TOKENS": "64",
}
COUNTED = {"EVAL_STRIDE": "16", "COUNTS": "scored", "COUNT_CHUNK_TOKENS": "16"}


def additions_keep_the_rule(settings: dict[str, str]) -> bool:
    """Of a small network that was not trained."""

    def fresh() -> train_gpt.GPT:
        torch.manual_seed(0)
        model = train_gpt.GPT(train_gpt.Config.from_env(NETWORK)[0])
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    return compliance.additions_score_first(train_gpt, NETWORK | settings, fresh, {})


class LearnsFirst(train_gpt.DocumentScorer):
    """A scorer of documents that learns from a chunk and then scores it."""

    def score_and_learn(self, documents, first, at, chunk, deltas) -> Tensor:
        own, rows = documents[first:], slice(first, len(documents))
        batch = train_gpt.chunk_batch(self.val, own, at, chunk, self.run.cfg, None)
        nats, _ = train_gpt.nats_and_scores(
            self.model, batch, 0.0, deltas.of_rows(rows, torch.float32)
        )
        deltas.learn(nats.sum())
        self.run.ledger.activity["ttt"] += 1
        return self.score_chunk(own, at, chunk, deltas, rows)[0]


SCORE = train_gpt.Mixture.score


class CountsFirst(train_gpt.Mixture):
    """A mixture that learns from targets and then says what they cost."""

    def score(self, log_probs: Tensor) -> Tensor:
        ahead = copy.deepcopy(self)
        SCORE(ahead, log_probs)
        self.gates, self.biases = ahead.gates, ahead.biases
        return super().score(log_probs)


def test_documents_that_learn_before_they_are_scored_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert additions_keep_the_rule(BY_DOCUMENT)
    monkeypatch.setattr(train_gpt, "DocumentScorer", LearnsFirst)
    assert not additions_keep_the_rule(BY_DOCUMENT)


def test_counts_that_learn_before_they_score_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert additions_keep_the_rule(COUNTED)
    monkeypatch.setattr(train_gpt, "Mixture", CountsFirst)
    assert not additions_keep_the_rule(COUNTED)


def test_a_script_that_is_written_otherwise_is_not_tried(capsys) -> None:
    other = Scorer()
    del other.training_nats
    assert compliance.attempt(lambda: before_update(other)) is None
    assert compliance.attempt(lambda: before_update(Scorer())) is True
    assert "training_nats" in capsys.readouterr().err


def test_settings_are_those_of_the_artifact_and_legal() -> None:
    header = {"settings": {"MODEL_DIM": "64", "TIE": "1"}}
    settings = {"model_dim": 64, "tie": True, "gptq_calib": "train", "seed": 1}
    assert compliance.settings_are_legal(header, settings)
    for wrong in ({"model_dim": 65}, {"tie": False}, {"gptq_calib": "train_after_cap"}):
        assert not compliance.settings_are_legal(header, settings | wrong)


def test_settings_of_parts_are_found_by_their_names() -> None:
    @dataclass(frozen=True)
    class Part:
        width: int = 8

    @dataclass(frozen=True)
    class Whole:
        depth: int = 2
        model: Part = field(default_factory=Part)

    assert compliance.flat(Whole()) == {"depth": 2, "width": 8}
