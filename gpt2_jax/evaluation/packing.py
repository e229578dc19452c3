"""Packs requests into rows of equal length, so that one program scores them all and few tokens are padding.

A request with several continuations becomes a tree: its context once, then each continuation. The rows and their order
do not depend on the number of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.requests import Request

ROW_MULTIPLE = 64
LONGEST_SEARCHED = 512  # Longer rows do not fill much better.


class Slot(NamedTuple):
    """A continuation: the index of its request, and its place in the request."""

    request: int
    continuation: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """A context with continuations that fit with it into `block_size`.

    Attributes:
        context: int32 [tokens].
        branches: the tokens of each continuation, int32, at least one.
        slots: what each branch is.
    """

    context: np.ndarray
    branches: list[np.ndarray]
    slots: list[Slot]

    @property
    def size(self) -> int:
        """The places it takes in a row: of the tokens to read, or of those to score if they are more."""
        scored = sum(map(len, self.branches))
        return max(len(self.context) + scored - len(self.branches), scored)


def make_trees(requests: Sequence[Request], block_size: int) -> list[Tree]:
    """Makes a tree of each request; several if its context is cut to different lengths, or if the tree would be large.

    The last token of a continuation is not read, so `block_size + 1` tokens fit.

    Raises:
        UserError: a context is empty, or a continuation alone is longer than `block_size`.
    """
    trees: list[Tree] = []
    largest = max(block_size, LONGEST_SEARCHED)
    for index, request in enumerate(requests):
        context = np.asarray(request.context, np.int32)
        if not len(context):
            raise UserError("a continuation has no context; give at least one token, such as end-of-text")
        by_length: dict[int, Tree] = {}
        for place, continuation in enumerate(request.continuations):
            branch = np.asarray(continuation, np.int32)
            if not len(branch):
                continue
            if len(branch) > block_size:
                raise UserError(
                    f"a continuation of {len(branch):,} tokens leaves no room for its context in the model's "
                    f"block_size of {block_size:,}; take a model with a longer one, or shorter texts"
                )
            kept = min(len(context), block_size + 1 - len(branch))
            tree = by_length.setdefault(kept, Tree(context[len(context) - kept :], [], []))
            if tree.branches and tree.size + len(branch) > largest:  # thousands of continuations may share a context
                trees.append(tree)
                tree = by_length[kept] = Tree(tree.context, [], [])
            tree.branches.append(branch)
            tree.slots.append(Slot(index, place))
        trees += by_length.values()
    return trees


def pack(trees: Sequence[Tree], n_embd: int) -> tuple[int, list[list[Tree]]]:
    """Distributes trees over rows of the length that costs least.

    Args:
        n_embd: the width of the model. The wider it is, the less the attention scores of a longer row cost beside its
            matmuls.

    Returns:
        The length of the rows in tokens, and the trees of each row.
    """
    if not trees:
        return 0, []
    ordered = sorted(trees, key=lambda tree: -tree.size)
    shortest = -(-ordered[0].size // ROW_MULTIPLE) * ROW_MULTIPLE
    packings = {
        length: _pack(ordered, length) for length in range(shortest, max(shortest, LONGEST_SEARCHED) + 1, ROW_MULTIPLE)
    }
    # A token costs about 24 n_embd² FLOPs in the matmuls of a layer. Its scores cost 4 n_embd FLOPs per token of the
    # row, and take about twice as long per FLOP.
    length = min(packings, key=lambda length: len(packings[length]) * length * (1 + length / (3 * n_embd)))
    return length, packings[length]


def _pack(ordered: Sequence[Tree], length: int) -> list[list[Tree]]:
    """Distributes trees, the largest first, over rows of a length: each to the fullest row that it fits into."""
    rows: list[list[Tree]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the places that they have left
    for tree in ordered:
        room = next((room for room in range(tree.size, length + 1) if with_room[room]), length)
        if not with_room[room]:
            with_room[room].append(len(rows))
            rows.append([])
        row = with_room[room].pop()
        rows[row].append(tree)
        with_room[room - tree.size].append(row)
    return rows


Array = TypeVar("Array")


class Rows(NamedTuple, Generic[Array]):
    """Packed rows on the host or on devices, int32 [rows, length] each.

    A target is scored from the hidden state of the token at its source. The first `used` of a row are in use.
    """

    tokens: Array
    positions: Array
    segments: Array
    parents: Array
    sources: Array
    targets: Array
    used: Array  # int32 [rows]


def layout(rows: Sequence[Sequence[Tree]], length: int) -> tuple[Rows[np.ndarray], list[list[tuple[Slot, int]]]]:
    """Lays out rows of trees.

    Returns:
        The rows, and for each row its continuations with their numbers of targets, in the order of the targets.
    """

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((len(rows), *shape), np.int32)

    arrays = Rows(zeros(length), zeros(length), zeros(length), zeros(length), zeros(length), zeros(length), zeros())
    scored: list[list[tuple[Slot, int]]] = []
    for row, trees in enumerate(rows):
        at = segment = n_targets = 0
        scored.append([])
        for tree in trees:
            segment += 1
            context, root = len(tree.context), segment
            here = slice(at, at + context)
            arrays.tokens[row, here], arrays.positions[row, here] = tree.context, np.arange(context)
            arrays.segments[row, here] = arrays.parents[row, here] = root
            last, at = at + context - 1, at + context
            for slot, branch in zip(tree.slots, tree.branches, strict=True):
                segment += 1
                read = len(branch) - 1
                here, there = slice(at, at + read), slice(n_targets, n_targets + len(branch))
                arrays.tokens[row, here], arrays.positions[row, here] = branch[:-1], context + np.arange(read)
                arrays.segments[row, here], arrays.parents[row, here] = segment, root
                arrays.sources[row, there] = [last, *range(at, at + read)]
                arrays.targets[row, there] = branch
                scored[-1].append((slot, len(branch)))
                at, n_targets = at + read, n_targets + len(branch)
        arrays.used[row] = n_targets
    return arrays, scored
