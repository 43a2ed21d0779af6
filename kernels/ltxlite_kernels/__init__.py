"""GPU kernels, one operation a file, each with a plain-torch twin that defines it.

    dequant, unpack           blocks of a quantized weight -> values
    int8_weight, weight_pieces  the same -> codes for matmuls, piece by piece
    coding, quantize, rotate  rows of an activation -> codes with a scale each (`rows`)
    norm_modulate, norm_rope, gate_heads, norm_silu  what stands between products, fused
    matmul, epilogue          products of codes; matmul_int8, matmul_fp16, matmul_fp8: the ways in
    attention, attention_keys int8 scores or flash, on prepared keys (`attention_inputs`)
    dispatch                  which arithmetic, by mode, card and stored format
    configs, card, specimens  launch configurations as data, what is compiled without a card
    reference*                the twins
    ops                       operators of torch's own that are counted, and what each needs

Imports without Triton and without a GPU; then the twins compute.
"""

from ltxlite_kernels import ops as ops  # registers the operators
