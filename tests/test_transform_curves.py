"""Laws of transformations that evaluate x once, in a curve: separable, operators, encoders."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ndm.decoder import GaussianDecoder
from ndm.errors import UserError
from ndm.linear_transform import AffineTransform, Blur, Downsample, FadingMask
from ndm.model import NDM
from ndm.nn import MLP, ConvEncoder, Dense, UNet
from ndm.predictor import Predictor
from ndm.schedule import CosineSchedule, FlowMatchingSchedule, LinearLogSNRSchedule
from ndm.transform import Encoder, GatedTransform, SeparableTransform, SumTransform, Transform
from oracles import F64, randomized

SCHEDULE = CosineSchedule(-6.0, 4.0)


class ForeignChannels(nn.Module):
    """A user's network with four outputs that ignores t."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.last(x)).reshape(-1, 4, 3)


SEPARABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(3, 16, 1, outputs=5), (3,)),
    "mlp_image": (lambda: MLP(8, 16, 1, outputs=2), (2, 2, 2)),
    "unet": (lambda: UNet(2, 8, (1, 2), outputs=4), (2, 9, 9)),
    "foreign": (ForeignChannels, (3,)),
}


class Counting(nn.Module):
    """A network that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, t)


def separable(
    network: str, gate: str, started: bool = True
) -> tuple[SeparableTransform, Tensor, Tensor]:
    torch.manual_seed(0)
    make, event = SEPARABLE[network]
    transform = SeparableTransform(make(), gate).double()  # type: ignore[arg-type]
    if started:
        randomized(transform, 0.2)
    x = torch.randn(4, *event, dtype=F64, generator=torch.Generator().manual_seed(1))
    return transform, x, torch.tensor([0.07, 0.3, 0.62, 0.95], dtype=F64)


@pytest.mark.parametrize("gate", ["noise", "time"])
@pytest.mark.parametrize("network", SEPARABLE)
@pytest.mark.parametrize(
    "schedule", [SCHEDULE, FlowMatchingSchedule(0.05, 0.1)], ids=["cosine", "flow"]
)
def test_separable_transforms_obey_the_laws(
    network: str, gate: str, schedule: CosineSchedule | FlowMatchingSchedule
) -> None:
    transform, x, t = separable(network, gate)
    value, derivative = transform.with_derivative(x, schedule(t))
    step = 1e-5
    with torch.no_grad():
        after, before = (transform(x, schedule(t + sign * step)) for sign in (1, -1))
    torch.testing.assert_close(derivative, (after - before) / (2 * step), rtol=1e-6, atol=1e-7)
    assert float(derivative.detach().abs().min(0).values.max()) > 0.01
    both = transform.at_both(x, schedule(t / 2), schedule(t))
    torch.testing.assert_close(both[1], value)
    torch.testing.assert_close(both[0], transform(x, schedule(t / 2)))
    channels = transform.displacement.channels(x)
    weights = schedule(t).sigma ** 2 if gate == "noise" else t
    sizes = [1] * (x.dim() - 1)
    expected = x  # by the definition, term by term
    for k in range(channels.shape[1]):
        gain = (weights * torch.cos(math.pi * k * t)).reshape(-1, *sizes)
        expected = expected + gain * channels[:, k]
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(
        (derivative**2).sum(), list(transform.parameters()), allow_unused=True
    )
    assert any(g is not None and float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("gate", ["noise", "time"])
@pytest.mark.parametrize("network", SEPARABLE)
def test_separable_transforms_start_at_the_identity_and_data_at_zero_is_right(
    network: str, gate: str
) -> None:
    transform, x, t = separable(network, gate, started=False)
    value, derivative = transform.with_derivative(x, SCHEDULE(t))
    assert torch.equal(value, x)
    assert torch.equal(derivative, torch.zeros_like(x))
    randomized(transform, 0.2)
    at_zero = transform(x, SCHEDULE(torch.zeros(4, dtype=F64)))
    assert transform.data_at_zero == (gate == "time")
    assert torch.equal(at_zero, x) == transform.data_at_zero


@pytest.mark.parametrize("steps", [None, 7])
def test_the_bound_evaluates_the_separable_network_once_for_x_and_once_for_the_prediction(
    steps: int | None,
) -> None:
    counting = Counting(MLP(3, 8, 1, outputs=4))
    schedule, transform = LinearLogSNRSchedule(-5.0, 4.0), SeparableTransform(counting)
    predictor = Predictor(MLP(3, 8, 1))
    model = NDM(schedule, transform, predictor, GaussianDecoder(), steps=steps)
    model.bound(torch.randn(5, 3))
    assert counting.calls == 2
    model.bound(torch.randn(5, 3), draws=4)
    assert counting.calls == 2 + 1 + 4


def test_invalid_separable_transforms_are_rejected() -> None:
    with pytest.raises(UserError, match="outputs=K"):
        SeparableTransform(MLP(3, 8, 1))(torch.randn(2, 3), SCHEDULE(torch.rand(2)))
    with pytest.raises(UserError, match="gate"):
        SeparableTransform(MLP(3, 8, 1, outputs=2), "maybe")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="outputs=0"):
        MLP(3, 8, 1, outputs=0)


def moved(transform: Transform) -> Transform:
    """Move a transform away from the identity, at which it starts."""
    randomized(transform, 0.3)
    return transform.float()


OTHERS: dict[str, tuple[Callable[[], Transform], tuple[int, ...]]] = {
    "blur": (lambda: Blur(2.0, 0.01), (2, 5, 8)),
    "blur_plane": (lambda: Blur(3.0, 0.0), (6, 3)),
    "mask": (lambda: FadingMask(4.0, 0.5), (2, 5, 8)),
    "downsample": (lambda: Downsample((0.25, 0.6, 1.0)), (1, 8, 16)),
    "affine": (lambda: moved(AffineTransform((3, 4))), (3, 4)),
    "affine_cosines": (lambda: moved(AffineTransform((3, 4, 6), "cosines", 2)), (3, 4, 6)),
    "sum": (
        lambda: SumTransform([Blur(2.0), moved(AffineTransform((2, 5, 8), "cosines"))]),
        (2, 5, 8),
    ),
    "sum_network": (
        lambda: moved(SumTransform([GatedTransform(MLP(3, 8, 1)), AffineTransform((3,))])),
        (3,),
    ),
    "encoder": (lambda: Encoder(Dense([3], [2], 8)), (3,)),
    "encoder_image": (lambda: Encoder(ConvEncoder(2, 3, 4, 1)), (2, 4, 6)),
}


NONLINEAR = ("encoder", "encoder_image", "sum_network")


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, FlowMatchingSchedule(0.05, 0.1)], ids=["cosine", "flow"]
)
@pytest.mark.parametrize("name", OTHERS)
def test_fixed_operators_and_encoders_obey_the_laws(
    name: str, schedule: CosineSchedule | FlowMatchingSchedule
) -> None:
    torch.manual_seed(0)
    make, event = OTHERS[name]
    transform, x = make().double(), torch.randn(4, *event, dtype=F64)
    t, zero = torch.tensor([0.07, 0.3, 0.62, 0.95], dtype=F64), torch.zeros(4, dtype=F64)
    with torch.no_grad():
        value, derivative = transform.with_derivative(x, schedule(t))
        expected = (transform(x, schedule(t + 1e-5)) - transform(x, schedule(t - 1e-5))) / 2e-5
        torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-7)
        assert transform.constant == bool((derivative == 0).all())
        torch.testing.assert_close(value, transform(x, schedule(t)))
        at_s, at_t = transform.at_both(x, schedule(t / 2), schedule(t))
        torch.testing.assert_close(at_s, transform(x, schedule(t / 2)))
        torch.testing.assert_close(at_t, value)
        curve, zeros = transform.curve(x), torch.full_like(x, math.nan)
        torch.testing.assert_close(curve.at(schedule(t)), value)
        torch.testing.assert_close(curve.with_derivative(schedule(t)), (value, derivative))
        torch.testing.assert_close(curve.at_both(schedule(t / 2), schedule(t)), (at_s, at_t))
        assert transform.data_at_zero == bool(transform(x, schedule(zero)).equal(x))
        assert transform.latent_shape(zeros) == value.shape == curve.like.shape
        assert transform.keeps_shape == (value.shape == x.shape)
        same = schedule(t[:1].expand(4))
        combined = transform(x + 2 * x.flip(0), same)
        parts = transform(x, same) + 2 * transform(x.flip(0), same)
        parts = parts - 2 * transform(torch.zeros_like(x), same)  # the offset counts once
        assert name in NONLINEAR or combined.allclose(parts), "affine"


def test_an_encoder_runs_once_per_curve_and_invalid_networks_are_rejected() -> None:
    class Once(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    network = Once(3, 2)
    curve = Encoder(network).curve(torch.randn(5, 3))
    for level in (SCHEDULE(torch.rand(5)), SCHEDULE(torch.rand(5))):
        curve.at(level), curve.with_derivative(level), curve.at_both(level, level)
    assert network.calls == 1
    with pytest.raises(UserError, match=r"nn.Module"):
        Encoder(lambda x: x)  # type: ignore[arg-type]
    flat = Encoder(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 12))))
    with pytest.raises(UserError, match=r"\(4, 3\) to \(1, 12\)"):
        flat(torch.randn(4, 3), SCHEDULE(torch.rand(4)))


@pytest.mark.parametrize("name", [*OTHERS, "separable"])
def test_curves_keep_float32_under_autocast(name: str) -> None:
    if name == "separable":
        transform, x, t = separable("unet", "noise")
        transform, x, level = transform.float(), x.float(), SCHEDULE(t.float())
    else:
        transform = OTHERS[name][0]()
        x = torch.randn(4, *OTHERS[name][1])
        level = SCHEDULE(torch.rand(4))
    with torch.no_grad():
        plain = transform.with_derivative(x, level)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = (*transform.with_derivative(x, level), transform(x, level))
    for got, expected in zip(mixed, (*plain, plain[0]), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
