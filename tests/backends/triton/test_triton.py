"""The Triton kernels against core and float64 attention; interpreted where there is no GPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tqai.backends.base import ExactTokens, History
from tqai.core.codebook import optimal_codebook
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import unpack
from tqai.core.page import CanonicalPages, PageFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter rounds to bfloat16 by cutting off, which would hide the errors looked for here.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 1.2e-3}[DTYPE]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN in interpreted code


def formats(bits_k, bits_v, key_dim, value_dim=None, **spec):
    return PageFormat(
        make_codec(CodecSpec("scalar", key_dim, bits_k, **spec)),
        make_codec(CodecSpec("scalar", value_dim or key_dim, bits_v, seed=1, **spec)),
    )


def draw(*shape, seed=0, dtype=DTYPE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def filled(backend, page_format, batch, kv_heads, pages, first_token=0, edit=None):
    """Encoded random pages, a history of them, and what core decodes, twice `[batch, heads, tokens, dim]`."""
    dims = (page_format.key.spec.head_dim, page_format.value.spec.head_dim)
    sides = [
        draw(batch * pages, kv_heads, 64, dim, seed=i, dtype=torch.float32) for i, dim in enumerate(dims)
    ]
    if edit is not None:
        edit(*sides)
    if DEVICE == "cuda":
        raw = torch.full(
            (*sides[0].shape[:2], page_format.page_bytes), 0xFF, dtype=torch.uint8, device=DEVICE
        )
        backend.encode(*sides, page_format, raw)
    else:  # by core, as interpreting the kernel takes long; it has a test of its own
        both = zip((page_format.key, page_format.value), sides, strict=True)
        pages_of_core = CanonicalPages(*(codec.encode(side.numpy()) for codec, side in both))
        raw = torch.from_numpy(backend.from_canonical(pages_of_core, page_format))
    ids = torch.arange(batch * pages, device=DEVICE).view(batch, pages)
    addresses = torch.full((batch, pages + 2), -1, dtype=torch.int64, device=DEVICE)
    addresses[:, :pages] = raw.data_ptr() + ids * raw.stride(0)
    history = History(page_format, [raw], [0], ids.cpu().int().numpy(), addresses, first_token)
    canonical = backend.to_canonical(raw, page_format)
    decoded = []
    for codec, part, dim in zip((page_format.key, page_format.value), canonical, dims, strict=True):
        tokens = torch.from_numpy(codec.decode(part)).double().view(batch, pages, kv_heads, 64, dim)
        decoded.append(tokens.transpose(1, 2).reshape(batch, kv_heads, -1, dim)[:, :, first_token:])
    return raw, history, decoded


def reference(query, keys, values, seen, scaling, softcap=None):
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.nan_to_num(0).repeat_interleave(group, 1) for x in (keys, values))
    logits = query.double().cpu() @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    return (logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp() @ values, lse


def check(
    backend, page_format, batch=1, kv_heads=2, group=2, new_tokens=1, pages=4, recent=5, sinks=0,
    first_token=0, softcap=None, masked=False, edit=None, query_scale=1.0,
):  # fmt: skip
    dims = (page_format.key.spec.head_dim, page_format.value.spec.head_dim)
    _, history, decoded = filled(backend, page_format, batch, kv_heads, pages, first_token, edit)
    query = draw(batch, kv_heads * group, new_tokens, dims[0], seed=5) * query_scale
    exact = [
        ExactTokens(*(draw(batch, kv_heads, count, dim, seed=7 + i) for i, dim in enumerate(dims)))
        for count in (sinks, recent)
    ]
    keys, values = (
        torch.cat([exact[0][i].cpu().double(), decoded[i], exact[1][i].cpu().double()], 2) for i in range(2)
    )
    tokens = keys.shape[2]
    index = torch.arange(tokens)
    seen = (index <= torch.arange(tokens - new_tokens, tokens)[:, None])[None, None]
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(3)
        seen = torch.rand(batch, kv_heads * group, new_tokens, tokens, generator=generator) < 0.7
        seen[..., (keys.isnan().any(-1) | values.isnan().any(-1)).any(0).any(0)] = False
        seen[0, 0, 0] = False
        mask = seen.to(DEVICE)
    scaling = dims[0] ** -0.5
    result = backend.attend(query, history, exact[0] if sinks else None, exact[1], mask, scaling, softcap)
    wanted, wanted_lse = reference(query, keys, values, seen, scaling, softcap)
    assert ((result.out.cpu().double() - wanted).norm() / wanted.norm()).item() < TOLERANCE
    known = wanted_lse > -torch.inf
    lse = result.lse.cpu()
    torch.testing.assert_close(lse[known].double(), wanted_lse[known], rtol=0, atol=2e-3)
    assert (lse[~known] == -torch.inf).all() and (result.out.cpu()[~known] == 0).all()


@pytest.mark.parametrize(
    ("bits_k", "bits_v", "dim"),
    [(4, 2, 128), (3, 4, 128), (2, 3, 128), (4, 2, 64), (8, 5, 64), (1, 8, 64), (6, 1, 64), (7, 3, 64)],
)
def test_every_width(triton_backend, bits_k, bits_v, dim):
    check(triton_backend, formats(bits_k, bits_v, dim), pages=2, kv_heads=1)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(80, 80), (96, 64), (64, 128)])
def test_head_dims(triton_backend, key_dim, value_dim):
    check(triton_backend, formats(4, 4, key_dim, value_dim), pages=1, kv_heads=1)


@pytest.mark.parametrize("bits_v", [4, 2])
@pytest.mark.parametrize(("group", "new_tokens"), [(1, 1), (4, 1), (3, 3), (2, 16)])
def test_groups_and_new_tokens(triton_backend, group, new_tokens, bits_v):
    page_format = formats(4, bits_v, 64)
    check(triton_backend, page_format, group=group, new_tokens=new_tokens, recent=20, pages=1, kv_heads=1)


@pytest.mark.parametrize(("pages", "recent", "sinks"), [(0, 1, 0), (1, 33, 0), (5, 2, 33)])
def test_lengths(triton_backend, pages, recent, sinks):
    check(triton_backend, formats(4, 4, 64), batch=2, kv_heads=1, pages=pages, recent=recent, sinks=sinks)


@pytest.mark.parametrize("bits_v", [4, 2])
def test_softcap(triton_backend, bits_v):
    check(triton_backend, formats(4, bits_v, 64), kv_heads=1, pages=2, softcap=20.0, query_scale=4.0)


@pytest.mark.parametrize("bits_v", [4, 2])
def test_mask_hides_even_nan(triton_backend, bits_v):
    def poison(keys, values):
        keys[1, :, 3] = torch.nan
        values[2, :, 5, 7] = torch.inf

    page_format = formats(4, bits_v, 64)
    check(triton_backend, page_format, new_tokens=3, sinks=4, first_token=9, masked=True, edit=poison)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_out_of_sight_sets_no_unit(triton_backend, masked):
    def poison(keys, values):
        values[0, :, 3] *= 1e30

    check(triton_backend, formats(4, 4, 64), kv_heads=1, pages=2, first_token=4, masked=masked, edit=poison)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size(triton_backend, size):
    def shrink(keys, values):
        values *= size

    _, history, (keys, values) = filled(triton_backend, formats(4, 4, 64), 1, 1, 2, edit=shrink)
    query, recent = draw(1, 2, 1, 64), ExactTokens(draw(1, 1, 1, 64), draw(1, 1, 1, 64) * 0)
    if torch.float16 == DTYPE:  # which holds no such results: the sum before them is looked at
        query = query.float()
    out = triton_backend.attend(query, history, None, recent, None, 0.125).out
    keys, values = (torch.cat([x, y.cpu().double()], 2) for x, y in zip((keys, values), recent, strict=True))
    wanted, _ = reference(query, keys, values, torch.ones(1, 2, 1, 129, dtype=torch.bool), 0.125)
    assert ((out.cpu().double() - wanted).norm() / wanted.norm()).item() < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("bits_k", "bits_v"), [(4, 2), (3, 3), (2, 4)])
def test_portable_form_agrees_with_ptx(triton_backend, monkeypatch, bits_k, bits_v):
    if DEVICE != "cuda":
        pytest.skip("PTX needs an NVIDIA GPU")
    page_format = formats(bits_k, bits_v, 128)
    _, history, _ = filled(triton_backend, page_format, 1, 2, 9)
    query, recent = draw(1, 8, 1, 128), ExactTokens(draw(1, 2, 5, 128), draw(1, 2, 5, 128))
    found = triton_backend.attend(query, history, None, recent, None, 0.1).out
    for codec in (page_format.key, page_format.value):
        ready = importlib.import_module("tqai.backends.triton.tables").tables(codec.spec, query.device)
        assert ready.instructions is not None
        monkeypatch.setattr(ready, "instructions", None)
    plain = triton_backend.attend(query, history, None, recent, None, 0.1).out
    assert ((found.double() - plain.double()).norm() / plain.double().norm()).item() < 2e-3


def test_nan_in_sight_shows(triton_backend):
    for side, bits_v in ((0, 4), (1, 4), (1, 2)):

        def poison(keys, values, side=side):
            (keys, values)[side][1, 0, 3] = torch.nan

        _, history, _ = filled(triton_backend, formats(4, bits_v, 64), 1, 2, 3, edit=poison)
        recent = ExactTokens(draw(1, 2, 1, 64), draw(1, 2, 1, 64))
        out = triton_backend.attend(draw(1, 4, 1, 64), history, None, recent, None, 0.125).out
        assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), [(4, 2, 128), (3, 3, 128), (3, 8, 80), (5, 1, 64)])
def test_codes_are_those_of_core(triton_backend, bits_k, bits_v, dim, dtype):
    page_format = formats(bits_k, bits_v, dim)
    sides = [draw(2, 2, 64, dim, seed=i, dtype=torch.float32) for i in range(2)]
    for x in sides:
        x[0, 0, 0] = 0
        x[0, 0, 1] *= 1e-30 if dtype != torch.float16 else 1e-3
        x[0, 0, 2] *= 1e30 if dtype != torch.float16 else 1e3
        x[0, 0, 3, 5] = torch.nan
        x[0, 0, 4, 7] = -torch.inf
    sides = [x.to(dtype) for x in sides]
    out = torch.full((2, 2, page_format.page_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
    triton_backend.encode(*sides, page_format, out)
    got = triton_backend.to_canonical(out, page_format)
    for codec, part, vectors in zip((page_format.key, page_format.value), got, sides, strict=True):
        wanted = codec.encode(vectors.float().cpu().numpy())
        mine, right = (unpack(e.codes, codec.spec.bits, dim).astype(int) for e in (part, wanted))
        apart = mine != right
        assert apart.sum() < 5 and np.abs(mine - right).max() <= 1
        whole = ~apart.any(-1)
        np.testing.assert_array_equal(part.scales[whole] == 0x7FC0, wanted.scales[whole] == 0x7FC0)
        steps = np.abs(part.scales[whole].astype(int) - wanted.scales[whole].astype(int))
        assert steps.max() <= 1 and (steps > 0).mean() < 2e-2
    decoded = triton_backend.decode(out, page_format, torch.float32)
    for codec, part, mine in zip((page_format.key, page_format.value), got, decoded, strict=True):
        wanted = torch.from_numpy(codec.decode(part))
        size = wanted.nan_to_num(0).abs().amax(-1, keepdim=True)
        assert ((mine.cpu() - wanted).abs().nan_to_num(0) <= 3e-6 * size).all()
        assert (mine.cpu().isnan() == wanted.isnan()).all()


@pytest.mark.parametrize("bits", [(3, 5, 80), (3, 4, 128)])
def test_pages_come_back_bit_exact(triton_backend, bits):
    page_format = formats(*bits)
    raw = torch.randint(0, 256, (3, 2, page_format.page_bytes), dtype=torch.uint8)
    back = triton_backend.from_canonical(triton_backend.to_canonical(raw, page_format), page_format)
    np.testing.assert_array_equal(back, raw.numpy())


def test_refusals_say_why(triton_backend):
    assert triton_backend.refuses(formats(4, 2, 128), DEVICE, "bfloat16") is None
    assert "float32" in triton_backend.refuses(formats(4, 2, 128), DEVICE, "float32")
    assert "head_dim 256" in triton_backend.refuses(formats(4, 2, 256), DEVICE, "bfloat16")
    assert "head_dim 72" in triton_backend.refuses(formats(4, 2, 72), DEVICE, "bfloat16")
    codecs = [make_codec(CodecSpec("scalar", 64, bits)) for bits in (4, 2)]
    for side, what in enumerate(("keys", "values")):
        other = SimpleNamespace(spec=codecs[side].spec, row_bytes=codecs[side].row_bytes)
        other.tables = lambda side=side: {
            "centroids": optimal_codebook(64, codecs[side].spec.bits).centroids.astype(np.float32)
        }
        both = [other if i == side else codec for i, codec in enumerate(codecs)]
        assert f"levels of {what}" in triton_backend.refuses(PageFormat(*both), DEVICE, "bfloat16")
