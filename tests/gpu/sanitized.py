"""Every kernel of the compiled library once, with tails, misaligned rows and absent ones: a program for compute-sanitizer."""

import itertools
import sys

import torch

import mtlkernels as mtl

# Values come from the CPU, so that hardly a kernel but our own runs.
DEVICE = torch.device(sys.argv[1])


def gradients(num_tasks: int, dtype: torch.dtype) -> list[list[torch.Tensor | None]]:
    rows: list[list[torch.Tensor | None]] = []
    for k in range(num_tasks):
        whole = torch.randn(8192 + 37, dtype=torch.float64).to(dtype).to(DEVICE)
        rows.append([whole, whole[k % 3 : 999 + k % 3].view(27, 37), None if k == 0 else whole[:64].view(8, 8)])
    return rows


torch.manual_seed(0)
for dtype, num_tasks in itertools.product(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64], [1, 2, 3, 4, 8, 11, 33]
):
    grads = gradients(num_tasks, dtype)
    if num_tasks == 1:
        grads = [row[:2] for row in grads]
    for per in ("model", "tensor", "channel"):
        mtl.gram(grads, per=per)
        mtl.gram(grads, grads[:1], per=per)
    weights = torch.randn(num_tasks, num_tasks, dtype=torch.float64).to(DEVICE)
    mtl.combine(grads, weights[0])
    mtl.aggregate(grads, "mean", per="channel")
    mtl.mix(grads, weights)
    mtl.aggregate(grads, mtl.MomentumConFIG())
    mtl.aggregate(grads, mtl.ExcessMTL())
    for mode in ("gaussian", "bernoulli"):
        mtl.gradient_dropout(grads[0], 0.1, mode)
    mtl.aggregate(grads, "graddrop")
    for trim in {min(trim, (num_tasks - 1) // 2) for trim in (1, 3, 8, 16)}:
        mtl.TrimmedMean(trim)(grads)
    tiny = [[None if t is None else t * 1e-3 for t in row] for row in grads]
    mtl.gram([[None if t is None else (t * 1e-20 if dtype.itemsize > 2 else t) for t in row] for row in tiny])
for size in (1, 2, 8, 16, 40, 64):
    rows = torch.randn(3, size, 100, dtype=torch.float64)
    grams = (rows @ rows.mT).to(DEVICE)
    ops = torch.ops.mtlkernels
    seed, order = torch.tensor(1).to(DEVICE), torch.arange(size).expand(3, size, size).contiguous().to(DEVICE)
    for op in (ops.cosine, ops.magnitude_similarity, ops.conflict_rate, ops.condition_number):
        op(grams)
    ops.projection_coefficients(grams, order, True)
    ops.pcgrad_weights(grams, seed)
    ops.mgda_weights(grams, None)
    ops.cagrad_weights(grams, None, 0.4)
    ops.conicgrad_weights(grams, None, 0.9)
    ops.fairgrad_weights(grams, None, 2.0)
    ops.upgrad_weights(grams, None, None)
    ops.dualproj_weights(grams, None, None)
    ops.pcd_weights(grams, None, grams[0, 0] * 0)
    ops.config_weights(grams, None, None, 1e-14)
    ops.imtl_g_weights(grams, None, 1e-14)
    ops.aligned_mtl_weights(grams, None, None, 0, 1e-14)
    ops.gradvac_weights(grams, grams * 0, None, seed, 0.5, 0.0)
if DEVICE.type == "cuda":
    torch.cuda.synchronize()
print("all ran")
