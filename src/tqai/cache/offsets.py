"""One offset per KV head and sequence, taken off all its keys (or values) before anything is kept.

    softmax(<q, k_t>)        = softmax(<q, k_t - o>)        the same number goes off every logit
    sum_t p_t v_t            = o + sum_t p_t (v_t - o)      as the p_t add up to 1

Both are exact for any o, so a bad estimate costs quality, never correctness. The error of a code is
proportional to the norm of what is coded: where keys share a large constant (the key biases of Qwen-type
models do that) little is left of the norm, and of the error, without it.

The estimate is frozen at the layer's first compression from the tokens that go into pages there; every
s-th of them, so that at most `MOST_TOKENS` are looked at. It is their mean, but

* a token whose value repeats that of the token before it does not count (left padding, which else
  would outweigh the text), nor one whose norm is more than twice the median (attention sinks), nor one
  that holds NaN or inf;
* each coordinate j is shrunk by max(0, 1 - (a_j - b_j)^2 / m_j^2), a and b being the means of the first
  and the second half and m that of all: RoPE turns a constant of the key projection once every so many
  tokens, and a mean that moves within the prefill will have moved away later;
* a head with fewer than `LEAST_TOKENS` tokens that count gets the offset 0, which changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens

__all__ = ["LEAST_GAIN", "LEAST_TOKENS", "MOST_TOKENS", "Offsets", "estimate"]

MOST_TOKENS = 1024
LEAST_TOKENS = 16
LEAST_GAIN = 1 / 32
"""With "auto" a head takes part if an offset made of the first half of the tokens takes this share off the
energy of the second half. A share g is worth 0.72 g bits per value and the offset costs 16 / tokens of them
(in a half-precision model), so this pays from about 700 tokens on; where there is no mean to be found,
that measure comes out below 0, not above."""
REPEATED = 1e-3
OUTLIER = 4.0


@dataclass(frozen=True)
class Offsets:
    """The offsets of one layer, in the dtype of its tokens; None on a side that does without.

    Attributes:
        keys: `[batch, kv_heads, 1, head_dim]`.
        values: `[batch, kv_heads, 1, value_head_dim]`.
        factors: `[batch, kv_heads, 1, head_dim]`; keys are held multiplied by them, after the offset was
            taken off (`cache.balance`). None for 1.
    """

    keys: Tensor | None
    values: Tensor | None
    factors: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts() if part is not None)

    def taken_off(self, tokens: ExactTokens) -> ExactTokens:
        """`tokens` without the offsets, in their dtype: new tensors where there is an offset.

        Rounded once to that dtype, so exact where a coordinate lies between half and twice its offset
        (Sterbenz), and within half a unit in the last place elsewhere.
        """
        keys = _sum(tokens.keys, self.keys, -1)
        if self.factors is not None:
            keys = _within(keys * self.factors)
        return ExactTokens(keys, _sum(tokens.values, self.values, -1))

    def take_off_into(self, target: ExactTokens, tokens: ExactTokens) -> None:
        """Write `tokens` without the offsets into `target` (views of the same shape): `taken_off` without
        the tensors between, which a step would pay for."""
        for held, new, offset in zip(target, tokens, (self.keys, self.values), strict=True):
            if offset is None or new.requires_grad:
                held.copy_(_sum(new, offset, -1))
            else:
                _within(torch.sub(new, offset, out=held))
        if self.factors is not None:
            _within(target.keys.mul_(self.factors))

    def put_back(self, tokens: ExactTokens) -> ExactTokens:
        """Inverse of `taken_off`, but for rounding."""
        keys = tokens.keys if self.factors is None else tokens.keys / self.factors
        return ExactTokens(_sum(keys, self.keys, 1), _sum(tokens.values, self.values, 1))

    def for_query(self, query: Tensor) -> Tensor:
        """`query` `[batch, query_heads, new_tokens, head_dim]` as attention to what is held wants it."""
        if self.factors is None:
            return query
        by_head = query.unflatten(1, (self.factors.shape[1], -1))
        return _within(by_head / self.factors.unsqueeze(2)).flatten(1, 2)

    def corrected(self, attended: Attended, query: Tensor, scaling: float | None, masked: bool) -> Attended:
        """Attention over the true tokens, of attention over tokens without offsets.

        `masked` says that a query may see nothing at all; its output stays 0 and its lse -inf. Where
        `scaling` is None nobody reads the lse, and it stays that of keys without offsets.
        """
        out, lse = attended
        if self.values is not None:
            batch, kv_heads, _, dim = self.values.shape
            # a view of `out` itself, which nobody else holds: every operation here is paid at every step
            by_head = out.contiguous().view(batch, kv_heads, -1, dim)
            blind = lse.isneginf().view(batch, kv_heads, -1, 1) if masked else None
            shift = self.values if blind is None else torch.where(blind, 0.0, self.values)
            out = _within(by_head.add_(shift)).view(out.shape)
        if self.keys is not None and scaling is not None:
            by_head = query.float().unflatten(1, (self.keys.shape[1], -1))
            shift = (by_head * self.keys.float().unsqueeze(2)).sum(-1).flatten(1, 2)
            lse = lse + scaling * shift
        return Attended(out, lse)

    def select(self, rows: Tensor) -> Offsets:
        """The offsets of sequences `rows` (int64, on the device)."""
        return Offsets(*(None if part is None else part.index_select(0, rows) for part in self.parts()))

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three tensors, in the order of the fields."""
        return self.keys, self.values, self.factors


