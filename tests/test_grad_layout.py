"""The gradient handed to cuDNN's backward always has the output's layout (traced on fake CUDA tensors)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kp_compiler.config import resolve
from kp_compiler.lowering.graph_passes import GradLayout

aten = torch.ops.aten
SIZES = {"heads first": (2, 4, 24, 16), "sequence first": (2, 24, 4, 16)}


def _tensor(layout: str) -> torch.Tensor:
    x = torch.empty(*SIZES[layout], device="cuda", dtype=torch.bfloat16)
    return x if layout == "heads first" else x.transpose(1, 2)


def _backward(q, k, v, grad):
    out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=0.25)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out[0], out[1], out[6], out[7], None, None, None, 24, 24, 0.0, True, scale=0.25
    )


@pytest.mark.parametrize("inputs", SIZES)
@pytest.mark.parametrize("gradient", SIZES)
def test_gradient_follows_the_output(inputs: str, gradient: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (_tensor(inputs) for _ in range(3))
        grad = _tensor(gradient)
    gm = make_fx(_backward, tracing_mode="fake", _allow_non_fake_inputs=True)(q, k, v, grad)
    before = len(gm.graph.nodes)
    GradLayout(None, resolve({}))(gm.graph)
    gm.graph.lint()
    name = "_scaled_dot_product_cudnn_attention_backward"
    (node,) = (n for n in gm.graph.nodes if name in str(n.target))
    assert node.args[0].meta["val"].stride() == node.args[4].meta["val"].stride()
    assert (len(gm.graph.nodes) == before) == (inputs == gradient)
