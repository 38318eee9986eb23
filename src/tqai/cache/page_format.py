"""The page format that a configuration means. Knows no framework."""

from __future__ import annotations

from tqai.config import CacheConfig
from tqai.core.codec import Codec, CodecSpec, make_codec
from tqai.core.page import PageFormat
from tqai.errors import ConfigError

__all__ = ["page_format_for"]


def page_format_for(config: CacheConfig, key_dim: int, value_dim: int) -> PageFormat:
    """The page format of a configuration for these head dimensions (keys and values may differ).

    Raises:
        ConfigError: its bits differ from layer to layer, or are not decided yet.
    """
    for name in ("layer_bits", "last_layer_bits", "bits_budget"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no one page format: allowed are bits_k and bits_v, or "
                "TurboQuantCache, which decides layer by layer"
            )

    def codec(name: str, dim: int, bits: int, rotation: str) -> Codec:
        sketch = config.qjl_sketch_size if name == "qjl" else 0
        return make_codec(CodecSpec(name, dim, bits, rotation, config.scale, config.seed, sketch))

    return PageFormat(
        codec(config.key_codec, key_dim, config.bits_k, config.rotation),
        codec(config.codec, value_dim, config.bits_v, config.rotation_v or config.rotation),
        config.scale_format,
    )
