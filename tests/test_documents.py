"""Adaptation by document: published numbers, a naive statement of it, order, ranks and budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import golden_kit
import numpy as np
import pytest
import torch
from golden_1855 import build
from golden_kit import PR1855

import train_gpt
from train_gpt import (
    GPT,
    Batch,
    Config,
    DocumentScorer,
    LowRank,
    Run,
    Validation,
    document_queue,
    evaluate_documents,
    training_nats,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, which is faster than two for tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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

    class PublishedDraw(LowRank):
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

    monkeypatch.setattr(train_gpt, "LowRank", PublishedDraw)
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
