"""Counts the FLOPs of the matmuls in a traced function. Loops count as often as they run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from jax.extend.core import ClosedJaxpr, Jaxpr

# Matmuls [time, head_dim] × [head_dim, time] in one call of each attention kernel, forward and backward. Splash has one
# backward kernel for all gradients, or one for dq and one for dk and dv, which both recompute the attention weights.
KERNEL_MATMULS = {"splash": {"fwd": 2, "dq": 3, "dkv": 4, "dqkv": 5}, "cudnn": {"fwd": 2, "bwd": 5}}
Part = Literal["matmuls", "attention"]


def flops(jaxpr: ClosedJaxpr) -> dict[Part, float]:
    """FLOPs of the matmuls in one run of a traced function, on all its devices together, recomputation included.

    "attention" counts the attention kernels, which compute the causal half of their matmuls. "matmuls" counts all
    others. A conditional counts as its largest branch.

    Raises:
        ValueError: a `while` loop, whose number of iterations is unknown, contains matmuls.
    """
    return _flops(jaxpr.jaxpr)


def _flops(jaxpr: Jaxpr) -> dict[Part, float]:
    total: dict[Part, float] = {"matmuls": 0.0, "attention": 0.0}

    def add(part: dict[Part, float], times: float = 1.0) -> None:
        for name, value in part.items():
            total[name] += times * value

    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (lhs_contracting, _), _ = params["dimension_numbers"]
            lhs: Any = eqn.invars[0].aval
            result: Any = eqn.outvars[0].aval
            contracted = math.prod(lhs.shape[axis] for axis in lhs_contracting)
            add({"matmuls": 2.0 * contracted * result.size})
        elif kernel := _attention_kernel(eqn):
            add({"attention": kernel})
        elif name == "scan":
            add(_flops(params["jaxpr"].jaxpr), params["length"])
        elif name == "while":
            if any(any(_flops(inner).values()) for inner in _inner(params.values())):
                raise ValueError("a while loop with matmuls has no known trip count; use jax.lax.scan")
        elif name == "cond":
            add(max((_flops(branch.jaxpr) for branch in params["branches"]), key=lambda part: sum(part.values())))
        elif name == "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            add(_flops(params["jaxpr"]), devices)
        else:
            for inner in _inner(params.values()):
                add(_flops(inner))
    return total


def _inner(values: Iterable[Any]) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _attention_kernel(eqn: Any) -> float:
    """FLOPs of an attention kernel, 0 for any other equation.

    Kernels compute whole blocks on the diagonal, but the masked halves do not count.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "pallas_call":
        part = next(part for part in ("fwd", "dq", "dkv") if f"_{part}_" in params["name"])
        if part == "dkv" and any(var.aval.ndim == 5 for var in eqn.outvars):  # parts of dq from each block of keys
            part = "dqkv"
        matmuls = KERNEL_MATMULS["splash"][part]
        *lead, head_dim, time = next(var.aval.shape for var in eqn.invars if var.aval.ndim == 4)  # q
    elif name.startswith("dot_product_attention_"):
        matmuls = KERNEL_MATMULS["cudnn"][name.removeprefix("dot_product_attention_").removesuffix("_wrapper")]
        batch, time, heads, head_dim = eqn.invars[0].aval.shape
        lead = [batch, heads]
    else:
        return 0.0
    return matmuls * math.prod(lead) * float(time) ** 2 * head_dim  # 2 FLOPs per multiply-add, half of them causal
