"""`tqai.compress_activations`: what is saved for backward is packed, and nothing else changes."""

import gc

import pytest
import torch
from torch import nn

import tqai
from tqai.activations import saved
from tqai.errors import ConfigError


class Block(nn.Module):
    """A toy layer with everything that has to be told apart: weights, masks, shared inputs, nonlinearity."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask):
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y)) * mask


class Net(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(128, 10)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 32, 128, generator=generator)
    return x, (torch.rand(4, 32, 128, generator=generator) > 0.1).float()


def gradients(net, *inputs):
    net.zero_grad()
    out = net(*inputs)
    out.square().mean().backward()
    return out.detach(), [parameter.grad.clone() for parameter in net.parameters()]


def relative(found, wanted):
    error = sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))
    return float((error / sum(b.square().sum() for b in wanted)) ** 0.5)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 0.15)])
def test_forward_is_untouched_and_gradients_follow(net, bits, limit):
    out, wanted = gradients(net, *batch())
    with tqai.compress_activations(net, bits=bits, layers=net.layers):
        packed_out, found = gradients(net, *batch())
    assert torch.equal(packed_out, out)
    assert 0 < relative(found, wanted) < limit
    assert torch.equal(gradients(net, *batch())[1][0], wanted[0])


def test_bytes_held_are_a_quarter_and_are_let_go(net):
    packing = tqai.compress_activations(net, bits=8, layers=net.layers)
    out = net(*batch())
    # per layer x, the norm's output, and three inside the gate: all [4, 32, 128] float32, each once
    one = 4 * 32 * 128 * 4
    assert packing.saved_bytes % one == 0 and packing.saved_bytes >= 3 * 4 * one
    assert packing.held_bytes == pytest.approx(packing.saved_bytes * (128 + 2) / 512)
    del out
    gc.collect()
    assert (packing.saved_bytes, packing.held_bytes, packing._packed) == (0, 0, {})
    packing.detach()


def test_an_input_that_several_operations_save_is_packed_once(net, monkeypatch):
    packed, stands = [], []
    original, stand_in = saved.pack_tensor, saved._Saved
    monkeypatch.setattr(saved, "pack_tensor", lambda *given: packed.append(original(*given)) or packed[-1])
    monkeypatch.setattr(saved, "_Saved", lambda *given: stands.append(stand_in(*given)) or stands[-1])
    with tqai.compress_activations(net, layers=net.layers):
        out = net(*batch())
    # the norm's output feeds two projections, the gate's goes into silu, ...
    assert len(packed) < len(stands)
    assert {id(part) for part in packed} == {id(stand.packed) for stand in stands}
    plain = torch.stack([stand.tensor().reshape(-1) for stand in stands])
    distances = torch.cdist(plain, plain)
    same = torch.tensor([[a.packed is b.packed for b in stands] for a in stands])
    assert torch.equal(distances < 1e-3, same)
    del out


def test_changed_in_place_is_another_tensor():
    """Same storage, same place, another version: the codes of before must not be taken for it."""

    class InPlace(nn.Module):
        def forward(self, x):
            first = x * 2.0
            a = first.square()  # saves the first version
            with torch.no_grad():
                first.add_(torch.ones_like(first))
            return a.sum() + first.square().sum()  # saves the second

    x = torch.randn(64, 64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    layer = InPlace()
    with tqai.compress_activations(layer, layers=[layer]):
        layer(x).backward()
    wanted = 2 * 2 * (2 * x) + 2 * 2 * (2 * x + 1)
    assert (x.grad - wanted).norm() < 0.01 * wanted.norm()


def test_parameters_masks_small_and_whole_numbers_stay_exact(net):
    seen = []
    packing = tqai.compress_activations(net, layers=net.layers)
    original = packing._pack

    def watched(tensor):
        out = original(tensor)
        seen.append((tensor.data_ptr(), out is tensor))
        return out

    packing._pack = watched
    x, mask = batch()
    net(x, mask)
    exact = {address for address, kept in seen if kept}
    assert mask.data_ptr() in exact
    assert all(address in exact for address in (layer.up.weight.data_ptr() for layer in net.layers))
    assert any(not kept for _, kept in seen)
    packing.detach()


def test_values_that_codes_cannot_hold_stay_exact():
    layer = nn.Identity()
    with tqai.compress_activations(layer) as packing:
        packing._exact.append(set())
        for value in (torch.inf, torch.nan, -3e38):
            tensor = torch.randn(64, 64)
            tensor[3, 3] = value
            assert packing._pack(tensor) is tensor
        expanded = torch.randn(1, 64).expand(64, 64)
        assert packing._pack(expanded) is expanded
        assert packing._pack(torch.randn(64, 64)).shape == (64, 64)
        packing._exact.pop()


def test_autocast_copies_of_weights_stay_exact(net):
    """Their gradient for the layer below must not carry a rounding of the weights."""
    seen = []
    packing = tqai.compress_activations(net, layers=net.layers)
    original = packing._pack
    packing._pack = lambda tensor: seen.append((tuple(tensor.shape), original(tensor) is tensor)) or tensor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(*(part[:2] for part in batch()))  # 64 tokens: no activation has the shape of a weight
    weights = [kept for shape, kept in seen if shape == (128, 128)]
    assert weights and all(weights)
    packing.detach()


def test_an_error_inside_closes_what_was_opened(net):
    packing = tqai.compress_activations(net, layers=net.layers)
    with pytest.raises(RuntimeError):
        net(torch.randn(4, 32, 64), torch.ones(1))
    assert packing._open == packing._exact == []
    _, found = gradients(net, *batch())
    packing.detach()
    _, wanted = gradients(net, *batch())
    assert 0 < relative(found, wanted) < 0.01


def test_detached_graphs_can_still_be_walked_back(net):
    packing = tqai.compress_activations(net, layers=net.layers)
    out = net(*batch())
    packing.detach()
    packing.detach()
    out.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_attached_again_after_a_detach(net):
    packing = tqai.compress_activations(net, layers=net.layers)
    packing.attach()
    assert len(packing._handles) == 2 * len(net.layers)
    packing.detach()
    out = net(*batch())
    assert packing.saved_bytes == 0
    packing.attach()
    again = net(*batch())
    assert packing.saved_bytes > 0 and torch.equal(again, out)
    packing.detach()


@pytest.mark.parametrize("bits", [0, 9, -1, True, 4.0, None])
def test_bad_bits(net, bits):
    with pytest.raises(ConfigError, match="bits="):
        tqai.compress_activations(net, bits=bits)
