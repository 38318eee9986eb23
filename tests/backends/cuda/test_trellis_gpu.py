"""Trellis codes on the GPU: encoding, decoding and attention against core and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.backends.cuda.conftest import causal, make_case, reference, relative
from tests.backends.cuda.distortion import check_as_good

from tqai.backends.cuda import trellis_codes
from tqai.backends.cuda.attention import Exact, attend_pages
from tqai.backends.cuda.codes import decode_pages
from tqai.backends.cuda.plan import Shape
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat, pages_from_bytes

pytestmark = pytest.mark.gpu

BOUND = 2e-4
"""Levels are exact here and the other factors have 16 bits: a tenth of what scalar codes are allowed."""


def formats(bits_k, bits_v, key_dim=128, value_dim=None, name="trellis", **spec):
    return PageFormat(
        make_codec(CodecSpec(name, key_dim, bits_k, **spec)),
        make_codec(CodecSpec(name, value_dim or key_dim, bits_v, seed=1, **spec)),
    )


def relative_errors(vectors, decoded):
    return np.square(decoded - vectors).sum(-1) / np.square(vectors).sum(-1)


def check(case, seen=None, mask=None, softcap=None, lse_bound=1e-3, **launch):
    scaling = case.query.shape[-1] ** -0.5
    exact = [None if t is None else Exact(*t) for t in (case.sinks, case.recent)]
    out, lse = attend_pages(
        case.query,
        case.page_format,
        case.history.addresses,
        case.history.pages,
        scaling,
        first_token=case.history.first_token,
        sinks=exact[0],
        recent=exact[1],
        mask=mask,
        softcap=softcap,
        out_dtype=torch.float32,
        **launch,
    )
    wanted, wanted_lse = reference(case, causal(case) if seen is None else seen, scaling, softcap)
    assert relative(out, wanted) < BOUND
    known = wanted_lse > -torch.inf
    torch.testing.assert_close(lse[known].double(), wanted_lse[known], rtol=0, atol=lse_bound)
    assert (lse[~known] == -torch.inf).all() and (out[~known] == 0).all()


@pytest.mark.parametrize("bits_v", [1, 2, 3, 4])
@pytest.mark.parametrize("bits_k", [1, 2, 3, 4])
def test_every_pair_of_widths(cuda_backend, bits_k, bits_v):
    check(make_case(cuda_backend, formats(bits_k, bits_v), pages=9))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_256_states(cuda_backend, bits):
    check(make_case(cuda_backend, formats(bits, bits, name="trellis256"), pages=9))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (256, 256), (128, 64), (80, 112)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_head_dims(cuda_backend, key_dim, value_dim, bits):
    check(make_case(cuda_backend, formats(bits, bits, key_dim, value_dim), pages=7))


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("new_tokens", [1, 3, 16])
def test_groups_and_new_tokens(cuda_backend, group, new_tokens):
    check(make_case(cuda_backend, formats(3, 3), batch=2, group=group, new_tokens=new_tokens, pages=6))


@pytest.mark.parametrize(
    ("kv_heads", "pages"), [(1, 0), (1, 1), (1, 11), (1, 1000), (8, 0), (8, 1), (8, 13), (8, 132)]
)
def test_page_counts(cuda_backend, kv_heads, pages):
    check(make_case(cuda_backend, formats(3, 3), kv_heads=kv_heads, pages=pages))


@pytest.mark.parametrize("launch", [{"blocks": 7}, {"blocks": 132}, {"splits": 1}, {"splits": 17}])
@pytest.mark.parametrize("shape", [Shape(12, 1), Shape(5, 2), Shape(4, 1)])
def test_any_cut_of_the_work_gives_the_same(cuda_backend, launch, shape):
    case = make_case(cuda_backend, formats(3, 3), batch=3, pages=17, recent=90, sinks=3)
    check(case, shape=shape, **launch)


def test_softcap(cuda_backend):
    check(make_case(cuda_backend, formats(3, 3), pages=7, query_scale=5.0), softcap=30.0, lse_bound=1e-2)


@pytest.mark.parametrize("first_token", [1, 13, 63])
def test_first_page_begins_inside(cuda_backend, first_token):
    check(make_case(cuda_backend, formats(4, 4), batch=2, pages=4, sinks=5, first_token=first_token))


def test_mask_with_nan_behind_it(cuda_backend):
    def poison(keys, values):
        keys[0, :, 3] = torch.nan
        values[1, :, 5, 7] = torch.inf

    case = make_case(cuda_backend, formats(3, 3), new_tokens=3, pages=4, sinks=2, edit=poison)
    mask = torch.rand(1, case.query.shape[1], 3, causal(case).shape[-1], device="cuda") < 0.7
    mask[..., [2 + 3, 2 + 64 + 5]] = False
    mask[0, 0, 0] = False
    check(case, seen=mask, mask=mask)


def test_nan_in_sight_shows(cuda_backend):
    for side in (0, 1):

        def poison(keys, values, side=side):
            (keys, values)[side][1, 0, 3] = torch.nan

        case = make_case(cuda_backend, formats(3, 3), pages=3, edit=poison)
        out = cuda_backend.attend(case.query, case.history, None, case.recent, None, 0.1).out
        assert out[:, :4].isnan().all()
        assert not out[:, 4:].isnan().any()


def test_ragged_lengths(cuda_backend):
    case = make_case(cuda_backend, formats(3, 3), batch=4, pages=20, recent=40)
    pages = torch.tensor([20, 0, 7, 13], dtype=torch.int32, device="cuda")
    case.history.addresses[1, :] = -1
    out, _ = attend_pages(
        case.query,
        case.page_format,
        case.history.addresses,
        20,
        128**-0.5,
        page_counts=pages,
        recent=Exact(*case.recent),
        out_dtype=torch.float32,
    )
    index = torch.arange(20 * 64 + 40, device="cuda")
    seen = ((index < 64 * pages[:, None]) | (index >= 1280))[:, None, None]
    wanted, _ = reference(case, seen, 128**-0.5)
    assert relative(out, wanted) < BOUND


@pytest.mark.parametrize("name", ["trellis", "trellis256"])
@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), [(3, 3, 128), (2, 4, 80), (4, 1, 64), (1, 2, 256)])
def test_decoding_is_that_of_core_to_the_bit(cuda_backend, name, bits_k, bits_v, dim):
    """Random codes of scale 1, in the space of the codes; then rotated back, with special scales."""
    page_format = formats(bits_k, bits_v, dim, name=name)
    rng = np.random.default_rng(0)
    canonical = pages_from_bytes(
        rng.integers(0, 256, (3, 2, page_format.page_bytes), dtype=np.uint8), page_format
    )
    for part in canonical:
        part.scales[...] = 0x3F80
    raw = torch.from_numpy(cuda_backend.from_canonical(canonical, page_format)).cuda()
    rotated = decode_pages(raw.view(6, -1), page_format, torch.float32, True)
    for codec, mine, part in zip((page_format.key, page_format.value), rotated, canonical, strict=True):
        wanted = codec.decode_rotated(part).reshape(mine.shape)
        np.testing.assert_array_equal(mine.cpu().numpy(), wanted)
    for part in canonical:
        part.scales[0, 0, :2] = (0x7FC0, 0)
    raw = torch.from_numpy(cuda_backend.from_canonical(canonical, page_format)).cuda()
    decoded = cuda_backend.decode(raw, page_format, torch.float32)
    for codec, mine, part in zip((page_format.key, page_format.value), decoded, canonical, strict=True):
        np.testing.assert_allclose(mine.cpu().numpy(), codec.decode(part), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("name", "bits_k", "bits_v", "dim"),
    [
        ("trellis", 3, 3, 128),
        ("trellis", 4, 2, 128),
        ("trellis", 2, 2, 80),
        ("trellis", 1, 4, 64),
        ("trellis", 3, 3, 256),
        ("trellis256", 3, 2, 128),
        ("trellis256", 4, 1, 80),
    ],
)
def test_codes_are_as_good_as_those_of_core(cuda_backend, name, bits_k, bits_v, dim, dtype):
    if name == "trellis256" and dtype != torch.bfloat16:
        pytest.skip("core takes its time")
    page_format = formats(bits_k, bits_v, dim, name=name)
    generator = torch.Generator("cuda").manual_seed(bits_k)
    sides = [torch.randn(3, 8, 64, dim, device="cuda", generator=generator).to(dtype) for _ in range(2)]
    sides[0][0, 0, 0] = 0
    sides[0][1, 1, 63, 5] = torch.nan
    sides[1][2, 0, 31, 7] = -torch.inf
    out = torch.full((3, 8, page_format.page_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    trellis_codes._encode_by_kernel(*sides, page_format, out)
    got = cuda_backend.to_canonical(out, page_format)
    for codec, mine, vectors in zip((page_format.key, page_format.value), got, sides, strict=True):
        plain = vectors.double().cpu().numpy()
        wanted = codec.encode(plain)
        special = (wanted.scales == 0x7FC0) | (wanted.scales == 0)
        np.testing.assert_array_equal(mine.scales == 0x7FC0, wanted.scales == 0x7FC0)
        assert (mine.codes[special] == 0).all() and (mine.scales[special] == wanted.scales[special]).all()
        check_as_good(
            *(relative_errors(plain[~special], codec.decode(part)[~special]) for part in (mine, wanted))
        )


@pytest.mark.parametrize(
    ("name", "bits"),
    [("trellis", 1), ("trellis", 2), ("trellis", 3), ("trellis", 4), ("trellis256", 2), ("trellis256", 3)],
)
def test_far_coordinates_are_not_given_up(cuda_backend, name, bits):
    """Of vectors whose rotated coordinates have long tails: where a distance ends too soon the error of some
    is many times what it need be."""
    page_format = formats(bits, bits, name=name)
    codec = page_format.key
    rotated = np.random.default_rng(bits).standard_t(3, (3, 8, 64, 128))
    vectors = (rotated @ codec.rotation_matrix).astype(np.float32)
    given = torch.from_numpy(vectors).cuda()
    out = torch.empty(3, 8, page_format.page_bytes, dtype=torch.uint8, device="cuda")
    trellis_codes._encode_by_kernel(given, given, page_format, out)
    plain = vectors.astype(np.float64)
    parts = (cuda_backend.to_canonical(out, page_format).key, codec.encode(plain))
    found, right = (relative_errors(plain, codec.decode(part)) for part in parts)
    ratio = found / right
    assert ratio.max() < 1.3 and abs(ratio.mean() - 1.0) < 3e-3


@pytest.mark.parametrize("name", ["trellis", "trellis256"])
def test_the_kernel_encodes_and_many_pages_at_once(cuda_backend, name):
    page_format = formats(3, 3, name=name)
    assert trellis_codes._kernel_encodes(page_format, torch.bfloat16, torch.device("cuda", 0))
    keys = torch.randn(300, 8, 64, 128, device="cuda").bfloat16()
    out = torch.full((300, 8, page_format.page_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    cuda_backend.encode(keys, keys, page_format, out)
    again = torch.empty_like(out)
    for start in range(0, 300, 50):
        part = slice(start, start + 50)
        cuda_backend.encode(keys[part], keys[part], page_format, again[part])
    assert torch.equal(out, again)
