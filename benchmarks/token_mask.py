"""What the canonical-token mask gives a kept artifact at scoring alone, and what it costs a step.

    python benchmarks/token_mask.py gain records/track_cpu_5min/ENTRY
    python benchmarks/token_mask.py cost mini 31        a preset, 31 timed pairs of steps

"gain" first checks both splits of the entry's data for forbidden pairs. It rebuilds the model with
the entry's own train_gpt.py and scores the first 32,768 validation tokens in chunks, with and
without the mask. "cost" times training steps in turn, A B A B, with the head's two forms.
"""

import importlib.util
import math
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import token_mask

ROOT = Path(__file__).resolve().parents[1]
SCORED_TOKENS = 32768


def entry_module(folder: Path) -> ModuleType:
    """The entry's own train_gpt.py."""
    spec = importlib.util.spec_from_file_location("entry_train_gpt", folder / "train_gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def split_tokens(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split."""
    shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards])


def gain(folder: Path) -> None:
    """Print violations in the data, and the score with and without the mask."""
    trainer = entry_module(folder)
    header, stored = trainer.read_artifact(folder / "artifact.bin")
    cfg, _ = trainer.settings_within(header, {})
    vocabulary = cfg.vocab_size
    data = ROOT / f"data/datasets/docs_sp{vocabulary}"
    model_file = ROOT / f"data/tokenizers/docs_{vocabulary}_bpe.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    start = time.perf_counter()
    forbidden = token_mask.forbidden_pairs(tokenizer)
    print(f"table: {time.perf_counter() - start:.2f} s, {forbidden.mean():.2%} of pairs forbidden")
    for split in ("train", "val"):
        tokens = split_tokens(data, split)
        start = time.perf_counter()
        place = token_mask.check_stream(tokens, forbidden)
        seconds = time.perf_counter() - start
        print(f"{split}: {len(tokens):,} tokens, first violation {place}, {seconds:.2f} s")
    run = trainer.Run(cfg, 0, 1, torch.device("cpu"))
    model = trainer.rebuild_model(cfg, stored, run)
    penalty = token_mask.penalties(forbidden)
    tokens = torch.from_numpy(split_tokens(data, "val").astype(np.int64))[: SCORED_TOKENS + 1]
    rows = (len(tokens) - 1) // cfg.eval_seq_len
    shape = (rows, cfg.eval_seq_len)
    inputs = tokens[:-1][: rows * cfg.eval_seq_len].view(shape)
    targets = tokens[1:][: rows * cfg.eval_seq_len].view(shape)
    sums = np.zeros(2)
    worst = -math.inf
    with torch.no_grad():
        for row in range(0, rows, 8):
            ids = inputs[row : row + 8]
            logits = model.logits(model.hidden(ids))
            pair = []
            for form in (logits, token_mask.masked(logits, ids, penalty)):
                nats = torch.nn.functional.cross_entropy(
                    form.flatten(0, 1), targets[row : row + 8].flatten(), reduction="none"
                )
                pair.append(nats.double())
            sums += [float(nats.sum()) for nats in pair]
            worst = max(worst, float((pair[1] - pair[0]).max()))
    plain, with_mask = sums / inputs.numel()
    print(
        f"{inputs.numel():,} tokens: {plain:.5f} nats a token, {with_mask:.5f} with the mask: "
        f"{plain - with_mask:.5f} = {1 - with_mask / plain:.2%}; most a token loses {worst:.1e}"
    )


def cost(preset: str, pairs: int) -> None:
    """Print how much longer steps take with the mask in the head."""
    from measure import Bench, t

    bench = Bench(preset, "COMPILE=0")
    path = str(ROOT / bench.cfg.tokenizer_path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
    penalty = token_mask.penalties(token_mask.forbidden_pairs(tokenizer))
    plain_apply = t.HeadNats.apply
    plain_forward = t.GPT.forward
    seen: list[torch.Tensor] = []

    def forward(model: t.GPT, input_ids: torch.Tensor, *rest: object) -> object:
        seen[:] = [input_ids]
        return plain_forward(model, input_ids, *rest)

    def masked_apply(*given: object) -> object:
        return token_mask.MaskedHeadNats.apply(*given, seen[0], penalty)

    t.GPT.forward = forward
    times: list[list[float]] = [[], []]
    for number in range(2 * (pairs + 2)):
        form = number % 2
        t.HeadNats.apply = masked_apply if form else plain_apply
        start = time.perf_counter()
        bench.step(number)
        times[form].append(time.perf_counter() - start)
    kept = [own[2:] for own in times]
    ratios = [b / a for a, b in zip(*kept, strict=True)]
    medians = [1e3 * statistics.median(own) for own in kept]
    print(
        f"{preset}: {medians[0]:.2f} ms a step, {medians[1]:.2f} with the mask; medians' ratio "
        f"{medians[1] / medians[0]:.4f}, median of the pairs' ratios {statistics.median(ratios):.4f}"
    )


if __name__ == "__main__":
    if sys.argv[1] == "gain":
        gain(Path(sys.argv[2]))
    else:
        cost(sys.argv[2], int(sys.argv[3]))
