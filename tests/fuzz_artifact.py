"""Hostile artifacts of under 4 kB through the reader, all in one process.

    python tests/fuzz_artifact.py 1000000       so many mutations of tiny artifacts of every codec
    python tests/fuzz_artifact.py 500000 --codec range   of the range coder alone
    python tests/fuzz_artifact.py 200000 --counts        of artifacts that hold training text
    python tests/fuzz_artifact.py --guided 600  ten minutes guided by coverage, through atheris

The reader is what --eval does before it looks for data: header and tensors, settings, model, and
training text, whose counts are made if it is short. An input may be read or be refused in one short
line. Anything else ends the script with status 1 and the input's bytes: another exception, more
than SECONDS of processor time, more than MEMORY of address space above what the process had before
the first input.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import lzma
import math
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402
from train_gpt import ARTIFACT_MAGIC, ARTIFACT_VERSION, CODECS, GPT, PRELUDE, Config, Refusal, Run  # noqa: E402

INPUT_BYTES, LINE = 4095, 1000  # most bytes of an input, most characters of a refusal
SECONDS, MEMORY = 5.0, 1536 << 20
SHORT_TEXT = 4096  # tokens that are counted; longer texts take time, as they may
TINY = {
    "vocab_size": 8,
    "num_layers": 1,
    "xsa_last_n": 1,
    "ve_layers": "0",
    "model_dim": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "rope_dims": 4,
    "bigram_vocab_size": 4,
    "bigram_dim": 2,
    "ve_dim": 2,
    "mlp_mult": 1.0,
    "int8_keep_float_max_numel": 32,
}
VARIANTS = (
    {},
    {
        "num_layers": 2,
        "tie_embeddings": False,
        "vrl_mode": "mix",
        "ve_enabled": False,
        "bigram_vocab_size": 0,
    },
    {"quant_clip": "std", "smear_enabled": False},
    {"quant_clip": "std_published", "lqer_top_k": 2, "lqer_rank": 2, "lqer_group": 5},
    {"vocab_size": 96},  # a table that the range coder predicts, see bodies()
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    8,
    255,
    65536,
    1 << 20,
    1 << 28,
    1 << 30,
    1 << 31,
    1 << 62,
    1 << 64,
    10**30,
    10**400,
    True,
    None,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    "1",
    "",
    [],
    {},
    [1],
)
TEXTS = (
    "",
    "0",
    "1",
    "-1",
    "7",
    "8",
    "64",
    "128",
    "8192",
    "65536",
    "1e9",
    "1e400",
    "nan",
    "inf",
    "False",
    " 8 ",
    "8\n",
    "\ud800",
    "\u0661",
    "0x8",
    "1_0",
    "9" * 5000,
    "mix",
    "cache",
    "std",
    "fp16",
    "0,1",
    "0,0",
    ",",
    "mlp:2,attn:8,emb:fp16,aux:3",
    f"blocks.{'9' * 5000}.mlp.fc:8",
    "x" * 3000,
    f"mlp:6,attn:6,emb:8,aux:8,blocks.{'9' * 5000}.mlp.fc:8",
)
JSON_BYTES = b'0123456789-.eE[]{}",:\\ \n\x00\xff\x7ftfnulIN'
PLACE = struct.Struct("<I")
QUICK_FILTERS = [{**train_gpt.FACTS_FILTERS[0], "preset": 0}]  # as readable, quicker to set up


# Inputs


def fast(body: bytes, codec: str) -> bytes:
    """The body under a codec at its quickest level."""
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(body)
    if codec == "lzma":
        return lzma.compress(body, preset=0)
    if codec == "range":
        return ranged(body)
    return train_gpt.brotli_module().compress(body, quality=1 if len(body) < 1 << 20 else 5)


def ranged(body: bytes) -> bytes:
    """The body under the range coder; one that has no streams as if all of it were packed text."""
    try:
        return train_gpt.pack_by_range(body)
    except train_gpt.MALFORMED:
        plain = lzma.compress(body[4:], lzma.FORMAT_RAW, filters=QUICK_FILTERS)
        length = min(len(body[4:]), int.from_bytes(body[:4], "little"))
        lengths = (length, 0, len(body[4:]) - length, len(plain))
        return train_gpt.RANGE_LENGTHS.pack(*lengths) + plain + bytes(4) + b"\1\0"


def repacked(rng: random.Random, packed: bytes) -> bytes:
    """Change bytes of what LZMA packs, where a change of the packed bytes would only break LZMA."""
    *lengths, size = train_gpt.RANGE_LENGTHS.unpack_from(packed)
    end = train_gpt.RANGE_LENGTHS.size + size
    plain = bytearray(train_gpt.unpack_lzma(packed[train_gpt.RANGE_LENGTHS.size : end], 1 << 20))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(lengths[0], len(plain)) if rng.random() < 0.8 else 0
        plain[at] = rng.choice((0, 1, 255, rng.randrange(256)))
    again = lzma.compress(bytes(plain), lzma.FORMAT_RAW, filters=QUICK_FILTERS)
    return train_gpt.RANGE_LENGTHS.pack(*lengths, len(again)) + again + packed[end:]


def sealed(packed: bytes, codec: int, size: int, version: int = ARTIFACT_VERSION) -> bytes:
    """An artifact with a right checksum around anything."""
    return (
        PRELUDE.pack(ARTIFACT_MAGIC, version, codec, size, hashlib.sha256(packed).digest()) + packed
    )


def as_version_1(body: bytes) -> bytes:
    """A body of version 2 as version 1 wrote it: numbers instead of the kinds' names."""
    (length,) = PLACE.unpack_from(body)
    header = json.loads(body[4 : 4 + length])
    kinds = {"float": 0, "grid": 1}
    header["tensors"] = [[name, kinds[kind], *sizes] for name, kind, *sizes in header["tensors"]]
    text = json.dumps(header, separators=(",", ":")).encode()
    return PLACE.pack(len(text)) + text + body[4 + length :]


