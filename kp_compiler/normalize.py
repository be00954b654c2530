"""One spelling per operation: a canonical, read-only view of Dynamo's graph, and what its mutations do to it.

Dynamo writes the same operation as a method, an operator, a function of `torch`, of `torch.nn.functional` or
of `torch._C._nn`. `canonical(node)` gives each one name and named arguments. The graph itself is left as it
came: what kp does not rewrite reaches Inductor untouched.

Dynamo's graph is not functional. `Writes` knows every write per storage (fake tensors of views share theirs),
so that a reader can tell whether a value is still what its node computed, and can follow a value through
in-place updates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

_MISSING = object()


@dataclass(frozen=True)
class Op:
    """A node in canonical form: `name`, its arguments by name, and whether it updates its first argument."""

    name: str
    args: dict[str, Any]
    inplace: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.args[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.args.get(key, default)


# ---------------------------------------------------------------------------------------------- the table of
# names

_FUNCTIONS: dict[Any, tuple[str, str]] = {}
_METHODS: dict[str, tuple[str, str]] = {}


def _define(
    name: str, signature: str, functions: tuple[Any, ...] = (), methods: tuple[str, ...] = ()
) -> None:
    for function in functions:
        _FUNCTIONS[function] = (name, signature)
    for method in methods:
        _METHODS[method] = (name, signature)


def _define_all() -> None:
    binary = "input other alpha=1"
    for name, extra in {
        "add": (operator.add, operator.iadd),
        "sub": (operator.sub, operator.isub),
        "mul": (operator.mul, operator.imul),
    }.items():
        _define(name, binary, (getattr(torch, name), *extra), (name, f"__{name}__", f"__i{name}__"))
    _define("rsub", binary, (torch.rsub,), ("__rsub__",))
    _define("sub", binary, (torch.subtract,), ("subtract",))
    _define("mul", binary, (torch.multiply,), ("multiply", "__rmul__"))
    _define("add", binary, (), ("__radd__",))
    _define(
        "div",
        "input other rounding_mode=None",
        (torch.div, torch.true_divide, torch.divide, operator.truediv, operator.itruediv),
        ("div", "divide", "true_divide", "__truediv__", "__itruediv__"),
    )
    _define(
        "floordiv", "input other", (operator.floordiv, torch.floor_divide), ("floor_divide", "__floordiv__")
    )
    _define("mod", "input other", (operator.mod, torch.remainder), ("remainder", "__mod__"))
    for name in ("le", "lt", "ge", "gt", "eq", "ne"):
        _define(name, "input other", (getattr(torch, name), getattr(operator, name)), (name, f"__{name}__"))
    words = {"le": "less_equal", "lt": "less", "ge": "greater_equal", "gt": "greater", "ne": "not_equal"}
    for name, word in words.items():
        _define(name, "input other", (getattr(torch, word),), (word,))
    for name, symbols in {
        "and": (operator.and_, operator.iand),
        "or": (operator.or_, operator.ior),
        "xor": (operator.xor, operator.ixor),
    }.items():
        spelt = (f"logical_{name}", f"bitwise_{name}")
        functions = (*symbols, *(getattr(torch, each) for each in spelt))
        _define(name, "input other", functions, (*spelt, f"__{name}__", f"__i{name}__"))
    _define(
        "not",
        "input",
        (operator.invert, torch.logical_not, torch.bitwise_not),
        ("logical_not", "bitwise_not", "__invert__"),
    )
    for name in ("neg", "abs", "tanh", "exp", "log", "floor", "sigmoid"):
        _define(name, "input", (getattr(torch, name),), (name,))
    _define("neg", "input", (operator.neg,), ("__neg__",))
    _define("abs", "input", (operator.abs,), ("__abs__",))
    _define("tanh", "input", (F.tanh,))
    _define("pow", "input exponent", (torch.pow, operator.pow), ("pow", "__pow__"))
    _define("minimum", "input other", (torch.minimum,), ("minimum",))
    _define("maximum", "input other", (torch.maximum,), ("maximum",))
    _define("min", "input dim=None keepdim=False", (torch.min,), ("min",))
    _define("max", "input dim=None keepdim=False", (torch.max,), ("max",))
    _define("amax", "input dim=() keepdim=False", (torch.amax,), ("amax",))
    _define("clamp", "input min=None max=None", (torch.clamp, torch.clip), ("clamp", "clip"))
    _define("clamp_min", "input min", (torch.clamp_min,), ("clamp_min",))
    _define("sum", "input dim=None keepdim=False dtype=None", (torch.sum,), ("sum",))
    _define("all", "input dim=None keepdim=False", (torch.all,), ("all",))

    _define("matmul", "input other", (torch.matmul, operator.matmul), ("matmul", "__matmul__"))
    _define("bmm", "input other", (torch.bmm,), ("bmm",))
    _define("matmul", "input other", (torch.mm,), ("mm",))
    _define("baddbmm", "input batch1 batch2 beta=1 alpha=1", (torch.baddbmm,), ("baddbmm",))
    _define("einsum", "equation *operands", (torch.einsum, torch.functional.einsum))
    _define("linear", "input weight bias=None", (F.linear, torch._C._nn.linear))
    _define("addmm", "input mat1 mat2 beta=1 alpha=1", (torch.addmm,), ("addmm",))
    _define("softmax", "input dim=None _stacklevel=3 dtype=None", (F.softmax,))
    _define(
        "softmax",
        "input dim dtype=None",
        (torch.softmax, torch._C._nn.softmax if hasattr(torch._C._nn, "softmax") else torch.softmax),
        ("softmax",),
    )
    _define("softmax", "input dim dtype=None", (torch.special.softmax,))
    _define("dropout", "input p=0.5 training=True inplace=False", (F.dropout,))
    _define("dropout", "input p train", (torch.dropout,))
    _define(
        "sdpa",
        "query key value attn_mask=None dropout_p=0.0 is_causal=False scale=None enable_gqa=False",
        (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention),
    )

    _define("view", "input *size", (torch.reshape,), ("view", "reshape", "unflatten_to"))
    _define("view_as", "input other", (), ("view_as", "reshape_as"))
    _define("flatten", "input start_dim=0 end_dim=-1", (torch.flatten,), ("flatten",))
    _define("unflatten", "input dim sizes", (torch.unflatten,), ("unflatten",))
    _define("expand", "input *size", (), ("expand", "broadcast_to"))
    _define("expand", "input *size", (torch.broadcast_to,))
    _define("expand_as", "input other", (), ("expand_as",))
    _define("permute", "input *dims", (torch.permute,), ("permute",))
    _define(
        "transpose",
        "input dim0 dim1",
        (torch.transpose, torch.swapaxes, torch.swapdims),
        ("transpose", "swapaxes", "swapdims"),
    )
    _define("t", "input", (torch.t,), ("t",))
    _define("unsqueeze", "input dim", (torch.unsqueeze,), ("unsqueeze",))
    _define("squeeze", "input dim=None", (torch.squeeze,), ("squeeze",))
    _define("repeat", "input *repeats", (torch.tile,), ("repeat", "tile"))
    _define(
        "repeat_interleave",
        "input repeats dim=None output_size=None",
        (torch.repeat_interleave,),
        ("repeat_interleave",),
    )
    _define("cat", "tensors dim=0", (torch.cat, torch.concat, torch.concatenate))
    _define("getitem", "input index", (operator.getitem,), ("__getitem__",))
    _define("getattr", "input name", (getattr,))
    _define("narrow", "input dim start length", (torch.narrow,), ("narrow",))
    _define("flip", "input *dims", (torch.flip,), ("flip",))
    _define("diff", "input n=1 dim=-1 prepend=None append=None", (torch.diff,), ("diff",))
    _define("cumsum", "input dim dtype=None", (torch.cumsum,), ("cumsum",))
    _define("embedding", "input weight", (F.embedding,))

    _define("to", "input *spec", (torch.ops.aten.to,), ("to",))
    _define("type", "input dtype", (), ("type",))
    _define("type_as", "input other", (), ("type_as",))
    for name, dtype in {
        "float": torch.float32,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
        "double": torch.float64,
        "bool": torch.bool,
        "int": torch.int32,
        "long": torch.int64,
    }.items():
        _METHODS[name] = ("cast", f"input memory_format=None ={dtype}")
    _define("clone", "input", (torch.clone,), ("clone", "contiguous", "detach_keep"))
    _define("clone", "input memory_format=None", (), ("contiguous",))
    _define("detach", "input", (torch.detach,), ("detach",))

    _define("masked_fill", "input mask value", (torch.masked_fill,), ("masked_fill",))
    _define("where", "condition input other", (torch.where,))
    _METHODS["where"] = ("where_method", "input condition other")
    _define("arange", "*range", (torch.arange,))
    for name in ("zeros", "ones"):
        _define("full", f"*size fill_value={int(name == 'ones')}", (getattr(torch, name),))
        _define("full", f"input *size fill_value={int(name == 'ones')}", (), (f"new_{name}",))
        _define("full_like", f"input fill_value={int(name == 'ones')}", (getattr(torch, f"{name}_like"),))
    _define("full", "size fill_value", (torch.full,))
    _METHODS["new_full"] = ("full", "input size fill_value")
    _define("full_like", "input fill_value", (torch.full_like,))
    _METHODS["new_tensor"] = ("new_tensor", "input data")
    _define("tril", "input diagonal=0", (torch.tril,), ("tril",))
    _define("triu", "input diagonal=0", (torch.triu,), ("triu",))
    _define("tensor", "data", (torch.tensor, torch.as_tensor, torch.scalar_tensor))
    _define("empty", "*size", (torch.empty,), ("new_empty",))
    _define("outer", "input other", (torch.outer,), ("outer",))
    _define("meshgrid", "*tensors indexing=None", (torch.meshgrid, torch.functional.meshgrid))
    _define("sqrt", "input", (torch.sqrt, math.sqrt), ("sqrt",))
    _define("size", "input dim=None", (), ("size",))
    _define("item", "input", (), ("item",))


_define_all()


def canonical(node: Node) -> Op | None:
    """The node's canonical form, or None for a target that kp has no name for."""
    if node.op == "call_function":
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = _from_aten(target)
        elif isinstance(target, torch._ops.OpOverloadPacket):
            target = _from_aten(target.default) if hasattr(target, "default") else target
        entry = _FUNCTIONS.get(target) if _hashable(target) else None
        inplace = getattr(target, "__name__", "") in _INPLACE_OPERATORS
    elif node.op == "call_method":
        method = str(node.target)
        inplace = _is_inplace_name(method)
        entry = _METHODS.get(method[:-1] if inplace and not method.startswith("__") else method)
    else:
        return None
    if entry is None:
        return None
    name, signature = entry
    args = _bind(signature, node.args, node.kwargs)
    return None if args is None else _simplify(name, args, inplace)