def estimate(tokens: ExactTokens, mode: str, of_keys: bool = True) -> Offsets | None:
    """Offsets from `tokens` `[batch, kv_heads, count, head_dim]`; None where no head is to have one.

    `mode` is "on" or "auto" (see `LEAST_GAIN`); without `of_keys`, only of the values.
    """
    step = -(-tokens.keys.shape[2] // MOST_TOKENS)
    keys, values = (_Side.of(part[:, :, ::step].detach()) for part in tokens)
    fresh = _fresh(values.unit)
    of_both = (_of_side(keys, fresh, mode) if of_keys else None, _of_side(values, fresh, mode))
    return None if of_both == (None, None) else Offsets(*of_both)


def _fresh(values: Tensor) -> Tensor:
    """Bool `[batch, 1, count]`: tokens whose values, over all heads, are not those of the token before."""
    change = (values[:, :, 1:] - values[:, :, :-1]).square().sum((1, 3))
    power = values[:, :, 1:].square().sum((1, 3))
    repeated = torch.nn.functional.pad(change <= REPEATED * power, (1, 0), value=False)
    return ~repeated.unsqueeze(1)


@dataclass(frozen=True)
class _Side:
    """Keys or values `[batch, kv_heads, count, head_dim]`, scaled so that squares of huge and tiny numbers
    neither overflow nor vanish.

    Attributes:
        unit: float32, divided by `largest`; 0 for tokens that hold NaN or inf.
        finite: bool `[batch, kv_heads, count]`, the other tokens.
        largest: float32 `[batch, kv_heads, 1, 1]`, the largest absolute coordinate.
        dtype: of the tokens.
    """

    unit: Tensor
    finite: Tensor
    largest: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, tokens: Tensor) -> _Side:
        finite = torch.isfinite(tokens).all(-1)
        unit = torch.where(finite.unsqueeze(-1), tokens, 0.0).float()
        largest = unit.abs().amax((2, 3), keepdim=True)
        return cls(unit / torch.where(largest > 0, largest, 1.0), finite, largest, tokens.dtype)


def _of_side(side: _Side, fresh: Tensor, mode: str) -> Tensor | None:
    """The offset `[batch, kv_heads, 1, head_dim]` of one side, or None."""
    power = side.unit.square().sum(-1)
    counts = fresh & side.finite
    median = torch.where(counts, power, torch.nan).nanmedian(-1, keepdim=True).values
    counts = counts & (power <= OUTLIER * median)
    # what is subtracted must not carry a coordinate out of the dtype's range
    in_range = side.largest.flatten(1) <= torch.finfo(side.dtype).max / 4
    used = in_range & (counts.sum(-1) >= LEAST_TOKENS)
    if mode == "auto":
        used &= _gain(side.unit, power, counts) > LEAST_GAIN
    mean = _shrunken_mean(side.unit, counts) * side.largest
    return torch.where(used[..., None, None], mean, 0.0).to(side.dtype) if bool(used.any()) else None


def _gain(tokens: Tensor, power: Tensor, counts: Tensor) -> Tensor:
    """`[batch, kv_heads]`: share of the second half's energy that an offset made of the first takes off."""
    first, second = _halves(counts)
    offset = _shrunken_mean(tokens, first)
    left = (tokens - offset).square().sum(-1)
    before = (power * second).sum(-1)
    return 1 - (left * second).sum(-1) / torch.where(before > 0, before, 1.0)


def _shrunken_mean(tokens: Tensor, counts: Tensor) -> Tensor:
    """Mean `[batch, kv_heads, 1, head_dim]` of the tokens that count, shrunk where its halves disagree."""
    whole = _mean(tokens, counts)
    first, second = (_mean(tokens, half) for half in _halves(counts))
    square = whole.square()
    shrink = 1 - (first - second).square() / torch.where(square > 0, square, 1.0)
    return whole * shrink.clamp(0.0, 1.0)


def _halves(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of the tokens that count."""
    order = counts.cumsum(-1)
    early = 2 * order <= order[..., -1:]
    return counts & early, counts & ~early


def _mean(tokens: Tensor, counts: Tensor) -> Tensor:
    weights = counts.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True).clamp_min(1.0)


def _sum(tokens: Tensor, offset: Tensor | None, sign: int) -> Tensor:
    return tokens if offset is None else _within(torch.add(tokens, offset, alpha=sign))


def _within(total: Tensor) -> Tensor:
    """`total` clamped to float16's range, in place, the only one that real tokens come near to."""
    if total.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        total.clamp_(-limit, limit)
    return total
