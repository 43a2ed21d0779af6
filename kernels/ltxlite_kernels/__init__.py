"""GPU kernels, one op a file, each with a plain-torch twin that defines it.

    dequant    blocks of a quantized weight -> values
    ops        torch operators around them, and what each needs of a card's memory
    configs    launch configurations, as data

Imports without Triton and without a GPU; then the twins compute.
"""

from ltxlite_kernels import ops as ops  # registers the operators