def _hashable(target: Any) -> bool:
    try:
        hash(target)
    except TypeError:
        return False
    return True


def _from_aten(overload: Any) -> Any:
    """The torch function whose positional arguments an ATen overload shares."""
    name = overload._schema.name.removeprefix("aten::")
    if name == "scaled_dot_product_attention":
        return F.scaled_dot_product_attention
    if name in ("to", "_to_copy"):
        return torch.ops.aten.to
    return getattr(
        torch, {"_softmax": "softmax", "view": "reshape", "expand": "broadcast_to"}.get(name, name), overload
    )


def _bind(signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by parameter name; `*name` collects the remaining positionals (or one sequence)."""
    bound: dict[str, Any] = {}
    rest = list(args)
    named = dict(kwargs)
    for token in signature.split():
        name, eq, default = token.partition("=")
        if name.startswith("*"):
            name = name[1:]
            value: Any = tuple(rest)
            rest = []
            if not value and name in named:
                value = (named.pop(name),)
            if len(value) == 1 and isinstance(value[0], tuple | list):
                value = tuple(value[0])
            bound[name] = value
        elif not name:
            bound["dtype"] = default
        elif rest:
            bound[name] = rest.pop(0)
        elif name in named:
            bound[name] = named.pop(name)
        elif (alias := _ALIASES.get(name)) in named and alias is not None:
            bound[name] = named.pop(alias)
        elif eq:
            bound[name] = _literal(default)
        else:
            return None
    bound.update({_ALIASES.get(key, key) if key == "axis" else key: value for key, value in named.items()})
    return None if rest else bound


_ALIASES = {"dim": "axis", "axis": "dim", "input": "self", "other": "tensor2", "size": "shape"}


def _literal(text: str) -> Any:
    literals: dict[str, Any] = {"None": None, "True": True, "False": False, "()": ()}
    if text in literals:
        return literals[text]
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _simplify(name: str, args: dict[str, Any], inplace: bool) -> Op | None:
    """Fold the spellings that differ in more than their name."""
    if name == "where_method":
        return Op(
            "where", {"condition": args["condition"], "input": args["input"], "other": args["other"]}, inplace
        )
    if name == "rsub":
        return Op("sub", {"input": args["other"], "other": args["input"], "alpha": args["alpha"]})
    if name == "cast":
        return Op(
            "cast", {"input": args["input"], "dtype": getattr(torch, args["dtype"].removeprefix("torch."))}
        )
    if name == "type_as":
        other = args["other"]
        return (
            Op("cast", {"input": args["input"], "dtype": value_of(other).dtype})
            if isinstance(other, Node)
            else None
        )
    if name == "type":
        return (
            Op("cast", {"input": args["input"], "dtype": args["dtype"]})
            if isinstance(args["dtype"], torch.dtype)
            else None
        )
    if name == "to":
        return _simplify_to(args)
    if name == "flatten" or name == "view_as" or name == "unflatten":
        return Op("view", {"input": args["input"], "size": None})
    if name == "expand_as":
        return Op("expand", {"input": args["input"], "size": None})
    if name == "t":
        return Op("transpose", {"input": args["input"], "dim0": 0, "dim1": 1})
    if name == "getattr":
        if args["name"] in ("T", "mT"):
            return Op("transpose", {"input": args["input"], "dim0": -2, "dim1": -1})
        return Op("getattr", args)
    if (
        name in ("min", "max")
        and isinstance(args["dim"], Node)
        and isinstance(value_of(args["dim"]), torch.Tensor)
    ):
        return Op(f"{name}imum", {"input": args["input"], "other": args["dim"]})
    if name == "clamp_min":
        return Op("clamp", {"input": args["input"], "min": args["min"], "max": None}, inplace)
    if name == "div" and args.get("rounding_mode") == "floor":
        return Op("floordiv", {"input": args["input"], "other": args["other"]}, inplace)
    if name == "div" and args.get("rounding_mode") is not None:
        return Op("div_trunc", {"input": args["input"], "other": args["other"]}, inplace)
    if name == "dropout":
        training = args.get("training", args.get("train", True))
        return Op("dropout", {"input": args["input"], "p": float(args["p"]) if training else 0.0}, inplace)
    return Op(name, args, inplace)


def _simplify_to(args: dict[str, Any]) -> Op:
    """`.to(...)`: a cast if a dtype is named, else a change of device, which is a no-op inside one graph."""
    dtype = args.get("dtype")
    for item in args["spec"]:
        if isinstance(item, torch.dtype):
            dtype = item
        elif isinstance(item, Node) and isinstance(value_of(item), torch.Tensor):
            dtype = value_of(item).dtype
    return Op("cast", {"input": args["input"], "dtype": dtype})


# -------------------------------------------------------------------------------------------------------
# metadata


def value_of(node: Any) -> Any:
    """The fake value Dynamo computed for a node (or the constant itself)."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def fill_metadata(gm: GraphModule) -> list[str]:
    """Compute missing `example_value`s under the graph's own fake mode; returns the names that stay without
    one."""
    from torch._guards import detect_fake_mode

    missing = [
        n
        for n in gm.graph.nodes
        if n.op in ("call_function", "call_method") and "example_value" not in n.meta
    ]
    if not missing:
        return []
    mode = detect_fake_mode([v for n in gm.graph.nodes if (v := tensor_of(n)) is not None])
    return [node.name for node in missing if mode is None or not infer(node, mode)]


def infer(node: Node, mode: Any) -> bool:
    """Like `trace_fake`, for a node that may be one that fakes can't run: sites that need its value are
    refused."""
    try:
        trace_fake(node, mode)
    except Exception:
        return False
    return True


def trace_fake(node: Node, mode: Any, *, grad: bool = True) -> None:
    """Run one node on its arguments' fake values and keep the result.

    The Python dispatcher decomposes composites such as matmul; their C++ form would turn symbolic sizes into
    numbers.
    """
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    with mode, torch.set_grad_enabled(grad), enable_python_dispatcher():
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]


