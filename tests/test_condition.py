"""Conditional models: each example has the numbers of a model built for its condition alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm.condition import ClassCondition, Condition, ImageCondition, VectorCondition
from ndm.elbo import BoundDraw
from ndm.errors import UserError
from ndm.evaluation.evaluate import Evaluation, evaluate_bound
from ndm.nn import MLP, DiT, FromDiffusers, UNet
from ndm.ode import OdeSettings
from ndm.random import standard_normal
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import GatedTransform, NetworkTransform, SeparableTransform, SumTransform
from oracles import (
    F64,
    GaussianProblem,
    LinearTransform,
    MixtureProblem,
    OwnNetwork,
    Points,
    gauss_times,
    randomized,
)

CLASSES = ClassCondition(3, dropout=0.2)
LABELS = torch.tensor([2, 0, 1, 1])


def mlp(seed: int, outputs: int | None = None, **condition: int) -> MLP:
    torch.manual_seed(seed)
    net = MLP(2, hidden=12, blocks=1, max_frequency=2.0, outputs=outputs, **condition)
    return randomized(net, 0.3, seed)


def model(
    transform: str = "gated",
    reverse: Any = "tied",
    steps: int | None = None,
    condition: Condition = CLASSES,
    seen_by: tuple[str, ...] = ("predictor", "transform"),
) -> ndm.NDM:
    """A random model in the plane whose networks take a condition."""
    argument = {condition.argument: condition.size}
    of_f = argument if "transform" in seen_by else {}
    of_x = argument if "predictor" in seen_by else {}
    forms = {
        "paper": lambda: NetworkTransform(mlp(3, **of_f)),
        "gated": lambda: GatedTransform(mlp(3, **of_f)),
        "separable": lambda: SeparableTransform(mlp(3, 3, **of_f)),
        "sum": lambda: SumTransform(
            [GatedTransform(mlp(3, **of_f)), NetworkTransform(mlp(5, **of_f))]
        ),
    }
    outputs = 2 if reverse == "direct-score" else None
    return ndm.NDM(
        LinearLogSNRSchedule(-5.0, 3.0),
        randomized(forms[transform](), 0.1),
        ndm.Predictor(mlp(4, outputs, **of_x)),
        ndm.GaussianDecoder(),
        steps=steps,
        reverse=reverse,
        condition=condition,
    ).double()


def data(count: int = 4) -> Tensor:
    return torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def row(draw: BoundDraw, index: int) -> BoundDraw:
    here = slice(index, index + 1)
    assert draw.weight is not None and draw.noise_0 is not None
    return BoundDraw(draw.u[here], draw.noise[here], None, draw.weight[here], draw.noise_0[here])


@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize(
    ("transform", "reverse"),
    [
        ("paper", "tied"),
        ("gated", "tied"),
        ("separable", "tied"),
        ("sum", "tied"),
        ("gated", "direct"),
        ("gated", "diffenc"),
    ],
)
def test_a_mixed_batch_has_the_bounds_of_single_examples(
    transform: str, reverse: str, steps: int | None
) -> None:
    ndm_, x = model(transform, reverse, steps), data()
    draw = ndm_.draw(x, torch.Generator().manual_seed(1))
    found = ndm_.given(LABELS).bound_at(x, draw).total
    single = [
        ndm_.given(int(label)).bound_at(x[i : i + 1], row(draw, i)).total
        for i, label in enumerate(LABELS)
    ]
    torch.testing.assert_close(found, torch.cat(single), rtol=1e-10, atol=1e-10)
    other = ndm_.given((LABELS + 1) % 3).bound_at(x, draw).total
    assert bool(((found - other).abs() > 1e-3).all()), "the condition changes nothing"


@pytest.mark.parametrize("probes", ["exact", 2])
def test_a_mixed_batch_has_the_likelihoods_of_single_examples(probes: Any) -> None:
    ndm_, x = model(), data()
    settings = OdeSettings("rk4", probes=probes, nodes=16)
    found = ndm_.given(LABELS).log_likelihood(x, samples=2, settings=settings).log_weights
    for i, label in enumerate(LABELS):
        alone = ndm_.given(int(label)).log_likelihood(
            x[i : i + 1], samples=2, settings=settings, examples=[i]
        )
        torch.testing.assert_close(found[i : i + 1], alone.log_weights, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["ancestral", "ddim", "sde", "ode"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_mixed_batch_has_the_samples_of_single_examples(method: str, guidance: float) -> None:
    ndm_ = model(seen_by=("predictor",))

    def sample(c: object, count: int) -> Tensor:
        return ndm_.given(c).sample((count, 2), method, steps=6, seed=0, guidance=guidance)

    found = sample(LABELS, 4)
    for label in range(3):
        same = sample(label, 4)
        mine = label == LABELS
        torch.testing.assert_close(found[mine], same[mine], rtol=0, atol=1e-9)


def test_samples_in_batches_keep_their_conditions() -> None:
    ndm_ = model()
    labels = torch.tensor([0, 1, 2, 0, 1])
    found = ndm_.given(labels).sample((5, 2), "ddim", steps=5, seed=3, batch_size=2)
    for label in range(3):
        same = ndm_.given(label).sample((5, 2), "ddim", steps=5, seed=3, batch_size=2)
        torch.testing.assert_close(found[labels == label], same[labels == label])


@pytest.mark.parametrize(
    ("condition", "c", "network"),
    [
        (VectorCondition(2), torch.tensor([[0.3, -1.0], [2.0, 0.0]]), mlp(1, condition_dims=2)),
        (ClassCondition(3), torch.tensor([2, 0]), mlp(1, classes=3)),
        (ClassCondition(3), [2, 0], UNet(1, 4, (1, 1), classes=3)),
        (VectorCondition(1), [[0.5], [1.0]], UNet(1, 4, (1, 1), condition_dims=1)),
        (ImageCondition(2), torch.rand(2, 2, 4, 4), UNet(1, 4, (1, 1), condition_channels=2)),
        (ClassCondition(3), [2, 0], DiT(1, 2, 8, 1, 2, classes=3)),
        (VectorCondition(1), [[0.5], [1.0]], DiT(1, 2, 8, 1, 2, condition_dims=1)),
        (ImageCondition(2), torch.rand(2, 2, 4, 4), DiT(1, 2, 8, 1, 2, condition_channels=2)),
    ],
)
def test_networks_see_the_condition_of_each_example(
    condition: Condition, c: Any, network: nn.Module
) -> None:
    network = randomized(network, 0.5).eval()
    predictor = ndm.Predictor(network).double()
    shape = (2, 2) if isinstance(network, MLP) else (2, 1, 4, 4)
    z = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    level = LinearLogSNRSchedule()(torch.tensor([0.5, 0.7], dtype=F64))
    found = predictor.bind(condition.encode(c))(z, level)
    for i in range(2):
        alone = predictor.bind(condition.encode(c[i : i + 1]))
        here = alone(z[i : i + 1], level.rows(slice(i, i + 1)))
        torch.testing.assert_close(found[i : i + 1], here)
    swapped = predictor.bind(condition.encode(c).flip(0))(z, level)
    assert bool((found - swapped).flatten(1).abs().amax(1).gt(1e-4).all())
    null = predictor.bind(condition.null())(z, level)
    mixed = condition.encode(c).clone()
    mixed[1:] = condition.null()
    half = predictor.bind(mixed)(z, level)
    torch.testing.assert_close(half, torch.cat([found[:1], null[1:]]))


def test_a_diffusers_network_takes_classes() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=4,
    )
    network = FromDiffusers(unet, condition="class_labels").eval()
    x, t, c = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 1])
    expected = unet(x, t * 1000, class_labels=c).sample
    torch.testing.assert_close(ndm.Predictor(network).bind(c).call(x, t), expected)
    assert not torch.equal(expected, unet(x, t * 1000, class_labels=c.flip(0)).sample)


class OfClass(nn.Module):
    """The exact E[x|z, c] of a mixture: that of its component c, or of all for the null."""

    def __init__(self, whole: MixtureProblem, components: list[GaussianProblem]):
        super().__init__()
        self.problems = [*components, whole]

    def forward(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        level = self.problems[0].process.schedule(t)
        each = torch.stack([problem(z, level) for problem in self.problems])
        return each[c, torch.arange(len(z))]


SCHEDULE = LinearLogSNRSchedule(-6.0, 14.0)
MEANS = torch.tensor([[0.4, -0.9], [-1.0, 0.5]], dtype=F64)
COVARIANCES = torch.tensor([[[2.0, 1.1], [1.1, 0.7]], [[0.5, -0.2], [-0.2, 0.9]]], dtype=F64)


def exact_parts(transform: LinearTransform) -> tuple[MixtureProblem, list[GaussianProblem]]:
    components = [
        GaussianProblem(SCHEDULE, transform, mean, covariance)
        for mean, covariance in zip(MEANS, COVARIANCES, strict=True)
    ]
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    return MixtureProblem(SCHEDULE, transform, weights, MEANS, COVARIANCES), components


def exact_model(transform: LinearTransform) -> ndm.NDM:
    whole, components = exact_parts(transform)
    predictor = ndm.Predictor(OfClass(whole, components), target="x")
    return ndm.NDM(
        SCHEDULE, transform, predictor, ndm.GaussianDecoder(), condition=ClassCondition(2)
    ).double()


@pytest.mark.parametrize("c", [0, 1])
def test_the_exact_predictor_given_a_class_has_its_bound(c: int) -> None:
    """E[NELBO(x|c)] = H(x|c) and the gaps of the class's Gaussian, all in closed form."""
    _, components = exact_parts(LinearTransform())
    problem, given = components[c], exact_model(LinearTransform()).given(c)
    x, noise, u, mean = problem.cubature(gauss_times(400))
    draw = BoundDraw(u, noise, None, torch.ones_like(u), noise)
    with torch.no_grad():
        found = mean(given.bound_at(x, draw).total).mean()
        gaps = problem.prior_gap() + problem.decoder_gap() + problem.path_gap(1.0)
        assert float(found) == pytest.approx(float(problem.entropy() + gaps), abs=1e-4)


