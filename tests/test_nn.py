"""Networks and layers: formulas, forward mode, memory formats, independence of examples."""

import math

import pytest
import torch
from torch import Tensor, nn

from ndm.autodiff.forward_mode import time_derivative
from ndm.errors import UserError
from ndm.nn import MLP, Attention, DiT, FourierFeatures, FromDiffusers, TimeEmbedding, UNet
from ndm.nn.fused import norm_silu
from ndm.nn.layers import ChannelNorm, LayerNorm, channel_norm, group_norm
from oracles import F64, randomized


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (16, 2), (12, 2), (7, 1), (11, 11), (24, 3)]
)
def test_group_norm_has_few_even_groups(channels: int, groups: int) -> None:
    norm, x = randomized(group_norm(channels), 0.5), 3 * seeded(4, channels, 5, 3) + 0.5
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, groups, norm.weight, norm.bias))


@pytest.mark.parametrize("powers", [(), (0,), (3, 5)])
def test_fourier_features_are_sines_and_cosines_of_doubled_angles(powers: tuple[int, ...]) -> None:
    features, x = FourierFeatures(powers), seeded(2, 3, 4)
    out = features(x)
    assert out.shape[1] == 3 * features.multiple() and torch.equal(out[:, :3], x)
    for place, power in enumerate(powers):
        sine, cosine = out[:, 3 + 6 * place : 6 + 6 * place], out[:, 6 + 6 * place : 9 + 6 * place]
        torch.testing.assert_close(
            torch.complex(cosine, sine), torch.exp(1j * math.pi * 2**power * x)
        )
    if powers:
        torch.testing.assert_close(features(x + 2.0)[:, 3:], out[:, 3:], rtol=0, atol=1e-9)


def test_time_embedding_has_the_stated_band_of_frequencies() -> None:
    embedding = TimeEmbedding(6, frequencies=5, max_frequency=16.0).double()
    torch.testing.assert_close(
        embedding.omega.double(), math.pi * 2.0 ** torch.arange(5, dtype=F64), rtol=1e-6, atol=0
    )
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    angle = t[:, None] * embedding.omega
    torch.testing.assert_close(
        embedding(t), embedding.net(torch.cat([torch.cos(angle), torch.sin(angle)], 1))
    )
    assert not torch.allclose(embedding(t)[0], embedding(t)[2])
    with pytest.raises(UserError, match="max_frequency"):
        TimeEmbedding(6, max_frequency=0.5)


@pytest.mark.parametrize(("channels", "heads"), [(8, 1), (64, 2)])
def test_attention_is_the_softmax_formula(channels: int, heads: int) -> None:
    layer = randomized(Attention(channels), 0.3)
    x = seeded(2, channels, 3, 2)
    normed = nn.functional.group_norm(x, channels // 8, layer.norm.weight, layer.norm.bias).flatten(
        2
    )
    weight, bias = layer.qkv.weight[..., 0, 0], layer.qkv.bias[:, None]
    q, k, v = (weight @ normed + bias).chunk(3, 1)
    size, mixed = channels // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        similarity = torch.einsum("bci,bcj->bij", q[:, part], k[:, part]) / math.sqrt(size)
        mixed.append(torch.einsum("bij,bcj->bci", similarity.softmax(-1), v[:, part]))
    out = layer.out.weight[..., 0, 0] @ torch.cat(mixed, 1) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), x + out.reshape(x.shape))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(layer(shuffled).flatten(2), layer(x).flatten(2)[..., order])


def unet(**options: object) -> UNet:
    torch.manual_seed(0)
    return randomized(UNet(2, 8, (1, 2), attention=(False, True), fourier=(0, 2), **options), 0.1)  # type: ignore[arg-type]


def dit(**options: object) -> DiT:
    torch.manual_seed(0)
    return randomized(DiT(2, 2, 8, 2, 2, fourier=(0,), **options), 0.2)  # type: ignore[arg-type]


