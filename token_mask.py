"""Pairs of tokens that a tokenizer can never emit, and a language model that knows them.

A BPE tokenizer turns one text into one sequence of tokens, so most sequences that spell the text
never occur: where "th" and "e" would be merged, the pair (th, e) is impossible. A model gives such
tokens some probability all the same. Taking it away is exact, causal and normalised:

    P'(x | context) = P(x | context) [(p, x) is allowed] / (1 - sum of P over forbidden tokens)

with p the token before x, and can only make the score of a canonically encoded text better.

SentencePiece BPE encodes a normalised text without cutting it into words first, and no merge ever
reaches over a boundary between two final tokens. So a pair can stand somewhere in some text if and
only if its own text, alone, is encoded as this very pair: context decides nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from train_gpt import mile_weights

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
BPE_MODEL = 2  # TrainerSpec.ModelType
CHECKED_PAIRS = 1 << 22  # at a time
LOG2_E = math.log2(math.e)


# What the table needs to know of a tokenizer


def wire_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field of a serialised protobuf message: its number, and a number or bytes.

    Fixed-size values come as their little-endian bytes. Raises ValueError if it is no message.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise ValueError("the tokenizer is not a SentencePiece model")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        sizes = {1: 8, 5: 4}
        if kind not in sizes and kind != 2:
            raise ValueError("the tokenizer is not a SentencePiece model")
        size = varint() if kind == 2 else sizes[kind]
        if at + size > len(message):
            raise ValueError("the tokenizer is not a SentencePiece model")
        yield key >> 3, message[at : at + size]
        at += size


@dataclass(frozen=True)
class Pieces:
    """The pieces of a SentencePiece model by id, and how it encodes."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    is_bpe: bool
    byte_fallback: bool
    escapes_spaces: bool  # a space is written U+2581, so that no text holds U+0020


def read_pieces(tokenizer: sentencepiece.SentencePieceProcessor) -> Pieces:
    """What the model file says; the processor itself does not tell user-defined from others."""
    texts, scores, kinds = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, content in wire_fields(tokenizer.serialized_model_proto()):
        if number == 1 and isinstance(content, bytes):
            piece = dict(wire_fields(content))
            texts.append(bytes(piece[1]).decode("utf-8"))
            scores.append(float(np.frombuffer(bytes(piece.get(2, bytes(4))), "<f4")[0]))
            kinds.append(int(piece.get(3, NORMAL)))
        elif number == 2 and isinstance(content, bytes):
            trainer.update(wire_fields(content))
        elif number == 3 and isinstance(content, bytes):
            normalizer.update(wire_fields(content))
    return Pieces(
        texts,
        scores,
        kinds,
        is_bpe=trainer.get(3, 1) == BPE_MODEL,
        byte_fallback=bool(trainer.get(35, 0)),
        escapes_spaces=bool(normalizer.get(5, 1)),
    )


# The table


@dataclass(frozen=True)
class Edge:
    """A symbol that is at one time the last (or the first) of a token that is being merged.

    Merges are done best score first. `birth` is the worst score of the merges up to the one that
    makes the symbol, `death` the worst of those from there to the one that swallows it.
    """

    symbol: str
    birth: float
    death: float


def encode_alone(text: str, score_of: dict[str, float]) -> list[tuple[float, int]]:
    """The merges of a text in their order: score, and the place of the left symbol at that time.

    Best score first, the leftmost of equal ones; any two neighbours merge that form a piece.
    """
    symbols = list(text)
    merges: list[tuple[float, int]] = []
    while True:
        candidates = [
            (-score_of[left + right], place)
            for place, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in score_of
        ]
        if not candidates:
            return merges
        cost, place = min(candidates)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        merges.append((-cost, place))


def edges_of(text: str, merges: list[tuple[float, int]]) -> tuple[list[Edge], list[Edge]]:
    """The symbols that are the first and the last of a token, each from birth to death."""
    symbols = list(text)
    found: tuple[list[Edge], list[Edge]] = ([], [])
    births = [np.inf, np.inf]
    since = [np.inf, np.inf]
    worst = np.inf
    for score, place in merges:
        worst = min(worst, score)
        since = [min(score, lowest) for lowest in since]
        touched = (place == 0, place + 2 == len(symbols))
        ends = (symbols[0], symbols[-1])
        for side in (0, 1):
            if touched[side]:
                found[side].append(Edge(ends[side], births[side], since[side]))
                births[side] = worst
                since[side] = np.inf
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    for side in (0, 1):
        found[side].append(Edge(text, births[side], -np.inf))
    return found


