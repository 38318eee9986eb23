"""Tables of trellis codes for the CUDA kernels: entries, forms, refusals; and that the sources compile."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from tqai.backends.cuda import compile as compiling
from tqai.backends.cuda.plan import Shape, attention_shared_bytes, choose_shape, codec_macros, refuse_format
from tqai.backends.cuda.trellis_encode import encode_macros
from tqai.backends.cuda.trellis_plan import (
    PARTS,
    Form,
    level_unit,
    table,
    table_bytes,
    table_forms,
    table_macros,
)
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat
from tqai.core.trellis import windows_of

LIMIT = 232448  # sm_90


def formats(bits_k, bits_v, key_dim=128, value_dim=None, name="trellis"):
    return PageFormat(
        make_codec(CodecSpec(name, key_dim, bits_k)),
        make_codec(CodecSpec(name, value_dim or key_dim, bits_v)),
    )


@pytest.mark.parametrize("name", ["trellis", "trellis256"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_entries_are_the_levels_of_windows(name, bits):
    codec = make_codec(CodecSpec(name, 128, bits))
    single, pair = table(codec, Form(False, 32)), table(codec, Form(True, 32)).view(np.int8).reshape(-1, 4)
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 128)).astype(np.uint8)
    windows = windows_of(codes, bits, codec.code.window_bits)
    wanted = codec.tables()["windows"][windows]
    unit = level_unit(codec)
    np.testing.assert_allclose(single[windows].view(np.float32) * unit, wanted, rtol=1e-6)
    wide = windows | (np.roll(windows, -1, -1) >> (codec.code.window_bits - bits)) << codec.code.window_bits
    np.testing.assert_allclose(pair[wide][..., 0] * unit, wanted, rtol=1e-6)
    np.testing.assert_allclose(pair[wide][..., 1] * unit, np.roll(wanted, -1, -1), rtol=1e-6)
    assert not pair[:, 2:].any(), "entries are joined by additions"


@pytest.mark.parametrize(("bits", "apart"), [(3, 3), (2, 1)])
def test_split_entries_have_both_levels_of_two_neighbours(bits, apart):
    """All but the outer bits of a pair are looked up; bits 0 and `apart`, and bits 8 and 8 + `apart`, say
    which of two it is."""
    codec = make_codec(CodecSpec("trellis", 128, bits))
    entries = table(codec, Form(False, 32, True)).view(np.int8).reshape(-1, 4)
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 128)).astype(np.uint8)
    windows = windows_of(codes, bits, 6 + bits)
    wide = windows | (np.roll(windows, -1, -1) >> 6) << (6 + bits)
    found = entries[wide >> 1 & len(entries) - 1]
    first = np.take_along_axis(found, ((wide ^ wide >> apart) & 1)[..., None], -1)[..., 0]
    second = np.take_along_axis(found, 2 + ((wide >> 8 ^ wide >> (8 + apart)) & 1)[..., None], -1)[..., 0]
    wanted = codec.tables()["windows"][windows]
    np.testing.assert_allclose(first * level_unit(codec), wanted, rtol=1e-6)
    np.testing.assert_allclose(second * level_unit(codec), np.roll(wanted, -1, -1), rtol=1e-6)


def test_split_entries_of_256_states_are_looked_up_by_sums_of_bits():
    """Twelve sums of two windows' bits (`trellis_sums.cuh`), of which the middle ten are looked up."""
    codec = make_codec(CodecSpec("trellis256", 128, 3))
    entries = table(codec, Form(False, 32, True)).view(np.int8).reshape(-1, 4)
    windows = windows_of(np.random.default_rng(0).integers(0, 8, (5, 128)).astype(np.uint8), 3, 11)

    def bit(i):
        return windows >> i & 1

    x = [
        bit(1) ^ bit(7) ^ bit(2) ^ bit(3) ^ bit(10),
        bit(2) ^ bit(8),
        bit(3) ^ bit(9),
        bit(4),
        bit(5),
        bit(6),
    ]
    sums = sum(each << i for i, each in enumerate(x))
    wide = sums | np.roll(sums, -2, -1) << 6
    found = entries[wide >> 1 & 1023]
    first = np.take_along_axis(found, ((wide ^ wide >> 3) & 1)[..., None], -1)[..., 0]
    second = np.take_along_axis(found, 2 + ((wide >> 8 ^ wide >> 11) & 1)[..., None], -1)[..., 0]
    wanted = codec.tables()["windows"][windows]
    np.testing.assert_allclose(first * level_unit(codec), wanted, rtol=1e-6)
    np.testing.assert_allclose(second * level_unit(codec), np.roll(wanted, -2, -1), rtol=1e-6)


