"""How the channels of every matrix's input go together, over the denoising of real examples: what GPTQ rounds by.

Shapes   products (experts, row, row) float32, summed over inputs
Source   GPTQ's Hessian is twice that sum; calibrate.py says what matrices see
Differs  all layers at once, from the model as it is: GPTQ's own code goes on with the rounded layers before. The
         experts of a layer share the products of what enters them: a factor each would take 60 GB for the 26B
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.products import device_memory
from mlx_dgemma.tensors import QUANTIZED_ROLES, Tensor, text_tensors
from mlx_dgemma.tokenizer import Tokenizer
from mlx_dgemma.units import human_bytes

from .calibrate import experts_of, model_identity, not_finite_inputs, run_passes
from .examples import Example
from .factors import about_of, entry_of, write_factors
from .gptq import factor, with_others
from .output import check_space

ENTERS_EXPERTS = "ffn_gate_up_exps"
SCRATCH = 8  # times its float32 size that turning products into a factor takes


class FactorDone(NamedTuple):
    """The events after run_passes' own: large factors take a minute each."""

    done: int
    total: int


def products(x: mx.array, experts: mx.array | None, n_experts: int) -> mx.array:
    """x (…, row), or with experts (M,) ascending x (M, 1, row) → (n_experts, row, row) float32"""
    rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    if experts is None or n_experts == 1:
        return (rows.T @ rows)[None]
    ends = mx.cumsum((experts[:, None] == mx.arange(n_experts)).sum(axis=0))
    starts = mx.concatenate([mx.zeros(1, ends.dtype), ends[:-1]])
    return mx.segmented_mm(rows.T, rows, mx.stack([starts, ends], axis=1).astype(mx.uint32))


def listened_to(model: DiffusionGemma, roles: tuple[str, ...] = QUANTIZED_ROLES) -> dict[Tensor, int]:
    """The matrices whose inputs are collected, one of each input → how many factors it gets."""
    tensors = [t for t in text_tensors(model.config) if t.role in roles and entry_of(t) == t.gguf]
    return {t: 1 if t.gguf_part == ENTERS_EXPERTS else experts_of(t) for t in tensors}


def memory(experts: dict[Tensor, int]) -> int:
    """Bytes of all sums, and of what the largest one is added to and turned into a factor with."""
    sizes = [n * t.shape[-1] ** 2 * 4 for t, n in experts.items()]
    return sum(sizes) + max([*sizes, *(SCRATCH * t.shape[-1] ** 2 * 4 for t in experts)], default=0)


def check_room(experts: dict[Tensor, int], path: Path, room: int | None = None) -> None:
    """Raises DgemmaError where the sums do not fit beside the model, or the file not on its disk. room: bytes."""
    room = device_memory() if room is None else room
    need = memory(experts)
    if room is not None and need > room - mx.get_active_memory():
        of_experts = memory({t: n for t, n in experts.items() if t.role == "expert"})
        raise DgemmaError(
            f"{human_bytes(room - mx.get_active_memory())} are left beside the model, expected {human_bytes(need)} for "
            f"the products of its inputs; `--roles expert` takes {human_bytes(of_experts)}, or give an 8-bit copy"
        )
    check_space(path, sum(n * t.shape[-1] * (t.shape[-1] + 1) * 2 for t, n in experts.items()))


def collect_factors(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    path: Path,
    seed: int = 0,
    limit: int | None = None,
    roles: tuple[str, ...] = QUANTIZED_ROLES,
    on_event: Callable = lambda event: None,
) -> tuple[int, int, int]:
    """Write the factors of what the matrices of `roles` saw to `path`. → inputs, passages, canvases

    Raises DgemmaError.
    """
    experts = listened_to(model, roles)
    check_room(experts, path)
    sums = {t: mx.zeros((n, t.shape[-1], t.shape[-1])) for t, n in experts.items()}

    def take(tensor, seen):
        sums[tensor] = sums[tensor] + seen
        squares = mx.diagonal(sums[tensor], axis1=1, axis2=2)
        # Evaluated one at a time: all of a pass at once would take as much memory again.
        if not mx.isfinite(squares).all().item():
            raise not_finite_inputs(tensor)

    looks = {t: partial(products, n_experts=n) for t, n in experts.items()}
    done = 0

    def count(event):
        nonlocal done
        done = event.done
        on_event(event)

    canvases = run_passes(model, tokenizer, examples, looks, take, seed=seed, limit=limit, on_event=count)

    def factors():
        made, total = 0, sum(experts.values())
        for tensor in list(sums):
            for products_of_one in with_others(np.array(sums.pop(tensor))):
                yield factor(products_of_one)
                made += 1
                on_event(FactorDone(made, total))

    shapes = {t.gguf: (n, t.shape[-1]) for t, n in experts.items()}
    write_factors(path, shapes, factors(), about_of(model_identity(model), done, canvases, seed))
    return len(experts), done, canvases