@dataclass(frozen=True)
class EdgeTable:
    """All tokens that have a symbol at their end (or start): ids, births and deaths."""

    ids: np.ndarray
    births: np.ndarray
    deaths: np.ndarray


def by_symbol(edges: dict[int, list[Edge]]) -> dict[str, EdgeTable]:
    """The edges of each token, gathered by symbol."""
    gathered = defaultdict(list)
    for token, own in edges.items():
        for edge in own:
            gathered[edge.symbol].append((token, edge.birth, edge.death))
    tables = {}
    for symbol, rows in gathered.items():
        ids, births, deaths = zip(*rows, strict=True)
        tables[symbol] = EdgeTable(np.array(ids), np.array(births), np.array(deaths))
    return tables


def forbid_merges(
    forbidden: np.ndarray, score_of: dict[str, float], lasts: dict, firsts: dict
) -> None:
    """Forbid each pair of which a merge would join the end of the first and the start of the other.

    Both halves are merged in one common order, best first, those of the left first among equals. A
    merge over the boundary happens if its symbols live at one time and it is better than what would
    swallow either; against the left half it loses a tie, against the right half it wins one.
    """
    for text, score in score_of.items():
        for cut in range(1, len(text)):
            left = lasts.get(text[:cut])
            right = firsts.get(text[cut:])
            if left is None or right is None:
                continue
            own = score > left.deaths
            other = score >= right.deaths
            birth, death = left.births[own, None], left.deaths[own, None]
            births, deaths = right.births[other], right.deaths[other]
            meet = births > np.minimum(birth, death)
            meet &= birth >= np.minimum(births, deaths)
            forbidden[np.ix_(left.ids[own], right.ids[other])] |= meet


def forbid_symbols(forbidden: np.ndarray, texts: dict[int, str], defined: dict[str, int]) -> None:
    """Forbid each pair over whose boundary a user-defined symbol would be read.

    Such symbols are found before all merges, from left to right, the longest first, so one begins
    wherever its text does, except inside another one.
    """
    owners = set(defined.values())
    for symbol in defined:
        for cut in range(1, len(symbol)):
            start = symbol[:cut]
            rest = symbol[cut:]
            left = [
                token
                for token, text in texts.items()
                if (text == start if token in owners else text.endswith(start))
            ]
            right = [token for token, text in texts.items() if text.startswith(rest)]
            forbidden[np.ix_(left, right)] = True


def byte_places(known: set[str], escapes_spaces: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes beside each other in a character that is no piece (256, 256); last ones, first ones.

    Byte tokens spell what is no piece, one whole character of UTF-8 after the other.
    """
    codes = np.arange(0x110000, dtype="<u4")
    spelt = (codes < 0xD800) | (codes > 0xDFFF)  # surrogates are no characters
    spelt[[ord(character) for character in known]] = False
    if escapes_spaces:
        spelt[ord(" ")] = False
    spelling = np.frombuffer(codes[spelt].tobytes().decode("utf-32-le").encode("utf-8"), np.uint8)
    following = np.append(spelling[1:], np.uint8(0))
    goes_on = (following & 0xC0) == 0x80
    inside = np.zeros((256, 256), bool)
    inside[spelling[goes_on], following[goes_on]] = True
    last = np.zeros(256, bool)
    last[spelling[~goes_on]] = True
    first = np.zeros(256, bool)
    first[spelling[(spelling & 0xC0) != 0x80]] = True
    return inside, last, first


def forbidden_pairs(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Which tokens x (columns) no text can have after a token p (rows): bool (V, V).

    Exact for the text and byte pieces of a BPE model that reads every text; a normaliser makes some
    texts impossible, which is not used. Beside control and unknown pieces everything is allowed: a
    document may be cut anywhere. Nothing is forbidden for other kinds of model and for those with
    unused pieces, which are merged and taken apart again. Raises ValueError if it is no model.
    """
    pieces = read_pieces(tokenizer)
    size = len(pieces.texts)
    if not pieces.is_bpe or UNUSED in pieces.kinds:
        return np.zeros((size, size), bool)
    tokens = range(size)
    defined = {pieces.texts[i]: i for i in tokens if pieces.kinds[i] == USER_DEFINED}
    # Characters spell symbols before they can be merged into one.
    score_of = {pieces.texts[i]: pieces.scores[i] for i in tokens if pieces.kinds[i] == NORMAL}
    texts: dict[int, str] = {}  # of the tokens that stand for text and do occur
    firsts: dict[int, list[Edge]] = {}
    lasts: dict[int, list[Edge]] = {}
    for token in tokens:
        text = pieces.texts[token]
        if pieces.kinds[token] == USER_DEFINED:
            texts[token] = text
        if pieces.kinds[token] != NORMAL or any(symbol in text for symbol in defined):
            continue
        merges = encode_alone(text, score_of)
        if len(merges) == len(text) - 1:
            texts[token] = text
            firsts[token], lasts[token] = edges_of(text, merges)

    forbidden = np.ones((size, size), bool)
    emitted = np.array(list(texts), dtype=np.int64)
    forbidden[np.ix_(emitted, emitted)] = False
    forbid_merges(forbidden, score_of, by_symbol(lasts), by_symbol(firsts))
    forbid_symbols(forbidden, texts, defined)
    if pieces.byte_fallback:
        byte_ids = np.array([tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)])
        known = {text for text in texts.values() if len(text) == 1}
        inside, last, first = byte_places(known, pieces.escapes_spaces)
        forbidden[np.ix_(byte_ids, byte_ids)] = ~(inside | (last[:, None] & first))
        forbidden[np.ix_(emitted, byte_ids[first])] = False
        forbidden[np.ix_(byte_ids[last], emitted)] = False
    special = [i for i in tokens if pieces.kinds[i] in (CONTROL, UNKNOWN)]
    forbidden[special] = False
    forbidden[:, special] = False
    return forbidden