def bodies(gm: GraphModule) -> Iterator[tuple[GraphModule, tuple[Node, ...]]]:
    """The graph and every activation-checkpoint body under it, each with the nodes that call it."""
    yield gm, ()
    calls: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if (
            node.op == "call_function"
            and str(node.target) in CHECKPOINT_OPS
            and isinstance(node.args[0], Node)
        ):
            calls.setdefault(str(node.args[0].target), []).append(node)
    for name, nodes in calls.items():
        body = gm.get_submodule(name)
        if isinstance(body, GraphModule):
            yield body, tuple(nodes)


CHECKPOINT_OPS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


# ----------------------------------------------------------------------------------------------------------
# writes

_INPLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "iand", "ior", "ixor", "ipow", "imatmul",
}  # fmt: skip


def _is_inplace_name(name: str) -> bool:
    if name.startswith("__"):
        return name.startswith("__i") and name[3:-2] in {op[1:] for op in _INPLACE_OPERATORS}
    return name.endswith("_")


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    found: list[Any] = []
    if node.kwargs.get("inplace") is True or "out" in node.kwargs:
        found.append(node.kwargs.get("out", node.args[0] if node.args else None))
    if node.op == "call_method":
        if _is_inplace_name(str(node.target)) or node.target == "__setitem__":
            found.append(node.args[0])
    elif isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        pairs = zip(schema.arguments, node.args, strict=False)
        found += [
            arg for formal, arg in pairs if formal.alias_info is not None and formal.alias_info.is_write
        ]
        by_name = {f.name for f in schema.arguments if f.alias_info is not None and f.alias_info.is_write}
        found += [arg for name, arg in node.kwargs.items() if name in by_name]
    elif node.target is operator.setitem:
        found.append(node.args[0])
    else:
        name = getattr(node.target, "__name__", "")
        if name in _INPLACE_OPERATORS or (
            name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_")
        ):
            found.append(node.args[0])
        elif node.target is F.dropout and len(node.args) > 3 and node.args[3] is True:
            found.append(node.args[0])
    return [arg for arg in found if isinstance(arg, Node) and tensor_of(arg) is not None]


