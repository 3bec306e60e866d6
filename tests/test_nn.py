"""Networks and layers: formulas, forward mode, memory formats, independence of examples."""

import math

import pytest
import torch
from torch import Tensor, nn

from ndm.autodiff.forward_mode import time_derivative
from ndm.errors import UserError
from ndm.nn import MLP, Attention, DiT, FourierFeatures, FromDiffusers, TimeEmbedding, UNet
from ndm.nn.layers import ChannelNorm, LayerNorm, channel_norm, group_norm
from oracles import F64, randomized


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (16, 2), (12, 2), (7, 1), (11, 11), (24, 3)]
)
def test_group_norm_has_few_equal_groups(channels: int, groups: int) -> None:
    norm, x = randomized(group_norm(channels), 0.5), 3 * seeded(4, channels, 5, 3) + 0.5
    expected = nn.functional.group_norm(x, groups, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("powers", [(), (0,), (3, 5)])
def test_fourier_features_are_sines_and_cosines_of_doubled_angles(powers: tuple[int, ...]) -> None:
    features, x = FourierFeatures(powers), seeded(2, 3, 4)
    out = features(x)
    assert out.shape[1] == 3 * features.multiple() and torch.equal(out[:, :3], x)
    for place, power in enumerate(powers):
        sine, cosine = out[:, 3 + 6 * place : 6 + 6 * place], out[:, 6 + 6 * place : 9 + 6 * place]
        expected = torch.exp(1j * math.pi * 2**power * x)
        torch.testing.assert_close(torch.complex(cosine, sine), expected)
    if powers:
        torch.testing.assert_close(features(x + 2.0)[:, 3:], out[:, 3:], rtol=0, atol=1e-9)


def test_time_embedding_has_the_stated_frequencies() -> None:
    embedding = TimeEmbedding(6, frequencies=5, max_frequency=16.0).double()
    omega = math.pi * 2.0 ** torch.arange(5, dtype=F64)
    torch.testing.assert_close(embedding.omega.double(), omega, rtol=1e-6, atol=0)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    angle = t[:, None] * embedding.omega
    waves = torch.cat([torch.cos(angle), torch.sin(angle)], 1)
    torch.testing.assert_close(embedding(t), embedding.net(waves))
    assert not torch.allclose(embedding(t)[0], embedding(t)[2])
    with pytest.raises(UserError, match="max_frequency"):
        TimeEmbedding(6, max_frequency=0.5)


@pytest.mark.parametrize(("channels", "heads"), [(8, 1), (64, 2)])
def test_attention_matches_the_softmax_formula(channels: int, heads: int) -> None:
    layer = randomized(Attention(channels), 0.3)
    x = seeded(2, channels, 3, 2)
    norm = layer.norm
    normed = nn.functional.group_norm(x, channels // 8, norm.weight, norm.bias).flatten(2)
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
def test_each_example_depends_only_on_its_own_input_and_time(network: str) -> None:
    make, event = NETWORKS[network]
    net = make()
    x = seeded(4, *event).requires_grad_()
    t = torch.rand(4, dtype=F64).requires_grad_()
    out = net(x, t)
    for index in range(4):
        of_x, of_t = torch.autograd.grad(out[index].square().sum(), (x, t), retain_graph=True)
        hit = of_x.flatten(1).abs().sum(1) > 0, of_t.abs() > 0
        assert all(flags.tolist() == [place == index for place in range(4)] for flags in hit)
        row = slice(index, index + 1)
        torch.testing.assert_close(net(x[row], t[row]), out[row])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (28, 28)])
def test_unet_accepts_images_of_any_size_and_memory_format(size: tuple[int, int]) -> None:
    net, x, t = unet(), seeded(2, 2, *size), torch.tensor([0.2, 0.9], dtype=F64)
    out = net(x, t).detach()
    assert out.shape == x.shape
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last), t), out)
    torch.testing.assert_close(time_derivative(net, x, t)[0], out)
    corner = x.clone()
    corner[..., 0, 0] += 1
    changed = (net(corner, t) - out).detach().abs().amax((0, 1))
    assert float(changed[-1, -1]) > 0, "attention must connect all pixels"


def test_unet_keeps_its_memory_format_in_forward_mode() -> None:
    """Convolutions get channels_last inputs; with other norms a step takes an eighth longer."""
    net, x, t = unet(), seeded(2, 2, 8, 8), torch.tensor([0.2, 0.9], dtype=F64)
    seen: list[bool] = []

    def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(record)
    time_derivative(net, x, t)
    assert len(seen) > 10 and all(seen)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "channel"])
def test_the_compiled_unet_gives_the_same_output(norm: str) -> None:
    """Compiled, it uses attention by tokens, upsampling by views and norms by formulas."""
    net, x, t = unet(norm=norm), seeded(2, 2, 7, 9), torch.tensor([0.2, 0.9], dtype=F64)
    torch.compiler.reset()
    found = torch.compile(net, backend="eager", fullgraph=True)(x, t)
    torch.testing.assert_close(found, net(x, t))