def test_the_exact_predictor_has_the_density_of_each_class_and_of_all() -> None:
    """log p(x|c) is that of the class's Gaussian, and without c that of the mixture."""
    exact, x = exact_model(LinearTransform()), data(6)
    settings = OdeSettings(probes="exact", rtol=1e-9, atol=1e-9, nodes=64)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    level = exact.process.level(0.0, x)
    whole, components = exact_parts(LinearTransform())

    def log_p(given: ndm.NDM) -> Tensor:
        return given.log_likelihood(x, dequantization="none", settings=settings).log_p

    def density(problem: MixtureProblem) -> Tensor:
        mean, covariance = problem.latent(level)
        normal = torch.distributions.MultivariateNormal(mean, covariance)
        z = (level.alpha[:, None] * x)[:, None]
        scale = 2 * torch.log(level.alpha)
        return (torch.logsumexp(normal.log_prob(z) + problem.weights.log(), 1) + scale).detach()

    each = torch.stack([density(problem) for problem in components])[labels, torch.arange(6)]
    # The ODE starts from N(0, I) instead of q(z_1), which is nearly the same.
    torch.testing.assert_close(log_p(exact.given(labels)), each, rtol=0, atol=0.01)
    torch.testing.assert_close(log_p(exact), density(whole), rtol=0, atol=0.01)


