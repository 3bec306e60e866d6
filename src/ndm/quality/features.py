r"""Feature networks: a network from images to features, its input format and its fingerprint.

.. math::
    x \in [-1, 1] \;\to\; x \;(\text{symmetric}), \quad (x + 1)/2 \;(\text{unit}), \quad
    \operatorname{round}(128 (x + 1) - \tfrac12) \;(\text{bytes}) .

On the models' grid of 256 values, x = (2k + 1)/256 - 1, the byte is k. Images are resized by
bilinear interpolation with antialiasing; without antialiasing FIDs are not reproducible (Parmar et
al. 2022).
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from ndm.data import EventDataset
from ndm.errors import UserError, check_choice, check_whole, one_line

Scale = Literal["bytes", "unit", "symmetric"]


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network and its input format.

    Raises:
        UserError: an argument is out of range.
    """

    module: nn.Module = field(repr=False)
    """Maps images ``(B, C, H, W)`` to features ``(B, d)``."""
    name: str
    """Name for tables and messages."""
    sha256: str
    """Fingerprint of weights and architecture, 64 hexadecimal digits."""
    dims: int
    """Number d of features."""
    scale: Scale = "symmetric"
    """Input values: ``bytes`` (uint8, 0 to 255), ``unit`` ([0, 1]) or ``symmetric`` ([-1, 1])."""
    size: int | None = None
    """Input height and width; None does not resize images."""
    channels: int | None = None
    """Input channels, to which gray images are repeated; None does not repeat."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_input(self.scale, self.size, self.channels)

    def prepare(self, x: Tensor) -> Tensor:
        """Convert images ``(B, C, H, W)`` from [-1, 1], with clipping, to the input format.

        Raises:
            UserError: x is not a batch of images, or has neither one channel nor as many as the
                network expects.
        """
        return _prepare(x, self.scale, self.size, self.channels)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor | EventDataset,
        batch_size: int = 256,
        progress: bool = False,
        examples: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the features of images, ``(N, d)``, float64 on the CPU.

        Args:
            images: images in [-1, 1], ``(N, C, H, W)``, or a split, which is read in batches.
            batch_size: images per batch.
            progress: show a progress bar.
            examples: the indices of the images to use; None for all.

        Raises:
            UserError: the images do not fit the network, or features are not finite.
        """
        check_whole("batch_size", batch_size, 1)
        indices = range(len(images)) if examples is None else examples
        first = next(iter([*self.module.parameters(), *self.module.buffers()]), torch.empty(0))
        parts = []
        starts = range(0, len(indices), batch_size)
        for start in tqdm(
            starts, desc="features", unit="batch", disable=not progress, delay=1, leave=False
        ):
            chosen = list(indices[start : start + batch_size])
            batch = images[chosen] if isinstance(images, Tensor) else images.__getitems__(chosen)
            part = _features(self.module, self.prepare(batch).to(first.device), self.name)
            parts.append(part.double().cpu())
        features = torch.cat(parts) if parts else torch.empty(0, self.dims, dtype=torch.float64)
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise UserError(
                f"the features of {bad} of {len(features)} images are not finite; check that the"
                " images are finite"
            )
        return features


def torchscript_features(
    path: str | Path,
    event_shape: tuple[int, ...],
    scale: Scale = "bytes",
    size: int | None = None,
    channels: int | None = 3,
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """Load a feature network from a TorchScript file.

    The defaults fit the usual Inception file. If ``forward`` has the argument ``return_features``
    (the Inception file of StyleGAN), it is set to True.

    Args:
        path: the file.
        event_shape: shape of the images, for a trial run.
        scale: input values, see :class:`FeatureNetwork`.
        size: input height and width; None if the network takes any size (the usual Inception file
            resizes images).
        channels: input channels; None does not repeat gray images.
        device: the device to run on.

    Raises:
        UserError: the file is missing or not TorchScript, or the network does not map such images
            to features ``(B, d)``.
    """
    _check_input(scale, size, channels)
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"there is no feature network {file}; give a TorchScript file, written by"
            " torch.jit.save"
        )
    try:
        # TorchScript is deprecated, but the standard networks are published in it.
        with warnings.catch_warnings(action="ignore"):
            module = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{file} is not a TorchScript file ({' '.join(str(error).split())[:120]}); save the"
            " network with torch.jit.save"
        ) from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if any(argument.name == "return_features" for argument in module.forward.schema.arguments):
        module = _ReturnFeatures(module)
    with torch.no_grad():
        trial = _prepare(torch.zeros(2, *event_shape), scale, size, channels).to(device)
        dims = _features(module, trial, file.name).shape[1]
    return FeatureNetwork(module, file.name, digest, dims, scale, size, channels)


class _ReturnFeatures(nn.Module):
    """Calls a network with ``return_features=True``."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.inner(x, return_features=True)
        return features


def _features(module: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return the features of prepared images, after checking their shape."""
    try:
        with warnings.catch_warnings(action="ignore"):
            features = module(x)
    except RuntimeError as error:
        reason = one_line(error)[-160:]
        raise UserError(
            f"the feature network {name} cannot take images of shape {tuple(x.shape[1:])},"
            f" {str(x.dtype).removeprefix('torch.')} ({reason}); set its input format: scale, size"
            " and channels"
        ) from error
    is_batch = isinstance(features, Tensor) and features.dim() >= 2 and len(features) == len(x)
    if not is_batch or features.flatten(1).shape[1] != features.shape[1]:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"the feature network {name} maps images {tuple(x.shape)} to {shape}; it must return"
            " features (B, d)"
        )
    return features.flatten(1)


def _prepare(x: Tensor, scale: Scale, size: int | None, channels: int | None) -> Tensor:
    if x.dim() != 4:
        raise UserError(
            f"feature networks take images (B, C, H, W), got a batch of shape {tuple(x.shape)}"
        )
    x = x.float().clamp(-1, 1)
    if channels is not None and x.shape[1] != channels:
        if x.shape[1] != 1:
            raise UserError(
                f"the images have {x.shape[1]} channels, the feature network expects {channels};"
                " only gray images can be repeated"
            )
        x = x.expand(-1, channels, -1, -1)
    if size is not None and x.shape[-2:] != (size, size):
        x = interpolate(x, size=(size, size), mode="bilinear", antialias=True).clamp(-1, 1)
    if scale == "bytes":
        return (128 * (x + 1) - 0.5).round().clamp(0, 255).byte()
    return (x + 1) / 2 if scale == "unit" else x


def _check_input(scale: str, size: int | None, channels: int | None) -> None:
    check_choice("scale", scale, get_args(Scale))
    for name, value in (("size", size), ("channels", channels)):
        if value is not None:
            check_whole(name, value, 1)
