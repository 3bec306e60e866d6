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
    """ŷ(z, t) with the interface of diffusers: ``model(sample, timestep).sample``.

    Args:
        model: a model whose generator is that of a plain diffusion.
        steps: N, the number of training time steps of the scheduler.
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
        """Predict the data from latents ``(B, *event)`` at a time step, a number or ``(B,)``."""
        step = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device)
        level = self.model.process.level(step / (self.steps - 1), sample)
        prediction = self.model.reverse_process.curve(sample, level, 1.0).at(level)
        decoded = sample / expand(level.alpha, sample)
        prediction = torch.where(expand(level.t == 0, sample), decoded, prediction)
        return SimpleNamespace(sample=prediction) if return_dict else (prediction,)


def to_diffusers(
    model: NDM, scheduler: type, steps: int = 1000, **options: Any
) -> tuple[DiffusersModel, Any]:
    """Return a model for diffusers, and a scheduler that samples from it.

    Args:
        model: a model with a direct reverse process, or with F = x, and a variance-preserving
            schedule.
        scheduler: a class of diffusers that takes ``trained_betas`` and ``prediction_type``, such
            as ``DDPMScheduler``.
        steps: N, the number of training time steps of the scheduler.
        options: further arguments of the scheduler.

    Returns:
        The model in evaluation mode, and the scheduler. If F is an encoder, they sample latents,
        from which ``model.decoder.sample`` draws data.

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
    with torch.no_grad():
        time = torch.linspace(0, 1, steps, dtype=torch.float64)
        signal = model.schedule(time.to(model.like)).alpha.double().cpu() ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    betas = (1 - signal / before).clamp(0, 0.999999).tolist()
    parameters = inspect.signature(scheduler).parameters
    if not {"trained_betas", "prediction_type"} <= set(parameters):
        raise UserError(
            f"{scheduler.__name__} does not take trained_betas and prediction_type; use"
            " DDPMScheduler or DPMSolverMultistepScheduler"
        )
    settings = {"num_train_timesteps": steps, "trained_betas": betas, "prediction_type": "sample"}
    if "clip_sample" in parameters:
        settings["clip_sample"] = False
    return DiffusersModel(model, steps).eval(), scheduler(**settings | options)
