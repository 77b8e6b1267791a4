"""What the engine does on a GPU: `make gpu`, or `python -m gpu`.

Minutes on one GPU, without a network: the models are random ones of real shapes. It needs a
checkout, and Python with torch, transformers, Triton, numpy, pytest and hypothesis; the package
need not be installed, nor its kernel for CPUs built.

`__main__` starts the parts of `parts`, each with a limit, in a process of their own (`worker`),
which a kernel may take down. What the parts have found until then is kept.
"""
