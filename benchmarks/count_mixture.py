"""What counts beside a kept record's network are worth, by component, by bytes, and how fast.

    python benchmarks/count_mixture.py components RECORD_FOLDER [--rows FILE.npy] [--only NAME ...]
    python benchmarks/count_mixture.py sizes RECORD_FOLDER [--rows FILE.npy] [--megabytes 0.5 1 2]
        [--picture FILE.png]
    python benchmarks/count_mixture.py long [--tokens 48000000] [--score 2000000]

The network's log-probabilities of the validation text are computed once and kept in --rows;
--targets scores the first of them only. The last command indexes a synthetic stream of that length
and scores some of it with a made-up network. For other seeds, give the folders of their runs, with
rows of their own.
"""

import argparse
import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
from compliance import load_script  # noqa: E402

import train_gpt  # noqa: E402

RATES_OF_0 = {"COUNT_GATE_RATE": "0", "COUNT_MATCH_RATE": "0"}
COMPONENTS = {
    "scored": {"COUNTS": "scored"},
    "artifact": {"COUNTS": "artifact"},
    "artifact, plain constants kept": {"COUNTS": "artifact", **RATES_OF_0},
    "artifact without recent tokens and followers": {
        "COUNTS": "artifact",
        "COUNT_RECENT_TOKENS": "0",
    },
    "both": {"COUNTS": "both"},
    "both, plain constants kept": {"COUNTS": "both", **RATES_OF_0},
    "both without repeats": {"COUNTS": "both", "COUNT_LONGEST_MATCH": "0"},
    "both without recent tokens and followers": {"COUNTS": "both", "COUNT_RECENT_TOKENS": "0"},
    "both without n-grams": {"COUNTS": "both", "COUNT_ORDERS": ""},
    "both with order 8 alone": {"COUNTS": "both", "COUNT_ORDERS": "8"},
    "both with orders 2, 4 and 8": {"COUNTS": "both", "COUNT_ORDERS": "2,4,8"},
    "both with orders 2 and 5": {"COUNTS": "both", "COUNT_ORDERS": "2,5"},
    "both, lessons of 16 targets": {"COUNTS": "both", "COUNT_CHUNK_TOKENS": "16"},
    "both, lessons of 256 targets": {"COUNTS": "both", "COUNT_CHUNK_TOKENS": "256"},
}
LONG_STREAM = {
    "COUNTS": "scored",
    "COUNT_ORDERS": "",
    "COUNT_RECENT_TOKENS": "0",
    "COUNT_GATE_RATE": "0",
    "COUNT_LONGEST_MATCH": "16",
    "COUNT_CHUNK_TOKENS": "1024",
}
ROWS_A_CALL = 2048


@torch.no_grad()
def network_rows(trainer, folder: Path, cfg, val) -> np.ndarray:
    """The artifact's log-probabilities of the targets in sliding windows: float16 (N - 1, V)."""
    _, stored = trainer.read_artifact(folder / "artifact.bin")
    run = trainer.Run(cfg, 0, 1, torch.device("cpu"))
    model = trainer.rebuild_model(cfg, stored, run)
    tokens = torch.from_numpy(val.tokens.astype(np.int64))
    # The oldest entries know no mask.
    masked = "token_mask" in vars(cfg) and cfg.token_mask in ("eval", "1")
    if masked:
        trainer.mask_tokens(model, val, run.device)
    targets = len(tokens) - 1
    T = cfg.eval_seq_len
    rows = np.empty((targets, cfg.vocab_size), np.float16)
    spans = trainer.windows(targets, T, cfg.eval_stride)
    for batch in np.array_split(spans, range(32, len(spans), 32)):
        places = np.minimum(batch[:, :1] + np.arange(T), targets - 1)
        hidden = model.hidden(tokens[places])
        for row, (start, first, end) in enumerate(batch.tolist()):
            before = [tokens[first:end]] if masked else []
            logits = model.logits(hidden[row, first - start : end - start], *before)
            rows[first:end] = logits.log_softmax(1).numpy()
    return rows


class Case:
    """A record's validation text, training text and network."""

    def __init__(self, folder: Path, kept_rows: Path | None, targets: int | None = None) -> None:
        trainer = load_script(folder / "train_gpt.py")
        header, _ = trainer.read_artifact(folder / "artifact.bin")
        cfg, _ = trainer.settings_within(header, {})
        cfg = trainer.locate_validation(cfg, header)
        val = trainer.load_validation(cfg)
        paths = trainer.shard_paths(cfg.data_path, "train")
        self.vocab_size = cfg.vocab_size
        self.validation = val.tokens
        shards = [trainer.open_shard(path, cfg.vocab_size) for path in paths]
        self.training = np.concatenate(shards)
        if kept_rows and kept_rows.is_file():
            self.rows = np.load(kept_rows, mmap_mode="r")
        else:
            self.rows = network_rows(trainer, folder, cfg, val)
            if kept_rows:
                np.save(kept_rows, self.rows)
        self.rows = self.rows[:targets]
        self.validation = self.validation[: len(self.rows) + 1]
        self.num_bytes = int(val.target_bytes[: len(self.rows)].sum())

    def report(self, label: str, settings: dict, training: np.ndarray) -> float:
        """Score the validation text with these settings: bits per byte, printed as a line too."""
        start, cpu = time.perf_counter(), time.process_time()
        cfg, _ = train_gpt.Config.from_env(settings)
        mixture = train_gpt.Mixture(cfg, training, self.validation, self.vocab_size)
        counted = time.perf_counter() - start
        nats = 0.0
        for first in range(0, len(self.rows), ROWS_A_CALL):
            rows = torch.from_numpy(self.rows[first : first + ROWS_A_CALL].astype(np.float32))
            nats += float(mixture.score(rows.log_softmax(1)).sum())
        seconds = time.perf_counter() - start
        bpb = nats / math.log(2) / self.num_bytes
        print(
            f"{label} | {bpb:.4f} | counting {counted:.1f} s, all {seconds:.1f} s, "
            f"CPU {time.process_time() - cpu:.1f} s, {peak_gib():.2f} GiB, "
            f"largest |sum - 1| {mixture.largest_sum_error:.1e}",
            flush=True,
        )
        return bpb


