r"""Figures of samples and of the learned transformation over time.

In a figure of the transformation each column is a time t. Its rows show, for one example x,

.. math::
    F(x, t), \qquad z_t = \alpha_t F(x, t) + \sigma_t \epsilon, \qquad \hat x(z_t, t) .

Needs matplotlib (extra ``eval``). Images are enlarged by an integer factor, without smoothing.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ndm.errors import UserError, require
from ndm.model import DiffusionModel
from ndm.serialize import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)


def new_figure(width: float, height: float) -> "Figure":
    """Create an empty matplotlib figure; width and height are in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib.figure", "matplotlib", "eval")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def is_image(shape: Sequence[int]) -> bool:
    """Whether events of this shape are drawn as images; others are drawn as points."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_pixels(x: Tensor) -> np.ndarray:
    """Convert images ``(B, C, H, W)`` from [-1, 1], with clipping, to uint8 ``(B, H, W, 3)``.

    Raises:
        UserError: the shape is not that of gray or RGB images.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise UserError(
            f"a batch of shape {tuple(x.shape)} cannot be drawn as images; give (B, 1, H, W) or"
            " (B, 3, H, W)"
        )
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def image_grid(
    x: Tensor, columns: int | None = None, gap: int = 1, least_height: int = 48
) -> np.ndarray:
    """Arrange images in a grid, one uint8 array ``(H, W, 3)`` with each pixel enlarged to a square.

    Args:
        x: images ``(B, C, H, W)`` in [-1, 1].
        columns: images per row; by default the grid is about square.
        gap: white pixels between images, before enlarging.
        least_height: images are enlarged to at least this many pixels in height.
    """
    pixels = to_pixels(x)
    count, height, width, _ = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * (height + gap) + gap, column * (width + gap) + gap
        canvas[top : top + height, left : left + width] = image
    scale = max(1, -(-least_height // height))
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def write_samples(
    path: Path, x: Tensor, reference: Tensor | None = None, columns: int | None = None
) -> None:
    """Write a figure of samples as PNG.

    Images are shown in a grid, vectors in a histogram (D = 1) or a scatter plot of their first two
    dimensions.

    Args:
        path: the file.
        x: samples ``(B, *event)``; images in [-1, 1].
        reference: data to show next to samples of vectors.
        columns: images per row; by default the grid is about square.
    """
    if is_image(x.shape[1:]):
        require("PIL", "pillow", "data")
        from PIL import Image

        image = Image.fromarray(image_grid(x, columns))
        write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
        return
    panels = [("samples", x)] + ([("data", reference)] if reference is not None else [])
    figure = new_figure(3.4 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    limit = common_limit([points for _, points in panels])
    for axis, (title, points) in zip(axes, panels, strict=True):
        draw_points(axis, points, limit)
        axis.set_title(title)
    write_figure(path, figure)


def write_images(folder: Path, pixels: np.ndarray) -> None:
    """Write images to a new folder as PNG files ``000000.png``, ..., all of them or none.

    Args:
        folder: the folder.
        pixels: uint8 ``(N, 1, H, W)`` or ``(N, 3, H, W)``.

    Raises:
        UserError: the folder exists or cannot be created.
    """
    require("PIL", "pillow", "data")
    from PIL import Image

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            temporary = Path(name) / folder.name
            temporary.mkdir()
            for index, image in enumerate(pixels):
                array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
                Image.fromarray(array).save(temporary / f"{index:06d}.png")
            temporary.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; choose a new folder where you can"
            " write"
        ) from error


def common_limit(batches: Sequence[Tensor], share: float = 0.995, margin: float = 1.08) -> float:
    """Return half the side of a square around 0 for plots of several batches ``(B, D)``.

    The square contains ``share`` of the points of every batch, and is then enlarged by ``margin``.
    """
    radii = (points.detach().abs().flatten(1)[:, :2].amax(1) for points in batches)
    return margin * max(float(np.quantile(radius.cpu().numpy(), share)) for radius in radii)


def draw_points(axis: Any, points: Tensor, limit: float) -> None:
    """Draw vectors ``(B, D)`` on a matplotlib axis from -limit to limit.

    The plot is a histogram for D = 1, else a scatter plot of the first two dimensions.
    """
    values = points.detach().float().cpu().flatten(1).numpy()
    if values.shape[1] == 1:
        axis.hist(values[:, 0], bins=80, range=(-limit, limit), density=True, color="#30507a")
        axis.set(xlabel="x", ylabel="density")
        return
    axis.scatter(values[:, 0], values[:, 1], s=2, alpha=0.4, linewidths=0, color="#30507a")
    axis.set(
        xlabel="$x_1$", ylabel="$x_2$", xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal"
    )


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure atomically, in the format of the suffix, PNG without one."""
    kind = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))


@torch.no_grad()
def transform_over_time(
    model: DiffusionModel, x: Tensor, times: tuple[float, ...] = TIMES, seed: int = 0
) -> dict[str, Tensor]:
    """Compute F(x, t), z_t and x̂(z_t, t) at several times with the same noise.

    Returns:
        ``transformed``, ``latent`` and ``prediction``, each ``(len(times), B, *event)``.
    """
    device = next((p.device for p in model.parameters()), x.device)
    x = x.to(device)
    rows: dict[str, list[Tensor]] = {"transformed": [], "latent": [], "prediction": []}
    for time in times:
        generator = torch.Generator(device).manual_seed(seed)
        latent = model.noised(x, time, generator)
        rows["transformed"].append(model.transformed(x, time))
        rows["latent"].append(latent)
        rows["prediction"].append(model.predict(latent, time))
    return {name: torch.stack(parts) for name, parts in rows.items()}


LABELS = {"transformed": "$F(x,t)$", "latent": "$z_t$", "prediction": r"$\hat{x}(z_t,t)$"}


def write_transform(
    path: Path, model: DiffusionModel, x: Tensor, times: tuple[float, ...] = TIMES, seed: int = 0
) -> None:
    """Write :func:`transform_figure` as PNG or PDF."""
    write_figure(path, transform_figure(model, x, times, seed))


def transform_figure(
    model: DiffusionModel,
    x: Tensor,
    times: tuple[float, ...] = TIMES,
    seed: int = 0,
    show: Callable[[Tensor], Tensor] | None = None,
) -> "Figure":
    """Draw a figure of F(x, t), z_t and x̂(z_t, t) over time.

    Args:
        model: the model.
        x: examples ``(B, *event)``: two or three images, or many vectors.
        times: the times of the columns.
        seed: seed of the noise, which is the same at every time.
        show: maps a batch of the states to images; needed if the latents are not images.
    """
    states = transform_over_time(model, x, times, seed)
    if show is not None:
        with torch.no_grad():
            states = {
                name: torch.stack([show(at) for at in values]) for name, values in states.items()
            }
    images = is_image(states["latent"].shape[2:])  # latents may have another shape than the data
    height = 1.3 * 3 * x.shape[0] if images else 1.6 * 3
    figure = new_figure(1.25 * len(times) + 0.6, height + 0.3)
    draw_over_time(figure, states, times)
    return figure


def draw_over_time(
    figure: Any,
    states: Mapping[str, Tensor],
    times: Sequence[float],
    label_size: int = 13,
    title_size: int = 11,
) -> None:
    """Draw the result of :func:`transform_over_time`, a column per time and three rows per image.

    Args:
        figure: a matplotlib figure or subfigure.
        states: each ``(len(times), B, *event)``; a batch of vectors is drawn in one panel.
        times: the times of the columns.
        label_size: font size of the row labels, points.
        title_size: font size of the column titles, points.
    """
    first = next(iter(states.values()))
    images = is_image(states["latent"].shape[2:])
    groups = range(first.shape[1]) if images else range(1)
    axes = figure.subplots(3 * len(groups), len(times), squeeze=False)
    limit = 1.0
    if not images:
        limit = common_limit([values.flatten(0, 1) for values in states.values()])
    for group in groups:
        for row, (name, values) in enumerate(states.items()):
            for column, time in enumerate(times):
                axis = axes[3 * group + row][column]
                if images:
                    pixels = to_pixels(values[column, group : group + 1])[0]
                    axis.imshow(pixels, interpolation="nearest")
                else:
                    draw_points(axis, values[column], limit)
                    axis.set(xlabel="", ylabel="")
                axis.set_xticks([])
                axis.set_yticks([])
                if column == 0:
                    axis.set_ylabel(LABELS[name], fontsize=label_size)
                if row == 0 and group == 0:
                    axis.set_title(f"$t={time:g}$", fontsize=title_size)
