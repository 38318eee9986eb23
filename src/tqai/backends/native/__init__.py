"""The "native" backend: plain C for the CPU (`csrc/`), called through ctypes.

library.py    finds and loads the shared library, or says in one line why there is none
structs.py    the C structures, and what a kernel needs to know of a page format
order.py      the physical order of codes, converted from and to the canonical one in numpy
checks.py     refuses what the kernels must never see
backend.py    `NativeBackend`
op.py         attention as a registered torch operator, for torch.compile
"""
