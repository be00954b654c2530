"""Tokens that are written into other tensors: each to its own place, of a tensor that has the sequence or is
new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import same
from kp_compiler.passes.sequence_layouts import indexed
from kp_compiler.passes.sequence_state import SIZES, Along, Mixed, State, argument, first, is_mask, name_of

_FRESH = {"empty", "full", "full_like", "empty_like"}


class Written(State):
    """See the module docstring."""

    def rule_setitem(self, node: Node, op: Op | None) -> None:
        base, index, source = node.args
        assert isinstance(base, Node)
        if isinstance(index, Node) and is_mask(index):
            return self._masked(base, index, source)
        if any(each in self.found.along for each in nodes_of(index)):
            raise Mixed("it writes to tokens by their numbers")
        return self._write([(base, index)], source)

    def _masked(self, base: Node, mask: Node, source: Any) -> None:
        """One number wherever a mask of the tokens is true."""
        value, chosen = tensor_of(base), tensor_of(mask)
        along = self.found.along.get(base)
        same_place = along is not None and self.found.along.get(mask) == along
        if isinstance(source, Node) or value is None or chosen is None or not same_place:
            raise Mixed("it is indexed by a tensor")
        self._write([(base, slice(None))], source)

    def rule_copy(self, node: Node, op: Op | None) -> Along:
        base, source = first(node), argument(node, 1, "src")
        assert isinstance(base, Node)
        self._write([(base, Ellipsis)], source)
        return self.found.along[base]

    def _write(self, path: list[tuple[Node, Any]], source: Any) -> None:
        """Into a part of what each token has. A new tensor gets the sequence where it is written to."""
        base, value = path[0][0], tensor_of(path[0][0])
        assert value is not None
        own = self.found.along.get(base)
        if own is None:
            op = canonical(base)
            if op is not None and op.name == "getitem" and tensor_of(op["input"]) is not None:
                return self._write([(op["input"], op["index"]), *path], source)
            self._adopt(path, source)
            return None
        along, rank, views = own, value.dim(), {}
        for each, part in path:
            views[each] = along
            along, rank = indexed(along, rank, part)
        if isinstance(source, Node):
            theirs = self._from_last(source)
            if theirs is None:
                self._fits(source, along.dim - rank)
            elif theirs != replace(along, dim=along.dim - rank):
                raise Mixed("it writes tokens to others' places")
        self.found.along |= views
        return None

    def _adopt(self, path: list[tuple[Node, Any]], source: Any) -> None:
        base, value = path[0][0], tensor_of(path[0][0])
        if value is None or name_of(base) not in _FRESH or self._is_used(base):
            raise Mixed("it writes tokens into what is not shared among ranks")
        self.uniform.discard(base)
        for dim, size in enumerate(value.shape):
            if same(size, self.tokens):
                self.found.along[base] = Along(dim)
                try:
                    return self._write(path, source)
                except Mixed:
                    del self.found.along[base]
        raise Mixed("it writes tokens into what has no dimension of theirs")

    def _is_used(self, node: Node) -> bool:
        """By a node before this one, which took it for what is not shared."""
        for user in self.visited.intersection(node.users):
            op = canonical(user)
            if op is not None and op.name == "getitem":
                if self._is_used(user):
                    return True
            elif name_of(user) not in SIZES or tensor_of(user) is not None:
                return True
        return False


def nodes_of(index: Any) -> list[Node]:
    return [each for each in (index if isinstance(index, tuple) else (index,)) if isinstance(each, Node)]
