"""The model as an object: what it accepts, shows and knows; what ``import ndm`` gives."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ndm
from ndm.nn import MLP, UNet


def plane(**options: object) -> ndm.NDM:
    torch.manual_seed(0)
    return ndm.NDM(
        ndm.LinearLogSNRSchedule(gamma_0=-7.25),
        ndm.NetworkTransform(MLP(2, hidden=8, blocks=1)),
        ndm.Predictor(MLP(2, hidden=8, blocks=1), "eps"),
        ndm.GaussianDecoder(),
        **options,  # type: ignore[arg-type]
    )


def images() -> ndm.NDM:
    network = UNet(channels=8, multiples=(1,))
    decoder = ndm.DiscretizedGaussian(16)
    return ndm.NDM(ndm.CosineSchedule(), ndm.Identity(), ndm.Predictor(network), decoder)


BAD_DATA = {
    "(4,): give a batch": torch.zeros(4),
    "events of 2 dimensions, got a batch of shape (4, 3)": torch.zeros(4, 3),
    "float64 and the model torch.float32: use x.to(model.like)": torch.zeros(4, 2).double(),
    "int64, and the model takes floats": torch.zeros(4, 2).long(),
    "x is a ndarray: give a tensor": np.zeros((4, 2)),
    "x has 3 values that are not finite": torch.tensor([[0.0, math.nan], [math.inf, -math.inf]]),
}


@pytest.mark.parametrize("message", BAD_DATA)
@pytest.mark.parametrize("method", ["bound", "log_likelihood"])
def test_wrong_data_raise_one_clear_line(method: str, message: str) -> None:
    with pytest.raises(ndm.UserError) as raised:
        getattr(plane(), method)(BAD_DATA[message])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 3, 8, 8), "takes images (B, 1, H, W)"), ((2, 64), "takes images")]
)
def test_images_of_another_shape_raise_one_clear_line(shape: tuple[int, ...], message: str) -> None:
    x = torch.full(shape, 1 / 16)
    for call in (lambda: images().bound(x), lambda: images().sample(shape, steps=1)):
        with pytest.raises(ndm.UserError) as raised:
            call()
        assert message in str(raised.value)


PARTS: dict[str, Callable[[], object]] = {
    "transform must be a Transform": lambda: ndm.NDM(
        ndm.CosineSchedule(), MLP(2), ndm.Predictor(MLP(2)), ndm.GaussianDecoder()
    ),
    "predictor must be a DataPredictor": lambda: ndm.NDM(
        ndm.CosineSchedule(), ndm.Identity(), MLP(2), ndm.GaussianDecoder()
    ),
    "schedule must be a Schedule": lambda: ndm.NDM(
        MLP(2), ndm.Identity(), ndm.Predictor(MLP(2)), ndm.GaussianDecoder()
    ),
    "decoder must be a Decoder": lambda: ndm.NDM(
        ndm.CosineSchedule(), ndm.Identity(), ndm.Predictor(MLP(2)), None
    ),
    "scale must be a DiagonalScale": lambda: ndm.NFDM(
        ndm.CosineSchedule(), ndm.Identity(), MLP(2), ndm.Predictor(MLP(2)), ndm.GaussianDecoder()
    ),
    "needs an nn.Module called as network(z, t)": lambda: ndm.Predictor(lambda z, t: z),
    "Linear, which cannot be called as network(z, t)": lambda: ndm.Predictor(torch.nn.Linear(2, 2)),
    "transform must be a Transform, such as ndm.NetworkTransform(network),"
    " got the class Identity": (
        lambda: ndm.NDM(
            ndm.CosineSchedule(), ndm.Identity, ndm.Predictor(MLP(2)), ndm.GaussianDecoder()
        )
    ),
    "time_sampler must be a TimeSampler": lambda: plane(time_sampler="uniform"),
}


@pytest.mark.parametrize("message", PARTS)
def test_a_part_of_the_wrong_kind_is_named(message: str) -> None:
    with pytest.raises(ndm.UserError) as raised:
        PARTS[message]()
    assert message in str(raised.value)
    assert "ndm." in str(raised.value) or "network(" in str(raised.value)


@pytest.mark.parametrize("eta", [0.0, -1.0, math.inf, math.nan, "1"])
def test_eta_must_be_positive_and_finite(eta: object) -> None:
    with pytest.raises(ndm.UserError, match="give a finite number above 0"):
        plane(eta=eta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_has_no_bound(dtype: torch.dtype) -> None:
    with pytest.raises(ndm.UserError, match="too coarse for its bound"):
        plane().to(dtype).bound(torch.zeros(4, 2, dtype=dtype))


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, torch.tensor([0.5, 2.0])])
def test_times_outside_of_the_process_are_rejected(t: float | Tensor) -> None:
    model, x = plane(), torch.zeros(2, 2)
    for method in (model.noised, model.transformed, model.predict):
        with pytest.raises(ndm.UserError, match=r"t is outside \[0, 1\]"):
            method(x, t)


def test_a_network_that_returns_no_tensor_is_named() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    x = torch.zeros(4, 2)
    for transform in (ndm.NetworkTransform(Pair()), ndm.SeparableTransform(Pair())):
        with pytest.raises(ndm.UserError, match=r"maps \(4, 2\) to a tuple"):
            transform.curve(x).at(plane().process.level(0.5, x))
    with pytest.raises(ndm.UserError, match="tuple"):
        ndm.Predictor(Pair())(x, plane().process.level(0.5, x))


def test_a_sampler_object_has_its_own_options() -> None:
    sampler = ndm.GridSampler(ndm.Ancestral(), 3)
    with pytest.raises(ndm.UserError, match="belong to the sampler object"):
        plane().sample((2, 2), sampler, steps=5)
    with pytest.raises(ndm.UserError, match=r"wrap it in ndm.GridSampler\(Ancestral"):
        plane().sample((2, 2), ndm.Ancestral())  # type: ignore[arg-type]
    with pytest.raises(ndm.UserError, match="step is the class Ancestral"):
        ndm.GridSampler(ndm.Ancestral, 3)  # type: ignore[arg-type]
    assert repr(sampler) == "GridSampler(Ancestral(eta=1), 3)"


@pytest.mark.parametrize("shape", [4.0, (), (-1, 2), (2.0, 2), "42", torch.zeros(2, 2), None])
def test_a_shape_that_is_none_is_rejected(shape: object) -> None:
    with pytest.raises(ndm.UserError, match=r"give \(B, \*event\), or only the number B"):
        plane().sample(shape)  # type: ignore[arg-type]


def test_without_a_seed_samples_follow_the_global_generator() -> None:
    model = plane()

    def draw() -> Tensor:
        return model.sample((3, 2), steps=2)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_a_model_in_double_precision_is_loaded_in_double_precision(tmp_path: Path) -> None:
    model, x = plane().double().eval(), torch.randn(4, 2).double()
    model.save_pretrained(tmp_path)
    loaded = ndm.NDM.from_pretrained(tmp_path)
    expected, found = (
        one.bound(x, generator=torch.Generator().manual_seed(0)).total for one in (model, loaded)
    )
    assert torch.equal(found, expected)
    with pytest.raises(ndm.UserError, match="JSON cannot store"):
        model.save_pretrained(tmp_path, info={"a": x})


def test_data_show_their_arguments() -> None:
    assert repr(ndm.data.Digits(seed=3)) == "Digits(seed=3, test_fraction=0.2, classes=None)"
    assert repr(ndm.data.Digits().split("test")).endswith("(359 examples)")


def test_repr_shows_the_numbers() -> None:
    text = repr(plane(steps=12, eta=0.5))
    assert "steps=12, eta=0.5, reverse='tied'" in text
    for part in ("gamma_0=-7.25", "target='eps'", "dims=2, hidden=8, blocks=1", "gate='time'"):
        assert part in text
    assert repr(ndm.DiscretizedGaussian(16)) == "DiscretizedGaussian(num_values=16)"


def test_a_number_of_samples_is_enough_where_the_data_are_described() -> None:
    model = plane()
    model.info = {"data": ndm.data.TwoMoons().describe().to_dict()}
    torch.testing.assert_close(
        model.sample(3, steps=2, seed=1), model.sample((3, 2), steps=2, seed=1), rtol=0, atol=0
    )


def test_without_a_description_the_shape_is_asked_for() -> None:
    with pytest.raises(ndm.UserError, match=r"give the whole shape, sample\(\(3, \*event\)\)"):
        plane().sample(3)
    with pytest.raises(ndm.UserError, match=r"give \(B, \*event\), or only the number B"):
        plane().sample((3,))


@pytest.mark.slow
def test_submodules_are_imported_on_first_use() -> None:
    """``import ndm`` needs neither Lightning nor matplotlib; submodules are reachable after it."""
    script = (
        "import sys, ndm\n"
        "heavy = {'lightning', 'matplotlib', 'jsonargparse', 'ndm.data', 'ndm.train'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "ndm.data.TwoMoons, ndm.evaluation, ndm.variants.TransportNDM, ndm.quality, ndm.viz\n"
        "assert set(ndm.__all__) | {'data', 'apps'} <= set(dir(ndm))\n"
        "for name in ndm.__all__: getattr(ndm, name)\n"
        "try: ndm.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "module 'ndm' has no attribute 'nothing'"
