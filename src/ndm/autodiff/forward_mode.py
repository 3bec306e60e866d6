r"""Value and time derivative of a network in one pass, by forward-mode automatic differentiation.

.. math::
    (x, t) \mapsto \bigl(f(x, t),\; \partial_t f(x, t)\bigr)

This is one Jacobian-vector product with tangent 1 in t. Both results can be differentiated backward
in the parameters, in x and in t.

PyTorch's fused layer and instance norms give a correct derivative but a silently WRONG gradient
of that derivative, because their saved mean and deviation are treated as constants
(pytorch/pytorch#196700, #196699; measured in ``tests/autodiff``). So within :func:`time_derivative`
these norms run as plain formulas in every module. So does ``glu``, which has no second derivative;
attention takes its unfused path. Convolution, group norm and SiLU, the main operations of U-Nets,
have rules in :mod:`ndm.autodiff.rules` for speed; within another transform of torch.func they run
as plain formulas too.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ndm.autodiff.functorch import NOTHING, ONE_JVP, RULES, Nesting, nesting
from ndm.autodiff.rules import Convolution, GroupNorm, SiLU, standardized
from ndm.errors import ForwardModeError, one_line

Network = Callable[[Tensor, Tensor], Tensor]
"""Anything that maps ``(x, t)`` of shapes ``(B, *event)`` and ``(B,)`` to ``(B, *event)``."""


def time_derivative(
    network: Network, x: Tensor, t: Tensor, name: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`f(x, t)` and :math:`\partial_t f(x, t)` at fixed x, in one forward-mode pass.

    Both can be differentiated again if the network can: by autograd, and within ``grad``, ``vjp``,
    ``jacrev``, ``jvp``, ``jacfwd`` and ``vmap`` of torch.func, including this function itself (the
    second derivative in t). For networks in channels_last, such as :class:`ndm.nn.UNet`, ``vmap``
    directly over the inputs fails with or without this derivative, and so do gradients of several
    outputs together (``is_grads_batched``) of the derivative. Within
    ``torch.autograd.forward_ad.dual_level`` PyTorch has no second forward level: use
    ``torch.func.jvp`` there.

    Args:
        network: maps ``(B, *event)`` and ``(B,)`` to ``(B, *event)``; each example may depend on
            its own time only.
        x: ``(B, *event)``.
        t: ``(B,)``.
        name: name of the network in error messages; its class by default.

    Returns:
        Value and derivative, each ``(B, *event)``.

    Raises:
        ForwardModeError: the network has an operation that forward mode cannot differentiate, at
            all or within the transforms around this call; the message names the fix.
    """

    def at_time(time: Tensor) -> Tensor:
        return network(x, time)

    t = t.contiguous()  # tangents are written in place, which fails for an expanded tensor
    one = torch.ones_like(t)
    # Compiled layers of ndm.nn are plain formulas already; other networks are not compiled.
    if torch.compiler.is_compiling():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(at_time, (t,), (one,))  # type: ignore[return-value]
    around = nesting() or NOTHING
    try:
        with _plain_formulas():
            value, derivative = torch.func.jvp(at_time, (t,), (one,))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        # An error of the network itself is raised here, unchanged. Fused norms and attention may
        # fail within the transforms around this call.
        with (
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            contextlib.nullcontext() if around == NOTHING else _plain_formulas(),
        ):
            network(x, t)
        raise _explained(error, name or type(network).__name__, around) from error
    return value, derivative


def _explained(error: Exception, name: str, around: Nesting) -> ForwardModeError:
    what = f"the network {name} works but cannot be differentiated in t"
    reason = one_line(error, 160)
    if around == NOTHING:
        return ForwardModeError(
            f"{what} by forward-mode AD ({reason}); train in discrete time (steps=T), which"
            " needs no time derivative, or replace the operation: F.scaled_dot_product_attention"
            " for nn.MultiheadAttention and fused attention, group norm for batch norm, no"
            " torch.utils.checkpoint, only PyTorch operations"
        )
    outer = "forward_ad.dual_level"
    if around.transforms:
        outer = f"torch.func ({around.innermost.lower()} is the innermost)"
    return ForwardModeError(
        f"{what} within another transform, of {outer} ({reason}); if you can, take the outer"
        " derivative by torch.autograd.grad or torch.func.jvp, and pass a batch instead of vmap"
    )


@contextlib.contextmanager
def _plain_formulas() -> Iterator[None]:
    token = RULES.set(True)
    try:
        with _PlainFormulas(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        RULES.reset(token)


class _PlainFormulas(TorchFunctionMode):
    """Replaces the operations of ``_PLAIN`` by others that can be differentiated repeatedly."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _rules_apply() -> bool:
    """Whether the rules can be used, which have one forward level and no batching."""
    return nesting() == ONE_JVP


def _standardize(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * torch.rsqrt((centered * centered).mean(dims, keepdim=True) + eps)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(
    normal: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    if weight is not None:
        normal = normal * weight.reshape(shape)
    if bias is not None:
        normal = normal + bias.reshape(shape)
    return normal.to(dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    normal = _standardize(_full(input), list(range(-len(normalized_shape), 0)), eps)
    return _affine(normal, weight, bias, list(normalized_shape), input.dtype)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dtypes, devices = (torch.float32, torch.float64), ("cpu", "cuda")
    supported = input.dtype in dtypes and input.device.type in devices and input.numel()
    if _rules_apply() and supported:
        return GroupNorm.apply(input, weight, bias, num_groups, eps)[0]
    shape = [1, -1] + [1] * (input.dim() - 2)
    return _affine(standardized(_full(input), num_groups, eps), weight, bias, shape, input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        raise NotImplementedError(
            "batch norm in training mode makes each example depend on the times of all others"
        )
    return functional.batch_norm(
        input, running_mean, running_var, weight, bias, False, momentum, eps
    )


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return SiLU.apply(input) if _rules_apply() and not inplace else functional.silu(input, inplace)


def _convolution(dims: int, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def as_list(value: int | Sequence[int]) -> list[int]:
        return [value] * dims if isinstance(value, int) else list(value)

    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if not _rules_apply() or isinstance(padding, str) or input.dim() != dims + 2:
            return func(input, weight, bias, stride, padding, dilation, groups)
        return Convolution.apply(
            input, weight, bias, as_list(stride), as_list(padding), as_list(dilation), groups
        )

    return convolution


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    functional.instance_norm: _instance_norm,
    functional.batch_norm: _batch_norm,
    functional.glu: _glu,
    functional.silu: _silu,
    functional.conv1d: _convolution(1, functional.conv1d),
    functional.conv2d: _convolution(2, functional.conv2d),
    functional.conv3d: _convolution(3, functional.conv3d),
}
