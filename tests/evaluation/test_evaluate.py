"""Bound and likelihood of a data set: calibrated standard errors, results free of batching."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ndm.data import spread
from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.evaluation.calibrate import Fit
from ndm.evaluation.evaluate import Evaluation, evaluate_bound
from ndm.evaluation.measurement import (
    BoundProtocol,
    LikelihoodProtocol,
    Measurement,
    neighbor_error,
    paired_difference,
    strata_error,
    weights_error,
)
from ndm.evaluation.relations import check_relations
from ndm.evaluation.tables import flat_record, markdown_table
from ndm.model import NDM
from ndm.nn import MLP
from ndm.ode import OdeSettings
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import NetworkTransform
from oracles import F64, Points, randomized


def network(seed: int) -> MLP:
    torch.manual_seed(seed)
    return randomized(MLP(2, hidden=16, blocks=1, max_frequency=2.0), 0.1, seed)


def toy_model(steps: int | None = None) -> NDM:
    transform = randomized(NetworkTransform(network(3)), 0.1)
    schedule, predictor = LinearLogSNRSchedule(-5.0, 3.0), Predictor(network(4))
    return NDM(schedule, transform, predictor, GaussianDecoder(), steps=steps).double()


def points(count: int, seed: int = 0) -> Points:
    return Points(torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("steps", [None, 40])
def test_the_standard_error_is_calibrated(steps: int | None) -> None:
    model, size, runs = toy_model(), 64, 120
    truth = Evaluation(model, points(4_000, 12345), seed=99).nelbo(steps, 8).nats
    for draws in (1, 4):
        found = [
            Evaluation(model, points(size, run), seed=run).nelbo(steps, draws)
            for run in range(runs)
        ]
        means = torch.tensor([one.nats for one in found])
        errors = torch.tensor([one.stderr for one in found])
        ratio = float(means.std() / errors.square().mean().sqrt())
        assert ratio == pytest.approx(1, abs=0.15), "neither too small nor too large"
        assert abs(float(means.mean()) - truth) < 4 * float(means.std()) / math.sqrt(runs)


def test_stratification_over_the_data_lowers_the_error_and_its_estimate() -> None:
    predictor = Predictor(network(4), target="x")  # its loss grows like exp(-gamma) towards t = 0
    schedule, transform = LinearLogSNRSchedule(-5.0, 3.0), NetworkTransform(network(3))
    model = NDM(schedule, transform, predictor, GaussianDecoder()).double()
    data, numbers = points(64), list(range(64))
    stratified = [Evaluation(model, data, seed=seed).nelbo(None, 1) for seed in range(150)]
    plain = []
    for seed in range(150):
        source = ExampleGenerators(seed, numbers)
        with torch.no_grad():
            total = model.bound(data.x, steps=None, draws=1, generator=source).total
        plain.append(float(total.mean()))
    ours, theirs = torch.tensor([one.nats for one in stratified]).std(), torch.tensor(plain).std()
    assert float(ours) < 0.75 * float(theirs)
    naive = torch.tensor([float(one.values.std()) / 8 for one in stratified]).mean()
    error = float(torch.tensor([one.stderr for one in stratified]).square().mean().sqrt())
    assert error < 0.9 * float(naive)
    assert error == pytest.approx(float(ours), rel=0.25)


def test_neighbor_error_of_independent_values_is_the_usual_standard_error() -> None:
    values = torch.randn(20_000, dtype=F64, generator=torch.Generator().manual_seed(0)) * 3
    assert neighbor_error(values) == pytest.approx(3 / math.sqrt(20_000), rel=0.03)
    trend = torch.linspace(0, 1, 1001, dtype=F64)
    assert neighbor_error(trend) < 1e-4, "a trend over the order is not noise"
    assert math.isnan(neighbor_error(torch.zeros(1)))


def test_a_paired_difference_has_the_error_of_the_differences() -> None:
    """What both have in common cancels; signs and units count."""
    generator = torch.Generator().manual_seed(0)
    common = 100 * torch.randn(50, generator=generator, dtype=torch.float64)
    first, second = common + torch.tensor([3.0, 1.0]).repeat(25), common
    mean, error = paired_difference(first, second, dims=4)
    assert mean == pytest.approx(2 / (4 * math.log(2)))
    assert error == pytest.approx(math.sqrt(50 / 49) / math.sqrt(50) / (4 * math.log(2)))
    assert paired_difference(second, first, dims=4) == pytest.approx((-mean, error))


@pytest.mark.parametrize("draws", [4, 16])
@pytest.mark.parametrize("steps", [None, 500])
def test_the_standard_error_of_each_example_is_calibrated(steps: int | None, draws: int) -> None:
    """Against the spread over copies of the same examples, each with its own noise."""
    model, copies = toy_model(), Points(points(12).x.repeat(200, 1))
    found = Evaluation(model, copies).nelbo(steps, draws)
    assert found.errors is not None
    values, errors = found.values.reshape(200, 12), found.errors.reshape(200, 12)
    ratio = values.std(0) / errors.square().mean(0).sqrt()
    assert float(ratio.log().mean().exp()) == pytest.approx(1, abs=0.15)
    assert bool(((ratio > 0.6) & (ratio < 1.5)).all())


def test_the_error_of_an_example_contains_noise_and_the_position_of_its_times() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.randn(4000, 16, dtype=F64, generator=generator)
    rms = float(strata_error(noise).square().mean().sqrt())
    assert rms == pytest.approx(3 / math.sqrt(16), rel=0.04)
    # A slope of 1 over [0, 1] moves by p/K, which has the variance 1/(12 K²).
    position = torch.rand(4000, 1, dtype=F64, generator=generator)
    slope = (torch.arange(16, dtype=F64) + position) / 16
    rms = float(strata_error(slope).square().mean().sqrt())
    assert rms == pytest.approx(float(slope.mean(1).std()), rel=0.3)
    assert bool(strata_error(noise[:, :1]).isnan().all())


def test_the_error_of_a_weighted_bound_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    log_weights = 0.3 * torch.randn(4000, 64, dtype=F64, generator=generator)
    spread = (torch.logsumexp(log_weights, 1) - math.log(64)).std()
    rms = weights_error(log_weights).square().mean().sqrt()
    assert float(rms) == pytest.approx(float(spread), rel=0.05)
    torch.testing.assert_close(weights_error(log_weights - 1e5), weights_error(log_weights))
    assert bool(weights_error(log_weights[:, :1]).isnan().all())


def test_the_seed_of_a_likelihood_draws_its_latents() -> None:
    """With the exact trace the latents are the only random numbers."""
    model, data = toy_model(), points(6)
    settings = OdeSettings(solver="rk4", nodes=8, probes="exact")
    first, again, other = (
        Evaluation(model, data, seed=seed).nll(settings=settings).values for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert float((first - other).abs().min()) > 1e-3
    pairs = Evaluation(model, data, seed=1).nll(2, settings=settings).values
    assert float((pairs - first).abs().min()) > 1e-6, "the second sample is another one"


def test_the_standard_error_of_a_likelihood_is_that_of_its_weighted_values() -> None:
    """A wide decoder: one sample of z_0 varies much more than the mean of many weights."""
    measured = Evaluation(wide_model(), points(40)).nll(
        16, settings=OdeSettings(solver="rk4", nodes=8, probes="exact")
    )
    expected = float(measured.values.std() / math.sqrt(40))
    assert measured.stderr == pytest.approx(expected, rel=1e-12)
    protocol = measured.protocol
    assert isinstance(protocol, LikelihoodProtocol)
    one_sample = protocol.one_sample_bpd_stderr
    assert one_sample is not None and one_sample != pytest.approx(measured.bpd_stderr, rel=0.01)
    assert protocol.one_sample_bpd > measured.bpd + 0.01
    assert measured.numbers()["nats_stderr"] == measured.stderr
    assert flat_record([measured])["nll_nats_stderr"] == measured.stderr


def wide_model() -> NDM:
    schedule, predictor = LinearLogSNRSchedule(-1.0, 3.0), Predictor(network(4))
    transform = randomized(NetworkTransform(network(3)), 0.1)
    return NDM(schedule, transform, predictor, GaussianDecoder()).double()


def test_few_steps_are_all_visited_equally_often() -> None:
    evaluation = Evaluation(toy_model(), points(10))
    assert evaluation.nelbo(10, 16).protocol.time_samples_per_example == 20
    assert evaluation.nelbo(100, 16).protocol.time_samples_per_example == 16
    model, x = toy_model(), points(3000).x
    means = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            means.append(model.bound(x, steps=3, draws=3, generator=generator).diffusion.mean())
    assert means[0] != means[1], "only the noise differs"


def test_results_do_not_depend_on_the_batch_size() -> None:
    model, data = toy_model(), points(11)
    settings = OdeSettings(solver="rk4", nodes=8)

    def all_of(evaluation: Evaluation) -> list[Measurement]:
        return [
            evaluation.nelbo(draws=2),
            evaluation.nelbo(5, 2),
            evaluation.nelbo_iw(3, 2),
            evaluation.nll(2, settings=settings),
        ]

    whole, small = all_of(Evaluation(model, data)), all_of(Evaluation(model, data, batch_size=4))
    for one, other in zip(whole, small, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-6, atol=1e-6)
        assert one.stderr == pytest.approx(other.stderr, rel=1e-6)


def test_a_limit_is_spread_over_the_split_and_recorded() -> None:
    model, data = toy_model(), points(20)
    whole, part = Evaluation(model, data), Evaluation(model, data, limit=5)
    assert part.numbers == spread(20, 5)
    settings = OdeSettings(rtol=1e-6, atol=1e-6, nodes=8)
    found, expected = (one.nll(settings=settings).values for one in (part, whole))
    # The steps of the solver depend on the batch, within the tolerance.
    torch.testing.assert_close(found, expected[part.numbers], rtol=1e-4, atol=1e-4)
    protocol = part.nelbo(draws=1).protocol.to_dict()
    assert (protocol["num_examples"], protocol["split_size"], protocol["limit"]) == (5, 20, 5)
    assert Evaluation(model, data, limit=100).numbers == list(range(20))


def test_the_record_holds_the_protocol_of_each_number() -> None:
    about = {"data": "points", "split": "test", "data_sha256": "a" * 64}
    evaluation = Evaluation(toy_model(), points(12), seed=4, about=about)
    numbers = [
        evaluation.nelbo(draws=3),
        evaluation.nelbo(7, 3),
        evaluation.nelbo_iw(3, 2),
        evaluation.nll(2),
    ]
    shared = (
        "data split data_sha256 num_examples split_size seed batch_size dtype device seconds"
        " versions parameters scale"
    )
    specific = [
        "time_samples_per_example steps eta",
        "time_samples_per_example steps reverse_variance",
        "steps importance_samples nfe_mean",
        "dequantization importance_samples solver rtol atol probes nodes nfe_mean"
        " half_the_nodes_shift_bpd reversibility",
    ]
    for one, keys in zip(numbers, specific, strict=True):
        record = one.to_dict()
        assert set((shared + " " + keys).split()) <= set(record), one.name
        assert record["bpd"] == pytest.approx(record["nats"] / (2 * math.log(2)))
        assert record["bpd_stderr"] == pytest.approx(record["nats_stderr"] / (2 * math.log(2)))
    flat = flat_record(numbers)
    assert flat["nelbo_discrete_bpd"] == {"7": numbers[1].bpd}
    assert flat["nelbo_iw_bpd"] == {"3": numbers[2].bpd}
    ten = Evaluation(toy_model(10), points(12)).nelbo(draws=2)
    assert flat_record([ten])["nelbo_discrete_bpd"] == {"10": ten.bpd}
    assert flat_record([ten])["nelbo_bpd"] == ten.bpd
    assert flat["nll_bpd"] == numbers[3].bpd
    assert flat["nfe_mean"] == numbers[3].protocol.nfe_mean > 50
    terms = flat["prior_bpd"] + flat["diffusion_bpd"] + flat["reconstruction_bpd"]
    assert flat["nelbo_bpd"] == pytest.approx(terms, abs=1e-12)
    assert numbers[3].protocol.one_sample_bpd >= numbers[3].bpd
    assert numbers[3].protocol.reversibility["rms_error"] < 1e-2
    table = markdown_table(numbers).splitlines()
    assert len(table) == 6
    assert len({row.count(" | ") for row in table[2:]}) == 1


SHARED: dict[str, Any] = {
    "about": {},
    "num_examples": 200,
    "split_size": 200,
    "limit": None,
    "scale": "",
    "seed": 0,
    "batch_size": 8,
    "processes": 1,
    "parameters": 1,
    "dtype": "float64",
    "device": "cpu",
    "seconds": 0.0,
    "versions": {},
    "condition": "none",
}


def bound(values: Tensor, steps: int | None = None, **options: Any) -> Measurement:
    protocol = BoundProtocol(**SHARED, eta=1.0, reverse_variance="v")
    return Measurement("nelbo", values, 0.1, 1, protocol, steps=steps, **options)


def likelihood(
    values: Tensor, shift: float = 0.002, dequantization: str = "variational"
) -> Measurement:
    protocol = LikelihoodProtocol(
        **SHARED,
        dequantization=dequantization,
        solver="rk4",
        rtol=None,
        atol=None,
        nodes=8,
        probes=4,
        probe="rademacher",
        nfe_mean=1.0,
        one_sample_bpd=0.0,
        one_sample_bpd_stderr=0.0,
        half_the_nodes_shift_bpd=shift,
        half_the_nodes_shift_bpd_stderr=0.001,
        reversibility=None,
    )
    return Measurement("nll", values, 0.1, 1, protocol, importance_samples=1)


def test_relations_between_measurements_are_checked() -> None:
    base = torch.randn(200, dtype=F64, generator=torch.Generator().manual_seed(0))
    noise = 0.01 * torch.randn(200, dtype=F64, generator=torch.Generator().manual_seed(1))
    limit, good = bound(base, as_trained=True), likelihood(base - 0.1 + noise)
    above = base + 0.1 + noise
    assert [check.holds for check in check_relations([limit, good])] == [True, True]
    checks = check_relations([limit, likelihood(above)])
    assert [check.holds for check in checks] == [False, True] and "NO" in checks[0].text
    coarse_nodes = check_relations([limit, likelihood(above, shift=-0.2)])
    assert [check.holds for check in coarse_nodes] == [False, False]
    box = check_relations([limit, likelihood(above, -0.2, "uniform")])
    assert [check.holds for check in box] == [False], (
        "uniform dequantization is not the decoder of the bound"
    )
    trained = bound(base, 10, as_trained=True)
    weighted = bound(base - 0.1, 10, importance_samples=4)
    assert [check.holds for check in check_relations([trained, weighted])] == [True]
    fitted = bound(base, 10, fitted=True)
    worse = bound(base + 0.1, 10, fitted=True, importance_samples=4)
    assert [check.holds for check in check_relations([fitted, worse])] == [False]
    coarse, fine = (bound(base + gap + noise, steps) for gap, steps in ((1.0, 10), (0.1, 100)))
    assert all(check.holds for check in check_relations([limit, coarse, fine]))
    stuck = bound(base + 0.9 + noise, 100)
    assert [check.holds for check in check_relations([limit, coarse, stuck])] == [True, True, False]
    below = bound(base - 0.2 + noise, 100)
    assert not check_relations([limit, below])[0].holds
    worse = bound(base + 2.0, 10, importance_samples=4)
    assert [check.holds for check in check_relations([coarse, worse])] == [False]
    assert check_relations([bound(base[:1], as_trained=True), likelihood(base[:1])]) == []


def test_a_fit_is_computed_once_per_number_of_steps() -> None:
    class Counting(Points):
        calls = 0

        def __getitems__(self, indices: object) -> Tensor:
            self.calls += 1
            return super().__getitems__(indices)

    train = Counting(points(20).x)
    evaluation, fit = Evaluation(toy_model(), points(5)), Fit(train)
    fitted = [evaluation.nelbo(3, 3, fit), evaluation.nelbo_iw(3, 2, fit)]
    assert train.calls == 1
    assert [one.name for one in fitted] == ["nelbo_discrete_calibrated", "nelbo_iw_calibrated"]
    evaluation.nelbo(None, 2, fit)
    assert train.calls == 2


def test_evaluate_bound_returns_a_flat_record() -> None:
    record = evaluate_bound(toy_model(), points(9), draws=2, seed=1)
    assert record["num_examples"] == 9
    assert record["time_samples_per_example"] == 2
    assert record["nelbo_bpd"] == pytest.approx(record["nelbo_nats"] / (2 * math.log(2)))


def test_empty_data_and_nonfinite_bounds_are_rejected() -> None:
    with pytest.raises(UserError, match="empty"):
        Evaluation(toy_model(), Points(torch.zeros(0, 2)))
    with pytest.raises(UserError, match="limit"):
        Evaluation(toy_model(), points(3), limit=0)
    with pytest.raises(UserError, match="steps"):
        Evaluation(toy_model(), points(3)).nelbo(0)
    model = toy_model().train()
    with pytest.raises(UserError, match="not finite"):
        Evaluation(model, Points(torch.full((3, 2), 1e200, dtype=F64))).nelbo(draws=1)
    assert model.training
    with pytest.raises(UserError, match="not finite"):
        Evaluation(toy_model(), Points(torch.full((3, 2), 1e200, dtype=F64))).nelbo(draws=1)


def test_discrete_data_are_measured_on_their_integers() -> None:
    """A uniform model of bytes costs eight bits."""
    decoder, schedule = DiscretizedGaussian(256), LinearLogSNRSchedule(40.0, 41.0)
    transform, predictor = NetworkTransform(network(3)), Predictor(network(4))
    model = NDM(schedule, transform, predictor, decoder).double()
    data = Points(decoder.values[torch.arange(40).reshape(20, 2) * 6])
    measured = Evaluation(model, data).nelbo(draws=2)
    assert measured.bpd == pytest.approx(8.0, rel=1e-6)
    assert "256 values" in measured.protocol.scale
