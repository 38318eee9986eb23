"""The same cache on an NVIDIA GPU: equal to the CPU's, on every backend that serves it there."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

import tqai
from tqai import CacheConfig, TurboQuantCache
from tqai.backends import BACKENDS, load
from tqai.errors import TqaiError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

# Model dtype and relative L2 of logits against the CPU in float32: torch computes in float32 throughout,
# the kernels take half precision, whose own rounding is most of the difference.
DTYPE = {"torch": torch.float32}
LOGITS_ERROR = {"torch": 2e-4}
HALF_LOGITS_ERROR = 2e-2


@pytest.fixture(autouse=True)
def torch_backend():
    """In place of the folder's fixture of that name: here every backend is wanted."""


@pytest.fixture(scope="module")
def models():
    """The embedded model on the CPU in float32, on the GPU in each dtype, and 2,000 tokens of text."""
    from tqai.demo import load as load_demo
    from tqai.demo.retrieval import document

    on_cpu, tokenizer = load_demo(torch.float32, "cpu")
    on_gpu = {dtype: load_demo(dtype, "cuda")[0] for dtype in (torch.float32, torch.float16)}
    ids = torch.tensor(tokenizer.encode(document()[:12000]))[None, :2000]
    return on_cpu, on_gpu, ids


@pytest.fixture(params=[name for name in BACKENDS if name != "native"])
def backend(request):
    try:
        load(request.param)
    except TqaiError as error:
        pytest.skip(str(error))
    return request.param


@torch.inference_mode()
def forced_logits(model, ids, cache, prompt=1500, chunk=200, steps=40):
    """Logits of a prompt's end, of a chunk, and of single tokens that follow."""
    ids = ids.to(model.device)
    parts = [model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    parts.append(model(ids[:, prompt : prompt + chunk], past_key_values=cache).logits)
    for position in range(prompt + chunk, prompt + chunk + steps):
        parts.append(model(ids[:, position : position + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1).double().cpu()


@pytest.mark.parametrize("preset", ["K4/V2", "K4/V4", "K3/V3"])
def test_logits_equal_the_cpu(models, backend, preset):
    on_cpu, on_gpu, ids = models
    on_gpu = on_gpu[DTYPE.get(backend, torch.float16)]
    wanted = forced_logits(
        on_cpu, ids, TurboQuantCache(on_cpu, config=CacheConfig.preset(preset, backend="torch"))
    )
    cache = TurboQuantCache(on_gpu, config=CacheConfig.preset(preset, backend=backend))
    found = forced_logits(on_gpu, ids, cache)
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.median() < LOGITS_ERROR.get(backend, HALF_LOGITS_ERROR)
    report = cache.memory()
    assert report.backend == backend
    assert report.tokens == 1740


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generate_in_half_precision(models, backend, dtype):
    from tqai.demo import load as load_demo

    *_, ids = models
    model, _ = load_demo(dtype, "cuda")
    prompt = ids[:, :1000].cuda()
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **settings)
    cache = tqai.patch(model, bits_k=8, bits_v=8, backend=backend)
    packed = model.generate(prompt, past_key_values=cache, **settings)
    tqai.unpatch(model)
    assert (plain == packed)[:, 1000:1012].all()
    held = cache.memory().total_bytes
    assert held < 0.75 * cache.memory().bf16_bytes


def test_left_padding_and_beams(models, backend):
    _, on_gpu, ids = models
    model = on_gpu[DTYPE.get(backend, torch.float16)]
    rows = [ids[0, :300], ids[0, 300:500], ids[0, 500:871]]
    batch = torch.zeros(3, 371, dtype=torch.long)
    mask = torch.zeros(3, 371, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, -len(row) :] = row
        mask[index, -len(row) :] = 1
    outs = []
    for filler in (5, 99):
        filled = torch.where(mask.bool(), batch, filler).cuda()
        tqai.patch(model, bits_k=4, bits_v=4, backend=backend)
        outs.append(
            model.generate(
                filled, attention_mask=mask.cuda(), max_new_tokens=80, num_beams=2, pad_token_id=0
            )[:, 371:]
        )
        tqai.unpatch(model)
    assert torch.equal(*outs)


def test_saved_on_the_gpu_continues_on_the_cpu(models, backend, tmp_path):
    on_cpu, on_gpu, ids = models
    on_gpu = on_gpu[DTYPE.get(backend, torch.float16)]
    on_cpu = type(on_cpu)(on_cpu.config).to(on_gpu.dtype)
    on_cpu.load_state_dict(on_gpu.state_dict())
    cache = TurboQuantCache(on_gpu, bits=4, backend=backend)
    with torch.inference_mode():
        on_gpu(ids[:, :700].cuda(), past_key_values=cache)
        cache.save(tmp_path / "cache")
        twin = TurboQuantCache.load(tmp_path / "cache", on_cpu)
        wanted = on_gpu(ids[:, 700:701].cuda(), past_key_values=cache).logits.cpu()
        found = on_cpu(ids[:, 700:701], past_key_values=twin).logits
    error = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < LOGITS_ERROR.get(backend, HALF_LOGITS_ERROR)