def test_unet_is_equivariant_to_batch_order_and_zero_output_gives_zeros() -> None:
    net, x, t = unet(), seeded(3, 2, 8, 8), torch.rand(3, dtype=F64)
    torch.testing.assert_close(net(x.flip(0), t.flip(0)), net(x, t).flip(0))
    net.zero_output()
    assert torch.equal(net(x, t), torch.zeros_like(x))
    mlp = MLP(4)
    mlp.zero_output()
    assert torch.equal(mlp(torch.randn(2, 4), torch.rand(2)), torch.zeros(2, 4))


def test_dit_splits_images_into_patches_and_reassembles_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As strided convolutions do. Between them only the position embeddings tell patches apart."""
    net = DiT(2, 2, 8, 1, 2, outputs=3).double()
    x = seeded(2, 2, 4, 6)
    t = torch.tensor([0.2, 0.9], dtype=F64)
    monkeypatch.setattr(
        "ndm.nn.dit.positions",
        lambda rows, columns, features, like: like.new_zeros(rows * columns, features),
    )
    kernel = net.first.weight.unflatten(1, (2, 2, 2))
    tokens = nn.functional.conv2d(x, kernel, net.first.bias, stride=2)
    normed = nn.functional.layer_norm(tokens.movedim(1, -1), (8,)).movedim(-1, 1)
    # (width, outputs * channels, 2, 2)
    kernel = net.last.weight.unflatten(0, (6, 2, 2)).movedim(-1, 0)
    out = nn.functional.conv_transpose2d(normed, kernel, stride=2)
    out = out + net.last.bias.reshape(6, 2, 2).repeat(1, 2, 3)
    torch.testing.assert_close(net(x, t), out.unflatten(1, (3, 2)))
    net = dit()
    moved = torch.roll(x, (2, -2), (2, 3))  # by whole patches
    torch.testing.assert_close(net(moved, t), torch.roll(net(x, t), (2, -2), (2, 3)))
    monkeypatch.undo()
    assert not torch.allclose(net(moved, t), torch.roll(net(x, t), (2, -2), (2, 3)))


def test_dit_starts_independent_of_time_and_has_the_right_time_derivative() -> None:
    net, x, t = DiT(1, 2, 8, 2, 2).double(), seeded(2, 1, 4, 4), torch.tensor([0.2, 0.9], dtype=F64)
    torch.testing.assert_close(net(x, t), net(x, t.flip(0)))
    net = dit()
    x = seeded(2, 2, 4, 4)
    value, rate = time_derivative(net, x, t)
    torch.testing.assert_close(value, net(x, t))
    difference = (net(x, t + 1e-6) - net(x, t - 1e-6)) / 2e-6
    torch.testing.assert_close(rate, difference, rtol=1e-5, atol=1e-6)
    net.zero_output()
    assert torch.equal(net(x, t), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_as_plain_formulas_match_pytorch(dtype: torch.dtype) -> None:
    """Also for nearly constant groups far from zero, where a variance from squares would cancel."""
    x = seeded(3, 8, 5, 3) * torch.tensor([1e-3, 1.0, 30.0], dtype=F64).reshape(3, 1, 1, 1) + 50
    norm = randomized(nn.GroupNorm(2, 8), 0.5)
    expected = norm(x)
    found = channel_norm(x.to(dtype), 2, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    eps = float(torch.finfo(dtype).eps)
    rounding = eps * 50 / 3e-3  # of x, over the smallest deviation, the square root of norm.eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=20 * rounding)
    by_channel = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    found = ChannelNorm()(x.to(dtype)).double()
    torch.testing.assert_close(found, by_channel, rtol=10 * eps, atol=0)
    layer = randomized(LayerNorm(5), 0.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.mT), layer(x.mT))


def test_mlp_flattens_events() -> None:
    net, x, t = randomized(MLP(12, 16, 1), 0.1), seeded(3, 3, 2, 2), torch.rand(3, dtype=F64)
    torch.testing.assert_close(net(x, t), net(x.flatten(1), t).reshape(x.shape))


def test_dropout_is_off_in_eval_mode() -> None:
    net = MLP(3, 16, 1, dropout=0.5)
    x, t = torch.randn(2, 3), torch.rand(2)
    assert not torch.equal(net.train()(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))


def test_from_diffusers_scales_time_to_a_thousand() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> object:
            return type("Record", (), {"sample": x + timestep[:, None]})

    found = FromDiffusers(Model())(torch.zeros(2, 1), torch.tensor([0.25, 1.0]))
    assert found.tolist() == [[250.0], [1000.0]]
    found = FromDiffusers(Model(), 4.0)(torch.zeros(1, 1), torch.tensor([0.25]))
    assert found.tolist() == [[1.0]]


def test_wrong_shapes_and_arguments_are_rejected_in_one_line() -> None:
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
