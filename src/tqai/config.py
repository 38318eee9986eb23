"""`CacheConfig`: every choice a compressed cache is made with, validated once, then frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tqai.errors import ConfigError
from tqai.presets import NAMED_PRESETS, PRESETS, STUDY_PRESETS

__all__ = [
    "DEFAULT_PRESET",
    "FALLBACK_PRESET",
    "NAMED_PRESETS",
    "PRESETS",
    "STUDY_PRESETS",
    "CacheConfig",
    "TurboQuantConfig",
]

logger = logging.getLogger("tqai")

STRATEGIES = ("auto", "residual", "full", "incremental")
ROTATIONS = ("auto", "haar", "hadamard", "hadamard2", "identity")
SCALES = ("least_squares", "norm")
SCALE_FORMATS = ("bfloat16", "log8")
OFFSETS = ("off", "on", "auto")
BALANCE = ("off", "auto")
MAX_BITS = 8
MAX_WINDOW_TOKENS = 1 << 20
RESIDUAL_STRATEGY_TOKENS = 128
MAX_SKETCH_BITS = 4096

DEFAULT_PRESET = "balanced"
"""What a cache is made with where nobody says how to compress (`CacheConfig.asked`)."""
FALLBACK_PRESET = "K4/V2"
"""And where what serves the cache does not serve that; every part of tqai serves this one."""

COMPRESSION_FIELDS = frozenset(
    {
        *("bits_k", "bits_v", "layer_bits", "last_layer_bits", "bits_budget", "budget_tokens"),
        *("codec", "rotation", "rotation_v", "scale", "scale_format", "offsets", "balance"),
        *("sink_tokens", "residual_window", "use_qjl", "qjl_sketch_size"),
    }
)
"""Fields that say how tokens are compressed. To give one of them is to give up the default preset."""
MOST_TRELLIS_BITS = 4


@dataclass(frozen=True)
class CacheConfig:
    """How keys and values are compressed. Immutable; `replace` from dataclasses makes variants.

    Attributes:
        bits_k: bits per key coordinate, 1 to 8.
        bits_v: bits per value coordinate, 1 to 8.
        sink_tokens: the first N tokens of every sequence stay exact (0 to 1048576).
        residual_window: at least this many of the newest tokens stay exact (0 to 1048576). Whole
            pages of 64 tokens leave the window, so between N and N+63 tokens are exact. None means
            0, and 128 with `cache_strategy="residual"`.
        cache_strategy: "auto" and "residual" attend on the codes (residual also keeps a larger
            exact window), "full" decompresses everything at every step (for debugging),
            "incremental" keeps a decompressed copy beside the codes (fast, gives up the memory).
        codec: name of a registered codec; "scalar" is the Lloyd-Max codec of TurboQuant, "trellis" and
            "trellis256" (64 and 256 states) code 1 to 4 bits with 0.53 to 0.78 of its error and encode
            slowly.
        rotation: "haar", "hadamard" (one round, powers of two), "hadamard2" (two rounds) or "auto"
            (hadamard2 where head_dim is a power of two, haar elsewhere), "identity" for none.
        rotation_v: the same for values alone; None for `rotation`. A converted model computes its
            values rotated (`tqai convert`), and has "identity" here.
        scale: "least_squares" (<x,c>/<c,c>) or "norm" (as the paper has it).
        seed: seed of the rotation, 0 to 2**63-1.
        backend: name of a backend, or None for the best that serves the device.
        device: where the cache lives, or None for where the keys are.
        check_finite: True checks every key and value for NaN and inf; False never; None checks
            where it is free, on the CPU.
        use_qjl: keys also hold a 1-bit sketch of what the codes leave over (codec "qjl"), which makes
            their inner products unbiased and noisier. Off by default: see docs/quality-options.md.
        qjl_sketch_size: sign bits of that sketch per key, 1 to 4096.
        compress_hidden, bits_hidden: round the residual stream that enters each decoder layer.
        compress_ffn, bits_ffn: round what enters each feed-forward block.
        compress_attn_logits, bits_attn: round the attention logits. These three are a study of
            sensitivity and save no memory (`tqai.activations`); bits are 1 to 8, used by `tqai.patch`.
        offsets: one vector per KV head and sequence is taken off all keys, and one off all values, before
            they are coded, and attention puts it right, exactly: "on"; "auto", where it takes at least
            1/32 off their energy; "off". Frozen from the tokens compressed first (`cache.offsets`).
        balance: "auto" multiplies the coordinates of keys and divides those of queries where that takes at
            least 3/10 off the error of logits, exactly (`cache.balance`); frozen with the offsets, from the
            first queries; "off". Needs attention on the codes, which is where queries are seen.
        scale_format: "bfloat16", 16 bits per vector, or "log8", 8 bits and 16 bytes per page of both sides
            (`core.log_scale`): 0.055 bits per value less at head_dim 128, for 0.00016 of the energy.
        layer_bits: (bits_k, bits_v) of every layer of the cache, instead of one pair for all. A layer with
            more than 4 bits on either side is coded by "scalar" where `codec` is a trellis.
        last_layer_bits: (bits_k, bits_v) of the last attention layer alone: nothing after it makes good
            what it loses (docs/quality.md has what that is worth).
        bits_budget: bits per value, all-in at `budget_tokens` tokens, within which each layer gets 2, 3 or
            4 bits for keys and for values by what its first prefill shows (`cache.first_prefill`).
        budget_tokens: the context at which the budget counts window, sinks and tables, 64 to 2**30.

    Raises:
        ConfigError: a field is out of range; the message names field, value and what is allowed.
    """

    bits_k: int = 4
    bits_v: int = 2
    sink_tokens: int = 0
    residual_window: int | None = None
    cache_strategy: str = "auto"
    codec: str = "scalar"
    rotation: str = "auto"
    scale: str = "least_squares"
    seed: int = 0
    backend: str | None = None
    device: str | None = None
    check_finite: bool | None = None
    rotation_v: str | None = None
    use_qjl: bool = False
    qjl_sketch_size: int = 64
    compress_hidden: bool = False
    bits_hidden: int = 8
    compress_ffn: bool = False
    bits_ffn: int = 8
    compress_attn_logits: bool = False
    bits_attn: int = 8
    offsets: str = "off"
    scale_format: str = "bfloat16"
    layer_bits: tuple[tuple[int, int], ...] | None = None
    bits_budget: float | None = None
    budget_tokens: int = 8192
    last_layer_bits: tuple[int, int] | None = None
    balance: str = "off"

    def __post_init__(self) -> None:
        _check_int("bits_k", self.bits_k, 1, MAX_BITS)
        _check_int("bits_v", self.bits_v, 1, MAX_BITS)
        _check_int("sink_tokens", self.sink_tokens, 0, MAX_WINDOW_TOKENS)
        if self.residual_window is not None:
            _check_int("residual_window", self.residual_window, 0, MAX_WINDOW_TOKENS)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_choice("cache_strategy", self.cache_strategy, STRATEGIES)
        _check_choice("rotation", self.rotation, ROTATIONS)
        _check_choice("scale", self.scale, SCALES)
        _check_choice("offsets", self.offsets, OFFSETS)
        _check_choice("balance", self.balance, BALANCE)
        _check_choice("scale_format", self.scale_format, SCALE_FORMATS)
        _check_int("budget_tokens", self.budget_tokens, 64, 1 << 30)
        if self.bits_budget is not None:
            _check_budget(self.bits_budget)
            if self.layer_bits is not None:
                raise ConfigError(
                    f"bits_budget={self.bits_budget!r} beside layer_bits: allowed is one of the two"
                )
        if self.layer_bits is not None:
            object.__setattr__(self, "layer_bits", _checked_layer_bits(self.layer_bits))
        if self.last_layer_bits is not None:
            for name in ("layer_bits", "bits_budget"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"last_layer_bits={self.last_layer_bits!r} beside {name}: allowed is one of the two"
                    )
            pair = _checked_pair("last_layer_bits", self.last_layer_bits)
            object.__setattr__(self, "last_layer_bits", pair)
        for name in ("codec", "backend", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name != "codec"):
                raise ConfigError(f"{name}={value!r} is not a string")
        if self.check_finite not in (None, True, False):
            raise ConfigError(f"check_finite={self.check_finite!r}: allowed are True, False and None")
        if self.rotation_v is not None:
            _check_choice("rotation_v", self.rotation_v, ROTATIONS)
        for name in ("use_qjl", "compress_hidden", "compress_ffn", "compress_attn_logits"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed are True and False")
        for name in ("bits_hidden", "bits_ffn", "bits_attn"):
            _check_int(name, getattr(self, name), 1, MAX_BITS)
        _check_int("qjl_sketch_size", self.qjl_sketch_size, 1, MAX_SKETCH_BITS)
        if self.use_qjl and self.codec not in ("scalar", "qjl"):
            raise ConfigError(f"use_qjl=True with codec={self.codec!r}: allowed is codec='scalar'")

    @property
    def window_tokens(self) -> int:
        """Least number of newest tokens kept exact, with the default for the strategy filled in."""
        if self.residual_window is not None:
            return self.residual_window
        return RESIDUAL_STRATEGY_TOKENS if self.cache_strategy == "residual" else 0

    @property
    def key_codec(self) -> str:
        """Name of the codec of the keys: "qjl" with `use_qjl`, else `codec`."""
        return "qjl" if self.use_qjl else self.codec

    def for_layer(self, index: int) -> CacheConfig:
        """The configuration of one layer: `layer_bits` resolved, the rest unchanged.

        Raises:
            ConfigError: `layer_bits` has no such layer.
        """
        if self.layer_bits is None:
            return self
        if not 0 <= index < len(self.layer_bits):
            raise ConfigError(f"layer_bits is of {len(self.layer_bits)} layers: there is no layer {index}")
        bits_k, bits_v = self.layer_bits[index]
        too_many = self.codec.startswith("trellis") and max(bits_k, bits_v) > MOST_TRELLIS_BITS
        codec = "scalar" if too_many else self.codec
        return replace(self, layer_bits=None, bits_k=bits_k, bits_v=bits_v, codec=codec)

    def by_layer(self, layers: int, last: int | None = None) -> CacheConfig:
        """The same for a cache of so many layers: `last_layer_bits` written out as `layer_bits`.

        Args:
            layers: all layers of the cache, 1 or more.
            last: number of the last one that is compressed, None for `layers` - 1.
        """
        if self.last_layer_bits is None:
            return self
        pairs = [(self.bits_k, self.bits_v)] * layers
        pairs[layers - 1 if last is None else last] = self.last_layer_bits
        return replace(self, layer_bits=tuple(pairs), last_layer_bits=None)

    @property
    def studies_activations(self) -> bool:
        """Whether activations are rounded as well."""
        return self.compress_hidden or self.compress_ffn or self.compress_attn_logits

    @property
    def label(self) -> str:
        """Short name for tables, such as 'K4/V2' or 'K4/V2 qjl64 hidden8'."""
        parts = [_bits_label(self)]
        parts += [f"qjl{self.qjl_sketch_size}"] if self.use_qjl else []
        parts += [f"hidden{self.bits_hidden}"] if self.compress_hidden else []
        parts += [f"ffn{self.bits_ffn}"] if self.compress_ffn else []
        parts += [f"logits{self.bits_attn}"] if self.compress_attn_logits else []
        return " ".join(parts)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CacheConfig:
        """Configuration of a preset by name ("K4/V2", also spelled "k4v2", one of `NAMED_PRESETS` or of
        `STUDY_PRESETS`), with fields changed.

        Raises:
            ConfigError: no such preset, or a changed field is out of range.
        """
        wanted = _preset_key(name) if isinstance(name, str) else ""
        for known, (bits_k, bits_v) in PRESETS.items():
            if _preset_key(known) == wanted:
                return cls.from_dict({"bits_k": bits_k, "bits_v": bits_v, **changes})
        for named in (NAMED_PRESETS, STUDY_PRESETS):
            if isinstance(name, str) and name in named:
                settings = dict(named[name])
                if changes.get("layer_bits") is not None or changes.get("bits_budget") is not None:
                    settings.pop("last_layer_bits", None)
                return cls.from_dict({**settings, **changes})
        known_names = [*PRESETS, *NAMED_PRESETS, *STUDY_PRESETS]
        raise ConfigError(f"preset={name!r}: allowed are {', '.join(known_names)}")

    @classmethod
    def asked(
        cls,
        given: Mapping[str, Any],
        refuses: Callable[[CacheConfig], str | None] | None = None,
        default: str | None = None,
    ) -> CacheConfig:
        """What somebody who gave `given` gets: the default preset with these fields changed where none of
        them says how to compress (`COMPRESSION_FIELDS`), else the plain configuration with them.

        `refuses` says why a configuration is not served where it is to be used, or None. A default that
        is not served becomes `FALLBACK_PRESET`, and a warning in the log says so. `default` is the name of
        another default than `DEFAULT_PRESET`.

        Raises:
            ConfigError: an unknown field, or a value out of range.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        # None says nothing only where it is a value of the field
        said = {name for name, value in given.items() if value is not None or defaults.get(name) is not None}
        if COMPRESSION_FIELDS & said:
            return cls.from_dict(given)
        given = {name: value for name, value in given.items() if name not in COMPRESSION_FIELDS}
        default = DEFAULT_PRESET if default is None else default
        chosen = cls.preset(default, **given)
        reason = None if refuses is None else refuses(chosen)
        if reason is not None:
            logger.warning(
                "the default preset %s is not served here (%s): %s", default, reason, FALLBACK_PRESET
            )
            chosen = cls.preset(FALLBACK_PRESET, **given)
        return chosen

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CacheConfig:
        """Configuration from a mapping, refusing names that are no fields.

        Raises:
            ConfigError: an unknown field, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"{name!r} is no setting of a cache: allowed are {', '.join(sorted(known))}"
                )
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for JSON and for `from_dict`."""
        return asdict(self)

    def with_changes(self, **changes: Any) -> CacheConfig:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