NETWORKS = {
    "unet": (unet, (2, 7, 9)),
    "unet, channel norm": (lambda: unet(norm="channel"), (2, 7, 9)),
    "dit": (dit, (2, 4, 6)),
    "mlp": (lambda: randomized(MLP(6, 16, 2, fourier=(1,)), 0.1), (6,)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_each_example_depends_on_its_own_input_and_time_only(network: str) -> None:
    make, event = NETWORKS[network]
    net, x, t = (
        make(),
        seeded(4, *event).requires_grad_(),
        torch.rand(4, dtype=F64).requires_grad_(),
    )
    out = net(x, t)
    for index in range(4):
        of_x, of_t = torch.autograd.grad(out[index].square().sum(), (x, t), retain_graph=True)
        hit = of_x.flatten(1).abs().sum(1) > 0, of_t.abs() > 0
        assert all(flags.tolist() == [place == index for place in range(4)] for flags in hit)
        torch.testing.assert_close(
            net(x[index : index + 1], t[index : index + 1]), out[index : index + 1]
        )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (28, 28)])
def test_unet_reads_images_of_any_size_in_either_memory_format(size: tuple[int, int]) -> None:
    net, x, t = unet(), seeded(2, 2, *size), torch.tensor([0.2, 0.9], dtype=F64)
    out = net(x, t).detach()
    assert out.shape == x.shape
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last), t), out)
    torch.testing.assert_close(time_derivative(net, x, t)[0], out)
    corner = x.clone()
    corner[..., 0, 0] += 1
    changed = (net(corner, t) - out).detach().abs().amax((0, 1))
    assert float(changed[-1, -1]) > 0, "attention in the middle lets every pixel see every other"