def bodies(counts: str = "off") -> list[bytes]:
    """Bodies of real tiny models: length of the header, the header, integers, floats, text."""
    made = []
    for seed, changes in enumerate(VARIANTS):
        cfg = Config(**{**TINY, **changes, "counts": counts})
        torch.manual_seed(seed)
        run = Run(cfg, 0, 1, torch.device("cpu"))
        split = train_gpt.Validation(
            np.zeros(2, np.uint16),
            np.zeros(1, np.int16),
            "f" * 64,
            "a" * 64,
            documents=1,
            recorded_bytes=0,
        )
        run.folder.log = run.folder.progress = lambda *a, iterable=None, **k: iterable
        model = GPT(cfg)
        table = model.tok_emb.weight
        table.data += (
            2 * table.data.std() * torch.randn(len(table), 1)
        )  # columns that are correlated
        stored = train_gpt.quantize(model, {}, run)
        if cfg.counts_training_text:
            tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, 200)
            stored |= train_gpt.stored_text(train_gpt.pack_tokens(tokens))
        blob = train_gpt.encode_artifact(train_gpt.artifact_header(cfg, split), stored)
        size = PRELUDE.unpack_from(blob)[3]
        made.append(train_gpt.decompress(blob[PRELUDE.size :], "zstd", size))
    return made


def damaged(rng: random.Random, content: bytes, alphabet: bytes = b"") -> bytes:
    """One to eight flips, changes, cuts, insertions or repetitions."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, kind = rng.randrange(len(content) + 1), rng.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind <= 2 and at < len(content):
            content[at] = rng.choice(alphabet) if alphabet else rng.randrange(256)
        elif kind == 3:
            del content[at : at + rng.choice((1, 2, 8, len(content)))]
        elif kind == 4:
            content[at:at] = rng.randbytes(rng.choice((1, 2, 40)))
        else:
            content[at:at] = content[at : at + rng.choice((1, 4, 60))]
    return bytes(content)


def lying_header(rng: random.Random, header: dict) -> object:
    """The header with one to three of its facts wrong."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        settings, tensors = header["settings"], header["tensors"]
        kind = rng.randrange(9)
        if kind <= 2:
            settings[rng.choice(sorted(settings))] = rng.choice(TEXTS)
        elif kind == 3:
            name = rng.choice(sorted(settings))
            settings[rng.choice(("MODEL_DIMS", "PRESET", "RUN_ID", "", name + "S"))] = settings.pop(
                name
            )
        elif kind == 4:
            tensors[rng.randrange(len(tensors))] = rng.choice(tensors)
        elif kind <= 6:
            entry = rng.choice(tensors)
            entry[rng.randrange(len(entry))] = rng.choice(NUMBERS)
        elif kind == 7:
            rng.choice(tensors).append(rng.choice(NUMBERS))
        else:
            name = rng.choice(("settings", "tensors", "tokenizer", "validation", "more"))
            lie = rng.choice((*NUMBERS, *TEXTS, {"SEED": 1}))
            return {**header, name: lie}
    return header


