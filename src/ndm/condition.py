r"""Conditions c: what is known of an example besides x, and how networks see it.

.. math::
    q(z_t|x, c) = N(\alpha_t F(x, t, c), \sigma_t^2 I), \qquad \hat x(z_t, t, c), \qquad
    -\log p(x|c) \le NELBO(x|c)

Every term of the bound is as before, with c given. Networks that can take it are called as
``network(x, t, c)``. The model is bound to a condition in one place, :meth:`ndm.NDM.given`.

One value of c, the **null**, means that nothing is known. Training replaces c by it with the
probability ``dropout``, so that one network has p(x|c) and p(x) (Ho & Salimans 2022). At the
optimum the bound on p(x|c) is lower than that on p(x) by the mutual information of x and c, at most
the entropy of c: log2(10)/784 bits/dim for the classes of MNIST. A gain above that is a leak.

=========================  ============================  ===========================================
class                      c, for B examples             as the network sees it
=========================  ============================  ===========================================
:class:`ClassCondition`    class indices ``(B,)``        int64 ``(B,)``; the null is ``num_classes``
:class:`VectorCondition`   numbers ``(B, D)``            ``(B, D + 1)``: the numbers, then 1;
                                                         the null is 0
:class:`ImageCondition`    images ``(B, C, H, W)``       ``(B, C + 1, H, W)``: the image, then ones;
                                                         the null is 0
:class:`MaskCondition`     (x, missing), both            ``(B, 2 C, ...)``: the known part of x,
                           ``(B, C, ...)``               then 1 where it is known; the null is 0
=========================  ============================  ===========================================

With masks the model is one of any part of x given any other part. Noise, F and every term of the
bound are those of the missing dimensions only,

.. math::
    -\log p(x_m|x_o) \le NELBO(x_m|x_o),

and the prediction has the known values in their places before it enters F.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ndm.errors import UserError, check_whole, describe_value
from ndm.parts import Part


class Condition(Part, ABC):
    """A kind of condition: its values, its null, and how often training drops it.

    Args:
        dropout: probability of the null in training; 0 means that there is no p(x).
    """

    name: str
    """The name in records."""
    argument: str
    """The argument by which networks of this library take a condition of this kind."""

    def __init__(self, dropout: float):
        super().__init__()
        number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
        if not (number and 0 <= dropout < 1):
            raise UserError(
                f"dropout={describe_value(dropout)}: give the probability, in [0, 1), that training"
                " drops the condition"
            )
        self.dropout = float(dropout)

    @property
    @abstractmethod
    def size(self) -> int:
        """What a network of this library needs as :attr:`argument`."""

    @property
    def has_null(self) -> bool:
        """Whether the model has p(x) too."""
        return self.dropout > 0

    def encode(self, c: object) -> Tensor:
        """Return c as the network sees it, ``(B, ...)``; None is the null, ``(1, ...)``.

        Raises:
            UserError: it is no condition of this kind.
        """
        if c is not None:
            return self._encode(c)
        if not self.has_null:
            raise UserError(
                "the model has no p(x), because its training never dropped the condition: give one"
                " (in Python model.given(c)), or train with model.condition.dropout above 0"
            )
        return self.null()

    @abstractmethod
    def _encode(self, c: object) -> Tensor:
        """Encode a condition that is not None."""

    @abstractmethod
    def null(self) -> Tensor:
        """Return the null, ``(1, ...)``, which broadcasts against encoded conditions."""

    def dropped(self, encoded: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Replace each condition by the null with the probability ``dropout``."""
        if not self.has_null:
            return encoded
        shape = (len(encoded), *([1] * (encoded.dim() - 1)))
        drop = torch.rand(shape, device=encoded.device, generator=generator) < self.dropout
        return torch.where(drop, self.null().to(encoded), encoded)

    @property
    def masks(self) -> bool:
        """Whether c is a part of the example itself."""
        return False

    def check_network(self, network: nn.Module) -> None:
        """Check that a network of this library takes conditions of this kind and size.

        Raises:
            UserError: it does not.
        """
        found = getattr(network, self.argument, self.size)
        if found != self.size:
            raise UserError(
                f"{type(network).__name__} has {self.argument}={found}, and the model's"
                f" {type(self).__name__} needs {self.argument}={self.size}"
            )


class ClassCondition(Condition):
    """The class of an example.

    Args:
        num_classes: K, the number of classes.
        dropout: probability of the null in training; 0 means that there is no p(x).
    """

    name, argument = "labels", "classes"

    def __init__(self, num_classes: int, dropout: float = 0.1):
        check_whole("num_classes", num_classes, 1)
        super().__init__(dropout)
        self.num_classes = num_classes

    @property
    def size(self) -> int:
        return self.num_classes

    def _encode(self, c: object) -> Tensor:
        """Encode class indices 0 ... K-1: an int, or ``(B,)``."""
        index = _tensor(c, "class indices")
        whole = not (index.dtype == torch.bool or index.is_floating_point() or index.is_complex())
        if not whole or index.dim() > 1:
            raise UserError(
                f"the condition is {_describe(index)}: give class indices, an int or a 1-D tensor"
                f" of ints from 0 to {self.num_classes - 1}"
            )
        index = index.long()
        outside = index[(index < 0) | (index >= self.num_classes)]
        if outside.numel():
            raise UserError(
                f"class {int(outside[0])} is not one of the {self.num_classes} classes: give"
                f" indices from 0 to {self.num_classes - 1}"
            )
        return index.reshape(-1)

    def null(self) -> Tensor:
        return torch.tensor([self.num_classes])