def test_unet_keeps_its_memory_format_in_forward_mode() -> None:
    """Convolutions get channels_last; norms that gave another format would cost an eighth of the
    step and more.
    """
    net, x, t, seen = unet(), seeded(2, 2, 8, 8), torch.tensor([0.2, 0.9], dtype=F64), list[bool]()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(
                lambda _, inputs: seen.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    time_derivative(net, x, t)
    assert len(seen) > 10 and all(seen)


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_the_compiled_unet_is_the_same(norm: str) -> None:
    """In other memory formats within: attention by tokens, doubling by views, norms by formulas."""
    net, x, t = unet(norm=norm), seeded(2, 2, 7, 9), torch.tensor([0.2, 0.9], dtype=F64)
    torch.compiler.reset()
    found = torch.compile(net, backend="eager", fullgraph=True)(x, t)
    torch.testing.assert_close(found, net(x, t))


def test_unet_is_equivariant_to_the_batch_and_starts_at_zero_when_told() -> None:
    net, x, t = unet(), seeded(3, 2, 8, 8), torch.rand(3, dtype=F64)
    torch.testing.assert_close(net(x.flip(0), t.flip(0)), net(x, t).flip(0))
    net.zero_output()
    assert torch.equal(net(x, t), torch.zeros_like(x))
    mlp = MLP(4)
    mlp.zero_output()
    assert torch.equal(mlp(torch.randn(2, 4), torch.rand(2)), torch.zeros(2, 4))


def test_a_transformer_cuts_images_into_patches_and_puts_them_together_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As strided convolutions do; what is between treats patches alike but for their positions."""
    net, x, t = (
        DiT(2, 2, 8, 1, 2, outputs=3).double(),
        seeded(2, 2, 4, 6),
        torch.tensor([0.2, 0.9], dtype=F64),
    )
    monkeypatch.setattr(
        "ndm.nn.dit.positions",
        lambda rows, columns, features, like: like.new_zeros(rows * columns, features),
    )
    tokens = nn.functional.conv2d(
        x, net.first.weight.unflatten(1, (2, 2, 2)), net.first.bias, stride=2
    )
    normed = nn.functional.layer_norm(tokens.movedim(1, -1), (8,)).movedim(-1, 1)
    kernel = net.last.weight.unflatten(0, (6, 2, 2)).movedim(
        -1, 0
    )  # (width, outputs * channels, 2, 2)
    out = nn.functional.conv_transpose2d(normed, kernel, stride=2) + net.last.bias.reshape(
        6, 2, 2
    ).repeat(1, 2, 3)
    torch.testing.assert_close(net(x, t), out.unflatten(1, (3, 2)))
    net = dit()
    moved = torch.roll(x, (2, -2), (2, 3))  # by whole patches
    torch.testing.assert_close(net(moved, t), torch.roll(net(x, t), (2, -2), (2, 3)))
    monkeypatch.undo()
    assert not torch.allclose(net(moved, t), torch.roll(net(x, t), (2, -2), (2, 3)))


def test_the_transformer_starts_as_a_linear_map_of_each_patch_and_its_time_derivative_is_right() -> (
    None
):
    net, x, t = DiT(1, 2, 8, 2, 2).double(), seeded(2, 1, 4, 4), torch.tensor([0.2, 0.9], dtype=F64)
    torch.testing.assert_close(net(x, t), net(x, t.flip(0)))
    net = dit()
    x = seeded(2, 2, 4, 4)
    value, rate = time_derivative(net, x, t)
    torch.testing.assert_close(value, net(x, t))
    torch.testing.assert_close(
        rate, (net(x, t + 1e-6) - net(x, t - 1e-6)) / 2e-6, rtol=1e-5, atol=1e-6
    )
    net.zero_output()
    assert torch.equal(net(x, t), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_as_plain_formulas_are_those_of_pytorch(dtype: torch.dtype) -> None:
    """Nearly constant groups far from zero included, where a variance from squares would have no
    digits.
    """
    x = seeded(3, 8, 5, 3) * torch.tensor([1e-3, 1.0, 30.0], dtype=F64).reshape(3, 1, 1, 1) + 50
    norm = randomized(nn.GroupNorm(2, 8), 0.5)
    expected = norm(x)
    found = channel_norm(x.to(dtype), 2, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    rounding = (
        float(torch.finfo(dtype).eps) * 50 / 3e-3
    )  # of x over the smallest deviation, that of eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=20 * rounding)
    by_channel = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        ChannelNorm()(x.to(dtype)).double(),
        by_channel,
        rtol=10 * float(torch.finfo(dtype).eps),
        atol=0,
    )
    layer = randomized(LayerNorm(5), 0.5)
    with torch.no_grad():
        plain = layer(x.mT)
        torch.testing.assert_close(
            torch.compile(layer, backend="eager", fullgraph=True)(x.mT), plain
        )


def test_mlp_flattens_events() -> None:
    net, x, t = randomized(MLP(12, 16, 1), 0.1), seeded(3, 3, 2, 2), torch.rand(3, dtype=F64)
    torch.testing.assert_close(net(x, t), net(x.flatten(1), t).reshape(x.shape))


def test_dropout_is_off_in_evaluation() -> None:
    net = MLP(3, 16, 1, dropout=0.5)
    x, t = torch.randn(2, 3), torch.rand(2)
    assert not torch.equal(net.train()(x, t), net(x, t)) and torch.equal(
        net.eval()(x, t), net(x, t)
    )


def test_from_diffusers_runs_its_clock_to_a_thousand() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> object:
            return type("Record", (), {"sample": x + timestep[:, None]})

    assert FromDiffusers(Model())(torch.zeros(2, 1), torch.tensor([0.25, 1.0])).tolist() == [
        [250.0],
        [1000.0],
    ]
    assert FromDiffusers(Model(), 4.0)(torch.zeros(1, 1), torch.tensor([0.25])).tolist() == [[1.0]]


def test_wrong_shapes_and_arguments_are_refused_in_one_line() -> None:
    t = torch.rand(2)
    calls = [
        (lambda: UNet(3, 8)(torch.zeros(2, 1, 8, 8), t), r"\(B, 3, H, W\).*\(2, 1, 8, 8\)"),
        (lambda: UNet(3, 8)(torch.zeros(2, 3), t), "image_channels"),
        (lambda: MLP(3)(torch.zeros(2, 4), t), "3 dimensions.*set dims"),
        (lambda: UNet(0), "image_channels=0"),
        (lambda: UNet(1, 8, (1, 2), attention=(True,)), "as many attention flags"),
        (lambda: UNet(1, 8, ()), "multiples"),
        (lambda: DiT(3)(torch.zeros(2, 3, 7, 8), t), "multiples of 2.*patch"),
        (lambda: DiT(3, width=6), "width=6"),
        (lambda: UNet(3, norm="layer"), "norm='layer' is unknown: choose one of group, channel"),
        (lambda: MLP(0), "dims=0"),
        (lambda: MLP(3, dropout=1.0), "dropout=1"),
    ]
    for call, pattern in calls:
        with pytest.raises(UserError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("modulated", [False, True])
def test_norm_and_silu_in_one_are_those_in_turn(
    modulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndm.nn.fused.SMALLEST", 0)
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(2, 6).double()
    x = (
        torch.randn(3, 6, 5, 4, dtype=torch.float64, generator=generator)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    scale, shift = (
        torch.randn(3, 6, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    leaves = [x, *norm.parameters(), *((scale, shift) if modulated else ())]

    def fused(*_: torch.Tensor) -> torch.Tensor:
        return norm_silu(norm, x, *leaves[3:])

    inner = norm(x)
    plain = nn.functional.silu(
        inner * (1 + scale[..., None, None]) + shift[..., None, None] if modulated else inner
    )
    torch.testing.assert_close(fused(), plain)
    probe = torch.randn(plain.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad((probe * plain).sum(), leaves)
    for found, value in zip(
        torch.autograd.grad((probe * fused()).sum(), leaves), expected, strict=True
    ):
        torch.testing.assert_close(found, value)
    assert torch.autograd.gradgradcheck(fused, leaves)


@pytest.mark.parametrize("smallest", [0, 2**18], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_silu_of_half_precision_round_the_result_alone(
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
    expected = nn.functional.silu(
        normal * (1 + exact[1][..., None, None]) + exact[2][..., None, None]
    )
    with torch.autocast("cpu", dtype):
        found = norm_silu(norm, x, scale, shift)
    assert found.dtype == dtype and (smallest > 0 or found.grad_fn.name() == "_NormSiLUBackward")  # type: ignore[union-attr]
    eps = float(torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * eps, atol=1e-6)
    gradients = torch.autograd.grad((expected * probe.double()).sum(), exact)
    for leaf, value, gradient in zip(
        leaves, torch.autograd.grad((found * probe).float().sum(), leaves), gradients, strict=True
    ):
        assert value.dtype == leaf.dtype
        torch.testing.assert_close(
            value.double(), gradient, rtol=1.1 * eps, atol=eps * float(gradient.abs().max())
        )


@pytest.mark.parametrize("smallest", [0, 2**18], ids=["fused", "plain"])
@pytest.mark.parametrize("last", [False, True])
def test_norm_and_silu_learn_where_their_input_does_not(
    smallest: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndm.nn.fused.SMALLEST", smallest)
    norm, x = randomized(nn.GroupNorm(2, 8), 0.5), seeded(3, 8, 5, 4)
    x = x.to(memory_format=torch.channels_last) if last else x
    found = torch.autograd.grad((norm_silu(norm, x) * x.flip(0)).sum(), list(norm.parameters()))
    inner = nn.functional.group_norm(x.contiguous(), 2, norm.weight, norm.bias)
    for one, other in zip(
        found,
        torch.autograd.grad((nn.functional.silu(inner) * x.flip(0)).sum(), list(norm.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_held_in_half_precision_is_that_of_float32_but_for_rounding(
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
    torch.testing.assert_close(
        found.detach().float(), expected, rtol=0, atol=0.05 * float(expected.abs().max())
    )


def test_attention_of_half_precision_is_that_of_float32_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of matrices in half precision, the norm and the softmax in float32."""
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
    torch.testing.assert_close(
        found.detach().float(), expected, rtol=0, atol=0.02 * float(expected.abs().max())
    )
