"""What the scores of a softmax are made of, and what their dimensions mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from kp_compiler.metadata import tensor_of
from kp_compiler.passes.base import same
from kp_compiler.passes.contraction import Dims, Product


@dataclass(frozen=True)
class Term:
    """An additive term, or a mask (`fill` given): `node` broadcasts against a tensor labelled `frame`."""

    node: Node
    frame: Dims
    reader: Node  # what reads it in the original graph
    coeff: float = 1.0
    fill: float | None = None
    keep: bool = True  # the mask's true elements are the ones that take part


@dataclass
class Scores:
    """The scores a softmax sees."""

    product: Product
    dims: Dims
    scale: float = 1.0
    softcap: float | None = None
    biases: list[Term] = field(default_factory=list)
    masks: list[Term] = field(default_factory=list)
    sink: Node | None = None
    shifted: bool = False  # by a constant or the rows' maximum, which softmax alone ignores
    chain: list[Node] = field(default_factory=list)
    refined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: dict[str, tuple[Node, int]] = field(default_factory=dict)

    def split(self, dims: Dims) -> Dims:
        """`dims` in terms of the labels that reshapes split them into."""
        return tuple(tuple(part for label in labels for part in self.parts(label)) for labels in dims)

    def parts(self, label: str) -> tuple[str, ...]:
        if label not in self.refined:
            return (label,)
        return tuple(part for child in self.refined[label] for part in self.parts(child))

    def note_sizes(self, node: Node) -> None:
        """Remember where the size of each label can be read."""
        for index, labels in enumerate(self.dims):
            if len(labels) == 1:
                self.sizes.setdefault(labels[0], (node, index))

    def reshape(self, node: Node, before: Any, after: Any) -> bool:
        """Follow a reshape of the batch dimensions from shape `before` to `after`."""
        if (
            len(before) < 2
            or len(after) < 2
            or not all(same(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))
        ):
            return False
        dims = _regroup(self, list(self.dims[:-2]), list(before[:-2]), list(after[:-2]))
        if dims is None:
            return False
        self.dims = (*dims, *self.split(self.dims[-2:]))
        self.note_sizes(node)
        return True


def _regroup(scores: Scores, dims: list[Any], before: list[Any], after: list[Any]) -> list[Any] | None:
    """Labels of the batch dimensions `after` a reshape, splitting labels where one dimension becomes
    several."""
    out: list[Any] = []
    while before and after:
        if same(before[0], after[0]):
            out.append(dims.pop(0))
            before.pop(0), after.pop(0)
            continue
        merged = _prefix(before, after[0])
        if merged is not None:
            out.append(tuple(label for labels in dims[:merged] for label in labels))
            del dims[:merged], before[:merged]
            after.pop(0)
            continue
        parted = _prefix(after, before[0])
        if parted is None:
            return None
        labels = dims.pop(0)
        if len(labels) == 1:
            names = tuple(f"{labels[0]}.{index}" for index in range(parted))
            scores.refined[labels[0]] = names
        elif len(labels) == parted and _label_sizes_match(scores, labels, after[:parted]):
            names = labels
        else:
            return None
        out += [(name,) for name in names]
        before.pop(0)
        del after[:parted]
    return None if dims or any(not same(size, 1) for size in after) else out + [()] * len(after)


def _prefix(sizes: list[Any], product: Any) -> int | None:
    total: Any = 1
    for count, size in enumerate(sizes, 1):
        total = total * size
        if count > 1 and same(total, product):
            return count
    return None


def _label_sizes_match(scores: Scores, labels: tuple[str, ...], sizes: list[Any]) -> bool:
    for label, size in zip(labels, sizes, strict=True):
        known = scores.sizes.get(label)
        tensor = tensor_of(known[0]) if known else None
        if known is None or tensor is None or not same(tensor.shape[known[1]], size):
            return False
    return True
