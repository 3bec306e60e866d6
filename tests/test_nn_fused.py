"""The fused norm and SiLU, and layers in half precision."""

import pytest
import torch
from torch import nn

from ndm.nn import Attention, UNet
from ndm.nn.fused import norm_silu
from oracles import F64, randomized
from test_nn import seeded


@pytest.mark.slow
@pytest.mark.parametrize("modulated", [False, True])
def test_norm_silu_matches_norm_then_silu(modulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndm.nn.fused.SMALLEST", 0)
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(2, 6).double()
    x = torch.randn(3, 6, 5, 4, dtype=F64, generator=generator)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    scale, shift = (
        torch.randn(3, 6, dtype=F64, generator=generator).requires_grad_() for _ in range(2)
    )
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    leaves = [x, *norm.parameters(), *((scale, shift) if modulated else ())]

    def fused(*_: torch.Tensor) -> torch.Tensor:
        return norm_silu(norm, x, *leaves[3:])

    inner = norm(x)
    if modulated:
        inner = inner * (1 + scale[..., None, None]) + shift[..., None, None]
    plain = nn.functional.silu(inner)
    torch.testing.assert_close(fused(), plain)
    probe = torch.randn(plain.shape, dtype=F64, generator=generator)
    expected = torch.autograd.grad((probe * plain).sum(), leaves)
    found = torch.autograd.grad((probe * fused()).sum(), leaves)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(fused, leaves)


@pytest.mark.parametrize("smallest", [0, 2**18], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_silu_in_half_precision_rounds_only_the_result(
    smallest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndm.nn.fused.SMALLEST", smallest)
    norm, generator = randomized(nn.GroupNorm(2, 8), 0.5).float(), torch.Generator().manual_seed(0)
    x = (3 * torch.randn(3, 8, 5, 4, generator=generator) + 4).to(memory_format=torch.channels_last)
    x = x.to(dtype).requires_grad_()
    scale, shift = (
        torch.randn(3, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2)
    )
    probe = torch.randn(x.shape, generator=generator).to(dtype)
    leaves = [x, scale, shift, *norm.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    normal = nn.functional.group_norm(exact[0], 2, exact[3], exact[4])
    modulated = normal * (1 + exact[1][..., None, None]) + exact[2][..., None, None]
    expected = nn.functional.silu(modulated)
    with torch.autocast("cpu", dtype):
        found = norm_silu(norm, x, scale, shift)
    assert found.dtype == dtype and (smallest > 0 or found.grad_fn.name() == "_NormSiLUBackward")  # type: ignore[union-attr]
    eps = float(torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * eps, atol=1e-6)
    exact_grads = torch.autograd.grad((expected * probe.double()).sum(), exact)
    grads = torch.autograd.grad((found * probe).float().sum(), leaves)
    for leaf, grad, exact_grad in zip(leaves, grads, exact_grads, strict=True):
        assert grad.dtype == leaf.dtype
        atol = eps * float(exact_grad.abs().max())
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1.1 * eps, atol=atol)


@pytest.mark.parametrize("smallest", [0, 2**18], ids=["fused", "plain"])
@pytest.mark.parametrize("last", [False, True])
def test_norm_silu_has_parameter_gradients_for_inputs_without_gradients(
    smallest: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndm.nn.fused.SMALLEST", smallest)
    norm, x = randomized(nn.GroupNorm(2, 8), 0.5), seeded(3, 8, 5, 4)
    x = x.to(memory_format=torch.channels_last) if last else x
    parameters = list(norm.parameters())
    found = torch.autograd.grad((norm_silu(norm, x) * x.flip(0)).sum(), parameters)
    inner = nn.functional.group_norm(x.contiguous(), 2, norm.weight, norm.bias)
    plain = nn.functional.silu(inner)
    expected = torch.autograd.grad((plain * x.flip(0)).sum(), parameters)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_matches_float32_up_to_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndm.nn.fused.SMALLEST", 0)
    torch.manual_seed(0)
    network = randomized(UNet(1, 8, (1, 2), attention=True), 0.1).to(dtype)
    x, t = seeded(2, 1, 8, 8).to(dtype), torch.tensor([0.25, 0.5], dtype=dtype)
    found = network(x, t)
    found.float().sum().backward()
    expected = network.float()(x.float(), t.float()).detach()
    assert found.dtype == dtype
    atol = 0.05 * float(expected.abs().max())
    torch.testing.assert_close(found.detach().float(), expected, rtol=0, atol=atol)


def test_half_precision_attention_matches_float32_up_to_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Matrix products run in half precision, the norm and the softmax in float32."""
    seen = []
    attend = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *qkv: (seen.extend(part.dtype for part in qkv), attend(*qkv))[1],
    )
    layer, x = randomized(Attention(32), 0.3).float(), seeded(2, 32, 4, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
    expected = layer(x).detach()
    assert found.dtype == torch.bfloat16 and seen == 6 * [torch.float32]
    atol = 0.02 * float(expected.abs().max())
    torch.testing.assert_close(found.detach().float(), expected, rtol=0, atol=atol)
