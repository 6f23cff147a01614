"""Arguments for the inner loops of rounding, and what must hold of a result and its oracle's.

As a program it runs the Triton kernels on the CPU, in Triton's interpreter, and writes what they
return to a file: `python tests/support/rounding_cases.py FILE`.
"""

import os
import sys

import torch

ROWS = 19  # one more tile than is full
WIDTHS = (128, 32)


def cases(rows=ROWS, device="cpu"):
    """Name -> (function, arguments), the same ones every time."""
    return {
        name if width == 128 else f"{name}, {width} columns": case
        for width in WIDTHS
        for name, case in _cases(rows, device, width).items()
        if width == 128 or name in ("search", "round", "descend within reach")
    }


def _cases(rows, device, width):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    spread = torch.tensor([[1.0], [9.0], [60.0]])[torch.arange(rows) % 3]
    level1 = (normal(rows, 2 * width) * spread).clamp(-119, 119).view(rows, 2, width)
    level1[5, 1] = 0
    level1[6, 0] = 7.25
    cost = torch.rand(2, width, generator=random) + 0.1
    mixed = normal(width, width)
    hessian = mixed @ mixed.t() / width + 0.3 * torch.eye(width)
    lower = torch.linalg.cholesky(hessian).contiguous()
    ideal = normal(rows, width) * 4 + 7.5
    ideal[:, 3] = ideal[:, 3].round() + 0.5  # ties
    base = (normal(rows, width) * 5 + 7).round()
    codes, gradient = ideal.round().clamp(0, 15), normal(rows, width)
    within = codes.maximum(base - 8).minimum(base + 7)
    found = {
        "search": ("search", (level1, cost, 4, True)),
        "search of the row scale": ("search", (level1, cost, 2, False)),
        "round alone": ("round_columns", (ideal, torch.eye(width), 0.0, 15.0)),
        "round": ("round_columns", (ideal, lower, 0.0, 15.0)),
        "round within reach": ("round_columns", (ideal, lower, base - 8, base + 7)),
        "descend": ("descend", (codes, gradient, hessian, 0.0, 15.0)),
        "descend within reach": ("descend", (within, gradient, hessian, base - 8, base + 7)),
    }
    return {
        name: (function, [a.to(device) if torch.is_tensor(a) else a for a in arguments])
        for name, (function, arguments) in found.items()
    }


def results(form, device="cpu", rows=ROWS):
    """Run all cases; name -> the tensors that a function returns."""
    found = {}
    for name, (function, arguments) in cases(rows, device).items():
        got = getattr(form, function)(*arguments)
        found[name] = [t.cpu() for t in (got if isinstance(got, tuple) else (got,))]
    return found


def assert_alike(name, found, wanted):
    """Equal where nothing is summed; elsewhere a sum may take one code to the other side of a tie.

    All later columns of that row may differ then, so rows are counted.
    """
    if name.startswith("search"):
        level1, cost, *_ = cases(len(found[0]))[name][1]
        scale, offset, error = found
        codes = ((level1 - offset[..., None]) / scale[..., None]).round().clamp(0, 15)
        lost = (codes * scale[..., None] + offset[..., None] - level1).square() * cost
        # Of two that lose the same, either may be found.
        assert torch.allclose(error, wanted[2], rtol=1e-5, atol=1e-9)
        assert torch.allclose(error, lost.sum(dim=2), rtol=1e-4, atol=1e-9)
        return
    if name == "round alone":
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        return
    is_equal = (found[0] == wanted[0]).all(dim=1)
    assert is_equal.float().mean() >= 0.9
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got[is_equal], expected[is_equal], atol=1e-4)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from vllm_qoq.quantizer import rounding_triton

    torch.save(results(rounding_triton), sys.argv[1])
