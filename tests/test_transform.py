"""Laws of every transformation F(x, t) with every kind of network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ndm.autodiff.forward_mode import time_derivative
from ndm.errors import ForwardModeError, UserError
from ndm.forward import ForwardProcess
from ndm.nn import MLP, FromDiffusers, UNet
from ndm.schedule import CosineSchedule, FlowMatchingSchedule, LinearLogSNRSchedule
from ndm.transform import GatedTransform, Identity, NetworkTransform, Transform
from oracles import F64, SHEAR, LinearTransform, randomized


class Foreign(nn.Module):
    """A user's network with multiplicative time; its last layer does not start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * (1 + t[:, None])))


class Normed(nn.Module):
    """PyTorch's layer, RMS and group norms: their derivative in t needs the right gradient."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.norm(x * (1 + t[:, None] * torch.linspace(-1, 2, x.shape[1], dtype=x.dtype)))


class Record:
    def __init__(self, sample: Tensor):
        self.sample = sample


class DiffusersLike(nn.Module):
    """Like diffusers' models, it takes time steps up to 1000 and returns a record."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Record:
        return Record(self.conv(x) * torch.cos(timestep / 400)[:, None, None, None])


class UserAttention(nn.Module):
    """A user's network with fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.out = nn.Linear(1, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x + self.time(t[:, None])[:, None]
        return self.out(nn.functional.scaled_dot_product_attention(h, h, h))


def unet() -> UNet:
    return UNet(2, 8, (1, 2), attention=(False, True), fourier=(0,), max_frequency=2.0)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(3, 16, 2, fourier=(0,), max_frequency=2.0), (3,)),
    "mlp_image": (lambda: MLP(8, 16, 1, max_frequency=2.0), (2, 2, 2)),
    "unet_odd": (unet, (2, 9, 9)),
    "foreign": (Foreign, (3,)),
    "diffusers_like": (lambda: FromDiffusers(DiffusersLike()), (2, 5, 4)),
    "attention": (UserAttention, (4, 8)),
    "layer_norm": (lambda: Normed(nn.LayerNorm(6)), (6,)),
    "rms_norm": (lambda: Normed(nn.RMSNorm(6)), (6,)),
    "group_norm": (lambda: Normed(nn.GroupNorm(2, 6)), (6,)),
}
every_network = pytest.mark.parametrize("network", NETWORKS)
every_kind = pytest.mark.parametrize("kind", [NetworkTransform, GatedTransform])
SCHEDULE = CosineSchedule(-6.0, 4.0)


def build(
    kind: type[Transform], network: str, started: bool = True
) -> tuple[Transform, Tensor, Tensor]:
    """A float64 transformation, randomized if ``started``, with data and times."""
    torch.manual_seed(0)
    make, event = NETWORKS[network]
    transform = kind(make()).double()  # type: ignore[call-arg]
    if started:
        randomized(transform, 0.2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, *event, dtype=F64, generator=generator)
    if network == "unet_odd":
        x = x.to(memory_format=torch.channels_last)
    return transform, x, torch.tensor([0.07, 0.3, 0.62, 0.95], dtype=F64)


@pytest.mark.slow
@every_kind
@every_network
def test_new_transforms_are_exactly_the_identity(kind: type[Transform], network: str) -> None:
    transform, x, t = build(kind, network, started=False)
    value, derivative = transform.with_derivative(x, SCHEDULE(t))
    assert torch.equal(transform(x, SCHEDULE(t)), x) and torch.equal(value, x)
    assert torch.equal(derivative, torch.zeros_like(x))
    loss = (transform(x, SCHEDULE(t)) ** 2).sum()
    gradients = torch.autograd.grad(loss, list(transform.parameters()), allow_unused=True)
    nonzero = [g for g in gradients if g is not None and float(g.abs().max()) > 0]
    assert nonzero, "training must be able to leave the identity"


@every_network
def test_data_at_zero_tells_where_f_starts_at_the_data(network: str) -> None:
    transform, x, _ = build(NetworkTransform, network)
    zero, half = torch.zeros(4, dtype=F64), torch.full((4,), 0.5, dtype=F64)
    assert transform.data_at_zero and torch.equal(transform(x, SCHEDULE(zero)), x)
    assert float((transform(x, SCHEDULE(half)) - x).detach().abs().max()) > 0.01
    gated, x, _ = build(GatedTransform, network)
    assert not gated.data_at_zero and not torch.equal(gated(x, SCHEDULE(zero)), x)


@every_network
def test_gates_are_t_and_the_noise_variance(network: str) -> None:
    plain, x, t = build(NetworkTransform, network)
    gated, _, _ = build(GatedTransform, network)
    torch.manual_seed(0)
    level = SCHEDULE(t)
    shape = (-1, *[1] * (x.dim() - 1))
    by_time = (plain(x, level) - x) / t.reshape(shape)
    by_noise = (gated(x, level) - x) / torch.sigmoid(level.gamma).reshape(shape)
    torch.testing.assert_close(by_time, by_noise, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@every_kind
@every_network
@pytest.mark.parametrize("schedule", [SCHEDULE, FlowMatchingSchedule(0.01)], ids=["cosine", "flow"])
def test_derivative_matches_central_differences(
    kind: type[Transform], network: str, schedule: nn.Module
) -> None:
    transform, x, t = build(kind, network)
    with torch.no_grad():
        value, derivative = transform.with_derivative(x, schedule(t))
        expected = (transform(x, schedule(t + 1e-5)) - transform(x, schedule(t - 1e-5))) / 2e-5
        torch.testing.assert_close(value, transform(x, schedule(t)), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-7)
    assert float(derivative.abs().max()) > 0.05


@pytest.mark.slow
@every_kind
@every_network
def test_gradients_of_the_derivative_match_finite_differences(
    kind: type[Transform], network: str
) -> None:
    """In the parameters and x jointly, along one random direction."""
    transform, x, t = build(kind, network)
    x.requires_grad_()
    leaves = [x, *transform.parameters()]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(x.shape, dtype=F64, generator=generator)
    direction = [torch.randn(leaf.shape, dtype=F64, generator=generator) for leaf in leaves]

    def loss() -> Tensor:
        value, derivative = transform.with_derivative(x, SCHEDULE(t))
        return (weight * derivative * (1 + value)).sum()

    gradients = torch.autograd.grad(loss(), leaves, allow_unused=True)
    got = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    sides = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            for leaf, d in zip(leaves, direction, strict=True):
                leaf.add_(shift * d)
            sides.append(loss())
    torch.testing.assert_close(got, (sides[0] - sides[1]) / 2e-6, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [*NETWORKS, "identity"])
def test_at_both_equals_two_calls(transform: str) -> None:
    module, x, t = build(NetworkTransform, "mlp" if transform == "identity" else transform)
    module = Identity() if transform == "identity" else module
    at_s, at_t = module.at_both(x, SCHEDULE(t - 0.05), SCHEDULE(t))
    torch.testing.assert_close(at_s, module(x, SCHEDULE(t - 0.05)), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(at_t, module(x, SCHEDULE(t)), rtol=1e-9, atol=1e-11)


def test_identity_returns_its_input_with_a_zero_derivative() -> None:
    x = torch.randn(3, 2, 2)
    value, derivative = Identity().with_derivative(x, SCHEDULE(torch.rand(3)))
    assert torch.equal(value, x) and torch.equal(derivative, torch.zeros_like(x))
    assert Identity().data_at_zero


def test_time_derivative_of_a_known_function_is_exact() -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.exp(2 * t)[:, None] + t[:, None] ** 3

    x, t = torch.randn(5, 3, dtype=F64), torch.rand(5, dtype=F64)
    value, derivative = time_derivative(function, x, t)
    torch.testing.assert_close(value, function(x, t))
    torch.testing.assert_close(derivative, 2 * x * torch.exp(2 * t)[:, None] + 3 * t[:, None] ** 2)


class FastMultihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.time = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x + self.time(t[:, None])[:, None]
        return self.attention(h, h, h, need_weights=False)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Foreign()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return checkpoint(self.inner, x, t, use_reentrant=True)  # type: ignore[no-any-return]


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * torch.as_tensor(t.detach().numpy())[:, None]


@pytest.mark.parametrize(
    ("network", "x", "fix"),
    [
        (Checkpointed(), torch.randn(2, 3), "checkpoint"),
        (ThroughNumpy(), torch.randn(2, 3), "discrete time"),
    ],
    ids=["checkpoint", "numpy"],
)
def test_networks_without_forward_mode_are_named_with_the_fix(
    network: nn.Module, x: Tensor, fix: str
) -> None:
    transform = NetworkTransform(network)
    with torch.no_grad(), pytest.raises(ForwardModeError) as caught:
        transform.with_derivative(x, LinearLogSNRSchedule()(torch.tensor([0.2, 0.4])))
    text = str(caught.value)
    assert type(network).__name__ in text and fix in text and "\n" not in text


def test_the_fast_path_of_multihead_attention_is_avoided_or_named_with_the_fix() -> None:
    network = FastMultihead().eval().double()
    x = torch.randn(2, 4, 8, dtype=F64)
    t = torch.tensor([0.2, 0.4], dtype=F64)
    with torch.no_grad():
        expected = (network(x, t + 1e-6) - network(x, t - 1e-6)) / 2e-6
        try:
            _, derivative = time_derivative(network, x, t)
        except ForwardModeError as error:
            assert "scaled_dot_product_attention" in str(error) and "\n" not in str(error)
        else:
            torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-6)


def test_other_errors_of_a_network_are_raised_unchanged() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x @ torch.ones(7, 7)

    level = LinearLogSNRSchedule()(torch.rand(2))
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|shapes") as caught:
        NetworkTransform(Broken()).with_derivative(torch.zeros(2, 3), level)
    assert not isinstance(caught.value, UserError)


@pytest.mark.slow
@every_kind
def test_transforms_keep_float32_under_autocast(kind: type[Transform]) -> None:
    transform, x, t = build(kind, "unet_odd")
    transform, x, t = transform.float(), x.float(), t.float()
    with torch.no_grad():
        plain = transform.with_derivative(x, SCHEDULE(t))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = (*transform.with_derivative(x, SCHEDULE(t)), transform(x, SCHEDULE(t)))
    for got, expected in zip(mixed, (*plain, plain[0]), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_wrong_networks_are_rejected() -> None:
    with pytest.raises(UserError, match=r"nn.Module"):
        NetworkTransform(lambda x, t: x)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\(2, 3\) to \(2, 1\)"):

        class Narrow(nn.Module):
            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return x[:, :1]

        NetworkTransform(Narrow())(torch.zeros(2, 3), SCHEDULE(torch.rand(2)))


def test_the_oracle_obeys_the_same_laws() -> None:
    transform = LinearTransform(start=SHEAR)
    x, t = torch.randn(4, 2, dtype=F64), torch.rand(4, dtype=F64)
    _, derivative = transform.with_derivative(x, SCHEDULE(t))
    expected = (transform(x, SCHEDULE(t + 1e-5)) - transform(x, SCHEDULE(t - 1e-5))) / 2e-5
    torch.testing.assert_close(derivative, expected, rtol=1e-7, atol=1e-8)
    process = ForwardProcess(SCHEDULE, transform)
    assert process.level(0.3, x).t.tolist() == [0.3] * 4
