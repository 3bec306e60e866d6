"""A direct model sampled by diffusers, on a Gaussian problem with exact target and marginals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.export import to_diffusers
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.reverse import ReverseKind
from ndm.sample import Ancestral
from ndm.schedule import FlowMatchingSchedule, LinearLogSNRSchedule, NoiseLevel, Schedule
from ndm.transform import GatedTransform, Identity
from oracles import F64, GaussianProblem, LinearTransform, randomized
from test_condition import LABELS
from test_condition import model as random_conditional
from test_reverse import ExactTarget

diffusers = pytest.importorskip("diffusers")


class GatedLinear(LinearTransform):
    """F(x, t) = x + sigma_t² (M x + c)."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def matrix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().matrix(self.schedule(t).sigma ** 2)

    def rate(self, level: NoiseLevel) -> Tensor:
        return 2 * level.sigma * level.dsigma


def exact_model(problem: GaussianProblem) -> NDM:
    schedule, target = problem.process.schedule, ExactTarget(problem, 1.0)
    return NDM(schedule, problem.linear, target, GaussianDecoder(), reverse="direct")  # type: ignore[arg-type]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("DDPMScheduler", {}, 500),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 100),
    ],
)
def test_diffusers_samples_the_data_of_a_transformed_process(
    name: str, options: dict[str, str], steps: int
) -> None:
    """F rotates and shears in time, so plain diffusion with E[x|z] as target misses the data."""
    schedule = LinearLogSNRSchedule(-7.0, 9.0)
    problem = GaussianProblem(schedule, GatedLinear(schedule))
    model, kind = exact_model(problem), getattr(diffusers, name)
    network, scheduler = to_diffusers(model, kind, 1000, **options)
    assert scheduler.config.prediction_type == "sample"

    def draw(predict: object) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)
        z = torch.randn(20_000, 2, dtype=F64, generator=generator)
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                output = predict(z, timestep)  # type: ignore[operator]
                z = scheduler.step(output, timestep, z, generator=generator).prev_sample
        return z

    mean, covariance = moments(draw(lambda z, t: network(z, t).sample))
    spread = problem.covariance().diagonal().sqrt()
    scale = torch.outer(spread, spread)
    assert bool(((mean - problem.mean()).abs() < 0.04 * spread).all())
    assert bool(((covariance - problem.covariance()).abs() < 0.06 * scale).all())

    def data_prediction(z: Tensor, timestep: Tensor) -> Tensor:
        return problem(z, problem.process.level(timestep / 999, z))

    _, wrong = moments(draw(data_prediction))
    error = (wrong - problem.covariance()).abs()
    assert bool((error > 0.1 * scale).any()), "the test must distinguish y from x"


def test_a_step_of_ddpm_is_our_ancestral_step() -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-5.0, 4.0), LinearTransform())
    model = exact_model(problem)
    network, scheduler = to_diffusers(model, diffusers.DDPMScheduler, 100)
    z = torch.randn(64, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for index in (99, 60, 5, 1):
        output, generator = network(z, index).sample, torch.Generator().manual_seed(1)
        found = scheduler.step(output, index, z, generator=generator).prev_sample
        noise = torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        t, s = (model.process.level(i / 99, z) for i in (index, index - 1))
        expected = Ancestral(1.0)(model.reverse_process, z, t, s, noise)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_schedule_of_diffusers_is_that_of_the_model_near_the_data() -> None:
    """In single precision 34 of the 1000 betas round to 0, and 1 - beta rounds to 1."""
    model = small_model("direct")
    _, scheduler = to_diffusers(model, diffusers.DDPMScheduler)
    t = torch.linspace(0, 1, 1000, dtype=F64)
    gamma = torch.lerp(torch.full_like(t, -13.3), torch.full_like(t, 5.0), t)
    variance = torch.sigmoid(gamma)
    signal = torch.sigmoid(-gamma)
    betas = torch.cat([variance[:1], (variance.diff() / signal[:-1])])
    for found in (scheduler.betas, torch.tensor(scheduler.config.trained_betas, dtype=F64)):
        assert bool((found > 0).all())
        torch.testing.assert_close(found.double(), betas, rtol=1e-6, atol=0)
    left = 1 - scheduler.alphas_cumprod.double()
    torch.testing.assert_close(left, variance, rtol=1e-6, atol=0)


def image_model(steps: int | None = None) -> NDM:
    torch.manual_seed(0)
    parts = LinearLogSNRSchedule(), GatedTransform(UNet(channels=8, multiples=(1,)))
    predictor = Predictor(UNet(channels=8, multiples=(1,)))
    model = NDM(*parts, predictor, DiscretizedGaussian(256), reverse="direct", steps=steps)
    return randomized(model, 0.05).float().eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pipeline_samples_saves_and_loads_the_model(tmp_path: Path) -> None:
    model = image_model()
    network, scheduler = to_diffusers(model, diffusers.DDPMScheduler, 20, event_shape=(1, 8, 8))
    pipeline = diffusers.DDPMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 20, "output_type": "pt", "return_dict": False}
        (images,) = pipe(batch_size=2, generator=generator, **options)
        return images

    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 1, 8, 8, generator=generator)
    for index in range(19, 0, -1):
        t, s = (model.process.level(i / 19, z) for i in (index, index - 1))
        noise = torch.randn(z.shape, generator=generator)
        with torch.no_grad():
            z = Ancestral(1.0)(model.reverse_process, z, t, s, noise)
    x = z / model.process.level(0.0, z).alpha[:, None, None, None]
    torch.testing.assert_close(draw(pipeline), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded), draw(pipeline), rtol=0, atol=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.unet.model.state_dict()[name], value)


