"""A diffusers U-Net as predictor and as F, in discrete and in continuous time."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from ndm.decoder import GaussianDecoder
from ndm.errors import ForwardModeError
from ndm.model import NDM
from ndm.nn import FromDiffusers, UNet
from ndm.predictor import Predictor
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import GatedTransform, Identity, NetworkTransform, Transform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DModel

BLOCKS = {
    "plain": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    },
}


def network(kind: str, time_scale: float = 1000.0) -> FromDiffusers:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        **BLOCKS[kind],
    )
    return FromDiffusers(unet, time_scale)


def data(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(count, 1, 8, 8, generator=generator) + torch.linspace(-1, 1, 8)


def model(transform: Transform, predictor: nn.Module, steps: int | None) -> NDM:
    schedule = LinearLogSNRSchedule(-5.0, 3.0)
    return NDM(schedule, transform, Predictor(predictor), GaussianDecoder(), steps=steps)


def fixed_bound(ndm: NDM, x: Tensor) -> Tensor:
    return ndm.bound(x, draws=2, generator=torch.Generator().manual_seed(1)).total.mean()


def assert_learns(ndm: NDM, part: nn.Module, updates: int = 10) -> None:
    """Check that the bound is finite and falls, and that the part's parameters have gradients."""
    x = data()
    optimizer = torch.optim.Adam(ndm.parameters(), lr=2e-3)
    before = fixed_bound(ndm, x)
    assert bool(before.isfinite())
    for _ in range(updates):
        optimizer.zero_grad()
        fixed_bound(ndm, x).backward()
        optimizer.step()
    gradients = {name: p.grad for name, p in part.named_parameters()}
    missing = [name for name, g in gradients.items() if g is None]
    assert not missing
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    nonzero = sum(float(g.abs().max()) > 0 for g in gradients.values())
    assert nonzero > 0.9 * len(gradients)
    assert float(fixed_bound(ndm, x).detach()) < float(before.detach())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_diffusers_unet_trains_as_predictor(kind: str, steps: int | None) -> None:
    net = network(kind)
    ndm = model(Identity(), net, steps)
    assert_learns(ndm, net)
    assert bool(ndm.sample((2, 1, 8, 8), steps=3, seed=0).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_diffusers_unet_trains_as_f_in_discrete_time(kind: str) -> None:
    net = network(kind)
    assert_learns(model(NetworkTransform(net), UNet(1, 8, (1,)), 10), net)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_diffusers_unet_trains_as_f_in_continuous_time_or_names_the_fix(
    kind: str, channels_last: bool
) -> None:
    net = network(kind)
    ndm = model(GatedTransform(net), UNet(1, 8, (1,)), None)
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        assert_learns(ndm, net, 3)
    except ForwardModeError as error:
        assert "discrete time" in str(error) and "\n" not in str(error)
        assert_learns(model(GatedTransform(net), UNet(1, 8, (1,)), 10), net, 3)


def test_time_derivative_of_a_diffusers_unet_matches_central_differences() -> None:
    """With a small time scale: diffusers embeds time in float32, too coarse for differences at a
    thousand steps.
    """
    transform = NetworkTransform(network("plain", 10.0)).double()
    with torch.no_grad():
        assert transform.displacement.gain is not None
        transform.displacement.gain.fill_(0.7)
        x = data(3).double()
        t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
        schedule = LinearLogSNRSchedule(-5.0, 3.0)
        _, derivative = transform.with_derivative(x, schedule(t))
        expected = (transform(x, schedule(t + 1e-3)) - transform(x, schedule(t - 1e-3))) / 2e-3
    assert float((derivative - expected).abs().max()) < 1e-3 * float(expected.abs().max())
