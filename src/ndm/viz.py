r"""Figures: samples, and the learned transformation over time beside the noised latent and the
prediction.

For one example x each column is a time t; the rows show

.. math::
    F(x, t), \qquad z_t = \alpha_t F(x, t) + \sigma_t \epsilon, \qquad \hat x(z_t, t) .

Needs matplotlib (extra ``eval``). Images keep their own pixels: they are enlarged by whole numbers
and never smoothed.
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
    """An empty matplotlib figure, inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib.figure", "matplotlib", "eval")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def is_image(shape: Sequence[int]) -> bool:
    """Whether an event of this shape can be drawn as an image; everything else is drawn as points
    of its first dimensions.
    """
    return len(shape) == 3 and shape[0] in (1, 3)


def to_pixels(x: Tensor) -> np.ndarray:
    """Images ``(B, C, H, W)`` with values in [-1, 1] as uint8 ``(B, H, W, 3)``, values outside
    clipped.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise UserError(
            f"a batch of shape {tuple(x.shape)} cannot be drawn as images; images are (B, 1 or 3,"
            " H, W)"
        )
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def image_grid(
    x: Tensor, columns: int | None = None, gap: int = 1, least_height: int = 48
) -> np.ndarray:
    """A grid of images as one uint8 array ``(H, W, 3)``, each pixel enlarged to a whole square.

    Args:
        x: images ``(B, C, H, W)`` in [-1, 1].
        columns: images a row; about square by default.
        gap: white pixels between images, before enlarging.
        least_height: images are enlarged to at least this many pixels.
    """
    pixels = to_pixels(x)
    count, height, width, _ = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for index, image in enumerate(pixels):
        top, left = (
            (index // columns) * (height + gap) + gap,
            (index % columns) * (width + gap) + gap,
        )
        canvas[top : top + height, left : left + width] = image
    scale = max(1, -(-least_height // height))
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def write_samples(path: Path, x: Tensor, reference: Tensor | None = None) -> None:
    """Write samples as a PNG: a grid of images, a histogram (D = 1), or a scatter plot of the first
    two dimensions.

    Args:
        path: the file.
        x: samples ``(B, *event)``; images in [-1, 1].
        reference: data to show beside samples of vectors.
    """
    if is_image(x.shape[1:]):
        require("PIL", "pillow", "data")
        from PIL import Image

        image = Image.fromarray(image_grid(x))
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
    """Write each of some images uint8 ``(N, 1 or 3, H, W)`` as a PNG file ``000000.png``, ... of a
    new folder: all of them, or none.

    Raises:
        UserError: the folder cannot be made, or exists.
    """
    require("PIL", "pillow", "data")
    from PIL import Image

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            made = Path(name) / folder.name
            made.mkdir()
            for index, image in enumerate(pixels):
                Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
                    made / f"{index:06d}.png"
                )
            made.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; choose a new folder in a place that"
            " you can write to"
        ) from error


def common_limit(batches: Sequence[Tensor], share: float = 0.995, margin: float = 1.08) -> float:
    """Half the side of a square around 0 that holds this share of the points of every batch ``(B,
    D)``, and a margin.
    """
    return margin * max(
        float(np.quantile(points.detach().abs().flatten(1)[:, :2].amax(1).cpu().numpy(), share))
        for points in batches
    )


def draw_points(axis: Any, points: Tensor, limit: float) -> None:
    """Draw vectors ``(B, D)`` on a matplotlib axis from -limit to limit: a histogram for D = 1,
    else the first two dimensions.
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
    """Write a matplotlib figure atomically, in the format of the file's suffix."""
    write_atomically(
        path,
        lambda temporary: figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png"),
    )


@torch.no_grad()
def transform_over_time(
    model: DiffusionModel, x: Tensor, times: tuple[float, ...] = TIMES, seed: int = 0
) -> dict[str, Tensor]:
    """F(x, t), z_t and x̂(z_t, t) at several times with one noise; each ``(len(times), B,
    *event)``.
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
    """A figure of F(x, t), z_t and x̂ over time.

    Args:
        model: the model.
        x: examples ``(B, *event)``: two or three images, or many vectors.
        times: the columns.
        seed: seed of the noise, the same at every time.
        show: what makes images of a batch of latents, where the latents are none themselves.
    """
    states = transform_over_time(model, x, times, seed)
    if show is not None:
        with torch.no_grad():
            states = {
                name: torch.stack([show(at) for at in values]) for name, values in states.items()
            }
    images = is_image(states["latent"].shape[2:])  # latents may have another shape than the data
    figure = new_figure(
        1.25 * len(times) + 0.6, 1.3 * 3 * x.shape[0] + 0.3 if images else 1.6 * 3 + 0.3
    )
    draw_over_time(figure, states, times)
    return figure


def draw_over_time(
    figure: Any,
    states: Mapping[str, Tensor],
    times: Sequence[float],
    label_size: int = 13,
    title_size: int = 11,
) -> None:
    """Draw what :func:`transform_over_time` gives into a figure or a part of one: a column for each
    time, three rows for each image.

    Args:
        figure: a matplotlib figure or subfigure.
        states: ``(len(times), B, *event)`` each; of vectors all are drawn in one panel.
        times: the columns.
        label_size: size of the words beside the rows, points.
        title_size: size of the words above the columns, points.
    """
    first = next(iter(states.values()))
    images = is_image(states["latent"].shape[2:])
    groups = range(first.shape[1]) if images else range(1)
    axes = figure.subplots(3 * len(groups), len(times), squeeze=False)
    limit = (
        common_limit([values.flatten(0, 1) for values in states.values()]) if not images else 1.0
    )
    for group in groups:
        for row, (name, values) in enumerate(states.items()):
            for column, time in enumerate(times):
                axis = axes[3 * group + row][column]
                if images:
                    axis.imshow(
                        to_pixels(values[column, group : group + 1])[0], interpolation="nearest"
                    )
                else:
                    draw_points(axis, values[column], limit)
                    axis.set(xlabel="", ylabel="")
                axis.set_xticks([])
                axis.set_yticks([])
                if column == 0:
                    axis.set_ylabel(LABELS[name], fontsize=label_size)
                if row == 0 and group == 0:
                    axis.set_title(f"$t={time:g}$", fontsize=title_size)