def mutated_body(rng: random.Random, body: bytes) -> bytes:
    """A body wrong anywhere, in its JSON, in its facts or in its payload."""
    (length,) = PLACE.unpack_from(body)
    text, payload = body[4 : 4 + length], body[4 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        return damaged(rng, body)
    if kind == 1:
        return (
            PLACE.pack(
                rng.choice((0, 1, length - 1, length + 1, 1 << 20, (1 << 20) + 1, (1 << 32) - 1))
            )
            + body[4:]
        )
    if kind == 2:
        text = rng.choice((b"[", b'{"a":', b'"', b"[1,")) * rng.choice((1, 900, 100_000))
    elif kind <= 4:
        text = damaged(rng, text, JSON_BYTES)
    elif kind <= 7:
        text = json.dumps(lying_header(rng, json.loads(text))).encode()
    elif kind == 8:
        halves = bytearray(payload)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(halves) // 2)
            halves[2 * at : 2 * at + 2] = rng.choice(
                (b"\x00\x7c", b"\x00\xfc", b"\xff\x7f", b"\x01\xfe", b"\xff\x7b", b"\x00\x80")
            )
        payload = bytes(halves)
    else:
        payload = damaged(rng, payload)
    return PLACE.pack(len(text)) + text + payload


def bombs(body: bytes, largest: int, codecs: list[tuple[str, int]]) -> list[bytes]:
    """Artifacts of few bytes that stand for many: zeros, a long text, the largest of models."""
    (length,) = PLACE.unpack_from(body)
    header, made = json.loads(body[4 : 4 + length]), []
    for size in (1 << 23, 3 << 25, 255 << 20, 1 << 28):
        if size > largest:
            break
        rows = size // 4096
        settings = {**header["settings"], "VOCAB_SIZE": str(rows), "MODEL_DIM": "4064"}
        cfg = Config.from_env(settings)[0]
        with torch.device("meta"):
            shapes = {name: list(p.shape) for name, p in GPT(cfg).named_parameters()}
        text = json.dumps(
            {
                **header,
                "settings": settings,
                "tensors": [
                    [name, "grid" if name == "tok_emb.weight" else "float", *shape]
                    for name, shape in shapes.items()
                ],
            }
        )
        floats = sum(math.prod(shape) for shape in shapes.values()) - rows * 4063
        whole = PLACE.pack(len(text)) + text.encode() + bytes(rows * 4064 + 2 * floats)
        blanks = PLACE.pack(1 << 20) + b" " * (1 << 20)
        for content in (whole, bytes(size), blanks.ljust(size, b"[")):
            for codec, number in codecs:
                packed = fast(content, codec)
                for claim in (len(content), 1 << 20, len(content) - 1, 1 << 30, (1 << 64) - 1):
                    made.append(sealed(packed, number, claim))
    return [bomb for bomb in made if len(bomb) <= INPUT_BYTES]


def inputs(
    seed: int, largest: int, only: Sequence[str] = tuple(CODECS), counts: str = "off"
) -> Callable[[], bytes]:
    """A function that makes the next hostile input; bombs stand for up to `largest` bytes."""
    rng, real = random.Random(seed), bodies(counts)
    codecs = [(codec, CODECS[codec]) for codec in only]
    explosive = bombs(real[0], largest, codecs)
    packs = [(fast(body, codec), number, len(body)) for body in real for codec, number in codecs]
    whole = [sealed(*pack) for pack in packs]
    if "zstd" in only and counts == "off":  # version 1 knows no text
        old = as_version_1(real[0])
        whole.append(sealed(fast(old, "zstd"), CODECS["zstd"], len(old), 1))

    # The range coder is slow to pack: alone, it reads more changes of what it has packed.
    share_of_packs = 0.85 if only == ("range",) else 0.35

    def draw() -> bytes:
        share = rng.random()
        if share < 0.0002:
            return rng.choice(explosive)
        if share < 0.1:
            return damaged(rng, rng.choice(whole))
        if share < share_of_packs:
            packed, codec, size = rng.choice(packs)
            size += rng.choice((0, 0, 0, 1, -1, 1 << 20, -size, (1 << 63)))
            if codec == CODECS["range"] and rng.random() < 0.6:
                packed = repacked(rng, packed)
            codec = rng.choice((codec, codec, codec, 0, 1, 2, 3, 4, 5, 65535))
            return sealed(rng.choice((packed, damaged(rng, packed))), codec, size)
        body, (codec, number) = mutated_body(rng, rng.choice(real)), rng.choice(codecs)
        return sealed(
            fast(body, codec), number, len(body), rng.choice((3, 3, 3, 3, 3, 3, 2, 2, 1, 4))
        )

    return draw


# The reader


def read(blob: bytes, run: Run) -> str:
    """Do as --eval does before it needs data; the kind of refusal, or "read"."""
    try:
        header, stored = train_gpt.decode_artifact(blob)
        cfg, _ = train_gpt.settings_within(header, {})
        train_gpt.rebuild_model(cfg, stored, run)
        if cfg.counts_training_text:
            text = train_gpt.text_of_artifact(stored, cfg)
            if len(text) <= SHORT_TEXT:
                train_gpt.Mixture(cfg, text, np.zeros(9, np.uint16), cfg.vocab_size)
        train_gpt.locate_validation(cfg, header)
    except Refusal as refusal:
        line = str(refusal)
        if len(line) > LINE or not line.isprintable():
            raise ValueError(f"no short line: {line!r:.300}") from refusal
        if line.startswith("no validation split"):
            return "read"
        return re.sub(r"[\[(\"'{].*|[A-Z]\w+=\S*|[\d,]+", "_", line)[:60].strip()
    raise ValueError("it found data in an empty folder")


def address_space() -> int:
    """Bytes of this process's address space now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_in_empty_folder() -> Run:
    """What rebuild_model() wants, in a folder without data."""
    os.chdir(tempfile.mkdtemp(prefix="fuzz_artifact"))
    return Run(Config(**TINY), 0, 1, torch.device("cpu"))


def fuzz(
    count: int,
    seed: int,
    only: Sequence[str] = tuple(CODECS),
    counts: str = "off",
    most_seconds: float = math.inf,
) -> int:
    """Put `count` inputs through the reader, or fewer, and print what came of them; the status."""
    largest = 1 << 28 if count >= 100_000 else 1 << 23
    draw, run = inputs(seed, largest, only, counts), run_in_empty_folder()
    kinds, slowest, begin = Counter(), 0.0, time.perf_counter()
    limit = address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for done in range(count):
        seconds = time.perf_counter() - begin
        if seconds > most_seconds:
            break
        if done % 100_000 == 0:
            print(f"{done:,} done, {seconds:.0f} s", file=sys.stderr, flush=True)
        if done % 1000 == 0:
            faulthandler.dump_traceback_later(600, exit=True)  # a hang inside a library
        while len(blob := draw()) > INPUT_BYTES:
            pass
        before = time.thread_time()
        try:
            kinds[read(blob, run)] += 1
            took = time.thread_time() - before
            if took > SECONDS:
                raise TimeoutError(f"{took:.1f} s")
        except Exception as error:
            path = Path(tempfile.gettempdir()) / f"fuzz_artifact_{seed}_{done}.bin"
            path.write_bytes(blob)
            print(f"input {done} of seed {seed}, kept as {path}: {error!r:.400}")
            return 1
        slowest = max(slowest, took)
    for kind, number in kinds.most_common():
        print(f"{number:9,}  {kind}")
    print(
        f"{kinds.total():,} inputs of up to {INPUT_BYTES:,} bytes in {seconds:.0f} s: "
        f"{kinds['read']:,} read, the others refused in {len(kinds) - 1} ways; "
        f"slowest {slowest:.2f} s of {SECONDS:g}; "
        f"address space never {MEMORY >> 20:,} MiB above the start"
    )
    return 0


def guided(seconds: int) -> int:
    """The same reader under libFuzzer for so long: an input is a byte and a body or a stream."""
    import atheris

    run, seeds = run_in_empty_folder(), bodies()
    instrument(atheris.patch_code)
    corpus = Path(tempfile.mkdtemp(prefix="fuzz_corpus"))
    for i, body in enumerate(seeds):
        (corpus / f"body{i}").write_bytes(b"\0" + body)
        for codec, number in CODECS.items():
            (corpus / f"pack{i}{codec}").write_bytes(
                bytes([number]) + PLACE.pack(len(body)) + fast(body, codec)
            )

    def one(data: bytes) -> None:
        if len(data) < 5:
            return
        codec = data[0] % 5
        blob = (
            sealed(data[5:], codec, PLACE.unpack_from(data, 1)[0])
            if codec
            else sealed(fast(data[1:], "zstd"), CODECS["zstd"], len(data) - 1)
        )
        before = time.thread_time()
        read(blob, run)
        if time.thread_time() - before > SECONDS:
            raise TimeoutError(f"{time.thread_time() - before:.1f} s")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5 or len(data) < 5 or data[0] % 5:
            return atheris.Mutate(data, most)
        try:
            return (data[:1] + mutated_body(rng, data[1:]))[:most]
        except Exception:  # what is no body any more cannot be mutated as one
            return (data[:1] + mutated_body(rng, rng.choice(seeds)))[:most]

    limit = address_space() + MEMORY + (1 << 30)  # libFuzzer's own corpus and counters
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={seconds}",
            "-max_len=16384",
            "-len_control=0",
            "-print_final_stats=1",
            "-rss_limit_mb=0",
            "-timeout=60",
            f"-artifact_prefix={tempfile.gettempdir()}/fuzz_artifact_",
        ],
        one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()
    return 0


def instrument(patch_code: Callable) -> None:
    """Have the reader's functions report their branches, those of JSON too, which so is Python."""
    decoder = json.decoder.JSONDecoder()
    decoder.parse_string = json.decoder.py_scanstring
    readers = [
        train_gpt.decode_artifact,
        train_gpt.header_of,
        train_gpt.tensor_row,
        train_gpt.tensors_in_body,
        train_gpt.decompress,
        train_gpt.unpack_by_range,
        train_gpt.decode_matrix,
        train_gpt.settings_within,
        train_gpt.rebuild_model,
        train_gpt.locate_validation,
        train_gpt.parse_setting,
        train_gpt.translate_names,
        Config.__post_init__,
        Config.value_layers.fget,
        train_gpt.values_by_role.__wrapped__,
        Config.bits_by_role.fget,
        Config.from_env.__func__,
        json.scanner.py_make_scanner,
        json.decoder.JSONObject,
        json.decoder.JSONArray,
        json.decoder.py_scanstring,
    ]
    for function in readers:
        function.__code__ = patch_code(function.__code__, True, True)
    decoder.scan_once = json.scanner.py_make_scanner(decoder)
    json._default_decoder = decoder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", choices=CODECS, help="no other codec")
    parser.add_argument("--counts", action="store_true", help="with training text")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no longer")
    parser.add_argument("--guided", type=int, metavar="SECONDS")
    options = parser.parse_args()
    if options.guided:
        sys.exit(guided(options.guided))
    codecs = (options.codec,) if options.codec else tuple(CODECS)
    counts = "both" if options.counts else "off"
    sys.exit(fuzz(options.count, options.seed, codecs, counts, options.seconds))
