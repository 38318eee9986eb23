"""Offsets of keys and values in a layer: exact whatever they are, kept and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cache.biased_tokens import DIM, biased, mean_of

from tqai.cache.layer import CompressedLayer
from tqai.cache.layer_state import export_layer, import_layer
from tqai.cache.offsets import Offsets
from tqai.cache.storage import read_file, write_file
from tqai.config import CacheConfig
from tqai.errors import ConfigError

DECODE_ERROR = 4e-6


class BiasedOracle:
    """Every token as the layer must give it back: coded by core without the offsets, exact otherwise."""

    def __init__(self, layer):
        self.layer, self.tokens, self.coded = layer, None, 0

    def append(self, keys, values):
        new = [keys.double(), values.double()]
        self.tokens = (
            new
            if self.tokens is None
            else [torch.cat(pair, 2) for pair in zip(self.tokens, new, strict=True)]
        )
        config, offsets = self.layer.config, self.layer.offsets
        count = self.tokens[0].shape[2]
        sinks = min(config.sink_tokens, count)
        full = max(count - sinks - config.window_tokens, 0) // 64
        for page in range(self.coded, full):
            span = slice(sinks + 64 * page, sinks + 64 * page + 64)
            page_format = self.layer.pool.page_format
            for part, codec, offset in zip(
                self.tokens, (page_format.key, page_format.value), (offsets.keys, offsets.values), strict=True
            ):
                offset = torch.zeros(1) if offset is None else offset
                centred = (part[:, :, span].to(keys.dtype) - offset).double()
                decoded = torch.from_numpy(codec.decode(codec.encode(centred.numpy())))
                part[:, :, span] = decoded.double() + offset.double()
        self.coded = max(self.coded, full)

    def crop(self, count):
        self.tokens = [part[:, :, : part.shape[2] - count].clone() for part in self.tokens]
        kept = max(self.tokens[0].shape[2] - self.layer.config.sink_tokens, 0) // 64
        self.coded = min(self.coded, kept)

    def select(self, rows):
        self.tokens = [part[rows].clone() for part in self.tokens]

    def attention(self, query, scaling, mask=None):
        """Output and log-sum-exp in float64; the last query tokens are the newest tokens."""
        return attention(*self.tokens, query, scaling, mask)


def attention(keys, values, query, scaling, mask=None):
    groups = query.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(groups, 1) for part in (keys, values))
    logits = scaling * query.double() @ keys.transpose(-1, -2)
    if mask is None:
        new, seen = query.shape[2], keys.shape[2]
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
    logits = torch.where(mask, logits, -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return weights @ torch.where(mask.any(-2).unsqueeze(-1), values, 0.0), torch.logsumexp(logits, -1)


def assert_near(found, wanted, tolerance):
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def query_like(layer, seed, tokens, groups=2):
    batch, heads = layer.window.keys.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, groups * heads, tokens, DIM, generator=generator).to(layer.window.keys.dtype)


def filled(tokens, batch=1, heads=2, dtype=torch.float32, sliding_window=None, **changes):
    layer = CompressedLayer(CacheConfig(**{"offsets": "on", **changes}), 0, sliding_window)
    layer.append(*biased(1, batch, heads, tokens, dtype=dtype))
    return layer


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 5, 63, 64, 65, 130])),
        st.tuples(st.just("crop"), st.sampled_from([0, 1, 3, 40, 64, 100])),
        st.tuples(st.just("select"), st.sampled_from([(0,), (1, 0), (0, 0, 1), (1, 1)])),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(
    operations=operations,
    sink_tokens=st.sampled_from([0, 4, 70]),
    residual_window=st.sampled_from([0, 1, 100]),
    strategy=st.sampled_from(["auto", "incremental"]),
)
def test_any_sequence_of_operations(operations, sink_tokens, residual_window, strategy):
    config = CacheConfig(
        bits_k=8,
        bits_v=4,
        sink_tokens=sink_tokens,
        residual_window=residual_window,
        cache_strategy=strategy,
        offsets="on",
        backend="torch",
    )
    layer = CompressedLayer(config)
    oracle = BiasedOracle(layer)
    batch = 2
    for turn, (name, argument) in enumerate([("append", 66), *operations]):
        if name == "append":
            keys, values = biased(turn, batch, 1, argument)
            step = layer.append(keys.clone(), values.clone())
            before = None if oracle.tokens is None else [part.clone() for part in oracle.tokens]
            seen = (
                [keys, values]
                if before is None
                else [
                    torch.cat([old, new.double()], 2) for old, new in zip(before, (keys, values), strict=True)
                ]
            )
            oracle.append(keys, values)
            for found, wanted in zip(layer.materialize(step), seen, strict=True):
                assert_near(found, wanted.double(), DECODE_ERROR)
            query = query_like(layer, turn, argument)
            out, lse = layer.attend(step, query, None, 0.1)
            wanted_out, wanted_lse = attention(*seen, query, 0.1)
            assert_near(out, wanted_out, 1e-5)
            assert (lse - wanted_lse).abs().max() < 1e-4
        elif name == "crop":
            count = min(argument, layer.length)
            layer.crop(count)
            oracle.crop(count)
        else:
            rows = torch.tensor([row % batch for row in argument])
            layer.select(rows)
            oracle.select(rows)
            batch = len(argument)
        if layer.length:
            for found, wanted in zip(layer.view().materialize(), oracle.tokens, strict=True):
                assert found.shape == wanted.shape
                assert_near(found, wanted, DECODE_ERROR)
        assert (layer.offsets is not None) == (layer.pool.pages > 0)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("new_tokens", [1, 5, 40])
@pytest.mark.parametrize("side", ["both", "keys", "values"])
def test_attention_is_that_over_the_true_tokens(dtype, backend, new_tokens, side):
    """The reference is float64 attention over decode(codes) + offset and the exact tokens as they came."""
    if backend == "native":
        pytest.importorskip("tqai.backends.native.backend")
        from tqai.backends import load
        from tqai.errors import BackendError

        try:
            load("native")
        except BackendError:
            pytest.skip("no native library")
    layer = filled(300, batch=3, dtype=dtype, sink_tokens=5, backend=backend, bits_v=4)
    if side != "both":
        # the codes were made without both: dropping one changes the tokens that they stand for
        kept = Offsets(
            layer.offsets.keys if side == "keys" else None,
            layer.offsets.values if side == "values" else None,
        )
        layer.offsets = kept
    held = copy.deepcopy(layer).view()
    keys, values = biased(2, 3, 2, new_tokens, dtype=dtype)
    step = layer.append(keys, values)
    raw = layer.backend.decode(layer.pool.raw(), layer.pool.page_format, torch.float32)
    pages = [part.transpose(1, 2).flatten(2, 3) for part in raw]
    parts = []
    for page_part, sink, recent, offset in zip(
        pages, held.sinks, held.recent, (layer.offsets.keys, layer.offsets.values), strict=True
    ):
        held_part = torch.cat(
            [sink.double(), page_part[:, :, : held.history.tokens].double(), recent.double()], 2
        )
        parts.append(held_part + (0 if offset is None else offset.double()))
    truth = [torch.cat([old, new.double()], 2) for old, new in zip(parts, (keys, values), strict=True)]
    query = query_like(layer, 3, new_tokens) * 0.3
    tolerance = max(TOLERANCE[dtype], 2e-3 if backend == "native" else 0.0)
    out, lse = layer.attend(step, query, None, 0.2)
    wanted, wanted_lse = attention(*truth, query, 0.2)
    assert_near(out, wanted, tolerance)
    assert (lse - wanted_lse).abs().max() < (1e-3 if dtype == torch.float32 else 0.05)
    quick = layer.attend(step, query, None, 0.2, with_lse=False)
    assert torch.equal(quick.out, out)
    mask = torch.rand(3, 1, new_tokens, truth[0].shape[2], generator=torch.Generator().manual_seed(4)) > 0.5
    mask[1, :, 0] = False
    out, lse = layer.attend(step, query, mask, 0.2)
    wanted, wanted_lse = attention(*truth, query, 0.2, mask)
    assert_near(out, wanted, tolerance)
    assert (out[1, :, 0] == 0).all()
    assert lse[1, :, 0].isneginf().all()
    seen = ~wanted_lse.isneginf()
    assert (lse[seen] - wanted_lse[seen]).abs().max() < (1e-3 if dtype == torch.float32 else 0.05)


def test_ragged_histories_count_only_their_pages():
    """A sequence with fewer pages: the output is over its own tokens, offsets included."""
    from dataclasses import replace

    layer = filled(200, batch=2, bits_k=8, bits_v=8, backend="torch")
    step = layer.append(*biased(2, 2, 2, 1))
    whole = layer.materialize(step)
    short = replace(step, history=replace(step.history, counts=torch.tensor([1, 3], dtype=torch.int32)))
    query = query_like(layer, 3, 1)
    out, lse = layer.attend(short, query, None, 0.2)
    mask = torch.ones(2, 1, 1, 201, dtype=torch.bool)
    mask[0, ..., 64:192] = False
    wanted, wanted_lse = attention(*whole, query, 0.2, mask)
    assert_near(out, wanted, 2e-5)
    assert (lse - wanted_lse).abs().max() < 1e-3


def test_codes_lose_the_constant():
    """4 bits: the error falls by the ratio of the norms, here about 8."""
    keys, values = biased(1, 1, 2, 640)
    errors = []
    for mode in ("off", "on"):
        layer = CompressedLayer(CacheConfig(bits_k=4, bits_v=4, offsets=mode))
        layer.append(keys, values)
        errors.append(
            [(a - b).norm() for a, b in zip(layer.view().materialize(), (keys, values), strict=True)]
        )
    for plain, centred, part in zip(*errors, (keys, values), strict=True):
        ratio = part.norm() / (part - mean_of(part)).norm()
        assert ratio > 6
        assert float(plain / centred) == pytest.approx(float(ratio), rel=0.08)


@pytest.mark.parametrize("sliding_window", [65, 100, 300])
@pytest.mark.parametrize("chunk", [1, 64, 150])
def test_sliding_windows(sliding_window, chunk):
    keys, values = biased(1, 1, 1, 500)
    layer = CompressedLayer(CacheConfig(bits_k=8, bits_v=8, offsets="on"), 0, sliding_window)
    for start in range(0, 500, chunk):
        part = slice(start, start + chunk)
        step = layer.append(keys[:, :, part], values[:, :, part])
        seen = slice(max(start - sliding_window + 1, 0), start + chunk)
        for found, wanted in zip(step.materialize(), (keys[:, :, seen], values[:, :, seen]), strict=True):
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() < 0.1


def test_a_step_stays_true_while_offsets_are_frozen():
    keys, values = biased(1, 1, 2, 63)
    layer = CompressedLayer(CacheConfig(offsets="on", sink_tokens=2, residual_window=1))
    layer.append(keys, values)
    step = layer.append(*biased(2, 1, 2, 4))
    assert step.offsets is None
    assert layer.offsets is not None
    assert torch.equal(step.materialize().keys[:, :, :63], keys)
    assert torch.equal(step.materialize().values[:, :, 63:], biased(2, 1, 2, 4)[1])


def test_crop_to_nothing_forgets_and_freezes_anew():
    layer = filled(200)
    layer.crop(199)
    assert layer.offsets is None
    assert_near(layer.view().materialize().keys, biased(1, 1, 2, 200)[0][:, :, :1].double(), 0.02)
    other = tuple(-3 * part for part in biased(2, 1, 2, 199))
    layer.append(*other)
    assert (layer.offsets.keys - other[0].mean(2, keepdim=True)).abs().max() < 1.5
    layer.reset()
    assert layer.offsets is None


def test_soft_caps_have_no_key_offset():
    """A soft cap is not blind to a shift: told of it, keys go without; not told, attention is still right."""
    query = torch.randn(1, 4, 1, DIM, generator=torch.Generator().manual_seed(0))
    told, untold = (CompressedLayer(CacheConfig(offsets="on", bits_k=8, bits_v=8)) for _ in "ab")
    told.soft_capped = True
    for layer in (told, untold):
        layer.append(*biased(1, 1, 2, 200))
        step = layer.append(*biased(2, 1, 2, 1))
        keys, values = layer.materialize(step)
        logits = 5 * torch.tanh(0.2 * query @ keys.repeat_interleave(2, 1).transpose(-1, -2) / 5)
        wanted = torch.softmax(logits.double(), -1) @ values.repeat_interleave(2, 1).double()
        assert_near(layer.attend(step, query, None, 0.2, 5.0).out, wanted, 1e-5)
    assert told.offsets.keys is None
    assert told.offsets.values is not None
    assert untold.offsets.keys is not None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_saved_and_loaded_to_the_bit(tmp_path, dtype):
    layer = filled(200, batch=2, dtype=dtype, sink_tokens=3)
    tensors, about = export_layer(layer)
    assert tensors["key_offsets"].shape == tensors["value_offsets"].shape == (2, 2, DIM)
    write_file(tmp_path / "c", tensors, {"layer": about})
    tensors, header = read_file(tmp_path / "c")
    assert header["version"] == 4
    twin = CompressedLayer(layer.config)
    import_layer(twin, tensors, header["layer"], torch.device("cpu"))
    assert twin.memory().offsets_bytes == layer.memory().offsets_bytes > 0
    more = biased(3, 2, 2, 100, dtype=dtype)
    for one, other in zip(layer.append(*more).materialize(), twin.append(*more).materialize(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(layer.pool.raw(), twin.pool.raw())


def test_files_without_offsets_say_nothing_of_them(tmp_path):
    layer = filled(200, offsets="off")
    tensors, about = export_layer(layer)
    write_file(tmp_path / "c", tensors, {"layer": about})
    assert not any("offsets" in name for name in read_file(tmp_path / "c")[0])
    assert "sketch" not in about["key_codec"]


@pytest.mark.parametrize("which", ["key_offsets", "value_offsets"])
def test_offsets_of_another_shape_are_refused(which):
    from tqai.errors import CorruptFileError

    tensors, about = export_layer(filled(100))
    with pytest.raises(CorruptFileError, match=which):
        import_layer(
            CompressedLayer(CacheConfig(offsets="on")),
            {**tensors, which: tensors[which][:, :1]},
            about,
            torch.device("cpu"),
        )


def test_memory_counts_them():
    layer = filled(1000, batch=3, dtype=torch.bfloat16)
    assert layer.memory().offsets_bytes == 3 * 2 * (DIM + DIM) * 2
    with_offsets = layer.memory().total_bytes
    layer.offsets = None
    assert with_offsets - layer.memory().total_bytes == 3 * 2 * (DIM + DIM) * 2


def test_a_copy_has_its_own():
    layer = filled(200)
    twin = copy.deepcopy(layer)
    twin.offsets.keys.zero_()
    assert layer.offsets.keys.abs().max() > 1


def test_half_precision_never_overflows():
    """Far from what was typical at first: clamped, not infinite."""
    layer = filled(64, heads=1, dtype=torch.float16)
    layer.offsets = Offsets(torch.full_like(layer.offsets.keys, -3e4), None)
    step = layer.append(*(torch.full((1, 1, 1, DIM), 6e4, dtype=torch.float16) for _ in "kv"))
    assert torch.isfinite(step.recent.keys).all()


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="offsets='yes': allowed are off, on, auto"):
        CacheConfig(offsets="yes")
    assert CacheConfig.from_dict(CacheConfig(offsets="auto").to_dict()).offsets == "auto"


def test_tokens_that_require_gradients():
    """Outside no_grad nothing is written in place that autograd holds."""
    plain, tracked = filled(200), filled(200)
    keys, values = biased(2, 1, 2, 1)
    query = query_like(plain, 3, 1)
    wanted = plain.attend(plain.append(keys, values), query, None, 0.2).out
    leaves = [part.clone().requires_grad_() for part in (keys, values, query)]
    step = tracked.append(*leaves[:2])
    out = tracked.attend(step, leaves[2], None, 0.2).out
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5)
