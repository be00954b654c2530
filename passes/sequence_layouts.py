"""Where tokens lie after what moves, takes apart or looks up elements of a tensor: a method for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import Op
from kp_compiler.passes.base import same
from kp_compiler.passes.sequence_state import Along, Mixed, State, argument, divided, first, is_mask, product


class Layouts(State):
    """See the module docstring."""

    def rule_transpose(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        a, b = (d % value.dim() for d in (op["dim0"], op["dim1"]))
        return replace(along, dim={a: b, b: a}.get(along.dim, along.dim))

    def rule_permute(self, node: Node, op: Op) -> Along:
        along, dims = self._one(node, op["input"]), op["dims"]
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
        return replace(along, dim=[d % len(dims) for d in dims].index(along.dim))

    def rule_unsqueeze(self, node: Node, op: Op) -> Along:
        along, out = self._one(node, op["input"]), tensor_of(node)
        assert out is not None
        return replace(along, dim=along.dim + (op["dim"] % out.dim() <= along.dim))

    def rule_expand(self, node: Node, op: Op) -> Along:
        value, out = tensor_of(op["input"]), tensor_of(node)
        assert value is not None and out is not None
        if op["input"] not in self.found.along:
            return self._expanded_as(node, op)
        along = self.found.along[op["input"]]
        return replace(along, dim=along.dim + out.dim() - value.dim())

    def _expanded_as(self, node: Node, op: Op) -> Along:
        """What is not shared, to the sizes of something that is: the same for every token."""
        like, out = self._one(node, argument(node, 1, "other")), tensor_of(node)
        assert out is not None
        self._fits(op["input"], like.dim - out.dim())
        return like

    def rule_repeat(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        times = [value_of(each) for each in op["repeats"]]
        times = [1] * (value.dim() - len(times)) + times
        dim = along.dim + len(times) - value.dim()
        if same(times[dim], 1):
            return replace(along, dim=dim)
        if along.order is not None:
            raise Mixed("it repeats tokens")
        return replace(along, dim=dim, outer=times[dim] * along.outer)  # all of them, again and again

    def rule_empty(self, node: Node, op: Op) -> None:
        """Like a tensor that is shared; whose its elements are is seen when they are written."""

    def rule_full(self, node: Node, op: Op) -> None:
        """Of the dtype and the device of a tensor that is shared."""
        if self.is_uniform(node, op):
            self.uniform.add(node)

    def rule_repeat_interleave(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        if op["dim"] is not None and op["dim"] % value.dim() != along.dim:
            return along
        if op["dim"] is None or not isinstance(op["repeats"], int) or along.order is not None:
            raise Mixed("it repeats tokens")
        return replace(along, inner=along.inner * op["repeats"])

    def rule_cat(self, node: Node, op: Op) -> Along:
        found = {self.found.along.get(each) for each in op["tensors"]}
        along, out = next(iter(found)), tensor_of(node)
        if len(found) != 1 or along is None or out is None or op["dim"] % out.dim() == along.dim:
            raise Mixed("it puts tokens beside others")
        return along

    def rule_stack(self, node: Node, op: Op | None) -> Along:
        found = {self.found.along.get(each) for each in argument(node, 0, "tensors")}
        along, out = next(iter(found)), tensor_of(node)
        if len(found) != 1 or along is None or out is None:
            raise Mixed("it puts tokens beside others")
        return replace(along, dim=along.dim + (argument(node, 1, "dim", 0) % out.dim() <= along.dim))

    def rule_view_as_real(self, node: Node, op: Op | None) -> Along:
        return self._one(node, first(node))

    def rule_view_as_complex(self, node: Node, op: Op | None) -> Along:
        along, value = self._one(node, first(node)), tensor_of(first(node))
        if value is None or along.dim == value.dim() - 1:
            raise Mixed("it puts tokens beside others")
        return along

    def rule_getitem(self, node: Node, op: Op) -> Along:
        given, index = op["input"], op["index"]
        value = tensor_of(given)
        if value is None:  # of several tensors
            return self._one(node, given)
        if given not in self.found.along:
            return self._looked_up(node, index)
        return indexed(self._one(node, given), value.dim(), index)[0]

    def _looked_up(self, node: Node, index: Any) -> Along:
        """Rows of what all ranks have, by a number for each token."""
        by = index[0] if isinstance(index, tuple) else index
        if not isinstance(by, Node) or is_mask(by):
            raise Mixed("its index is not understood")
        if isinstance(index, tuple) and any(each not in (slice(None), Ellipsis) for each in index[1:]):
            raise Mixed("its index is not understood")
        return self._one(node, by)

    def rule_index_select(self, node: Node, op: Op | None) -> Along:
        given, dim, index = (argument(node, i, name) for i, name in enumerate(("input", "dim", "index")))
        value = tensor_of(given)
        assert value is not None
        if given in self.found.along:
            raise Mixed("it takes tokens by their numbers")
        return replace(self._one(node, index), dim=dim % value.dim())

    def rule_view(self, node: Node, op: Op) -> Along:
        """A dimension of the result has the tokens if it is made of nothing else than all of them, of what
        lies outside of them, and of what lies inside."""
        given = op["input"]
        along, value, out = self.found.along.get(given), tensor_of(given), tensor_of(node)
        assert value is not None and out is not None
        if along is None:
            raise Mixed("something else than its first argument has the sequence")
        outside = product([*value.shape[: along.dim], along.outer])
        inside = product([along.inner, *value.shape[along.dim + 1 :]])
        for dim, each in enumerate(out.shape):
            outer = divided(outside, product(out.shape[:dim]))
            inner = divided(inside, product(out.shape[dim + 1 :]))
            if outer is None or inner is None or not same(each, product([outer, self.tokens, inner])):
                continue
            if along.order is not None and not (same(outer, along.outer) and same(inner, along.inner)):
                break
            return replace(along, dim=dim, outer=outer, inner=inner)
        raise Mixed("the sequence is not a dimension of what it makes, or one with the batch outside")

    rule_squeeze = rule_view


def indexed(along: Along, rank: int, index: Any) -> tuple[Along, int]:
    """Where the sequence lies in x[index], of a tensor of `rank` dimensions, and how many the result has."""
    index = index if isinstance(index, tuple) else (index,)
    named = [each for each in index if each is not None and each is not Ellipsis]
    rest = [slice(None)] * (rank - len(named))
    advanced = [each for each in named if not isinstance(each, slice)]
    where = index.index(Ellipsis) if Ellipsis in index else len(index)
    place, dim, found = 0, 0, None  # of the argument, of the result
    for each in (*index[:where], *rest, *index[where + 1 :]):
        if each is None:
            dim += 1
            continue
        if place == along.dim:
            if each not in (slice(None), slice(0, None), slice(0, None, None)):
                raise Mixed("it takes some tokens of the sequence")
            found = dim
        elif isinstance(each, Node) and tensor_of(each) is not None:
            if len(advanced) > 1 or is_mask(each):
                raise Mixed("it is indexed by a tensor")
            dim += tensor_of(each).dim()  # type: ignore[union-attr]
        elif isinstance(each, bool) or not isinstance(each, slice | int | Node):
            raise Mixed("its index is not understood")
        dim += isinstance(each, slice)
        place += 1
    if found is None:
        raise Mixed("its index is not understood")
    return replace(along, dim=found), dim