TurboQuantConfig = CacheConfig
"""The name that the older tqai gave it."""


def _preset_key(name: str) -> str:
    return name.lower().replace("/", "").replace("-", "").replace("_", "")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: allowed are whole numbers from {low} to {high}")


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 16:
        raise ConfigError(f"bits_budget={budget!r}: allowed are numbers above 0, up to 16")


def _checked_layer_bits(layer_bits: object) -> tuple[tuple[int, int], ...]:
    wrong = f"layer_bits={layer_bits!r}: wanted is a pair (bits_k, bits_v) per layer"
    if not isinstance(layer_bits, (list, tuple)) or not layer_bits:
        raise ConfigError(wrong)
    return tuple(_checked_pair(f"layer_bits[{index}]", pair, wrong) for index, pair in enumerate(layer_bits))


def _checked_pair(name: str, pair: object, wrong: str | None = None) -> tuple[int, int]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ConfigError(wrong or f"{name}={pair!r}: wanted is a pair (bits_k, bits_v)")
    for side, bits in zip("kv", pair, strict=True):
        _check_int(f"{name} bits_{side}", bits, 1, MAX_BITS)
    return pair[0], pair[1]


def _bits_label(config: CacheConfig) -> str:
    if config.bits_budget is not None:
        return f"auto {config.bits_budget:g}"
    if config.layer_bits is None:
        last = config.last_layer_bits
        return f"K{config.bits_k}/V{config.bits_v}" + ("" if last is None else " last K{}/V{}".format(*last))
    *others, pair = config.layer_bits
    if len(others) > 1 and len(set(others)) == 1:
        return "K{}/V{}".format(*others[0]) + ("" if pair == others[0] else " last K{}/V{}".format(*pair))
    means = (sum(side) / len(side) for side in zip(*config.layer_bits, strict=True))
    return "K{:.2f}/V{:.2f} by layer".format(*means)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