def peak_gib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synthetic_stream(tokens: int, vocab_size: int) -> np.ndarray:
    """Phrases of Zipf-distributed tokens that come again, Zipf-distributed too."""
    generator = np.random.default_rng(0)
    odds = 1 / np.arange(1, vocab_size - 1)
    lengths = generator.geometric(0.15, size=60_000) + 1
    phrases = [
        generator.choice(vocab_size - 2, size=length, p=odds / odds.sum()) + 2
        for length in lengths.tolist()
    ]
    packed = np.concatenate(phrases).astype(np.uint16)
    starts = np.cumsum(lengths) - lengths
    chosen = np.minimum(generator.zipf(1.15, size=tokens // 2), len(phrases)) - 1
    chosen = chosen[: int(np.searchsorted(np.cumsum(lengths[chosen]), tokens)) + 1]
    sizes = lengths[chosen]
    offsets = np.repeat(starts[chosen] - (np.cumsum(sizes) - sizes), sizes)
    return packed[offsets + np.arange(len(offsets))][:tokens]


def score_long_stream(tokens: int, scored: int) -> None:
    """Index a stream of many tokens and score some of them, with hints alone."""
    vocab_size = 1024
    stream = synthetic_stream(tokens, vocab_size)
    cfg, _ = train_gpt.Config.from_env(LONG_STREAM)
    start, cpu = time.perf_counter(), time.process_time()
    mixture = train_gpt.Mixture(cfg, stream[:0], stream, vocab_size, torch.float32)
    counted, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{len(stream):,} tokens: indexed in {counted:.1f} s, CPU {cpu:.1f} s, "
        f"{peak_gib():.2f} GiB",
        flush=True,
    )
    rows = torch.randn(ROWS_A_CALL, vocab_size).log_softmax(1)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(0, scored, ROWS_A_CALL):
        mixture.score(rows)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{mixture.scored:,} targets scored in {seconds:.1f} s, CPU {cpu:.1f} s, "
        f"{peak_gib():.2f} GiB; all of them would take {seconds * tokens / mixture.scored:.0f} s, "
        f"CPU {cpu * tokens / mixture.scored:.0f} s"
    )


def measure_sizes(case: Case, limits: list[int], picture: Path | None) -> None:
    """Bits per byte with training text of so many bytes: the worthiest documents, the first ones.

    The first documents are as many tokens as the worthiest that fit, and are charged as packed.
    """
    nothing = case.report("scored text alone", COMPONENTS["scored"], case.training[:0])
    lines: dict[str, list[tuple[int, float]]] = {
        "the worthiest documents": [(0, nothing)],
        "the first documents": [(0, nothing)],
    }
    for limit in limits:
        packed = train_gpt.pack_within(case.training, limit, train_gpt.BOS)
        worthiest = train_gpt.unpack_tokens(packed, case.vocab_size)
        first = case.training[: len(worthiest)]
        for name, text in zip(lines, (worthiest, first), strict=True):
            num_bytes = len(train_gpt.pack_tokens(text))
            label = f"{name}: {len(text):,} tokens, {num_bytes:,} bytes"
            lines[name].append((num_bytes, case.report(label, COMPONENTS["both"], text)))
    if picture:
        draw_sizes(lines, picture)


def draw_sizes(lines: dict[str, list[tuple[int, float]]], picture: Path) -> None:
    """Bits per byte against bytes of training text in the artifact, a line for each selection."""
    import pictures
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, points), colour in zip(lines.items(), pictures.COLOURS, strict=False):
        num_bytes, scores = zip(*points, strict=True)
        axis.plot(np.array(num_bytes) / 1e6, scores, "o-", color=colour, label=name)
    axis.set_xlabel("training text in the artifact, MB as packed")
    axis.set_ylabel("bits per byte")
    axis.set_title("Network and counts of training and scored text")
    axis.grid(color=pictures.PALE)
    axis.legend(frameon=False)
    pictures.save(figure, picture)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurement", choices=("components", "sizes", "long"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--only", nargs="*", default=list(COMPONENTS))
    parser.add_argument("--targets", type=int)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[0.25, 0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--tokens", type=int, default=48_000_000)
    parser.add_argument("--score", type=int, default=2_000_000)
    given = parser.parse_args()
    if given.measurement == "long":
        score_long_stream(given.tokens, min(given.score, given.tokens - ROWS_A_CALL))
        return
    if given.folder is None:
        raise SystemExit("give the folder of a record, as records/track_cpu_5min/...-mini")
    case = Case(given.folder, given.rows, given.targets)
    if given.measurement == "components":
        for label in given.only:
            case.report(label, COMPONENTS[label], case.training)
        return
    measure_sizes(case, [int(1e6 * megabytes) for megabytes in given.megabytes], given.picture)


if __name__ == "__main__":
    main()
