"""Make a data set to choose settings on: validation is a hold-out of the training split.

    python benchmarks/holdout.py [data/datasets/docs_sp1024] [--share 0.03]

Writes <folder>_holdout beside it. data/prepare.py takes the texts of the lowest keys for
validation, this those of the highest: the hold-out is the same text with every tokenizer. The
validation split of the original is not read. Runs then take DATA_PATH=<folder>_holdout.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import caseops, prepare  # noqa: E402


def is_held_out(text: str, share: float) -> bool:
    """Whether a training document belongs to the hold-out; the lowest keys went to validation."""
    return prepare.Document(text, place="").key >= (1 - share) * prepare.MAX_KEY


def text_of(tokenizer: prepare.Tokenizer, document: np.ndarray) -> str:
    """The text that a document's tokens were made from."""
    text = tokenizer.decode(document)
    return caseops.inverse(text) if tokenizer.marks_capitals else text


def bytes_of(tokenizer: prepare.Tokenizer, document: np.ndarray) -> np.ndarray:
    """The bytes of text that each token of a document stands for."""
    if not tokenizer.marks_capitals:
        return tokenizer.piece_bytes[document]
    _, counts = caseops.tokens_and_bytes(tokenizer.processor, text_of(tokenizer, document))
    return counts


def main() -> None:
    """Split the training shards in two and write the sidecar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/datasets/docs_sp1024"))
    parser.add_argument("--share", type=float, default=0.03)
    given = parser.parse_args()
    sidecar = prepare.read_json(given.folder / "fineweb_val.json")
    if sidecar is None:
        raise SystemExit(f"{given.folder} is no finished data set: run data/prepare.py first")
    tokenizer_path = given.folder.parents[1] / "tokenizers" / sidecar["tokenizer"]["file"]
    tokenizer = prepare.load_tokenizer(tokenizer_path)
    splits: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for document in prepare.iter_documents(prepare.shard_paths(given.folder, "train")):
        held_out = is_held_out(text_of(tokenizer, document), given.share)
        splits["val" if held_out else "train"].append(document)
    if not all(splits.values()):
        raise SystemExit(f"a share of {given.share} leaves one of the splits without a document")
    out = given.folder.with_name(f"{given.folder.name}_holdout")
    out.mkdir(exist_ok=True)
    tokens = {split: np.concatenate(documents) for split, documents in splits.items()}
    for split in splits:
        prepare.write_shard(prepare.shard_path(out, split, 0), tokens[split])
    shard = prepare.shard_path(out, "val", 0)
    token_bytes = np.concatenate([bytes_of(tokenizer, document) for document in splits["val"]])
    num_bytes = int(token_bytes.sum())
    facts = {
        "dataset": out.name,
        "documents": len(splits["val"]),
        "tokens": len(tokens["val"]),
        "raw_bytes": num_bytes,
        "encoded_bytes": num_bytes,
        "val_shards": {shard.name: prepare.file_sha256(shard)},
        "split": f"hold-out of {given.folder.name}: the highest {given.share} of keys",
        "train": {"documents": len(splits["train"]), "tokens": len(tokens["train"])},
    }
    if tokenizer.marks_capitals:
        path = caseops.sidecar_path(out, 0)
        caseops.write_sidecar(path, token_bytes)
        # A tokenizer that folds white space would not have given the texts back.
        hashes = {"val_bytes": {path.name: prepare.file_sha256(path)}}
        facts["caseops"] = {**sidecar["caseops"], **hashes, "published_bytes": num_bytes}
    prepare.write_json(out / "fineweb_val.json", sidecar | facts)
    print(
        f"{out}: {len(tokens['train']):,} training tokens, {len(tokens['val']):,} held out in "
        f"{len(splits['val'])} documents"
    )


if __name__ == "__main__":
    main()
