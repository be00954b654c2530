"""What an operation does to the dimension that tokens lie along: a method `rule_…` for each, by its canonical
name or, where it has none, its function's. They raise `Mixed` where an operation looks at several tokens, or
might.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import Op
from kp_compiler.passes.base import same
from kp_compiler.passes.sequence_layouts import Layouts
from kp_compiler.passes.sequence_state import Along, Mixed, argument, first
from kp_compiler.passes.sequence_writes import Written

REDUCTIONS = {
    "sum", "mean", "softmax", "log_softmax", "logsumexp", "amax", "amin", "max", "min", "all", "any", "prod",
    "norm", "vector_norm", "linalg_vector_norm", "var", "std", "argmax", "argmin", "cumsum", "cumprod",
}  # fmt: skip
ADDS_UP = REDUCTIONS | {"matmul", "bmm", "einsum"}
LOSSES = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "kl_div"}


class Rules(Layouts, Written):
    """See the module docstring; layouts and writes have modules of their own."""

    # ----------------------------------------------------------------------------------------- token by token

    def pointwise(self, node: Node) -> Along:
        out = tensor_of(node)
        if out is None:
            raise Mixed("what it makes is no tensor")
        self.look_at_numbers(node)
        along = self.aligned(node.all_input_nodes)
        return replace(along, dim=along.dim + out.dim())

    def rule_linear(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        if along.dim == value.dim() - 1:
            raise Mixed("it sums over the sequence")
        self._fits(op["bias"], along.dim - value.dim())
        return along

    def rule_matmul(self, node: Node, op: Op) -> Along:
        """Tokens are rows of the first factor, or columns of the second, as rotary angles have them; or
        batches of both."""
        left, right = self.found.along.get(op["input"]), self.found.along.get(op["other"])
        first, second, out = (tensor_of(each) for each in (op["input"], op["other"], node))
        assert first is not None and second is not None and out is not None
        if left is not None and right is not None:
            behind = self._from_last(op["input"])
            if behind != self._from_last(op["other"]) or left.dim >= first.dim() - 2:
                raise Mixed("it sums over the sequence, or takes tokens with others")
            return replace(left, dim=left.dim - first.dim() + out.dim())
        if left is None:
            along = self._one(node, op["other"])
            if second.dim() < 2 or along.dim != second.dim() - 1:
                raise Mixed("it sums over the sequence, or shares batches")
            return replace(along, dim=out.dim() - 1)
        if left.dim == first.dim() - 1:
            raise Mixed("it sums over the sequence")
        if second.dim() == 1:
            return left
        if left.dim < first.dim() - 2:
            self._fits(op["other"], left.dim - first.dim())
        return replace(left, dim=left.dim + out.dim() - first.dim())

    def rule_bmm(self, node: Node, op: Op) -> Along:
        return self.rule_matmul(node, op)

    def rule_addmm(self, node: Node, op: Op) -> Along:
        along = self._one(node, op["mat1"])
        if along.dim == 1:
            raise Mixed("it sums over the sequence")
        self._fits(op["input"], along.dim - 2)
        return along

    def rule_einsum(self, node: Node, op: Op) -> Along:
        """Tokens have a letter of their own, which stays."""
        inputs, arrow, result = str(op["equation"]).replace(" ", "").partition("->")
        given = op["operands"]
        operands = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
        terms = inputs.split(",")
        if not arrow or "." in inputs or len(terms) != len(operands):
            raise Mixed("its equation is not understood")
        letters = {
            (term[along.dim], replace(along, dim=0))
            for term, each in zip(terms, operands, strict=True)
            if (along := self.found.along.get(each)) is not None
        }
        if len(letters) != 1:
            raise Mixed("the sequence lies along different dimensions of what it takes")
        ((letter, along),) = letters
        for term, each in zip(terms, operands, strict=True):
            if each not in self.found.along and letter in term:
                self._fits(each, term.index(letter) - len(term))
            if term.count(letter) > 1:
                raise Mixed("its equation is not understood")
        if letter not in result:
            raise Mixed("it sums over the sequence")
        return replace(along, dim=result.index(letter))

    def rule_outer(self, node: Node, op: Op) -> Along:
        rows = op["input"] in self.found.along
        return replace(self._one(node, op["input" if rows else "other"]), dim=0 if rows else 1)

    def rule_embedding(self, node: Node, op: Op) -> Along:
        return self._one(node, op["input"])

    def rule_layer_norm(self, node: Node, op: Op | None) -> Along:
        given = first(node)
        along, value = self._one(node, given), tensor_of(given)
        assert value is not None
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        if along.dim >= value.dim() - len(sizes):  # type: ignore[arg-type]
            raise Mixed("it norms over the sequence")
        return along

    rule_rms_norm = rule_layer_norm

    def rule_one_hot(self, node: Node, op: Op | None) -> Along:
        classes = argument(node, 1, "num_classes", -1)
        if not isinstance(classes, int) or classes < 0:
            raise Mixed("how many classes there are depends on a rank's tokens")
        return self._one(node, first(node))

    # -------------------------------------------------------------------------------- along another dimension

    def reduced(self, node: Node, op: Op | None, name: str) -> Along | None:
        """Over some dimensions, or along one; sums over tokens are over those of one rank."""
        given = op["input"] if op is not None else first(node)
        along, value = self._one(node, given), tensor_of(given)
        if value is None:
            raise Mixed("it takes more than one tensor")
        place = 2 if name in ("norm", "vector_norm", "linalg_vector_norm") else 1  # behind the norm's order
        dims = op.get("dim") if op is not None else argument(node, place, "dim")
        if dims is None or isinstance(dims, bool) or (isinstance(dims, Iterable) and not [*dims]):
            dims = range(value.dim())
        dims = {d % value.dim() for d in (dims if isinstance(dims, Iterable) else (dims,))}
        if along.dim in dims:
            if name not in ("sum", "mean"):
                raise Mixed("it is one over the sequence, not a sum")
            self.found.sums.append(node)
            return None
        out = tensor_of(node)
        if out is None:  # values and indices
            out = value_of(node)[0]
        if out.dim() == value.dim():
            return along
        return replace(along, dim=along.dim - sum(d < along.dim for d in dims))

    def _elsewhere(self, node: Node, place: int, default: int | None = None) -> Along:
        """What it does along another dimension than the sequence's, which it keeps."""
        along, value = self._one(node, first(node)), tensor_of(first(node))
        dim = argument(node, place, "dim", default)
        if value is None or not isinstance(dim, int) or dim % value.dim() == along.dim:
            raise Mixed("it takes some tokens of the sequence, or several together")
        return along

    def rule_topk(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 2, -1)

    def rule_chunk(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 2, 0)

    rule_split = rule_chunk

    def rule_narrow(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 1)

    def rule_normalize(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 2, 1)

    def rule_glu(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 1, -1)

    def rule_unbind(self, node: Node, op: Op | None) -> Along:
        along, value = self._elsewhere(node, 1, 0), tensor_of(first(node))
        assert value is not None
        dim = argument(node, 1, "dim", 0) % value.dim()
        return replace(along, dim=along.dim - (dim < along.dim))

    def rule_pad(self, node: Node, op: Op | None) -> Along:
        along, value = self._one(node, first(node)), tensor_of(first(node))
        assert value is not None
        added = argument(node, 1, "pad", ())
        place = 2 * (value.dim() - 1 - along.dim)  # pairs, from the last dimension on
        if any(not same(each, 0) for each in added[place : place + 2]):
            raise Mixed("it adds tokens or takes some away")
        return along

    def rule_gather(self, node: Node, op: Op | None) -> Along:
        """Of what all ranks have, by a number for each token; or of each token's own."""
        given, index = first(node), argument(node, 2, "index")
        dim = argument(node, 1, "dim")
        own, along, value = self.found.along.get(given), self.found.along.get(index), tensor_of(given)  # type: ignore[arg-type]
        assert value is not None
        if along is None or (own is None) == (along.dim != dim % value.dim()) or own not in (None, along):
            raise Mixed("it takes tokens by their numbers")
        return along

    def rule_take_along_dim(self, node: Node, op: Op | None) -> Along:
        given, index, dim = (argument(node, i, name) for i, name in enumerate(("input", "indices", "dim")))
        along, value = self.found.along.get(given), tensor_of(given)
        if along is None or value is None or self.found.along.get(index) != along:
            raise Mixed("it takes tokens by their numbers")
        if dim is None or dim % value.dim() == along.dim:
            raise Mixed("it takes tokens by their numbers")
        return along

    def rule_scatter(self, node: Node, op: Op | None) -> Along:
        """Into each token's own."""
        base, dim, index, source = (
            argument(node, i, n) for i, n in enumerate(("input", "dim", "index", "src"))
        )
        along, value = self.found.along.get(base), tensor_of(base)
        if along is None or value is None or dim % value.dim() == along.dim:
            raise Mixed("it writes to tokens by their numbers")
        for each in (index, source):
            if isinstance(each, Node) and self.found.along.get(each, along) != along:
                raise Mixed("the sequence lies along different dimensions of what it takes")
            given = tensor_of(each)
            if given is not None and each not in self.found.along:
                if each not in self.uniform or not same(given.shape[along.dim], value.shape[along.dim]):
                    raise Mixed("it writes to tokens by their numbers")
        return along

    rule_scatter_add = rule_scatter
