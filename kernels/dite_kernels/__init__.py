"""Integer arithmetic for quantized linears: affine maths, packing, the exact reference, and the backends that compete with it.

Needs torch only, and nothing of `dite`, so that its tests and benches run on a bare GPU machine.

    affine        floats ↔ codes, scales and zero points
    packing       codes ↔ bytes on disk
    quant_tensor  the three tensors of a quantized weight, and what shape they must have
    reference     the exact linear: the oracle of every other backend
    backends      what can run a quantized linear on this machine, and which one does
    codec         what is sent instead of activations that are nearly known: exact, the oracle of residual, which picks the fastest one here
    bench         how fast they are: python -m dite_kernels.bench
"""
