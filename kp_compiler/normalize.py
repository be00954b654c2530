"""One spelling per operation: a canonical, read-only view of Dynamo's graph.

Dynamo writes the same operation as a method, an operator, a function of `torch`, of `torch.nn.functional` or
of `torch._C._nn`. `canonical(node)` gives each one name and named arguments. The graph itself is left as it
came: what kp does not rewrite reaches Inductor untouched.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from kp_compiler.metadata import number_of, value_of


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


# What each operation is spelt as: name, parameters, functions, methods. A `*name` takes the remaining
# positionals, `name=value` has a default, `=value` is the dtype that a method's name implies.

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

    _define("view", "input *size", (torch.reshape,), ("view", "reshape"))
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
    _define(
        "embedding",
        "input weight padding_idx=None max_norm=None norm_type=2.0 scale_grad_by_freq=False sparse=False",
        (F.embedding,),
    )

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
    _define("clone", "input", (torch.clone,), ("clone", "contiguous"))
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
        inplace = getattr(target, "__name__", "") in INPLACE_OPERATORS
    elif node.op == "call_method":
        method = str(node.target)
        inplace = is_inplace_name(method)
        entry = _METHODS.get(method[:-1] if inplace and not method.startswith("__") else method)
    else:
        return None
    if entry is None:
        return None
    name, signature = entry
    args = _bind(signature, node.args, node.kwargs)
    return None if args is None else _simplify(name, args, inplace)


def permutation(op: Op, rank: int) -> list[int] | None:
    """The order of dimensions that a permute or transpose makes."""
    if op.name == "transpose":
        order = list(range(rank))
        a, b = op["dim0"], op["dim1"]
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if not (-rank <= a < rank and -rank <= b < rank):
            return None
        order[a], order[b] = order[b], order[a]
        return order
    dims = op["dims"]
    return [d % rank for d in dims] if len(dims) == rank and all(isinstance(d, int) for d in dims) else None


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
    if name == "view" and any(isinstance(item, torch.dtype) for item in (*args["size"], args.get("dtype"))):
        return None  # reads the bits as another type
    if name == "flatten" or name == "view_as" or name == "unflatten":
        return Op("view", {"input": args["input"], "size": None})
    if name == "expand_as":
        return Op("expand", {"input": args["input"], "size": None})
    if name == "t":
        return Op("transpose", {"input": args["input"], "dim0": 0, "dim1": 1})
    if name == "arange":
        alone = len(args["range"]) == 1 and "end" not in args
        names = ("end",) if alone else ("start", "end", "step")
        rest = {key: value for key, value in args.items() if key != "range"}
        return Op(name, {"start": 0, "step": 1, **rest, **dict(zip(names, args["range"], strict=False))})
    if name == "getattr":
        value = value_of(args["input"])
        if args["name"] == "T" and isinstance(value, torch.Tensor) and value.dim() != 2:
            return Op("permute", {"input": args["input"], "dims": tuple(reversed(range(value.dim())))})
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
        p = number_of(args["p"]) if args.get("training", args.get("train", True)) else 0.0
        return None if p is None else Op("dropout", {"input": args["input"], "p": p}, inplace)
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


INPLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "iand", "ior", "ixor", "ipow", "imatmul",
}  # fmt: skip


def is_inplace_name(name: str) -> bool:
    if name.startswith("__"):
        return name.startswith("__i") and name[3:-2] in {op[1:] for op in INPLACE_OPERATORS}
    return name.endswith("_")
