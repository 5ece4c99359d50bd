"""The kernels for NVIDIA cards, in Triton. The files of this package need triton; nothing outside imports them until a kernel is wanted.

    rounding     affine quantization of a tile in registers: what quantize and modulate share
    rotation     block Hadamard matrices as a tile of the matrix unit wants them
    quantize     activations → codes, scales and zero points, after an optional smooth scale and rotation
    modulate     LayerNorm, adaLN's scale and shift, and the quantizer, in one pass
    weight       a quantized weight as the product wants it in memory
    product      codes × codes → y, groups scaled and summed on the way
    residual     encode, decode and reference update of `dite_kernels.codec`

Every operator is registered with torch.library under `dite_kernels::`, with its shapes, so that torch.compile passes over it. Launches are chosen by
shape from small tables; nothing is timed at import. Under TRITON_INTERPRET=1, set before the import, the kernels run on CPU tensors (for tests).
"""

import os


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
