"""GPU kernels behind torch operators, their references, and proof that they use tensor cores.

Every module of a kernel has the operator, its reference, the Triton kernel and test data; KERNELS
lists them. On the CPU an operator is its reference. ``supports`` says what runs natively where.
"""

from precision_compiler.kernels.capability import KERNELS, Support, architecture_of, supports

__all__ = ["KERNELS", "Support", "architecture_of", "supports"]
