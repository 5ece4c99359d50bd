"""Integer arithmetic for quantized linears: affine maths, packing, the exact reference, and the backends that compete with it.

Needs torch only, and nothing of `dite`, so that its tests and benches run on a bare GPU machine.

    affine        floats ↔ codes, scales and zero points
    packing       codes ↔ bytes on disk
    quant_tensor  the three tensors of a quantized weight, and what shape they must have
    reference     the exact linear: the oracle of every other backend
    backends      what can run a quantized linear on this machine, and which one does
    bench         how fast they are: python -m dite_kernels.bench
"""
