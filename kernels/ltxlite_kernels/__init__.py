"""GPU kernels, one op a file, each with a plain-torch twin that defines it.

    dequant    blocks of a quantized weight -> values
    configs    launch configurations, as data

Imports without Triton and without a GPU; then the twins compute.
"""
