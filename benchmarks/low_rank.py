"""An experiment: a low-rank correction of the worst matrices' quantisation error, at equal bytes.

    python benchmarks/low_rank.py "QUANT_CLIP=std CLIP_SIGMAS=..." RUN_FOLDER...

After GPTQ the error E = W - s Q of the `matrices` with the largest weighted error tr(E H E^T) is
corrected by A B of rank `rank`, the best there is by that measure: with H = L L^T, A and B L are
the singular vectors of E L. Both become integers of BITS bits with a scale a component, and go into
the artifact as further tensors, so that they are paid for. The second export takes the bytes of the
first, which has no correction.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import equal_bytes

import train_gpt
from train_gpt import GPT, Run, Stored, largest_integer

KINDS = ((3, 4), (4, 6), (8, 2))  # matrices and rank
BITS = 4


def integers(rows: torch.Tensor) -> Stored:
    """Components, (rank, n), as integers of BITS bits under their largest."""
    scale = (rows.abs().amax(dim=1) / largest_integer(BITS)).clamp_min(train_gpt.TINY_SCALE).half()
    return Stored(torch.round(rows / scale.float()[:, None]).to(torch.int8), scale)


def correction(E: torch.Tensor, H: torch.Tensor, rank: int) -> tuple[Stored, Stored]:
    """A^T (rank, r) and B (rank, c) of the best A B by tr((E - A B) H (E - A B)^T)."""
    damping = train_gpt.DAMPING * H.diagonal().mean() * torch.eye(len(H))
    L = torch.linalg.cholesky((H + damping).double())
    U, S, V = torch.linalg.svd(E.double() @ L, full_matrices=False)
    root = S[:rank].sqrt()
    B = torch.linalg.solve_triangular(L, root[:, None] * V[:rank], upper=False, left=False)
    return integers((U[:, :rank] * root).T.float()), integers(B.float())


@contextmanager
def corrected(matrices: int, rank: int) -> Iterator[None]:
    """Let train_gpt quantise and rebuild with corrections."""
    quantize, rebuild_model = train_gpt.quantize, train_gpt.rebuild_model

    def with_corrections(model: GPT, hessians: dict, run: Run, factor: float) -> dict[str, Stored]:
        stored, errors = quantize(model, hessians, run, factor), {}
        for name, p in model.named_parameters():
            H = hessians.get(train_gpt.hessian_source(model, name))
            if H is not None and name.startswith("blocks"):
                W = p.detach().float()
                errors[train_gpt.weighted_error(W, stored[name], H), name] = W, H
        for key in sorted(errors, reverse=True)[:matrices]:
            (W, H), name = errors[key], key[1]
            stored[f"{name}.a"], stored[f"{name}.b"] = correction(
                W - stored[name].restore(), H, rank
            )
        return stored

    def rebuilt(cfg: train_gpt.Config, stored: dict[str, Stored], run: Run) -> GPT:
        model = rebuild_model(
            cfg, {name: s for name, s in stored.items() if not name.endswith((".a", ".b"))}, run
        )
        with torch.no_grad():
            for name in stored:
                if name.endswith(".a"):
                    other = stored[name.removesuffix("a") + "b"]
                    model.get_parameter(name.removesuffix(".a")).add_(
                        stored[name].restore().T @ other.restore()
                    )
        return model

    train_gpt.quantize, train_gpt.rebuild_model = with_corrections, rebuilt
    try:
        yield
    finally:
        train_gpt.quantize, train_gpt.rebuild_model = quantize, rebuild_model


def main(settings: str, folders: list[str]) -> None:
    for matrices, rank in KINDS:
        print(f"{matrices} matrices, rank {rank}", flush=True)
        equal_bytes.main(settings, settings, folders, partial(corrected, matrices, rank))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
