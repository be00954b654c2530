"""Rows that are sorted, treated one by one, and put back: how experts get the tokens that are routed to them.

    order, rows = ids.sort()                the expert of every row [S], S = tokens · choices
    y = x[rows // choices]                  a token for each row, in the order of experts
    ends = ids.histc(…).cumsum(0)           where each expert's rows end
    y = grouped_mm(y, weights, ends)        every row by the weights of its expert, wherever it lies
    back[rows] = arange(S);  y[back]        as they were

Numbers of rows are a rank's own: they may be indices of what has as many rows, in the same order, and nothing
else; so may counts by expert, but as the ends of `grouped_mm` for rows that were sorted by the same ids.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import same
from kp_compiler.passes.sequence_rules import Rules
from kp_compiler.passes.sequence_state import (
    Along,
    Mixed,
    argument,
    counts_from_zero,
    divided,
    first,
    name_of,
)
from kp_compiler.writes import storage_of, written

# The last two are transformers'
GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback.default"}
_CASTS = {"cast", "to", "type", "type_as", "clone", "detach"}


@dataclass(frozen=True)
class Numbers:
    """Of rows: where a sort took each from, divided by `by`; or, if they lead `back`, where it went."""

    order: Node
    by: int = 1
    back: bool = False


class Sorts(Rules):
    """See the module docstring."""

    def __init__(self, tokens: Any) -> None:
        super().__init__(tokens)
        self.sorted: dict[Node, Along] = {}  # by sort, how its rows lay before
        self.numbers: dict[Node, Numbers] = {}
        self.counts: dict[Node, Node] = {}  # of the rows with each id: what the ids are
        self.ends: dict[Node, Node] = {}  # sums of such counts, up to each id

    # ------------------------------------------------------------------------------------------------- sorts

    def rule_sort(self, node: Node, op: Op | None) -> Along:
        given = first(node)
        assert isinstance(given, Node)
        if given in self.numbers:
            return self._turned(node, given)
        along, value = self._one(node, given), tensor_of(given)
        assert value is not None
        dim, descending = argument(node, 1, "dim", -1), argument(node, 2, "descending", False)
        if dim % value.dim() != along.dim:
            return along
        if value.dim() != 1 or descending is not False or along.order is not None:
            raise Mixed("it puts tokens in another order")
        self.sorted[node] = along
        return replace(along, order=node)

    def rule_argsort(self, node: Node, op: Op | None) -> Along:
        along = self.rule_sort(node, op)
        if along.order is node:
            self.numbers[node] = Numbers(node)
        return along

    def _turned(self, node: Node, given: Node) -> Along:
        """Numbers of rows that are sorted: where each went."""
        numbers = self.numbers[given]
        descending = argument(node, 2, "descending", False)
        if numbers.by != 1 or numbers.back or name_of(node) != "argsort" or descending is not False:
            raise Mixed("it puts tokens in another order")
        self.numbers[node] = Numbers(numbers.order, back=True)
        return self.sorted[numbers.order]

    def one_of_two(self, node: Node) -> Along | None:
        """What a sort has found: ids in their order, or numbers of rows."""
        order = node.args[0] if node.target is operator.getitem else None
        if not isinstance(order, Node) or order not in self.sorted or order in self.numbers:
            return None
        if node.args[1] == 1:
            self.numbers[node] = Numbers(order)
        return replace(self.sorted[order], order=order)

    # ---------------------------------------------------------------------------------------- numbers of rows

    def numbered(self, node: Node, name: str) -> Along | None:
        """Of a node that takes numbers of rows."""
        rule: Callable[[Node], Along | None] | None = getattr(self, f"_rows_{name}", None)
        if name in _CASTS:
            rule = self._rows_same
        if rule is None or any(each in self.numbers for each in written(node)):
            raise Mixed("it takes the numbers of a rank's rows for something else than rows")
        return rule(node)

    def _rows_same(self, node: Node) -> Along:
        given, value = first(node), tensor_of(node)
        if given not in self.numbers or value is None or value.dtype not in (torch.int32, torch.int64):
            raise Mixed("it takes the numbers of a rank's rows for something else than rows")
        self.numbers[node] = self.numbers[given]
        return self.found.along[given]

    def _rows_floordiv(self, node: Node) -> Along:
        given, by = first(node), argument(node, 1, "other")
        numbers = self.numbers.get(given)
        if numbers is None or numbers.back or not isinstance(by, int):
            raise Mixed("it takes the numbers of a rank's rows for something else than rows")
        self.numbers[node] = replace(numbers, by=numbers.by * by)
        return self.found.along[given]

    def _rows_empty_like(self, node: Node) -> None:
        """Which numbers may be written into."""
        return None

    _rows_full_like = _rows_empty_like

    def _rows_sort(self, node: Node) -> Along:
        return self.rule_sort(node, None)

    _rows_argsort = _rows_sort

    def _rows_getitem(self, node: Node) -> Along:
        return self._permuted(node.args[0], node.args[1])

    def _rows_index_select(self, node: Node) -> Along:
        if argument(node, 1, "dim") != 0:
            raise Mixed("its index is not understood")
        return self._permuted(first(node), argument(node, 2, "index"))

    def _permuted(self, given: Any, index: Any) -> Along:
        """Rows that are taken by their numbers."""
        numbers = self.numbers.get(index) if isinstance(index, Node) else None
        along = self.found.along.get(given)
        if numbers is None or along is None or along.dim != 0 or given in self.numbers:
            raise Mixed("it takes tokens by their numbers")
        before = self.sorted[numbers.order]
        if numbers.back:
            if along != replace(before, order=numbers.order):
                raise Mixed("it puts back rows that were sorted otherwise")
            return before
        if along.order is not None or not self._of_rows(along, before, numbers.by):
            raise Mixed("it takes tokens by their numbers")
        return replace(before, order=numbers.order)

    def _of_rows(self, along: Along, before: Along, by: int) -> bool:
        """Whether every `by` rows are of one of those that lie like this."""
        return same(along.outer, before.outer) and bool(same(along.inner, divided(before.inner, by)))

    def _rows_index_add(self, node: Node) -> Along:
        """Rows are added up by token."""
        base, dim, index, source = (
            argument(node, i, n) for i, n in enumerate(("input", "dim", "index", "source"))
        )
        numbers, along = self.numbers.get(index), self.found.along.get(base)
        if numbers is None or numbers.back or along is None or dim != 0 or along.dim != 0:
            raise Mixed("it writes to tokens by their numbers")
        before = self.sorted[numbers.order]
        theirs = self.found.along.get(source)
        rows = theirs == replace(before, order=numbers.order)
        if along.order is not None or not rows or not self._of_rows(along, before, numbers.by):
            raise Mixed("it writes to tokens by their numbers")
        return along

    def _rows_setitem(self, node: Node) -> None:
        """`back[rows] = arange(S)`, into what nothing else writes to."""
        base, index, source = node.args
        numbers, value = self.numbers.get(index), tensor_of(base)  # type: ignore[arg-type]
        assert isinstance(base, Node) and value is not None
        if numbers is None or numbers.by != 1 or numbers.back or not self._counts_rows(source, index):
            raise Mixed("it writes to tokens by their numbers")
        if (
            base in self.found.along
            or name_of(base) not in ("empty_like", "full_like")
            or self._is_used(base)
        ):
            raise Mixed("it writes to tokens by their numbers")
        self.numbers[base] = Numbers(numbers.order, back=True)
        self.found.along[base] = self.sorted[numbers.order]

    def _counts_rows(self, source: Any, index: Any) -> bool:
        """0, 1, … of as many rows as an index has."""
        if not isinstance(source, Node) or name_of(source) != "arange":
            return False
        if source in self.found.positions or storage_of(source) in self.writes:  # other numbers, then
            return False
        op, value, rows = canonical(source), tensor_of(source), tensor_of(index)
        assert op is not None and value is not None and rows is not None
        return counts_from_zero(op) and same(value.shape[0], rows.shape[0])

    def only_numbers_rows(self, node: Node) -> bool:
        """An arange that is nothing but what numbers of rows are turned around by."""
        return bool(node.users) and all(
            user.target is operator.setitem and user.args[1] in self.numbers and user.args[2] is node
            for user in node.users
        )

    # ------------------------------------------------------------------------------------------------- counts

    def rule_histc(self, node: Node, op: Op | None) -> None:
        """Of ids 0, 1, …, one bin each: a sum over a rank's tokens, too."""
        given = first(node)
        assert isinstance(given, Node)
        bins, low, high = (
            argument(node, i, name, default)
            for i, name, default in ((1, "bins", 100), (2, "min", 0), (3, "max", 0))
        )
        if self._one(node, given).dim != 0 or low != 0 or high != bins - 1:
            raise Mixed("it is one over the sequence, not a sum")
        ids = self._ids(given)
        if not _counts(ids):
            raise Mixed("ids that it counts may be negative")
        self.counts[node] = ids
        self.found.sums.append(node)

    def counted(self, node: Node, op: Op | None, name: str, given: Node) -> bool:
        """Whether a node that takes counts makes ends of them, or uses those."""
        summed = name == "cumsum" and op is not None and op["dim"] in (0, -1) and not written(node)
        if summed and given in self.counts:
            self.ends[node] = self.counts[given]
        elif name in _CASTS and given in self.counts:
            self.counts[node] = self.counts[given]
        elif name in _CASTS and given in self.ends:
            self.ends[node] = self.ends[given]
        else:
            return name in GROUPED
        self.found.sums.append(node)
        return True

    def grouped(self, node: Node) -> Along:
        """Each row by the weights of its expert."""
        rows, weight = first(node), argument(node, 1, "mat_b")
        ends = argument(node, 2, "offs")
        along, ids = self.found.along.get(rows), self.ends.get(ends)
        others = {each for each in node.all_input_nodes if each in self.found.along} - {rows}
        if others or along is None or along.dim != 0 or tensor_of(weight) is None or rows in self.numbers:
            raise Mixed("something else than its first argument has the sequence")
        if ids is None or along.order is None or self._ids(first(along.order)) is not ids:
            raise Mixed("its rows are not sorted by what its groups are counts of")
        return along

    def _ids(self, node: Any) -> Node:
        """What ids are, whatever their dtype and their order."""
        while True:
            if storage_of(node) in self.writes:
                raise Mixed("it counts what is written to")
            if node.target is operator.getitem and node.args[0] in self.sorted:
                node = first(node.args[0])
            elif name_of(node) in _CASTS and _keeps_ids(first(node), node):
                node = first(node)
            else:
                return node  # type: ignore[no-any-return]


def _keeps_ids(given: Any, node: Node) -> bool:
    """Whether a cast is one of whole numbers to what has all of them."""
    before, after = tensor_of(given), tensor_of(node)
    whole = (torch.int16, torch.int32, torch.int64)
    if before is None or after is None or before.dtype not in whole:
        return False
    return after.dtype in (*whole[1:], torch.float32, torch.float64)


def _counts(node: Any) -> bool:
    """Whether ids are 0, 1, … for what they are made of: a choice of some, however they lie."""
    while isinstance(node, Node):
        name, given = name_of(node), first(node)
        if name in ("argmax", "argmin", "argsort"):
            return True
        if name == "getitem" and tensor_of(given) is None:
            return name_of(given) in ("topk", "sort", "max", "min") and node.args[1] == 1
        if name == "clamp":
            least = argument(node, 1, "min")
            return isinstance(least, int) and least >= 0
        if name == "mod":
            return isinstance(argument(node, 1, "other"), int) and argument(node, 1, "other") > 0
        if name not in ("view", "clone", "transpose", "permute", "getitem", "cast", "to"):
            return False
        node = given
    return False