SAMPLERS = [
    *[("ancestral", eta) for eta in (0.4, 1.0)],
    *[("sde", eta) for eta in (0.4, 1.0)],
    ("ddim", None),
    ("ode", None),
]


@pytest.mark.parametrize(("method", "eta"), SAMPLERS)
def test_a_mixed_batch_has_the_samples_of_the_models_of_each_class(
    method: str, eta: float | None
) -> None:
    """Every sampler and eta; without a condition, the samples are those of the mixture."""
    transform = LinearTransform()
    whole, components = exact_parts(transform)
    exact, labels = exact_model(transform), torch.tensor([0, 1, 1, 0, 1])

    def sample(of: ndm.NDM) -> Tensor:
        return of.sample((5, 2), method, steps=9, eta=eta, seed=2)

    found = sample(exact.given(labels))
    for c, problem in enumerate([*components, whole]):
        alone = sample(ndm.NDM(SCHEDULE, transform, problem, ndm.GaussianDecoder()))
        mine = labels == c
        if problem is whole:
            found, mine = sample(exact), torch.ones(5, dtype=torch.bool)
        torch.testing.assert_close(found[mine], alone[mine], rtol=1e-9, atol=1e-9)


def test_samples_given_a_class_have_its_moments() -> None:
    labels = torch.arange(40_000) % 2
    given = exact_model(LinearTransform()).given(labels)
    x = given.sample((len(labels), 2), "ode", steps=100, seed=0)
    for c in range(2):
        mine = x[labels == c]
        torch.testing.assert_close(mine.mean(0), MEANS[c], rtol=0, atol=0.05)
        torch.testing.assert_close(mine.T.cov(), COVARIANCES[c], rtol=0, atol=0.1)


def test_without_a_condition_the_model_is_that_of_the_null() -> None:
    ndm_, x = model(), data()
    draw = ndm_.draw(x, torch.Generator().manual_seed(1))
    found = ndm_.bound_at(x, draw).total
    torch.testing.assert_close(found, ndm_.given(None).bound_at(x, draw).total)
    null = ndm_.bind(torch.full((4,), 3))
    torch.testing.assert_close(found, null.bound_at(x, draw).total)


