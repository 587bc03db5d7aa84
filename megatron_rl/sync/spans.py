"""Decides which ranks gather the whole model together for a push by sync/ipc.py, without any communication."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Holds ranks that hold the whole model between them. owner_of: by parameter, the one of them that has it for
    all."""

    ranks: tuple[int, ...]
    owner_of: dict[str, int]


def ranks_by_node(node_of: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the ranks of each node. node_of: by rank."""
    return [tuple(rank for rank, node in enumerate(node_of) if node == one) for one in dict.fromkeys(node_of)]


def gather_spans(node_of: Sequence[int], exports: Sequence[Collection[str]]) -> list[Span]:
    """Return the ranks of each node, where every node holds the whole model; otherwise all ranks as one.

    node_of: by rank. exports: by rank, the parameters that it can export, of any replica of the model.
    """
    names = set().union(*exports)
    by_node = ranks_by_node(node_of)
    whole = all(names == set().union(*(exports[rank] for rank in ranks)) for ranks in by_node)
    spans = by_node if whole else [tuple(range(len(node_of)))]
    return [
        Span(ranks=ranks, owner_of={name: rank for rank in reversed(ranks) for name in exports[rank]})
        for ranks in spans
    ]
