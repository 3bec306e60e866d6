"""Autocast affects only networks: for the same prediction the bound equals the float32 bound."""

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm.device import Precision, autocast
from ndm.errors import UserError
from ndm.nn import MLP, UNet
from ndm.reverse import ReverseKind
from ndm.sample import Method
from ndm.transform import Transform
from ndm.variants.interpolation import InterpolationScale, InterpolationTransform
from ndm.variants.monotone import ConvexMap, MonotoneMap
from ndm.variants.transport import TransportNDM
from oracles import randomized

NUM_VALUES, SHAPE = 256, (4, 1, 8, 8)


class Exact(nn.Module):
    """A network whose output is exact in half precision: a matrix product with nothing to round."""

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.outputs, self.linear = outputs, nn.Linear(1, outputs or 1)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.linspace(0.25, 0.5, outputs or 1))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        out = self.linear(z.unsqueeze(-1)).movedim(-1, 1)
        return out if self.outputs else out[:, 0]


def transformations() -> dict[str, Transform]:
    """All kinds of F by name."""
    unet, several = UNet(1, 8, (1, 2)), UNet(1, 8, (1, 2), outputs=3)
    return {
        "identity": ndm.Identity(),
        "network": ndm.NetworkTransform(unet),
        "gated": ndm.GatedTransform(MLP(64, hidden=16)),
        "separable": ndm.SeparableTransform(several),
        "blur": ndm.Blur(sigma_max=3.0),
        "mask": ndm.FadingMask(),
        "down": ndm.Downsample(ends=[0.3, 0.6]),
        "separable_time": ndm.SeparableTransform(MLP(64, hidden=16, outputs=3), gate="time"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", transformations())
@pytest.mark.parametrize(
    ("reverse", "steps"),
    [("tied", None), ("tied", 1000), ("diffenc", None), ("direct", None), ("direct-score", 1000)],
)
def test_the_bound_under_autocast_equals_the_float32_bound(
    name: str, reverse: ReverseKind, steps: int | None
) -> None:
    torch.manual_seed(0)
    schedule = ndm.LinearLogSNRSchedule(-13.0, 5.0)
    predictor = ndm.Predictor(Exact(2 if reverse == "direct-score" else None))
    decoder = ndm.DiscretizedGaussian(NUM_VALUES)
    transform = randomized(transformations()[name]).float()  # far from the identity
    model = ndm.NDM(schedule, transform, predictor, decoder, steps=steps, reverse=reverse)
    x = decoder.values[torch.randint(NUM_VALUES, SHAPE)].float()

    def terms_and_gradients(half: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            bound = model.bound(x, draws=2, generator=torch.Generator().manual_seed(1))
            loss = bound.loss.mean()
        loss.backward()
        gradients = {
            key: value.grad
            for key, value in model.transform.named_parameters()
            if value.grad is not None
        }
        return {**bound.terms(), **gradients}

    expected, found = terms_and_gradients(False), terms_and_gradients(True)
    assert all(value.dtype == torch.float32 for value in found.values())
    for key, value in expected.items():
        atol = 1e-5 * float(value.detach().abs().max())
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("scale", [None, InterpolationScale], ids=["plain", "stretched"])
def test_the_transport_bound_under_autocast_equals_the_float32_bound(
    dims: int, scale: type[InterpolationScale] | None
) -> None:
    torch.manual_seed(0)
    schedule, transform = ndm.LinearLogSNRSchedule(-6.0, -5.0), InterpolationTransform()
    transport = MonotoneMap() if dims == 1 else ConvexMap(dims)
    noise_scale = None if scale is None else scale()
    model = TransportNDM(schedule, transform, transport, ndm.GaussianDecoder(), noise_scale)
    x = torch.randn(8, dims)

    def bound() -> Tensor:
        return model.bound(x, draws=2, generator=torch.Generator().manual_seed(1)).total

    expected = bound()
    with torch.autocast("cpu", torch.bfloat16):
        found = bound()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ancestral", "ddim", "sde", "ode"])
@pytest.mark.parametrize("name", ["identity", "network", "separable", "blur"])
def test_samples_under_autocast_equal_float32_samples(name: str, method: Method) -> None:
    torch.manual_seed(0)
    transform = randomized(transformations()[name]).float()
    schedule, decoder = ndm.LinearLogSNRSchedule(-13.0, 5.0), ndm.DiscretizedGaussian(NUM_VALUES)
    model = ndm.NDM(schedule, transform, ndm.Predictor(Exact()), decoder)

    def samples(precision: Precision) -> Tensor:
        with autocast(torch.device("cpu"), precision):
            return model.sample(SHAPE, method, steps=5, seed=0)

    full = samples("32-true")
    for precision in ("bf16-mixed", "16-mixed"):
        found = samples(precision)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)


def test_mixed_precision_runs_the_network_in_half_precision() -> None:
    """The network's rounding shows in the samples; an unknown precision is rejected."""
    torch.manual_seed(0)
    schedule, predictor = ndm.LinearLogSNRSchedule(-13.0, 5.0), ndm.Predictor(UNet(1, 8, (1, 2)))
    model = ndm.NDM(schedule, ndm.Identity(), predictor, ndm.GaussianDecoder())
    with torch.no_grad():
        for value in model.predictor.parameters():
            value.normal_(0, 0.1)
    full = model.sample(SHAPE, steps=3, seed=0)
    with autocast(torch.device("cpu"), "bf16-mixed"):
        half = model.sample(SHAPE, steps=3, seed=0)
    assert 1e-5 < (full - half).abs().mean() / full.abs().mean() < 0.1
    with pytest.raises(UserError, match="bf16-mixed"):
        autocast(torch.device("cpu"), "bf16")  # type: ignore[arg-type]
