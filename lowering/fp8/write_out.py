"""Write nodes of a post-grad graph, with values; and scales and casts in ATen, for Inductor to fuse."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims


class Writer:
    """Writes nodes in front of `anchor`. `maxima`, where several share it, holds what was written before:
    (matrix, reduced dimension) -> largest magnitudes. Their order is then to be mended by sorting."""

    def __init__(self, graph: Graph, anchor: Node, maxima: dict[Any, Node] | None = None) -> None:
        self.graph, self.anchor = graph, anchor
        self.mode = _fake_mode(anchor)
        self.maxima = {} if maxima is None else maxima

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def view(self, node: Node, sizes: list[Any]) -> Node:
        value = node.meta["val"]
        if len(sizes) == value.dim() == 1:
            return node
        return self.call(aten.reshape.default, node, sizes)

    def slice(self, node: Node, start: int, end: int) -> Node:
        return self.call(aten.slice.Tensor, node, 0, start, end)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return (
            node
            if node.meta["val"].dtype == dtype
            else self.call(prims.convert_element_type.default, node, dtype)
        )

    def write_out(self) -> None:
        """Replace the anchor, one of the operators of `quantize`, by ATen."""
        node = self.anchor
        kp = torch.ops.kp
        if node.target is kp.fp8_amax.default:
            out = self.call(aten.reshape.default, self._amax_of(node.args[0]), [1])
        elif node.target is kp.fp8_scale.default:
            out = self._scale(*node.args)
        else:
            out = self._quantize(*node.args)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def _scale(
        self, parts: Any, dim: int, dtype: torch.dtype, block: list[int], power_of_two: bool, after: Any
    ) -> Node:
        assert list(block) in ([1, 0], [0, 1]), "other scales have kernels, or are made of fp8_amax"
        amax = self._amax_along(parts, dim, 1 if block[0] else 0)
        limit = torch.finfo(dtype).max
        tiny = self.call(aten.lt.Scalar, amax, limit * 2.0**-126)
        full = self.call(aten.full.default, [], limit, dtype=torch.float32, device=amax.meta["val"].device)
        scale = self.call(aten.div.Tensor, full, self.call(aten.where.self, tiny, full, amax))
        if power_of_two:
            scale = self.call(
                aten.exp2.default, self.call(aten.floor.default, self.call(aten.log2.default, scale))
            )
        return scale

    def largest(self, tiles: list[Node]) -> Node:
        """The largest of several tensors of magnitudes, [1]."""
        found = [self.call(aten.amax.default, each, [0, 1]) for each in tiles]
        return self.call(aten.reshape.default, self._maximum(found), [1])

    def _maximum(self, nodes: list[Node]) -> Node:
        return reduce(lambda a, b: self.call(aten.maximum.default, a, b), nodes)

    def _joined(self, parts: Any, dim: int) -> Node:
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, list(parts), dim)  # type: ignore[no-any-return]

    def _amax_along(self, parts: Any, dim: int, reduced: int) -> Node:
        """The largest magnitudes of rows or columns, the other dimension left with size 1; of each part where
        it lies."""
        found = [self._maxima(part, reduced) for part in parts]
        return self._maximum(found) if dim == reduced else self._joined(found, dim)

    def _maxima(self, matrix: Node, reduced: int) -> Node:
        """In float32. The largest magnitude has the largest bits, taken as integers, and a NaN larger ones:
        that is a comparison less for each element."""
        if (matrix, reduced) not in self.maxima:
            bits = self.call(aten.view.dtype, self.cast(matrix, torch.float32), torch.int32)
            magnitudes = self.call(aten.bitwise_and.Scalar, bits, 0x7FFFFFFF)
            largest = self.call(aten.amax.default, magnitudes, [reduced], True)
            self.maxima[matrix, reduced] = self.call(aten.view.dtype, largest, torch.float32)
        return self.maxima[matrix, reduced]

    def _amax_of(self, parts: Any) -> Node:
        """Along rows first, where the matrix is made, then over what that leaves."""
        found = []
        for part in parts:
            found.append(self.call(aten.amax.default, self._maxima(part, 1), [0, 1]))
        return self._maximum(found)

    def _quantize(
        self, parts: Any, dim: int, scale: Node, dtype: torch.dtype, block: Any, transpose: bool, after: Any
    ) -> Node:
        x = self._joined(parts, dim)
        scaled = self.call(aten.mul.Tensor, self.cast(x, torch.float32), scale)
        q = self.call(aten.add.Tensor, self._clamped(scaled, dtype), self.call(aten.mul.Tensor, scaled, 0.0))
        if not transpose:
            return self.cast(q, dtype)
        more = -x.meta["val"].shape[0] % 16
        q = self.call(aten.permute.default, q, [1, 0])
        if not (isinstance(more, int) and more == 0):
            q = self.call(aten.constant_pad_nd.default, q, [0, more], 0.0)
        return self.call(aten.clone.default, self.cast(q, dtype), memory_format=torch.contiguous_format)

    def _clamped(self, scaled: Node, dtype: torch.dtype) -> Node:
        """Within what `dtype` holds. On a GPU the conversion that Triton emits does that (PTX has no other
        one to FP8). The caller adds a product with zero, which makes infinities NaN before."""
        if scaled.meta["val"].device.type == "cuda":
            return scaled
        limit = torch.finfo(dtype).max
        return self.call(aten.clamp_max.default, self.call(aten.clamp_min.default, scaled, -limit), limit)


def _fake_mode(node: Node) -> Any:
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    return next(each.fake_mode for each in values if isinstance(each, torch.Tensor))
