r"""Models for other libraries: a direct model as the plain diffusion that it is, for the schedulers
of diffusers.

The generator of a direct reverse process (eta = 1) is that of a variance-preserving diffusion whose
data prediction is ŷ,

.. math::
    p(z_s|z_t) = N\bigl(k z_t + (\alpha_s - k \alpha_t)\, \hat y(z_t, t),\; v I\bigr), \qquad
    dz = \bigl[-\alpha\gamma'\, \hat y + \tfrac12 \gamma' (1 + \alpha^2)\, z\bigr] dt + \sigma\sqrt{\gamma'}\, d\bar w ,

so every sampler of SDEs that takes a data prediction ("sample" in diffusers) draws from it:
``DDPMScheduler``, ``DPMSolverMultistepScheduler`` with ``algorithm_type="sde-dpmsolver++"``.
Samplers of ODEs (DDIM, DPM-Solver++ without noise) need the score, which ŷ is not unless F = x: the
score is that of E[F|z_t]. Step i of N stands for t = i/(N - 1). So step 0 is z_0 itself, and its
prediction is the decoder's, z_0/alpha_0. A sampler that skips step 0 (DPM-Solver++) ends in ŷ,
which differs from the data by dF/gamma' there: nothing for an F that starts like sigma_t².
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ndm.errors import UserError, check_whole
from ndm.model import NDM
from ndm.schedule import VariancePreserving
from ndm.shapes import expand


class DiffusersModel(nn.Module):
    """ŷ(z, t), called as diffusers calls its models: ``model(sample, timestep).sample``.

    Args:
        model: a model whose generator is a plain diffusion.
        steps: N, training time steps of the scheduler.
    """

    def __init__(self, model: NDM, steps: int = 1000):
        super().__init__()
        self.model, self.steps = model, steps

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.like.dtype

    @torch.no_grad()
    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        """The data prediction for latents ``(B, *event)`` at a time step or ``(B,)`` of them."""
        time = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device) / (
            self.steps - 1
        )
        level = self.model.process.level(time, sample)
        prediction = self.model.reverse_process.curve(sample, level, 1.0).at(level)
        prediction = torch.where(
            expand(level.t == 0, sample), sample / expand(level.alpha, sample), prediction
        )
        return SimpleNamespace(sample=prediction) if return_dict else (prediction,)


def to_diffusers(
    model: NDM, scheduler: type, steps: int = 1000, **options: Any
) -> tuple[DiffusersModel, Any]:
    """A model and a scheduler of diffusers that samples from it.

    Args:
        model: a model with a direct reverse process, or with F = x, and a variance-preserving
            schedule.
        scheduler: a class of diffusers that takes ``trained_betas`` and ``prediction_type``, such
            as ``DDPMScheduler``.
        steps: N, the number of its training time steps.
        options: further arguments of the scheduler.

    Returns:
        The model in evaluation mode as diffusers calls it, and the scheduler. Where F is an
        encoder, what is drawn are latents: ``model.decoder.sample`` makes data of them.

    Raises:
        UserError: the model's generator is not a plain diffusion, or the scheduler does not take
            what is needed.
    """
    check_whole("steps", steps, 2)
    if model.reverse not in ("direct", "direct-score") and not model.transform.constant:
        raise UserError(
            f"a {model.reverse} reverse process puts its prediction through F at every step and is"
            " no plain diffusion; sample it with NDM.sample, or train with reverse=direct"
        )
    model.reverse_process.check_eta(1.0)
    if not isinstance(model.schedule, VariancePreserving):
        raise UserError(
            f"{type(model.schedule).__name__} is not variance preserving, which the schedulers of"
            " diffusers are; train with another"
        )
    with torch.no_grad():
        time = torch.linspace(0, 1, steps, dtype=torch.float64)
        signal = model.schedule(time.to(model.like)).alpha.double().cpu() ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    betas = (1 - signal / before).clamp(0, 0.999999).tolist()
    known = inspect.signature(scheduler).parameters
    if not {"trained_betas", "prediction_type"} <= set(known):
        raise UserError(
            f"{scheduler.__name__} takes no trained_betas and prediction_type; use DDPMScheduler or"
            " DPMSolverMultistepScheduler"
        )
    settings = {"num_train_timesteps": steps, "trained_betas": betas, "prediction_type": "sample"}
    if "clip_sample" in known:
        settings["clip_sample"] = False
    return DiffusersModel(model, steps).eval(), scheduler(**settings | options)
