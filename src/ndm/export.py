r"""Export of direct models to the schedulers of diffusers, as plain diffusions.

The generator of a direct reverse process (eta = 1) equals that of a variance-preserving diffusion
whose data prediction is ŷ:

.. math::
    p(z_s|z_t) = N\bigl(k z_t + (\alpha_s - k \alpha_t)\, \hat y(z_t, t),\; v I\bigr), \qquad
    dz = \bigl[-\alpha\gamma'\, \hat y + \tfrac12 \gamma' (1 + \alpha^2)\, z\bigr] dt
         + \sigma\sqrt{\gamma'}\, d\bar w .

So every SDE sampler that takes a data prediction ("sample" in diffusers) samples from it:
``DDPMScheduler``, ``DPMSolverMultistepScheduler`` with ``algorithm_type="sde-dpmsolver++"``. ODE
samplers (DDIM, DPM-Solver++ without noise) need the score, which follows from E[F|z_t]; ŷ gives the
score only if F = x.

Step i of N is the time t = i/(N - 1). At step 0 the prediction is that of the decoder, z_0/alpha_0.
A sampler that skips step 0 (DPM-Solver++) ends in ŷ, which differs from the data by dF/gamma' at
t = 0. The difference is zero for an F that starts like sigma_t².

The schedule is in double precision: at gamma = -13.3 beta is 3e-8, which 1 - beta rounds away in
single precision. A scheduler that diffusers loads from a file is in single precision; to sample in
few steps near the data, call :func:`to_diffusers` again.
"""

import functools
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ndm.errors import UserError, check_whole
from ndm.model import NDM
from ndm.schedule import VariancePreserving
from ndm.serialize import read_json, write_json
from ndm.shapes import expand

_STEPS_FILE = "steps.json"


class DiffusersModel(nn.Module):
    """ŷ(z, t) with the interface of diffusers: ``model(sample, timestep).sample``.

    Args:
        model: a model whose generator is that of a plain diffusion.
        steps: N, the number of training time steps of the scheduler.
        event_shape: shape of one example of the data; by default that in the model's ``info``.
            Pipelines need it.
    """

    def __init__(self, model: NDM, steps: int = 1000, event_shape: Sequence[int] | None = None):
        super().__init__()
        self.model, self.steps = model, steps
        data = model.info.get("data")
        if event_shape is None and isinstance(data, dict):
            event_shape = data.get("event_shape")
        self.event_shape = None if event_shape is None else tuple(event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.like.device

    @property
    def config(self) -> SimpleNamespace:
        """Shape of the latents, as diffusers names it: ``in_channels`` and ``sample_size``."""
        if self.event_shape is None:
            return _UnknownShape()
        example = torch.empty(1, *self.event_shape)
        _, channels, *size = self.model.transform.latent_shape(example)
        square = len(size) == 2 and size[0] == size[1]
        return SimpleNamespace(in_channels=channels, sample_size=size[0] if square else tuple(size))

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the data from latents ``(B, *event)`` at a time step, a number or ``(B,)``.

        ``class_labels`` ``(B,)`` are the classes of a model that takes them.
        """
        model = self.model if class_labels is None else self.model.given(class_labels)
        step = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device)
        level = model.process.level(step / (self.steps - 1), sample)
        prediction = model.reverse_process.curve(sample, level, 1.0).at(level)
        decoded = sample / expand(level.alpha, sample)
        prediction = torch.where(expand(level.t == 0, sample), decoded, prediction)
        return SimpleNamespace(sample=prediction) if return_dict else (prediction,)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the model into a folder. The options of diffusers are ignored."""
        del options
        self.model.save_pretrained(save_directory)
        record = {"steps": self.steps, "event_shape": self.event_shape}
        write_json(Path(save_directory) / _STEPS_FILE, record)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Read a model from a folder of :meth:`save_pretrained`, in evaluation mode.

        Args:
            path: the folder.
            torch_dtype: dtype of the weights; by default that of the file.
            options: further options of diffusers, which are ignored.

        Raises:
            UserError: a file is missing, damaged or does not fit.
        """
        del options
        record = read_json(Path(path) / _STEPS_FILE)
        model = NDM.from_pretrained(path)
        model = model if torch_dtype is None else model.to(torch_dtype)
        steps, shape = record.get("steps"), record.get("event_shape")
        check_whole("steps", steps, 2)
        assert isinstance(steps, int) and (shape is None or isinstance(shape, list))
        return cls(model, steps, shape).eval()


class _UnknownShape(SimpleNamespace):
    """The configuration of a model whose data have an unknown shape."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name} is unknown, because the model has no description of its data: call"
            " to_diffusers(..., event_shape=(C, H, W))"
        )