def check_stream(tokens: np.ndarray, forbidden: np.ndarray) -> int | None:
    """The place of the first token that may not follow the one before it; None if there is none."""
    for start in range(0, len(tokens) - 1, CHECKED_PAIRS):
        block = np.asarray(tokens[start : start + CHECKED_PAIRS + 1])
        violations = forbidden[block[:-1], block[1:]]
        if violations.any():
            return start + 1 + int(violations.argmax())
    return None


# Its use in a model


def penalties(forbidden: np.ndarray) -> Tensor:
    """What to add to logits: -inf where forbidden, else 0; bfloat16 (V, V), 2 V^2 bytes.

    Adding rows of such a table costs a CPU a tenth of what masked_fill() of a boolean one does.
    """
    table = torch.zeros(forbidden.shape, dtype=torch.bfloat16)
    return table.masked_fill_(torch.from_numpy(forbidden), -torch.inf)


def masked(logits: Tensor, input_ids: Tensor, penalty: Tensor) -> Tensor:
    """Logits (..., V), float32, with -inf where a token may not follow that of the input (...).

    Softmax, sampling and cross entropy then give such tokens no probability and no gradient.
    """
    # Three times as quick on a CPU as an index.
    return logits + torch.nn.functional.embedding(input_ids, penalty)


class MaskedHeadNats(torch.autograd.Function):
    """train_gpt.HeadNats with a mask: nats of the targets at capped logits and their weights.

    Without penalties it is the plain head.
    """

    ROWS = 128  # at a time

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        cap: float,
        gamma: Tensor | None,
        clamp_min: float,
        input_ids: Tensor,
        penalty: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Of hidden (B, T, D), head (V, D), targets and input tokens (B, T), penalties (V, V)."""
        shape = targets.shape
        hidden = hidden.flatten(0, 1)
        pull = hidden.new_empty(len(hidden), len(head))
        nats, weights = [], []
        blocks = (hidden, targets.reshape(-1, 1), input_ids.flatten(), pull)
        for own, at, previous, bent in zip(
            *(x.split(MaskedHeadNats.ROWS) for x in blocks), strict=True
        ):
            torch.mm(own, head.t(), out=bent).div_(cap).tanh_()
            logits = cap * bent
            if penalty is not None:
                logits += penalty.index_select(0, previous)
            weights.append(mile_weights(logits, gamma, clamp_min))
            share = torch.log_softmax(logits, -1)
            nats.append(-share.gather(1, at))
            # On a CPU exp() takes ten times as long where it gives 0; exp2() does not.
            p = share.mul_(LOG2_E).exp2_()
            excess = p.scatter_add_(1, at, p.new_full(at.shape, -1.0))
            bent.square_().neg_().add_(1.0).mul_(excess)  # (1 - tanh^2) (p - [target])
        ctx.save_for_backward(hidden, head, pull)
        of_loss = torch.cat(weights).view(shape)
        ctx.mark_non_differentiable(of_loss)
        return torch.cat(nats).view(shape), of_loss

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Of hidden and head, the only inputs that have one."""
        hidden, head, pull = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, 1)
        of_hidden = (grad * (pull @ head)).view(*shape, -1)
        of_head = pull.t() @ (grad * hidden)
        return of_hidden, of_head, None, None, None, None, None, None
