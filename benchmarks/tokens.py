"""What the parts that work on tokens alone are worth, and what they cost.

    python benchmarks/tokens.py mask ENTRY       what the mask gains at scoring
    python benchmarks/tokens.py tilt ENTRY       what the n-gram tilt gains
    python benchmarks/tokens.py head 1024 64     what the mask costs the head of a training step
    python benchmarks/tokens.py table MODEL...   seconds of a mask's table, pairs forbidden
    python benchmarks/tokens.py hints 47851520   seconds of the hints of so many targets
    python benchmarks/tokens.py caseops 1024     tokens and seconds of CaseOps, built-in text

ENTRY is a folder of records/track_cpu_5min; its model is rebuilt with its own train_gpt.py and
scores in chunks, 32,768 validation tokens for the mask and all for the tilt. "head" times its two
forms in turn, A B A B, for a vocabulary and a width.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
from compliance import load_script  # noqa: E402

import train_gpt  # noqa: E402

SCORED_TOKENS = 32768
BATCH_ROWS = 8


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a model file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def split_tokens(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split."""
    shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards])


class Entry:
    """A kept artifact, its model as the entry's own train_gpt.py rebuilds it, and its data."""

    def __init__(self, folder: Path) -> None:
        trainer = load_script(folder / "train_gpt.py")
        header, stored = trainer.read_artifact(folder / "artifact.bin")
        self.cfg, _ = trainer.settings_within(header, {})
        run = trainer.Run(self.cfg, 0, 1, torch.device("cpu"))
        self.model = trainer.rebuild_model(self.cfg, stored, run)
        self.data = ROOT / f"data/datasets/docs_sp{self.cfg.vocab_size}"
        model_file = ROOT / f"data/tokenizers/docs_{self.cfg.vocab_size}_bpe.model"
        self.tokenizer = load_tokenizer(model_file)

    @torch.no_grad()
    def scored(self, tokens: np.ndarray) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Full chunks of a stream: which targets, input tokens (B, T) and logits (B, T, V)."""
        length = self.cfg.eval_seq_len
        rows = (len(tokens) - 1) // length
        inputs = torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length)
        for row in range(0, rows, BATCH_ROWS):
            ids = inputs[row : row + BATCH_ROWS]
            targets = slice(row * length, row * length + ids.numel())
            yield targets, ids, self.model.logits(self.model.hidden(ids))


def gain_of_mask(folder: Path) -> None:
    """Print violations in the data, and the score with and without the mask."""
    entry = Entry(folder)
    forbidden = train_gpt.forbidden_pairs(entry.tokenizer)
    for split in ("train", "val"):
        tokens = split_tokens(entry.data, split)
        place = train_gpt.check_stream(tokens, forbidden)
        print(f"{split}: {len(tokens):,} tokens, first violation {place}")
    tokens = split_tokens(entry.data, "val")[: SCORED_TOKENS + 1]
    targets = torch.from_numpy(tokens[1:].astype(np.int64))
    penalty = train_gpt.penalties(forbidden)
    sums = np.zeros(2)
    scored = 0
    worst = -math.inf
    for where, ids, logits in entry.scored(tokens):
        own = targets[where]
        plain = cross_entropy(logits.flatten(0, 1), own, reduction="none").double()
        masked = logits + penalty[ids]
        with_mask = cross_entropy(masked.flatten(0, 1), own, reduction="none").double()
        sums += float(plain.sum()), float(with_mask.sum())
        worst = max(worst, float((with_mask - plain).max()))
        scored += len(own)
    report("mask", float(sums[0]) / scored, float(sums[1]) / scored, scored)
    print(f"the most that a token loses: {worst:.1e} nats")


def gain_of_tilt(folder: Path) -> None:
    """Print the score of the whole split with and without the tilt, for some orders."""
    entry = Entry(folder)
    tokens = split_tokens(entry.data, "val")
    targets = tokens[1:].astype(np.int64)
    plain = np.zeros(len(targets))
    forms = [(16, 0.8, 2.625), (8, 0.8, 2.625), (6, 0.8, 2.0), (4, 0.8, 1.5)]
    hints = {form: train_gpt.find_hints(targets, form[0]) for form in forms}
    sums = dict.fromkeys(forms, 0.0)
    scored = 0
    for where, _, logits in entry.scored(tokens):
        flat = logits.flatten(0, 1)
        own = torch.from_numpy(targets[where])
        plain[where] = cross_entropy(flat, own, reduction="none").numpy()
        scored = where.stop
        for form in forms:
            gates = torch.from_numpy(hints[form].gates(form[1])[where])
            tokens_of_hints = torch.from_numpy(hints[form].tokens[where])
            of_hints = cross_entropy(flat, tokens_of_hints, reduction="none")
            nats = torch.from_numpy(plain[where]).float()
            is_hint = own == tokens_of_hints
            tilted = train_gpt.tilted_nats(nats, of_hints, is_hint, gates, form[2])
            sums[form] += float(tilted.double().sum())
    for form in forms:
        order, threshold, beta = form
        gated = hints[form].gates(threshold)[:scored].mean()
        label = f"tilt, order {order}, threshold {threshold}, beta {beta}, {gated:.2%} gated"
        report(label, plain[:scored].mean(), sums[form] / scored, scored)


def report(label: str, plain: float, better: float, scored: int) -> None:
    """Print a mean score with and without a part."""
    share = 1 - better / plain
    print(f"{label}: {scored:,} tokens, {plain:.5f} -> {better:.5f} nats a token, {share:.3%}")


def cost_of_head(vocab_size: int, width: int, pairs: int = 41) -> None:
    """Print what the head takes for 2,048 tokens, forward and backward: plain, masked, in turn."""
    torch.manual_seed(0)
    forbidden = torch.rand(vocab_size, vocab_size) < 0.25
    forbidden[:, 0] = False
    penalty = train_gpt.penalties(forbidden.numpy())
    hidden = torch.randn(8, 256, width, requires_grad=True)
    head = torch.randn(vocab_size, width, requires_grad=True)
    ids = torch.randint(vocab_size, (8, 256))
    given = (hidden, head, torch.zeros_like(ids), 30.0, None, 0.1)
    forms = (
        lambda: train_gpt.HeadNats.apply(*given, ids, None),
        lambda: train_gpt.HeadNats.apply(*given, ids, penalty),
    )
    times: list[list[float]] = [[], []]
    for number in range(2 * (pairs + 2)):
        form = number % 2
        start = time.process_time()  # which other processes disturb least
        forms[form]()[0].mean().backward()
        times[form].append(time.process_time() - start)
    kept = [own[2:] for own in times]
    ratios = [b / a for a, b in zip(*kept, strict=True)]
    medians = [1e3 * statistics.median(own) for own in kept]
    print(
        f"head of {vocab_size} x {width}: {medians[0]:.2f} CPU ms, {medians[1]:.2f} masked; median "
        f"of the pairs' ratios {statistics.median(ratios):.4f}"
    )


def cost_of_table(models: list[str]) -> None:
    """Print how long tables take, and how many pairs they forbid."""
    for model in models:
        tokenizer = load_tokenizer(Path(model))
        start = time.perf_counter()
        forbidden = train_gpt.forbidden_pairs(tokenizer)
        seconds = time.perf_counter() - start
        size = len(forbidden)
        print(
            f"{Path(model).name}: {size} pieces, {seconds:.2f} s, {forbidden.mean():.2%} forbidden"
        )


def cost_of_hints(targets: int) -> None:
    """Print how long the hints of a random stream with long repeats take."""
    source = np.random.default_rng(0)
    stream = source.integers(0, 8192, targets, dtype=np.uint16)
    half = targets // 2
    stream[half : half + half // 10] = stream[: half // 10]
    start = time.perf_counter()
    hints = train_gpt.find_hints(stream)
    seconds = time.perf_counter() - start
    print(f"{targets:,} targets: {seconds:.1f} s, {hints.gates(0.8).mean():.2%} gated")


def tokens_of_caseops(vocab_size: int) -> None:
    """Print how many tokens the built-in validation text is, with CaseOps and without."""
    from data import caseops, prepare

    folder = ROOT / f"data/datasets/docs_sp{vocab_size}"
    plain = load_tokenizer(ROOT / f"data/tokenizers/docs_{vocab_size}_bpe.model")
    texts = {
        split: [
            plain.decode(document[1:].tolist())
            for document in prepare.iter_documents(prepare.shard_paths(folder, split))
        ]
        for split in ("train", "val")
    }
    size = sum(len(text.encode()) for text in texts["train"])
    start = time.perf_counter()
    marked = list(caseops.transformed(texts["train"]))
    seconds = time.perf_counter() - start
    if [caseops.inverse(text) for text in marked] != texts["train"]:
        raise SystemExit("CaseOps lost a text")
    print(
        f"transform: {size / seconds / 1e6:.1f} MB/s; inverse gives all {len(marked):,} texts back"
    )
    plain_train: Any = sentencepiece.SentencePieceTrainer.train

    def train_with_marks(**options: Any) -> None:
        plain_train(**options, **caseops.TRAINER_OPTIONS)

    setattr(sentencepiece.SentencePieceTrainer, "train", train_with_marks)  # noqa: B010
    model = prepare.train_tokenizer(marked, vocab_size, size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    start = time.perf_counter()
    pairs = [caseops.tokens_and_bytes(tokenizer, text) for text in texts["val"]]
    seconds = time.perf_counter() - start
    val_bytes = sum(len(text.encode()) for text in texts["val"])
    if sum(int(counts.sum()) for _, counts in pairs) != val_bytes:
        raise SystemExit("CaseOps lost bytes")
    stream = np.concatenate([ids for ids, _ in pairs])
    before = sum(len(plain.encode(text)) + 1 for text in texts["val"])
    forbidden = train_gpt.forbidden_pairs(tokenizer)
    marks = np.isin(stream, (4, 5, 6, 7)).mean()
    print(
        f"{val_bytes:,} validation bytes: {before:,} tokens, {len(stream):,} with CaseOps "
        f"({len(stream) / before - 1:+.1%}), of which marks {marks:.1%}; "
        f"tokens and bytes {val_bytes / seconds / 1e6:.2f} MB/s; mask: {forbidden.mean():.2%} "
        f"forbidden, first violation {train_gpt.check_stream(stream, forbidden)}"
    )


def main(verb: str, *arguments: str) -> None:
    """Measure what is asked for."""
    if verb == "mask":
        gain_of_mask(Path(arguments[0]))
    elif verb == "tilt":
        gain_of_tilt(Path(arguments[0]))
    elif verb == "head":
        cost_of_head(int(arguments[0]), int(arguments[1]))
    elif verb == "table":
        cost_of_table(list(arguments))
    elif verb == "hints":
        cost_of_hints(int(arguments[0]))
    elif verb == "caseops":
        tokens_of_caseops(int(arguments[0]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