@functools.cache
def _component() -> type[DiffusersModel]:
    """Return the subclass of :class:`DiffusersModel` that pipelines save and load."""
    from diffusers import ModelMixin

    namespace = {"__module__": __name__, "__doc__": DiffusersModel.__doc__}
    return cast(type[DiffusersModel], type("Component", (DiffusersModel, ModelMixin), namespace))


def __getattr__(name: str) -> Any:
    # When diffusers loads a pipeline, it looks up the class and its base in this module.
    if name == "Component":
        return _component()
    if name == "ModelMixin":
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def to_diffusers(
    model: NDM,
    scheduler: type,
    steps: int = 1000,
    event_shape: Sequence[int] | None = None,
    **options: Any,
) -> tuple[DiffusersModel, Any]:
    """Return a model for diffusers, and a scheduler that samples from it.

    Args:
        model: a model with a direct reverse process, or with F = x, and a variance-preserving
            schedule.
        scheduler: a class of diffusers that takes ``trained_betas`` and ``prediction_type``, such
            as ``DDPMScheduler``.
        steps: N, the number of training time steps of the scheduler.
        event_shape: shape of one example of the data; by default that in the model's ``info``.
            Only pipelines need it.
        options: further arguments of the scheduler.

    Returns:
        The model in evaluation mode, and the scheduler; ``DDPMPipeline(model, scheduler)`` samples,
        saves and loads them. If F is an encoder, they sample latents, from which
        ``model.decoder.sample`` draws data.

    Raises:
        UserError: the model's generator is not that of a plain diffusion, or the scheduler does not
            take the arguments needed.
    """
    check_whole("steps", steps, 2)
    if model.reverse not in ("direct", "direct-score") and not model.transform.constant:
        raise UserError(
            f"a {model.reverse} reverse process applies F at every step, so it is not a plain"
            " diffusion; sample it with NDM.sample, or train with reverse=direct"
        )
    model.reverse_process.check_eta(1.0)
    if not isinstance(model.schedule, VariancePreserving):
        raise UserError(
            f"{type(model.schedule).__name__} is not variance preserving, which diffusers needs;"
            " train with another schedule"
        )
    betas = _betas(model, steps)
    parameters = inspect.signature(scheduler).parameters
    if not {"trained_betas", "prediction_type"} <= set(parameters):
        raise UserError(
            f"{scheduler.__name__} does not take trained_betas and prediction_type; use"
            " DDPMScheduler or DPMSolverMultistepScheduler"
        )
    settings: dict[str, Any] = {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
    }
    if "clip_sample" in parameters:
        settings["clip_sample"] = False
    made = scheduler(**settings | options)
    changed = "trained_betas" in options or options.get("rescale_betas_zero_snr")
    if not changed and hasattr(made, "alphas_cumprod"):
        made.betas, made.alphas = betas, 1 - betas
        made.alphas_cumprod = made.alphas.cumprod(0)
    kind = _component() if "diffusers" in sys.modules else DiffusersModel
    return kind(model, steps, event_shape).eval(), made


@torch.no_grad()
def _betas(model: NDM, steps: int) -> Tensor:
    """Return beta_i = 1 - alpha_t²/alpha_s² of the N steps, ``(N,)``, float64."""
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    device = next((p.device for p in model.schedule.parameters()), time.device)
    gamma = model.schedule.in_double(time.to(device)).gamma.cpu()
    log_signal = nn.functional.logsigmoid(-gamma)
    change = torch.cat([log_signal[:1], log_signal.diff()])
    return (-torch.expm1(change)).clamp(0, 0.999999)
