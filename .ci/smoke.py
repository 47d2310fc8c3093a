"""A wheel's smoke test: the package installed below argv[1] loads its compiled library, computes and trains.

Needs torch and NumPy only.
"""

import pathlib
import sys

import torch

import mtlkernels as mtl
from mtlkernels import _library, dispatch

torch.manual_seed(0)
package = pathlib.Path(mtl.__file__).parent
assert package.is_relative_to(sys.argv[1]), f"imported {package}, not the wheel installed below {sys.argv[1]}"
assert _library.HAS_CPU_LIBRARY, _library.CPU_LIBRARY
assert dispatch.backend("gram", "cpu") == "cpp"

grads = [[torch.randn(1000, 37), None if task == 1 else torch.randn(5)] for task in range(3)]
flat = torch.stack([torch.cat([(torch.zeros(5) if t is None else t).flatten() for t in row]) for row in grads]).double()
expected = flat @ flat.T
norms = flat.norm(dim=1)
# The bound that the package's own tests hold the compiled Gram to, relative to the product of norms.
error = ((mtl.gram(grads) - expected).abs() / norms.outer(norms)).max().item()
assert error < 1e-7, f"gram is off by {error:.1e} of the product of norms"

net = torch.nn.Linear(8, 16)
heads = {"left": torch.nn.Linear(16, 1), "right": torch.nn.Linear(16, 1)}
parameters = [*net.parameters(), *(p for head in heads.values() for p in head.parameters())]
optimizer = mtl.MultiTaskOptimizer(torch.optim.Adam(parameters, 1e-2), "pcgrad", shared=net.parameters())
inputs, targets = torch.randn(64, 8), torch.randn(2, 64, 1)
history = []
for _ in range(20):
    features = net(inputs).relu()
    losses = {
        task: (head(features) - target).square().mean() for (task, head), target in zip(heads.items(), targets, strict=True)
    }
    info = optimizer.step(losses)
    history.append(sum(loss.item() for loss in losses.values()))
assert info.cosine.shape == (2, 2)
assert history[-1] < history[0], f"20 steps took the summed loss from {history[0]:.4f} to {history[-1]:.4f}"
report = f"gram within {error:.0e}, loss {history[0]:.3f} -> {history[-1]:.3f}"
print(f"mtlkernels {mtl.__version__} with torch {torch.__version__}: {report}")
