"""Finding and loading the shared library of `csrc/`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tqai.backends.native.structs import AttendArgs, PageFormatStruct, Source
from tqai.errors import BackendError

__all__ = ["LIBRARY_VARIABLE", "library_path", "load_library"]

LIBRARY_VARIABLE = "TQAI_NATIVE_LIB"
"""Environment variable with the path of a library to load instead of the installed one."""

ABI = 6
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
FILE_NAME = f"_tqai_native{SUFFIX}"
NOTE_NAME = "build_note.txt"


def library_path() -> Path:
    """Where the library lies: `TQAI_NATIVE_LIB`, beside this module, in the installed package of an
    editable install, or in `build/native` of a source tree.

    Raises:
        BackendError: nowhere; the message says why.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise BackendError(f"{LIBRARY_VARIABLE}={named}: no such file")
        return Path(named)
    note = None
    for folder in _folders():
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
        if (folder / NOTE_NAME).is_file():
            note = (folder / NOTE_NAME).read_text().strip()
    raise BackendError(
        f"native kernels are off: {note or 'they have not been built (csrc/build.sh builds them)'}"
    )


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The loaded library, its functions declared. ctypes releases the GIL during its calls.

    Raises:
        BackendError: no library, one of another version, or one that the system cannot load.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        abi = int(library.tqai_abi())
    except (OSError, AttributeError) as error:
        raise BackendError(f"native kernels are off: {path.name} cannot be loaded: {error}") from error
    if abi != ABI:
        raise BackendError(
            f"native kernels are off: {path} has interface {abi}, this tqai needs {ABI}: rebuild it"
        )
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.tqai_isa.restype = ctypes.c_char_p
    library.tqai_set_isa.argtypes = [ctypes.c_char_p]
    library.tqai_use_team.argtypes = [pointer]
    library.tqai_use_team.restype = None
    library.tqai_attend.argtypes = [ctypes.POINTER(AttendArgs)]
    library.tqai_encode.argtypes = [
        ctypes.POINTER(PageFormatStruct),
        ctypes.POINTER(Source),
        ctypes.POINTER(Source),
        pointer,
        size,
        size,
        ctypes.c_int32,
    ]
    library.tqai_decode.argtypes = [
        ctypes.POINTER(PageFormatStruct),
        pointer,
        pointer,
        pointer,
        ctypes.c_int32,
        size,
        ctypes.c_int32,
    ]
    return library


def _folders() -> Iterator[Path]:
    here = Path(__file__).resolve().parent
    yield here
    for entry in sys.path:
        # an editable install keeps the library in site-packages and the modules here
        yield Path(entry or ".") / "tqai" / "backends" / "native"
    yield here.parents[3] / "build" / "native"