def storage_of(node: Any) -> int | None:
    """An identity for the storage behind a node's tensor: views share it."""
    value = tensor_of(node)
    try:
        return None if value is None else value.untyped_storage()._cdata
    except NotImplementedError:  # wrappers inside functorch transforms own no storage
        return None


class Writes:
    """Where a graph writes to which storage, by position. Build it anew after the graph was edited."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.by_storage: dict[int, list[Node]] = {}
        self.external = {storage_of(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
        for node in graph.nodes:
            for target in written(node):
                storage = storage_of(target)
                if storage is not None:
                    self.by_storage.setdefault(storage, []).append(node)

    def between(self, value: Node, reader: Node, *, since: Node | None = None) -> list[Node]:
        """Writes to `value`'s storage before `reader` runs and after `since` did (default: after it was
        computed)."""
        storage = storage_of(value)
        if storage is None or storage not in self.by_storage:
            return []
        low, high = self.position.get(since or value, -1), self.position.get(reader, len(self.position))
        return [node for node in self.by_storage[storage] if low < self.position[node] < high]

    def current(self, value: Node, reader: Node) -> Node | None:
        """The node that holds what `value` reads as at `reader`: itself, the in-place update of it, or None.

        An update is followed when it rewrites the whole of a tensor that was made inside the graph.
        """
        while writes := self.between(value, reader):
            first = writes[0]
            whole = written(first) == [value] and tensor_of(first) is not None
            if not whole or first.target is operator.setitem or storage_of(value) in self.external:
                return None
            value = first
        return value


# --------------------------------------------------------------------------------------------------------
# clean-up


def erase_orphans(
    graph: Graph, roots: list[Node], *, keep: Callable[[Node], bool] = lambda node: False
) -> int:
    """Erase `roots` and whatever only they used, walking up. Mutations go only with everything that shares
    their storage; nodes with other effects and placeholders stay. Returns the number of nodes erased."""
    erased = 0
    queue = list(roots)
    while queue:
        node = queue.pop()
        if node._erased or node.users or node.op not in ("call_function", "call_method") or keep(node):
            continue
        if not _removable(node):
            continue
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        erased += 1
        queue.extend(inputs)
        queue.extend(user for i in inputs for user in i.users if not user.users and written(user) == [i])
    return erased


def _removable(node: Node) -> bool:
    targets = written(node)
    if targets:
        return all(_private(target, node) for target in targets)
    op = canonical(node)
    if op is not None:
        return op.name != "item" and not (
            op.name == "dropout" and op["p"] > 0.0 and not node.meta.get("kp_replaced")
        )
    if isinstance(node.target, torch._ops.OpOverload):
        return (
            not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
    return getattr(node.target, "__module__", "") in _PURE_MODULES and not node.is_impure()


_PURE_MODULES = ("_operator", "math", "torch.nn.functional", "torch._C._nn", "torch", "torch.functional")


def _private(target: Node, writer: Node) -> bool:
    """No one but `writer` still looks at the storage that `target` owns, and the graph made it."""
    storage = storage_of(target)
    for node in writer.graph.nodes:
        if storage_of(node) != storage:
            continue
        if node.op in ("placeholder", "get_attr"):
            return False
        if any(user is not writer for user in node.users):
            return False
    return True