class VectorCondition(Condition):
    """A vector of numbers known of an example.

    Args:
        dims: D, its length.
        dropout: probability of the null in training; 0 means that there is no p(x).
    """

    name, argument = "vector", "condition_dims"

    def __init__(self, dims: int, dropout: float = 0.1):
        check_whole("dims", dims, 1)
        super().__init__(dropout)
        self.dims = dims

    @property
    def size(self) -> int:
        return self.dims

    def _encode(self, c: object) -> Tensor:
        """Encode numbers ``(B, D)``, or ``(D,)`` for every example."""
        vector = _finite(_tensor(c, "numbers"))
        vector = vector[None] if vector.dim() == 1 else vector
        if vector.dim() != 2 or vector.shape[1] != self.dims:
            raise UserError(
                f"the condition is {_describe(vector)}: give the numbers of each example,"
                f" (B, {self.dims})"
            )
        return torch.cat([vector, torch.ones_like(vector[:, :1])], 1)

    def null(self) -> Tensor:
        return torch.zeros(1, self.dims + 1)


class ImageCondition(Condition):
    """An image known of an example, of its height and width.

    Args:
        channels: C, the number of its channels.
        dropout: probability of the null in training; 0 means that there is no p(x).
    """

    name, argument = "image", "condition_channels"

    def __init__(self, channels: int, dropout: float = 0.1):
        check_whole("channels", channels, 1)
        super().__init__(dropout)
        self.channels = channels

    @property
    def size(self) -> int:
        return self.channels

    def _encode(self, c: object) -> Tensor:
        """Encode images ``(B, C, H, W)``, or ``(C, H, W)`` for every example."""
        image = _finite(_tensor(c, "images"))
        image = image[None] if image.dim() == 3 else image
        if image.dim() != 4 or image.shape[1] != self.channels:
            raise UserError(
                f"the condition is {_describe(image)}: give images (B, {self.channels}, H, W)"
            )
        return torch.cat([image, torch.ones_like(image[:, :1])], 1)

    def null(self) -> Tensor:
        return torch.zeros(1, self.channels + 1, 1, 1)


class MaskCondition(Condition):
    """A part of the example itself, any part.

    Training draws masks at random: each example has its own share of known dimensions. Of images,
    half of the masks are boxes that are missing or known; pixels have all their channels.

    Args:
        event_shape: shape of an example.
        dropout: probability in training that nothing is known.
    """

    name, argument = "mask", "masked"

    def __init__(self, event_shape: Sequence[int], dropout: float = 0.5):
        for size in event_shape:
            check_whole("event_shape", size, 1)
        super().__init__(dropout)
        self.event_shape = list(event_shape)

    @property
    def size(self) -> bool:
        return True

    @property
    def has_null(self) -> bool:
        return True

    @property
    def masks(self) -> bool:
        return True

    def _encode(self, c: object) -> Tensor:
        """Encode a pair of examples ``(B, *event)``, and of bools where they are missing."""
        if not isinstance(c, (tuple, list)) or len(c) != 2:
            raise UserError("the condition is a pair: give (x, missing), or call model.impute")
        x, missing = _tensor(c[0], "examples"), _tensor(c[1], "bools")
        if missing.dtype != torch.bool:
            raise UserError("missing: give a bool tensor, True where a value is missing")
        x = x if x.is_floating_point() else x.float()
        shape = (len(x), *self.event_shape)
        if x.shape != shape:
            raise UserError(
                f"the condition is {_describe(x)}: give examples (B, "
                f"{', '.join(map(str, self.event_shape))})"
            )
        try:
            known = (~missing).expand(shape).to(x)
        except RuntimeError as error:
            raise UserError(f"missing has shape {tuple(missing.shape)}: give {shape}") from error
        values = torch.where(known > 0, x, 0.0)
        return torch.cat([_finite(values), known], 1)

    def null(self) -> Tensor:
        first, *rest = self.event_shape
        return torch.zeros(1, 2 * first, *rest)

    def random(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return encoded conditions with random masks for examples ``(B, *event)``."""
        share = torch.rand(len(x), generator=generator, device=x.device)
        share = share.view(-1, *[1] * (x.dim() - 1))
        one = x[:, :1] if x.dim() == 4 else x
        known = torch.rand(one.shape, generator=generator, device=x.device) < share
        if x.dim() == 4:
            u = torch.rand(len(x), 6, generator=generator, device=x.device)
            inside = _box(u[:, :2], x.shape[2])[:, :, None] & _box(u[:, 2:4], x.shape[3])[:, None]
            boxes = inside ^ (u[:, 4] < 0.5)[:, None, None]
            known = torch.where((u[:, 5] < 0.5).view(-1, 1, 1, 1), boxes[:, None], known)
        known = known.expand_as(x).to(x)
        return torch.cat([x * known, known], 1)


def _box(ends: Tensor, size: int) -> Tensor:
    """Return which of ``size`` places lie between two random ends, ``(B, size)``."""
    low, high = (ends * (size + 1)).floor().sort(1).values.unbind(1)
    places = torch.arange(size, device=ends.device)
    return (places >= low[:, None]) & (places < high[:, None])


def _tensor(c: object, what: str) -> Tensor:
    try:
        return torch.as_tensor(c)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the condition is a {type(c).__name__}: give {what}") from error


def _finite(c: Tensor) -> Tensor:
    """Return numbers as floats.

    Raises:
        UserError: one is not finite.
    """
    if c.is_complex():
        raise UserError("the condition is complex: give real numbers")
    c = c if c.is_floating_point() else c.float()
    if not bool(c.isfinite().all()):
        raise UserError("the condition has values that are not finite; replace them")
    return c


def _describe(c: Tensor) -> str:
    return f"a tensor {tuple(c.shape)} of {str(c.dtype).removeprefix('torch.')}"
