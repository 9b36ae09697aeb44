"""What the training loader takes of a step's time, and what scoring takes to form its windows.

    python benchmarks/loader.py                    configuration P
    python benchmarks/loader.py pr1361 --tokens 98304 --json FILE

Times TrainingRows.batch() over rows in the order of training, both loaders, on the shards of the
built-in corpus (read before, so from memory), and window_batch() over a batch of windows. With
--tokens a rank's share of a step may be that of a full-size run: 98,304 at eight ranks.
"""

from dataclasses import replace

from measure import arguments, finish, median, seconds, settings, t, table

CORPUS = {
    "DATA_PATH": "./data/datasets/docs_sp1024",
    "TOKENIZER_PATH": "./data/tokenizers/docs_1024_bpe.model",
}


def main() -> None:
    """Time both loaders and the forming of windows."""
    given = arguments(
        __doc__,
        tokens={"type": int, "default": 0, "help": "tokens a batch"},
        times={"type": int, "default": 51, "help": "batches"},
    )
    cfg = t.Config.from_env({**settings(given.configuration), **CORPUS})[0]
    count = (given.tokens or cfg.train_batch_tokens) // cfg.train_seq_len
    rows, facts = [], {}
    for loader in ("sequential", "shuffled"):
        source = t.TrainingRows(replace(cfg, loader=loader))
        took = median(
            seconds(lambda n=n, source=source: source.batch(n * count, count))
            for n in range(given.times)
        )
        facts[loader] = {
            "tokens": count * cfg.train_seq_len,
            "ms": 1e3 * took,
            "tokens/s": count * cfg.train_seq_len / took,
        }
        rows.append((f"{loader} rows", *facts[loader].values()))
    val = t.load_validation(cfg)
    spans = t.windows(val.num_targets(cfg), cfg.eval_seq_len, cfg.eval_stride)
    spans = spans[: cfg.eval_batch_seqs]
    width = cfg.eval_stride or cfg.eval_seq_len
    took = median(
        seconds(lambda: t.window_batch(val, spans, len(spans), width, cfg))
        for _ in range(given.times)
    )
    tokens = cfg.eval_batch_seqs * cfg.eval_seq_len
    facts["windows"] = {"tokens": tokens, "ms": 1e3 * took, "tokens/s": tokens / took}
    rows.append(("windows to score", *facts["windows"].values()))
    table(("", *facts["windows"]), rows)
    finish({"configuration": given.configuration, **facts}, given.json)


if __name__ == "__main__":
    main()
