"""The ops of the K x K stage that find weights: schema, fake and reference side by side, one family a module.

The references solve a whole batch at once in masked steps, on any device. Off the CPU they never read a value on the host:
they run the step limit. The kernels (csrc/common/kxk_*.h) solve the same problems one at a time. Notation: K tasks, G the Gram,
R its cosines, n_i = sqrt(G_ii).
"""

from . import around_mean, newton, orders, program, quadratic, spectral

__all__ = ["around_mean", "newton", "orders", "program", "quadratic", "spectral"]
