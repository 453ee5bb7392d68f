"""A deployed model of few evaluations: its static network in ONNX Runtime, beside the span and a jitted scan in JAX.

Rows whose packages are not installed are left out: ``pip install onnxscript onnxruntime jax``.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.contestants import mlp, node_of, state
from benchmarks.timing import Row, Run, compare
from torchdyn_mintime.core import LearnableSpan, as_network
from torchdyn_mintime.numerics import LearnableSolver

__all__ = ["deployed", "in_jax", "in_onnx_runtime"]


SIZES = ((2, 64, 64), (16, 64, 64))
"""Sizes of the state, of the hidden layer and of the batch."""
EVALUATIONS = (1, 2, 4, 8)


def deployed(rounds: int) -> Iterator[Row]:
    """Measures inference at 1 to 8 evaluations, against the span. The field's evaluations alone are the lower limit."""
    for size, width, batch in SIZES:
        for evaluations in EVALUATIONS:
            net, x = mlp(size, width), state(batch, size)
            if evaluations < 4:
                node, grid = node_of(net, solver=LearnableSolver(evaluations)), torch.tensor([0.0, 1.0])
            else:
                node, grid = node_of(net), torch.linspace(0, 1, evaluations // 4 + 1)
            span = LearnableSpan(node, grid).eval()
            network = as_network(span)
            runs: dict[str, Run] = {
                "LearnableSpan": torch.no_grad()(lambda span=span, x=x: span(x)),
                "as_network": torch.no_grad()(lambda network=network, x=x: network(x)),
                "the field alone": torch.no_grad()(lambda net=net, x=x, n=evaluations: [net(x) for _ in range(n)]),
            }
            if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
                runs["ONNX Runtime"] = in_onnx_runtime(network, x)
            if importlib.util.find_spec("jax") and evaluations >= 4:
                runs["JAX"] = in_jax(net, x, evaluations // 4)
            case = f"{evaluations} evaluations, {size}-{width}-{size}, batch {batch}"
            yield from compare("deployed", case, runs, rounds)


def in_onnx_runtime(network: nn.Module, x: Tensor) -> Run:
    """Returns a run of an exported network in ONNX Runtime, from and to NumPy, on one thread."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns that t_eval is an output
        program = torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def in_jax(net: nn.Sequential, x: Tensor, steps: int) -> Run:
    """Returns a run of equal steps of rk4 from 0 to 1 as a jitted scan in JAX, with the weights of ``net``."""
    import jax
    import jax.numpy as jnp

    w1, b1, w2, b2 = (jnp.asarray(p.detach().numpy()) for p in net.parameters())
    h = 1 / steps

    def field(z):
        return jnp.tanh(z @ w1.T + b1) @ w2.T + b2

    def step(z, _):
        k1 = field(z)
        k2 = field(z + h / 2 * k1)
        k3 = field(z + h / 2 * k2)
        k4 = field(z + h * k3)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z, z

    solve = jax.jit(lambda z: jax.lax.scan(step, z, None, length=steps))
    given = jnp.asarray(x.numpy())
    return lambda: jax.block_until_ready(solve(given))
