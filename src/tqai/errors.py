"""Every error that tqai raises on purpose.

The tree (each leaf also derives from the built-in that callers would expect):

    TqaiError
    +-- ConfigError          (ValueError)           a setting is out of range or contradicts another
    +-- InputError           (ValueError)           an array has a wrong shape, dtype or device
    |   +-- NonFiniteError                          NaN or inf among keys or values
    +-- UnsupportedError     (NotImplementedError)  a combination that tqai does not serve
    +-- BackendError         (RuntimeError)         a backend failed to build, load or launch
    +-- CacheFileError       (RuntimeError)         a saved cache cannot be used
        +-- CorruptFileError                        truncated, checksum differs, not such a file
        +-- FileVersionError                        written by an unknown format version
        +-- ModelMismatchError                      belongs to another model or configuration
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CacheFileError",
    "ConfigError",
    "CorruptFileError",
    "FileVersionError",
    "InputError",
    "ModelMismatchError",
    "NonFiniteError",
    "TqaiError",
    "UnsupportedError",
]


class TqaiError(Exception):
    """Base of every error that tqai raises on purpose."""


class ConfigError(TqaiError, ValueError):
    """A setting is out of range. The message names the field, the value and what is allowed."""


class InputError(TqaiError, ValueError):
    """An array has a shape, dtype or device that the call does not take."""


class NonFiniteError(InputError):
    """Keys or values hold NaN or inf. The message names the layer and the token."""


class UnsupportedError(TqaiError, NotImplementedError):
    """A combination that tqai does not serve. The message says what to use instead."""


class BackendError(TqaiError, RuntimeError):
    """A backend failed to build, load or launch."""


class CacheFileError(TqaiError, RuntimeError):
    """A saved cache cannot be used."""


class CorruptFileError(CacheFileError):
    """The file is truncated, altered, or no tqai cache at all."""


class FileVersionError(CacheFileError):
    """The file was written by a format version that this tqai does not read."""


class ModelMismatchError(CacheFileError):
    """The file belongs to a model or configuration other than the one it is loaded for."""
