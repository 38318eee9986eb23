"""The executable specification, in numpy: rotation, codebook, codec, packing, page.

Everything that computes on codes elsewhere in tqai is tested against this package. It imports no
tensor framework.
"""