def test_training_drops_the_condition_as_often_as_it_says() -> None:
    labels = torch.arange(3).repeat(20_000)
    found = CLASSES.dropped(labels, torch.Generator().manual_seed(0))
    dropped = found == 3
    assert float(dropped.float().mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 60_000))
    assert torch.equal(found[~dropped], labels[~dropped])
    vectors = VectorCondition(2, dropout=0.5)
    encoded = vectors.encode(torch.ones(20_000, 2))
    half = vectors.dropped(encoded, torch.Generator().manual_seed(0))
    gone = half[:, 2] == 0
    assert bool((half[gone] == 0).all()) and torch.equal(half[~gone], encoded[~gone])
    assert float(gone.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(ClassCondition(3, dropout=0.0).dropped(labels), labels)


def test_a_conditional_model_is_saved_and_loaded(tmp_path: Any) -> None:
    ndm_, x = model("separable"), data()
    ndm_.save_pretrained(tmp_path)
    again = ndm.NDM.from_pretrained(tmp_path)
    draw = ndm_.draw(x, torch.Generator().manual_seed(1))
    for given, other in ((ndm_.given(LABELS), again.given(LABELS)), (ndm_, again)):
        torch.testing.assert_close(given.bound_at(x, draw).total, other.bound_at(x, draw).total)


def test_binding_shares_the_weights_and_leaves_the_model_alone() -> None:
    ndm_ = model()
    given = ndm_.given(1)
    assert {id(p) for p in given.parameters()} == {id(p) for p in ndm_.parameters()}
    assert given.c is not ndm_.c and given.predictor is not ndm_.predictor
    assert list(given.state_dict()) == list(ndm_.state_dict())


def test_conditions_of_another_number_than_the_samples_are_rejected() -> None:
    """Also if the last batch happens to hold one condition."""
    ndm_ = model()
    for labels, count in (([0, 1, 2, 0, 1, 2], 10), ([0] * 20, 10), ([0] * 9, 10)):
        for size in (None, 5):
            with pytest.raises(UserError, match=f"{len(labels)} examples, and {count}"):
                ndm_.given(labels).sample((count, 2), "ddim", steps=2, batch_size=size)


def test_a_copy_leaves_the_mode_of_the_model_alone() -> None:
    ndm_ = model()
    ndm_.train()
    given = ndm_.given(1)
    ndm_.eval()
    given.sample((2, 2), "ddim", steps=2)
    assert not any(module.training for module in ndm_.modules())


def test_evaluation_of_a_model_that_is_bound_measures_that_condition() -> None:
    labelled = Points(data(8))
    labelled.labels = torch.arange(8) % 3
    given = model().given(1)
    found = Evaluation(given, labelled, batch_size=3).nelbo(draws=2)
    assert found.name == "nelbo" and found.protocol.condition == "fixed"
    labelled.labels = torch.ones(8, dtype=torch.int64)
    expected = Evaluation(model(), labelled, batch_size=3).nelbo(draws=2)
    torch.testing.assert_close(found.values, expected.values)
    record = evaluate_bound(given, labelled, draws=2)
    assert record["condition"] == "fixed" and "nelbo_unconditional_bpd" not in record


def test_a_wrapped_network_takes_what_its_inner_network_takes() -> None:
    plain, taking = OwnNetwork(), mlp(1, classes=3)
    for wrap in (nn.DataParallel, lambda net: torch.compile(net, backend="eager")):
        assert not ndm.Predictor(wrap(plain)).conditional
        assert ndm.Predictor(wrap(taking)).conditional


def test_a_network_of_a_user_sees_the_null_of_images_in_their_size() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return torch.cat([x, c], 1)[:, :1] * self.scale

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    ndm_ = ndm.NDM(
        LinearLogSNRSchedule(),
        ndm.Identity(),
        ndm.Predictor(Joined()),
        ndm.GaussianDecoder(),
        condition=ImageCondition(2),
    )
    x, c = torch.rand(3, 1, 4, 6), torch.rand(3, 2, 4, 6)
    ndm_.bound(x)
    ndm_.sample((2, 1, 4, 6), steps=2)
    ndm_.given(c).sample((3, 1, 4, 6), steps=2, guidance=2.0)
    for wrong in (c[..., :3], c[..., :1]):
        with pytest.raises(UserError, match="images of the same size"):
            ndm_.given(wrong).bound(x)


def test_guidance_of_a_model_that_is_given_nothing_is_rejected() -> None:
    ndm_ = model(seen_by=("predictor",))
    with pytest.raises(UserError, match="guidance needs a condition"):
        ndm_.sample((2, 2), guidance=5.0)
    with pytest.raises(UserError, match="guide"):
        ndm_.sample((2, 2), guide="score")  # type: ignore[arg-type]


class Listening(nn.Module):
    """A network of a user that takes any number of conditions, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.heard = OwnNetwork(), ()

    def forward(self, z: Tensor, t: Tensor, *c: Tensor) -> Tensor:
        self.heard = c
        return self.inner(z, t)


def test_a_network_of_a_user_is_called_with_the_condition() -> None:
    network = Listening()
    parts = LinearLogSNRSchedule(), ndm.Identity(), ndm.Predictor(network), ndm.GaussianDecoder()
    ndm_ = ndm.NDM(*parts, condition=VectorCondition(2))
    ndm_.given(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).bound(torch.zeros(2, 2))
    (heard,) = network.heard
    assert heard.tolist() == [[1.0, 2.0, 1.0], [3.0, 4.0, 1.0]]
    ndm_.bound(torch.zeros(2, 2))
    assert network.heard[0].tolist() == [[0.0, 0.0, 0.0]] * 2
    ndm.NDM(*parts).bound(torch.zeros(2, 2))
    assert network.heard == ()


def test_conditions_that_do_not_fit_are_rejected_in_one_line() -> None:
    ndm_, plain = model(), mlp(1).float()
    parts = LinearLogSNRSchedule(), ndm.Identity()
    decoder, of_3 = ndm.GaussianDecoder(), ndm.Predictor(mlp(1, classes=3))
    always = ndm.NDM(*parts, of_3, decoder, condition=ClassCondition(3, dropout=0.0)).double()
    x = data()
    cases: list[tuple[str, Any]] = [
        ("3 is not one of the 3 classes", lambda: ndm_.given(3)),
        ("-1 is not one", lambda: ndm_.given([0, -1])),
        ("class indices", lambda: ndm_.given(torch.tensor([0.5]))),
        ("class indices", lambda: ndm_.given("cat")),
        ("class indices", lambda: ndm_.given(torch.zeros(2, 2, dtype=torch.int64))),
        ("3 examples, and the batch has 4", lambda: ndm_.given([0, 1, 2]).bound(x)),
        ("no p\\(x\\)", lambda: always.bound(x)),
        ("no p\\(x\\)", lambda: always.sample((2, 2))),
        ("no p\\(x\\)", lambda: always.log_likelihood(x)),
        ("no p\\(x\\)", lambda: always.given(None)),
        ("takes no condition", lambda: ndm.NDM(*parts, ndm.Predictor(plain), decoder).given(0)),
        (
            "none of its networks takes it",
            lambda: ndm.NDM(*parts, ndm.Predictor(plain), decoder, condition=CLASSES),
        ),
        ("takes a condition and the model has none", lambda: ndm.NDM(*parts, of_3, decoder)),
        (
            "classes=3, and the model's ClassCondition needs classes=4",
            lambda: ndm.NDM(*parts, of_3, decoder, condition=ClassCondition(4)),
        ),
        ("one condition", lambda: MLP(2, classes=3, condition_dims=1)),
        ("dropout=1", lambda: ClassCondition(3, dropout=1.0)),
        ("num_classes", lambda: ClassCondition(0)),
        ("not finite", lambda: VectorCondition(1).encode([[math.nan]])),
        ("give the numbers", lambda: VectorCondition(2).encode([[1.0]])),
        ("complex", lambda: VectorCondition(1).encode(torch.ones(1, 1) * 1j)),
        ("class indices", lambda: ndm_.given(torch.ones(1) * 1j)),
        ("give images", lambda: ImageCondition(2).encode(torch.zeros(1, 1, 4, 4))),
        ("no condition", lambda: plain(x.float(), x.float()[:, 0], torch.tensor([0]))),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_random_numbers_of_a_batch_do_not_depend_on_its_conditions() -> None:
    """The same seed gives the same start, so classes can be compared."""
    ndm_ = model()
    z = [standard_normal(torch.zeros(3, 2), torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*z)
    first = ndm_.given(0).sample((3, 2), "ddim", steps=2, seed=0)
    again = ndm_.given([0, 0, 0]).sample((3, 2), "ddim", steps=2, seed=0)
    torch.testing.assert_close(first, again, rtol=0, atol=1e-12)