def permuted(words, selectors):
    """What a byte permute takes out of two words: the sign of an entry where the selector's top bit is."""
    entries = np.array(words, dtype="<u4").view(np.uint8)[selectors & 7].astype(int)
    return np.where(selectors & 8, 255 * (entries > 127), entries)


@pytest.mark.parametrize("name", ["trellis", "trellis256"])
def test_parts_of_4_bits_add_up_to_the_levels_of_windows(name):
    """By the macros, as `trellis_parts.cuh` takes them: three permutes, one of the first two 0."""
    page_format = formats(4, 2, name=name)
    macros = table_macros(page_format, table_forms(page_format, LIMIT))
    assert (macros["PARTSK"], macros["PARTSV"]) == (1, 0)
    windows = np.arange(1 << page_format.key.code.window_bits)
    index = [np.zeros_like(windows), np.zeros_like(windows)]
    for part in range(2):
        for term in int(macros[f"MAPK{part}"]).to_bytes(4, "little"):
            index[part] ^= windows >> (term & 15) & (term >> 4)
    words = [macros[f"LEVELSK{i}"] for i in range(6)]
    below, above = permuted(words[:2], index[0]), permuted(words[2:4], ~index[0] & 15)
    assert not (below * above).any()
    found = above - below + permuted(words[4:], index[1])
    assert found.min() >= 0 and found.max() <= 255, "bytes must not carry"
    levels = (found - macros["BIASK"]) * level_unit(page_format.key)
    np.testing.assert_allclose(levels, page_format.key.tables()["windows"], rtol=1e-6)


@pytest.mark.parametrize("limit", [LIMIT, 166912, 101376])
@pytest.mark.parametrize("name", ["trellis", "trellis256"])
@pytest.mark.parametrize("bits_v", [1, 2, 3, 4])
@pytest.mark.parametrize("bits_k", [1, 2, 3, 4])
def test_chosen_tables_leave_room_for_pages(bits_k, bits_v, name, limit):
    page_format = formats(bits_k, bits_v, name=name)
    forms = table_forms(page_format, limit)
    if forms is None:
        assert name == "trellis256" or limit < 166912
        return
    shape = choose_shape(page_format, limit, 8, forms)
    assert shape is not None and shape.warps >= 8
    assert attention_shared_bytes(page_format, shape, 8, forms) <= limit


def test_equal_bits_share_a_table_and_use_pairs_where_they_fit():
    assert table_forms(formats(2, 2), LIMIT) == (Form(True, 32),) * 2
    assert table_forms(formats(3, 3), LIMIT) == (Form(False, 32, True),) * 2
    assert table_bytes(formats(3, 3), (Form(False, 32, True),) * 2) == 1024 * 32 * 4
    assert table_bytes(formats(3, 3), (Form(False, 32),) * 2) == 512 * 32 * 4
    assert table_forms(formats(3, 3), 166912) == (Form(False, 32),) * 2
    assert table_forms(formats(3, 3, name="trellis256"), LIMIT) == (Form(False, 32, True),) * 2
    assert table_forms(formats(3, 3, 80, name="trellis256"), LIMIT) == (Form(False, 16),) * 2
    assert table_forms(formats(3, 2), LIMIT) == (Form(False, 32, True),) * 2
    assert table_bytes(formats(3, 2), (Form(False, 32, True),) * 2) == (1024 + 256) * 32 * 4
    assert table_forms(formats(3, 2, 80), LIMIT) == (Form(False, 32, True), Form(False, 32))
    assert table_forms(formats(2, 3), LIMIT) == (Form(False, 32), Form(False, 32, True))


