"""How fast the kernels are here, as data: `python -m dite_kernels.bench linear | codec`.

    cases         what is measured: shapes, schemes and codecs, from text; no torch
    timing        every candidate and the baseline once a round, in shuffled order
    vendor        what torch's own libraries do on the same shape: the baseline, and the ceilings
    linear        quantized linears of every backend
    codec         residual codecs of every backend, against a copy
    environment   what the numbers depend on besides
    document      the JSON, and columns that people read

A bench is a module with `NAME`, `HELP`, `add_options(parser)`, `run(arguments, progress)`, which returns a document, and
`table(document)` for people; `__main__` lists them.
"""
