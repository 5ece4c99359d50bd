"""The CPU backend: quantized linears in C, compiled at first use for the processor at hand.

csrc      the kernels; types.h explains the layouts
build     finds a compiler, compiles once, loads
packed    weights in the kernels' layout, and back
backend   what dite_kernels.backends offers as `cpu`
residual  the codecs of residuals, for dite_kernels.residual
"""