def test_codes_of_4_bits_need_no_table():
    for name in ("trellis", "trellis256"):
        assert table_forms(formats(4, 4, name=name), 101376) == (PARTS, PARTS)
        assert table_bytes(formats(4, 4, name=name), (PARTS, PARTS)) == 0
    assert table_forms(formats(4, 2), LIMIT) == (PARTS, Form(True, 32))
    assert table_forms(formats(3, 4), LIMIT) == (Form(False, 32, True), PARTS)
    assert table_bytes(formats(3, 4), (Form(False, 32, True), PARTS)) == 1024 * 32 * 4
    assert table(formats(4, 4).key, PARTS).size == 0


@pytest.mark.parametrize(
    ("bits_k", "bits_v", "dim", "limit", "warps"),
    [
        (2, 2, 128, LIMIT, 16),  # pairs on both sides
        (1, 2, 64, LIMIT, 16),
        (1, 2, 64, 166912, 12),  # no room for the pairs of both
        (3, 3, 128, LIMIT, 12),
        (4, 4, 128, LIMIT, 12),
        (4, 4, 256, LIMIT, 8),
    ],
)
def test_warps_have_registers_and_room(bits_k, bits_v, dim, limit, warps):
    page_format = formats(bits_k, bits_v, dim)
    forms = table_forms(page_format, limit)
    assert choose_shape(page_format, limit, 1, forms) == Shape(warps, 1)
    assert choose_shape(page_format, limit, 1, forms, line=True) == Shape(8, 1)


def test_refusals_say_what():
    assert refuse_format(formats(3, 3)) is None
    assert refuse_format(formats(4, 2, 64, 256)) is None
    scalar = make_codec(CodecSpec("scalar", 128, 4))
    mixed = PageFormat(make_codec(CodecSpec("trellis", 128, 4)), scalar)
    assert "both sides" in refuse_format(mixed)
    assert "'trellis256'" in refuse_format(PageFormat(scalar, make_codec(CodecSpec("trellis256", 128, 4))))
    assert "1 bits and head_dim 32" in refuse_format(formats(1, 1, 32))
    assert "24" in refuse_format(formats(3, 3, 24))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("arch", "bits", "dim", "name"),
    [("sm_90", 3, 80, "trellis"), ("sm_80", 2, 128, "trellis256"), ("sm_80", 4, 80, "trellis")],
)
def test_sources_compile(tmp_path, arch, bits, dim, name):
    page_format = formats(bits, bits, dim, name=name)
    macros = codec_macros(page_format, "bfloat16")
    form = table_forms(page_format, LIMIT if arch == "sm_90" else 166912)
    attention = {**macros, **table_macros(page_format, form), "WARPS": 8, "STAGES": 1, "SOFTCAP": 0, "OUT": 1}
    if arch == "sm_90":
        split = {**attention, "MASKED": 0, "CLUSTER": 0}
        files = [
            ("attend_split.cu", split),
            ("trellis_encode.cu", encode_macros(page_format.key, "bfloat16")),
            ("trellis_encode.cu", encode_macros(make_codec(CodecSpec("trellis256", dim, 3)), "bfloat16")),
        ]
    else:
        files = [("attend_line.cu", {**attention, "MASKED": 1}), ("trellis_decode.cu", macros)]
    for file, given in files:
        source = tmp_path / file
        source.write_text(compiling.source(file))
        command = [
            "nvcc",
            "-std=c++17",
            f"-arch={arch}",
            "-cubin",
            "-o",
            str(tmp_path / "out.cubin"),
            str(source),
        ]
        done = subprocess.run(
            [*command, *compiling.options(given)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
