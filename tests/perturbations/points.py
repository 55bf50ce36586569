"""Weights and gradients of several shapes and dtypes, and a check of where they are displaced to."""

import torch

from composer_sassha.perturbations import Ascent, Gradient, Point

SHAPES = [(3, 2), (4,), (), (2, 1, 2, 2)]
NAMES = ["conv.weight", "conv.bias", "scale", "norm.weight"]
DTYPES = {
    "float64": [torch.float64] * 4,
    "float32": [torch.float32] * 4,
    "bfloat16": [torch.bfloat16] * 4,
    "mixed": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
}


def tensors(seed, dtypes=DTYPES["float64"]):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]


def doubles(ts):
    return [t.double() for t in ts]


def norm(ts):
    return torch.cat([t.flatten() for t in doubles(ts)]).norm().item()


def displace(perturbation, params, grads=(), names=(), states=(), **known):
    """Move the parameters to where the descent is, given their gradients at w. Returns what to log."""
    at = Point(
        params, dict(zip(params, names, strict=False)).get, list(states) or [{} for _ in params], **known
    )
    program = perturbation.step(at)
    wanted = next(program)
    if isinstance(wanted, Ascent):
        assert wanted.e is None, "at w"
        wanted = program.send(Gradient(params, grads))
    wanted.e.apply()
    return at.metrics


def run(program, at, gradients):
    """Run a program on these flat gradients. Returns its update, and what it remembers by name."""
    next(program)
    try:
        for g in gradients:
            program.send(Gradient(at.params, [g]))
    except StopIteration as end:
        return end.value, dict(at.memory)
    raise AssertionError("the program wants another pass")


def combine(perturbation, g, h):
    """Return the update made of the gradients at w and at w + e, and the vector that is remembered."""
    update, memory = run(perturbation.step(at := Point([torch.zeros_like(g)])), at, [g, h])
    return update, next(iter(memory.values()), None)


def reuse(perturbation, g, remembered):
    """Return the update of a step between two perturbed ones, given the vector that is remembered."""
    at = Point([torch.zeros_like(g)], memory={perturbation.remembers: remembered})
    return run(perturbation.between(at), at, [g])[0]


def assert_displaces(perturbation, equation, dtypes, eps=0.0, **known):
    """Compare with the displacement by an equation on the list of weights and that of gradients, in float64.

    Allows for roundings to each tensor's dtype, or to `eps` if that is coarser. Returns what the perturbation
    has to log.
    """
    params, grads = tensors(1, dtypes), tensors(2, dtypes)
    w = doubles(params)
    expected = [w_i + e_i for w_i, e_i in zip(w, equation(w, doubles(grads)), strict=True)]
    metrics = displace(perturbation, params, grads, **known)
    for p, value in zip(params, expected, strict=True):
        tolerance = 4 * max(eps, torch.finfo(p.dtype).eps)
        torch.testing.assert_close(p.double(), value, rtol=tolerance, atol=tolerance)
    return metrics