def test_the_shape_comes_from_the_description_of_the_data_or_is_asked_for() -> None:
    model = image_model()
    network, _ = to_diffusers(model, diffusers.DDPMScheduler)
    with pytest.raises(AttributeError, match="event_shape="):
        network.config.sample_size  # noqa: B018
    model.info = {"data": {"event_shape": [1, 8, 16]}}
    config = to_diffusers(model, diffusers.DDPMScheduler)[0].config
    assert (config.in_channels, config.sample_size) == (1, (8, 16))


def test_the_last_step_is_the_decoder_mean_and_dropout_is_off() -> None:
    model = small_model("direct", predictor=Predictor(MLP(2, 8, 1, dropout=0.5))).train()
    network, _ = to_diffusers(model, diffusers.DDPMScheduler, 50)
    z = torch.randn(5, 2)
    level = model.process.level(0.0, z)
    torch.testing.assert_close(network(z, 0).sample, z / level.alpha[:, None])
    first, second = network(z, 30).sample, network(z, torch.full((5,), 30)).sample
    assert first.equal(second) and not first.requires_grad


def small_model(reverse: ReverseKind, **options: object) -> NDM:
    parts = {
        "schedule": LinearLogSNRSchedule(),
        "transform": GatedTransform(MLP(2, 8, 1)),
        "predictor": Predictor(MLP(2, 8, 1)),
        **options,
    }
    return NDM(**parts, decoder=GaussianDecoder(), reverse=reverse)  # type: ignore[arg-type]


def test_models_that_are_not_plain_diffusions_are_rejected() -> None:
    for model, pattern in (
        (small_model("tied"), "reverse=direct"),
        (small_model("diffenc"), "reverse=direct"),
        (small_model("direct", schedule=FlowMatchingSchedule()), "variance preserving"),
        (small_model("direct", eta=0.7), "eta"),
    ):
        with pytest.raises(UserError, match=pattern):
            to_diffusers(model, diffusers.DDPMScheduler)
    with pytest.raises(UserError, match="trained_betas"):
        to_diffusers(small_model("direct"), diffusers.FlowMatchEulerDiscreteScheduler)
    to_diffusers(small_model("tied", transform=Identity()), diffusers.DDPMScheduler)


def test_classes_are_passed_as_diffusers_passes_them() -> None:
    conditional = random_conditional(reverse="direct", seen_by=("predictor",))
    network, _ = to_diffusers(conditional, diffusers.DDPMScheduler, 100)
    z = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = network(z, 60, class_labels=LABELS).sample
    alone = to_diffusers(conditional.given(LABELS), diffusers.DDPMScheduler, 100)[0](z, 60).sample
    assert torch.equal(found, alone)
    for c in range(3):
        one = network(z, 60, class_labels=torch.full((4,), c)).sample
        torch.testing.assert_close(found[c == LABELS], one[c == LABELS])
    assert not torch.allclose(found, network(z, 60).sample)
