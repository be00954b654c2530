"""Hand a graph to Inductor, AOTAutograd or plain eager."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from kp_compiler import runtime
from kp_compiler.config import Config
from kp_compiler.lowering import fp8
from kp_compiler.lowering.fp8.delayed import let_passes_overlap
from kp_compiler.lowering.graph_passes import PASSES
from kp_compiler.lowering.whole_rows import keeping_rows


def lower(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, *, guarded: bool
) -> Callable[..., Any]:
    """Compile a graph as the options say. `guarded` keeps Inductor's attention patterns away from it."""
    fp8.register()
    whole, inputs = runtime.extended(gm, example_inputs)
    return runtime.provided(_lowered(whole, inputs, config, guarded=guarded), gm)


def _lowered(gm: GraphModule, inputs: list[Any], config: Config, *, guarded: bool) -> Callable[..., Any]:
    if config.lowering == "eager":
        return gm.forward
    if config.lowering == "aot_eager":
        return _aot_eager(gm, inputs)
    return compile_with_inductor(gm, inputs, config, guarded=guarded)


def _aot_eager(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """PyTorch's backend of that name, with the pass over joint graphs that correctness needs."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
        let_passes_overlap(joint.graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    return aot_autograd(  # type: ignore[no-any-return]
        fw_compiler=boxed_nop, partition_fn=partition, keep_inference_input_mutations=True
    )(gm, inputs)


def compile_with_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, *, guarded: bool
) -> Any:
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    patches: dict[str, Any] = {}
    if config.mode is not None and config.mode != "default":
        patches.update(list_mode_options(config.mode))
    patches.update({key.replace("-", "_"): value for key, value in config.inductor.items()})
    if guarded:
        for key, passes in PASSES.items():
            for each in passes:
                patches[key] = each(patches.get(key, getattr(inductor_config, key)), config)
    inner = compile_fx_inner if config.fp8_linear.mode == "off" else keeping_rows(compile_fx_inner)
    return compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches)


def reset() -> None:
    """What `torch._dynamo.reset()` asks of Inductor: drop its CUDA-graph trees. It must import nothing, see
    `backend`."""
    compiler = sys.modules.get("torch._inductor.compile_fx")
    if compiler is not None:
        getattr(compiler.compile_fx, "reset", lambda: None)()
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None and torch.cuda.is_initialized():
        trees.reset_cudagraph_trees()
