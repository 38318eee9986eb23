"""The executable specification, in numpy: rotation, codebook, codec, packing, page.

Everything that computes on codes elsewhere in tqai is tested against this package. It imports no
tensor framework.
"""

# Python runs this file before any module of the package, so every codec is registered whichever
# module a caller imports first.
from tqai.core import qjl_codec as qjl_codec
from tqai.core import scalar as scalar
from tqai.core import trellis as trellis
