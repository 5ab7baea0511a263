"""The drawings of the notebooks: each function takes arrays and shows one figure.

The notebooks compute; this file chooses colors, axes and labels. It explains nothing of the model.

    from notebooks import plots

    plots.use_style()
    plots.image_row(images, titles)

Images are uint8 or float arrays [H, W, 3]. Every array may also be a tensor on the CPU.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from IPython import display
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter
from numpy.typing import ArrayLike
from PIL import Image

# The palette of Okabe and Ito, which people with any color vision can tell apart.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
RED = "#D55E00"
SKY = "#56B4E9"
LIGHT_GRAY = "#DDDDDD"
LIGHT_BLUE = "#D9E8F2"
LIGHT_ORANGE = "#FBE8C0"
SERIES = (BLUE, ORANGE, GREEN, PINK)

AXIS_NAMES = ("time", "height", "width")  # the three positions of M-RoPE
AXIS_COLORS = (ORANGE, BLUE, GREEN)
AXIS_LINES = ("-", "--", ":")

PNG_COLORS = 256  # a palette keeps the notebooks small


def use_style() -> None:
    """Set the style of all figures of a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "image.interpolation": "nearest",
            "legend.frameon": False,
        }
    )


def show(figure: Figure) -> None:
    """Show a finished figure as the output of the cell, and close it."""
    full_color = io.BytesIO()
    figure.savefig(full_color, bbox_inches="tight")
    plt.close(figure)
    palette = io.BytesIO()
    Image.open(full_color).convert("RGB").quantize(PNG_COLORS).save(palette, "png")
    display.display(display.Image(palette.getvalue()))


def visible(token: str) -> str:
    """Return the text of a token with its spaces and line feeds visible: ␣ and ⏎."""
    return token.replace(" ", "␣").replace("\n", "⏎")


def aspect_ratios(images: Sequence[ArrayLike]) -> list[float]:
    """Return width / height of each image."""
    return [np.shape(image)[1] / np.shape(image)[0] for image in images]


def outline(axis: Axes, left: float, top: float, side: float, color: str) -> None:
    """Outline a square of an image."""
    axis.add_patch(plt.Rectangle((left, top), side, side, fill=False, edgecolor=color, lw=1.4))


def image_row(images: Sequence[ArrayLike], titles: Sequence[str], width: float = 9.5) -> None:
    """Show images in a row, all equally high. width: of the figure, in inches."""
    images = [np.asarray(image) for image in images]
    ratios = aspect_ratios(images)
    lines = max(title.count("\n") + 1 for title in titles)
    height = width / sum(ratios) + 0.25 + 0.15 * lines
    figure, axes = plt.subplots(1, len(images), figsize=(width, height), width_ratios=ratios)
    for axis, image, title in zip(np.atleast_1d(axes), images, titles, strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    show(figure)


# ---------------------------------------------------------------------------------------- 1: pixels
def token_maps(
    large_sides: ArrayLike, large: ArrayLike, small_sides: ArrayLike, small: ArrayLike
) -> None:
    """Draw the number of tokens of every image size: of large images, and of small ones, magnified.

    sides: the heights and widths in pixels [n]; tokens [n, n], NaN where a size is refused.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.3))
    token_map(axes[0], large_sides, large, Normalize(0, 1280), (0, 320, 640, 960, 1280))
    token_map(axes[1], small_sides, small, LogNorm(4, 81), (4, 9, 16, 36, 81))
    axes[0].set_title("every size up to 2400 pixels")
    axes[1].set_title("the lower left corner")
    mark_size(axes[0], 480, 640, "white")
    mark_size(axes[0], 720, 1280, "black")
    mark_size(axes[0], 1080, 1920, "black")
    for rows in range(2, 9):
        for columns in range(2, 9):
            tokens = rows * columns
            color = "black" if tokens > 16 else "white"
            place = (columns * 28, rows * 28)
            axes[1].annotate(str(tokens), place, ha="center", va="center", fontsize=7, color=color)
    show(figure)


def token_map(
    axis: Axes, sides: ArrayLike, tokens: ArrayLike, norm: Normalize, ticks: Sequence[int]
) -> None:
    """Draw one map of `token_maps`."""
    extent = (sides[0], sides[-1], sides[0], sides[-1])
    image = axis.imshow(tokens, origin="lower", extent=extent, norm=norm, cmap="cividis")
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.8, label="tokens")
    bar.set_ticks(ticks, labels=ticks)
    bar.minorticks_off()
    axis.set(xlabel="width of the image, pixels", ylabel="height, pixels")


def mark_size(axis: Axes, height: int, width: int, color: str) -> None:
    """Mark one image size in a map."""
    axis.plot(width, height, "o", color="white", markeredgecolor="black")
    axis.annotate(
        f"{height} × {width}",
        (width, height),
        (0, -13),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=color,
    )


def patch_grid(axis: Axes, image: ArrayLike) -> None:
    """Draw an image with thin lines around patches (14 pixels), thick ones around tokens (28)."""
    height, width = np.shape(image)[:2]
    axis.imshow(image, extent=(0, width, height, 0))
    for side, line_width in ((14, 0.4), (28, 1.6)):
        style = {"color": "black", "lw": line_width, "alpha": 0.75}
        axis.vlines(np.arange(0, width + 1, side), 0, height, **style)
        axis.hlines(np.arange(0, height + 1, side), 0, width, **style)
    axis.set(xticks=range(0, width + 1, 28), yticks=range(0, height + 1, 28))
    axis.tick_params(labelsize=7)
    axis.spines[:].set_visible(False)


def patch_grids(images: Sequence[ArrayLike], titles: Sequence[str]) -> None:
    """Draw images on one scale, each with its grid of patches and tokens."""
    widths = [np.shape(image)[1] for image in images]
    figure, axes = plt.subplots(1, len(images), figsize=(9.5, 3.3), width_ratios=widths)
    for axis, image, title in zip(axes, images, titles, strict=True):
        patch_grid(axis, image)
        axis.set_title(title, fontsize=8)
    axes[0].set_ylabel("pixels")
    show(figure)


def patch_order(image: ArrayLike, places: ArrayLike) -> None:
    """Number the patches of an image in the order of pixel_values, and join them in that order.

    places [N, 2]: row and column of each patch, counted in patches.
    """
    figure, axis = plt.subplots(figsize=(8.4, 4))
    patch_grid(axis, (np.asarray(image) // 2 + 127).astype(np.uint8))
    y, x = np.asarray(places).T * 14 + 7  # the centers of the patches
    for start in range(0, len(x), 4):
        axis.plot(x[start : start + 4], y[start : start + 4], color=BLUE, lw=1.4, alpha=0.6)
        axis.plot(x[start + 3 : start + 5], y[start + 3 : start + 5], color=RED, lw=0.7, ls=":")
    for number in range(len(x)):
        axis.text(x[number], y[number], number, ha="center", va="center", fontsize=8)
    axis.set(xlabel="pixels", ylabel="pixels")
    axis.set_title("rows of pixel_values: blue within a token, dotted from token to token")
    show(figure)


def accuracy_by_tokens(tokens: ArrayLike, accuracies: ArrayLike, limits: Sequence[int]) -> None:
    """Draw accuracies (0 to 1) over the mean number of tokens of an image, with its limit."""
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    axis.plot(tokens, accuracies, "o-", color=BLUE)
    for x, y, limit in zip(tokens, accuracies, limits, strict=True):
        label = f"≤ {limit}"
        axis.annotate(label, (x, y), (5, -11), textcoords="offset points", fontsize=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set(xlabel="mean tokens of an image (labels: the limits)", ylabel="exactly right")
    axis.set(ylim=(-0.08, 1.05), xlim=(0, None), title="descriptions, by max_pixels")
    show(figure)


def flops_by_tokens(tokens: ArrayLike, parts: Mapping[str, ArrayLike], marked: int) -> None:
    """Stack the floating-point operations of the parts over the number of tokens; mark one."""
    figure, axis = plt.subplots(figsize=(6.5, 3))
    values = [np.asarray(flops) / 1e12 for flops in parts.values()]
    axis.stackplot(tokens, *values, labels=parts, colors=SERIES[: len(values)], alpha=0.85)
    axis.legend(loc=(0.14, 0.68))
    axis.set(xlabel="tokens of the image", ylabel="TFLOP", title="compute before the first token")
    axis.set(xlim=(0, tokens[-1]), ylim=(0, None))
    axis.axvline(marked, color="black", lw=0.8, ls="--")
    label = f"{marked:,}: the default"
    axis.text(marked + 120, axis.get_ylim()[1] * 0.4, label, rotation=90, va="center", fontsize=8)
    show(figure)


# ---------------------------------------------------------------------------------------- 2: vision
def signed_image(axis: Axes, values: ArrayLike, largest: float = 1.0):
    """Draw values [H, W] from -largest to largest, 0 in white; return the image for a color bar."""
    return axis.imshow(values, cmap="PuOr", vmin=-largest, vmax=largest)


def filters_and_responses(filters: ArrayLike, responses: ArrayLike) -> None:
    """Draw 24 filters [24, 14, 14, 3], gray is 0, and responses [gh, gw, n] of the first n."""
    sheet = np.ones((4 * 16, 6 * 16, 3))
    for i, tile in enumerate(np.asarray(filters)):
        y, x = divmod(i, 6)
        scaled = 0.5 + 0.5 * tile / np.abs(tile).max()
        sheet[y * 16 + 1 : y * 16 + 15, x * 16 + 1 : x * 16 + 15] = scaled
    responses = np.asarray(responses)
    count = responses.shape[2]
    figure, axes = plt.subplots(1, count + 1, figsize=(10, 2.5), width_ratios=[1.3] + [1.4] * count)
    axes[0].imshow(sheet)
    axes[0].set_title("24 filters (gray is 0)")
    for i in range(count):
        signed_image(axes[i + 1], responses[:, :, i], np.abs(responses[:, :, i]).max())
        axes[i + 1].set_title(f"response of filter {i + 1}")
    for axis in axes:
        axis.axis("off")
    show(figure)


def phase_images(images: Mapping[str, ArrayLike], columns: int) -> None:
    """Draw images of cosines [H, W] by title, so many in a row."""
    rows = len(images) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(10, 1.6 * rows))
    for axis, (title, cosine) in zip(axes.flat, images.items(), strict=True):
        drawn = signed_image(axis, cosine)
        axis.set_title(title)
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="cos(angle)")
    show(figure)


def rope_similarity(similarity: ArrayLike) -> None:
    """Draw dot products [H, W] of all patches with the middle one, and three cuts through them."""
    similarity = np.asarray(similarity)
    height, width = similarity.shape
    x = np.arange(width) - width // 2
    y = np.arange(height) - height // 2
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.7))
    drawn = signed_image(left, similarity)
    figure.colorbar(drawn, ax=left, label="q · k / D")
    left.set(
        title="dot product with the patch in the middle", xlabel="x, patches", ylabel="y, patches"
    )
    right.plot(x, similarity[height // 2], color=BLUE, label="horizontal (same row)")
    vertical = similarity[:, width // 2]
    right.plot(y, vertical, color=ORANGE, ls="--", label="vertical (same column)")
    diagonal = similarity[np.arange(height), y + width // 2]
    right.plot(y, diagonal, color=GREEN, ls=":", label="diagonal (both)")
    right.set(xlabel="distance, patches", ylabel="q · k / D", title="near patches are favored")
    right.set_ylim(0.3, 1.02)
    right.legend(fontsize=8, loc="lower right")
    show(figure)


def head_measures(measures: Mapping[str, ArrayLike], uniform: Mapping[str, float]) -> None:
    """Draw measures [depth, heads] by name; uniform: each measure's value for uniform attention."""
    figure, axes = plt.subplots(1, len(measures), figsize=(10, 2.4))
    for axis, (name, values) in zip(axes, measures.items(), strict=True):
        depth, heads = np.shape(values)
        drawn = axis.imshow(values, cmap="cividis")
        figure.colorbar(drawn, ax=axis)
        axis.set_title(f"{name}\n(uniform attention: {uniform[name]:.2g})")
        axis.set(xlabel="head", ylabel="block", xticks=range(heads), yticks=range(depth))
    show(figure)


def attention_maps(
    image: ArrayLike,
    maps: Mapping[str, Mapping[str, ArrayLike]],
    queries: Mapping[str, Sequence[tuple[int, int]]],
) -> None:
    """Draw attention maps over the contours of an image.

    maps: by row name and column title, each [gh, gw]; queries: by row name, the (row, column) of
    the patches whose attention it is.
    """
    columns = len(next(iter(maps.values())))
    figure, axes = plt.subplots(len(maps), columns, figsize=(9, 4.9))
    brightness = np.asarray(image).mean(-1) / 255
    for row, (name, row_maps) in zip(axes, maps.items(), strict=True):
        for axis, (title, weights) in zip(row, row_maps.items(), strict=True):
            weights = np.asarray(weights)
            height, width = np.array(weights.shape) * 14
            # The square root, so that small weights are visible, too.
            axis.imshow(weights**0.5, extent=(0, width, height, 0), cmap="Oranges", vmin=0)
            style = {"colors": "black", "linewidths": 0.7}
            axis.contour(brightness, levels=[0.8], extent=(0, width, 0, height), **style)
            for y, x in queries[name]:
                outline(axis, x * 14 + 1, y * 14 + 1, 12, BLUE)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{title}\n(at most {weights.max():.0%} on one patch)", fontsize=8)
        row[0].set_ylabel(f"queries: {name}")
    show(figure)


def slice_isolation(frames: Sequence[ArrayLike], mask: ArrayLike, changes: ArrayLike) -> None:
    """Draw the first frame of each slice, the attention mask [N, N], and the changes [slices]."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), width_ratios=[2.2, 1, 1.1])
    frames = [np.asarray(frame) for frame in frames]
    width = frames[0].shape[1]
    axes[0].imshow(np.concatenate(frames, axis=1))
    labels = [f"slice {i}" for i in range(len(frames))]
    ticks = [width * (i + 0.5) for i in range(len(frames))]
    axes[0].set_xticks(ticks, labels=labels)
    axes[0].set(title="the first frame of each slice", yticks=[])
    axes[1].imshow(mask, cmap="Blues", vmax=1.4)
    axes[1].set(title="attention mask", xlabel="key: patch", ylabel="query: patch")
    largest = int(np.argmax(changes))
    colors = [BLUE] * len(frames)
    colors[largest] = ORANGE
    axes[2].bar(range(len(frames)), changes, color=colors)
    axes[2].set(
        title=f"after a change in slice {largest}", xlabel="slice", xticks=range(len(frames))
    )
    axes[2].set_ylabel("mean change of a token")
    show(figure)


def flops_by_seconds(seconds: ArrayLike, parts: Mapping[str, ArrayLike], title: str) -> None:
    """Draw floating-point operations over the length of a video, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    lines = ("--", ":", "-")
    for (name, flops), color, line in zip(parts.items(), (RED, "black", BLUE), lines, strict=True):
        axis.loglog(seconds, np.asarray(flops) / 1e12, color=color, ls=line, label=name)
    axis.set(xlabel="length of the video, seconds (2 frames each)", ylabel="TFLOP", title=title)
    axis.legend()
    show(figure)


def token_similarity(
    image: ArrayLike, similarities: Mapping[str, ArrayLike], tokens: Mapping[str, int]
) -> None:
    """Draw an image, and by name the similarity [h, w] of its tokens to the one of that index."""
    figure, axes = plt.subplots(1, len(similarities) + 1, figsize=(10, 2.2))
    axes[0].imshow(image)
    axes[0].set_title("the image")
    for axis, (name, similarity) in zip(axes[1:], similarities.items(), strict=True):
        drawn = signed_image(axis, similarity)
        row, column = divmod(tokens[name], np.shape(similarity)[1])
        outline(axis, column - 0.5, row - 0.5, 1, "black")
        axis.set_title(f"similar to: {name}")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, label="cosine")
    show(figure)


# ------------------------------------------------------------------------------------- 3: positions
Part = int | tuple[int, int, int]  # so many text tokens, or the (T, H, W) of an image or a video


def part_color(part: Part) -> str:
    """Return the color of a part of a sequence: text, image or video."""
    if isinstance(part, int):
        return "white"
    return LIGHT_BLUE if part[0] == 1 else LIGHT_ORANGE


def position_layout(parts: Sequence[Part], positions: ArrayLike) -> None:
    """Draw the tokens of a sequence with their positions [3, S], as grids and as three curves."""
    positions = np.asarray(positions)
    figure, (grids, curves) = plt.subplots(2, 1, figsize=(9.5, 5))
    remaining = iter(positions.T)
    left = 0.0
    for part in parts:
        left = draw_part(grids, part, remaining, left)
    grids.set(
        xlim=(-0.2, left), ylim=(2, -2.9), title="(time, height, width) of each token; white: text"
    )
    grids.axis("off")
    position_curves(curves, positions)
    start = 0
    for part in parts:
        count = int(np.prod(part))
        curves.axvspan(start - 0.5, start + count - 0.5, color=part_color(part), zorder=0)
        start += count
    curves.set(xlabel="token", ylabel="position", title="the three rows of position_ids")
    curves.legend(loc="upper left")
    show(figure)


def draw_part(axis: Axes, part: Part, positions: Sequence[ArrayLike], left: float) -> float:
    """Draw the tokens of one part from x = left on; return where the next part begins."""
    slices, height, width = (1, 1, part) if isinstance(part, int) else part
    for t in range(slices):
        for y in range(height):
            for x in range(width):
                place = (left + x, y - height / 2)
                color = part_color(part)
                axis.add_patch(
                    plt.Rectangle(place, 1, 1, facecolor=color, edgecolor="black", lw=0.6)
                )
                label = ",".join(str(position) for position in next(positions))
                center = (place[0] + 0.5, place[1] + 0.5)
                axis.annotate(label, center, ha="center", va="center", fontsize=6)
        if not isinstance(part, int):
            label = f"video, t = {t}" if slices > 1 else f"image\n1×{height}×{width}"
            top = (left + width / 2, -height / 2 - 0.15)
            axis.annotate(label, top, ha="center", va="bottom", fontsize=8)
        left += width + 0.25
    return left + 0.25


def position_curves(axis: Axes, positions: ArrayLike) -> None:
    """Draw positions [3, S] as three curves."""
    for i, name in enumerate(AXIS_NAMES):
        style = {"color": AXIS_COLORS[i], "ls": AXIS_LINES[i], "lw": 1.6}
        axis.plot(positions[i], label=name, **style)


def rotation_by_pair(
    pair_axes: ArrayLike, inv_freq: ArrayLike, distance: int, longest_context: int, title: str
) -> None:
    """Draw the period of each pair of a head, and its angle between positions `distance` apart.

    pair_axes [D / 2]: 0 time, 1 height, 2 width; inv_freq [D / 2]: radians per position.
    """
    pair_axes = np.asarray(pair_axes)
    inv_freq = np.asarray(inv_freq)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.1))
    for i, name in enumerate(AXIS_NAMES):
        pairs = np.flatnonzero(pair_axes == i)
        style = {"color": AXIS_COLORS[i], "ms": 4, "label": name}
        left.semilogy(pairs, 2 * np.pi / inv_freq[pairs], "o", **style)
        if name != "time":
            right.semilogy(pairs, distance * inv_freq[pairs], "o", **style)
    left.axhline(longest_context, color="black", lw=0.8, ls="--")
    left.text(0, longest_context * 1.25, "longest context", fontsize=8)
    left.set(xlabel="pair", ylabel="positions per full rotation")
    left.set_title(f"{title}: period of each pair")
    left.legend(loc="lower right")
    right.axhline(1, color="black", lw=0.8, ls="--")
    right.text(pair_axes.argmax(), 1.15, "1 radian", fontsize=8, ha="right")
    right.set(xlabel="pair", ylabel="angle, radians")
    right.set_title(f"{title}: rotation across {distance + 1} rows or columns")
    right.legend(loc="lower left")
    show(figure)


def decode_positions(position_ids: ArrayLike, new_tokens: int, delta: int) -> None:
    """Draw the positions [3, S] of a prompt and those of new tokens after it, right and wrong."""
    figure, axis = plt.subplots(figsize=(7.5, 3))
    position_curves(axis, position_ids)
    length = np.shape(position_ids)[1]
    n = np.arange(length, length + new_tokens)
    axis.plot(n, n + delta, ".", color="black", label="new tokens: n + delta")
    axis.plot(n, n, ".", color=RED, label="wrong: n")
    axis.set(xlabel="token n", ylabel="position", title="an image, a question and the answer")
    axis.legend()
    show(figure)


def accuracy_by_variant(accuracies: Mapping[str, Sequence[float]], tasks: Sequence[str]) -> None:
    """Draw bars of accuracies (0 to 1) by variant, one bar for each task."""
    figure, axis = plt.subplots(figsize=(8.5, 3.4))
    y = np.arange(len(accuracies))
    for i, task in enumerate(tasks):
        values = [100 * row[i] for row in accuracies.values()]
        bars = axis.barh(y + 0.2 * i, values, height=0.18, color=SERIES[i], label=task)
        axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axis.set_yticks(y + 0.3, list(accuracies))
    axis.invert_yaxis()
    axis.set(xlabel="answers exactly right, %", xlim=(0, 108))
    axis.set_title("one trained model, modified positions")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(figure)


def positions_after_video(positions: Mapping[str, ArrayLike], before: int, after: int) -> None:
    """Draw positions [3, S] of text, video, text by rule; before, after: counts of text tokens."""
    figure, axes = plt.subplots(1, len(positions), figsize=(10, 3), sharey=True)
    for axis, (title, rows) in zip(axes, positions.items(), strict=True):
        rows = np.asarray(rows)
        first = rows.shape[1] - after  # of the text after the video
        position_curves(axis, rows)
        axis.axvspan(before - 0.5, first - 0.5, color=LIGHT_ORANGE, zorder=0)
        axis.plot(range(first, rows.shape[1]), rows[0, first:], "o", color="black", ms=4)
        step = rows[0, first] - rows[0, :first].max()
        axis.annotate(
            f"first text token: {step:+} from\nthe last slice in time",
            (first, rows[0, first]),
            (50, 12.5),
            fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.6},
        )
        axis.set(xlabel="token", title=title)
    axes[0].set_ylabel("position")
    axes[0].legend(loc="upper left", fontsize=8)
    show(figure)


def distance_by_slices(slices: Sequence[int], distances: ArrayLike, threshold: int) -> None:
    """Draw the distance of two distributions over the number of slices; mark where it may begin."""
    figure, axis = plt.subplots(figsize=(6.5, 2.5))
    axis.plot(slices, distances, "o-", color=BLUE)
    axis.axvline(threshold, color="black", lw=0.8, ls="--")
    axis.text(threshold + 0.1, max(distances) * 0.9, "T = max(H, W)", fontsize=8)
    axis.set(
        xlabel="slices of the video, T", ylabel="total variation", ylim=(0, None), xticks=slices
    )
    axis.set_title("distance of next-token probabilities under the two rules")
    show(figure)


# --------------------------------------------------------------------------------------- 4: decoder
def layer_ticks(axis: Axes, layers: int) -> None:
    """Label the x axis with the embedding and the layers after it."""
    axis.set_xticks(range(layers + 1), ["embedding", *range(1, layers + 1)])
    axis.set_xlabel("after layer")


def residual_norms(norms: Mapping[str, ArrayLike]) -> None:
    """Draw the root mean square of vectors by group: [layers + 1, tokens], their mean and range."""
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    for (name, values), color in zip(norms.items(), SERIES, strict=False):
        values = np.asarray(values)
        steps = range(len(values))
        axis.fill_between(steps, values.min(1), values.max(1), color=color, alpha=0.2, lw=0)
        label = f"{values.shape[1]} {name} tokens: mean and range"
        axis.plot(steps, values.mean(1), "o-", color=color, label=label)
    axis.axhline(1, color="black", ls=":", lw=1, label="after the norm, before its weights")
    axis.set(ylabel="root mean square of a vector", yscale="log")
    layer_ticks(axis, len(values) - 1)
    axis.legend()
    show(figure)


def head_groups(models: Mapping[str, tuple[int, int, int]]) -> None:
    """Draw which query heads share a key/value head.

    models: (query heads, key/value heads, width) by name.
    """
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 1.15 * len(models)))
    for axis, (name, (heads, groups, width)) in zip(axes, models.items(), strict=True):
        share = heads // groups
        for head in range(heads):
            group = head // share
            color = SERIES[group % 4]
            middle = (group + 0.5) * share
            axis.add_patch(plt.Rectangle((head + 0.08, 2), 0.84, 0.84, color=color))
            axis.plot([head + 0.5, middle], [2, 0.9], color=color, lw=0.8)
            axis.add_patch(plt.Rectangle((middle - 0.45, 0), 0.9, 0.9, color=color))
        middle = heads / 2
        half = max(heads, 14) / 2 + 0.2
        axis.set(xlim=(middle - half, middle + half), ylim=(-0.3, 3.1))
        axis.axis("off")
        title = f"{name}: {heads} query heads, {groups} key/value heads of width {width}"
        axis.set_title(f"{title}, {share} in a group", fontsize=10, loc="left", pad=2)
    axes[0].text(-5.1, 2.2, "queries")
    axes[0].text(-5.1, 0.2, "keys, values")
    show(figure)


def decoder_attention(image: ArrayLike, weights: ArrayLike, group_size: int) -> None:
    """Draw attention to an image, [layers, heads, h, w], over the contours of it, [H, W] gray."""
    weights = np.asarray(weights)
    layers, heads, h, w = weights.shape
    size = (7, 7 * layers / heads * h / w * 1.25)
    figure, axes = plt.subplots(layers, heads, figsize=size, squeeze=False)
    x = np.linspace(0, w, np.shape(image)[1])
    y = np.linspace(0, h, np.shape(image)[0])
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer, head]
            axis.imshow(weights[layer, head], cmap="inferno", extent=(0, w, h, 0), vmin=0)
            axis.contour(x, y, image, levels=[0.75], colors="white", linewidths=0.8)
            axis.set(xticks=[], yticks=[])
            color = SERIES[head // group_size % 4]
            title = f"head {head}, {weights[layer, head].sum():.0%}"
            axis.set_title(title, fontsize=8, color=color, pad=3)
        axes[layer, 0].set_ylabel(f"layer {layer + 1}")
    figure.suptitle(
        "White: contours of the image. Percent: share of the attention on the image.\n"
        "Heads with titles in one color share keys.",
        fontsize=9,
    )
    show(figure)


def cache_growth(keys: ArrayLike, prompt: int, answer_tokens: Sequence[int]) -> None:
    """Draw which attention scores each call computes, and the KV cache as it fills.

    keys [D, S]: of one head, of a prompt of so many tokens and its answer; answer_tokens: after how
    many tokens of the answer to draw the cache.
    """
    keys = np.asarray(keys)
    total = keys.shape[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9), width_ratios=(1, 1.35))
    calls = np.full((total, total), np.nan)  # 0: prefill; 1 and 2 in turn: decode steps
    for query in range(total):
        step = query - prompt
        calls[query, : query + 1] = 1 + step % 2 if step >= 0 else 0
    left.imshow(calls, cmap=ListedColormap([BLUE, ORANGE, "#F7D08A"]))
    left.set(xlabel="key: token number", ylabel="query: token number")
    left.set_title("the scores that each call computes")
    left.text(prompt * 0.97, prompt * 0.3, "prefill:\none call", color=BLUE, ha="right")
    left.text(total * 0.98, prompt * 0.75, "decode:\none row\na call", color=RED, ha="right")
    for number, tokens in enumerate(answer_tokens):
        bottom = (len(answer_tokens) - 1 - number) * 1.25
        filled = keys.copy()
        filled[:, prompt + tokens :] = np.nan
        extent = (0, total, bottom, bottom + 1)
        right.imshow(filled, cmap="RdBu", vmin=-4, vmax=4, extent=extent, aspect="auto")
        right.add_patch(plt.Rectangle((0, bottom), total, 1, fill=False, lw=0.8))
        label = f"after {tokens} tokens of the answer: {prompt + tokens} of {total} columns"
        right.text(1, bottom + 1.03, label, fontsize=8)
    right.axvline(prompt, color="black", lw=1, ls=":")
    right.set(xlim=(0, total), ylim=(-0.05, 1.25 * len(answer_tokens) + 0.05), yticks=[])
    right.set(
        xlabel="token number (dotted: end of the prompt)", title="keys in the cache, one head"
    )
    show(figure)


def cache_sizes(models: Mapping[str, tuple[float, float, float]], marks: Mapping[str, int]) -> None:
    """Draw the size of the KV cache over the number of tokens.

    models: by name bytes per token with groups, without groups, and of the weights. marks: numbers
    of tokens by label.
    """
    tokens = np.geomspace(100, 1e6, 50)
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for (name, (grouped, ungrouped, weights)), color in zip(models.items(), SERIES, strict=False):
        axis.plot(tokens, tokens * grouped / 1e9, color=color, lw=2, label=f"{name}: cache")
        axis.plot(tokens, tokens * ungrouped / 1e9, color=color, lw=1, ls="--")
        axis.axhline(weights / 1e9, color=color, lw=1, ls=":")
        axis.text(110, 1.1 * weights / 1e9, f"weights {name}", color=color, fontsize=8)
    for label, count in marks.items():
        axis.axvline(count, color="gray", lw=0.8)
        axis.text(count * 1.06, 400, label, fontsize=8, color="dimgray")
    axis.plot([], [], color="gray", ls="--", lw=1, label="the same without groups")
    axis.set(xscale="log", yscale="log", xlim=(100, 1e6), ylim=(0.003, 1000))
    axis.set(xlabel="tokens in the cache (all conversations together)", ylabel="GB, bfloat16")
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(1, 0))
    show(figure)


def roofline(peak: float, bandwidth: float, measured: Sequence[tuple[int, float, float]]) -> None:
    """Draw the roofline of a machine and measured points.

    peak: operations per second; bandwidth: bytes per second; measured: (tokens, operations per
    byte, operations per second).
    """
    figure, axis = plt.subplots(figsize=(7.5, 4))
    intensities = np.geomspace(0.3, 400, 200)
    roof = np.minimum(peak, bandwidth * intensities) / 1e9
    axis.plot(intensities, roof, color="black", lw=1.5, label="roofline (measured limits)")
    tokens, intensity, speed = np.array(measured).T
    axis.plot(intensity, speed / 1e9, "o-", color=ORANGE, lw=1, label="one linear layer, measured")
    for i in range(0, len(tokens), 3):
        label = f"{tokens[i]:.0f} token" if tokens[i] == 1 else f"{tokens[i]:.0f} tokens"
        place = (intensity[i], speed[i] / 1e9)
        axis.annotate(label, place, (6, -12), textcoords="offset points", fontsize=8)
    ridge = peak / bandwidth
    axis.axvspan(0.3, ridge, color=SKY, alpha=0.15, lw=0)
    axis.axvspan(ridge, 400, color=ORANGE, alpha=0.12, lw=0)
    top = peak / 1e9 * 1.9
    axis.text(0.34, top, "memory-bound: decode", color=BLUE, va="top")
    axis.text(390, top, "compute-bound: prefill", color=RED, va="top", ha="right")
    axis.set(xscale="log", yscale="log", xlim=(0.3, 400), ylim=(speed.min() / 2e9, top * 1.1))
    axis.set(xlabel="arithmetic intensity (operations per byte)", ylabel="billion operations/s")
    axis.yaxis.set_minor_formatter("")
    axis.legend(loc="lower right")
    show(figure)


def decode_times(lengths: Sequence[int], cached: ArrayLike, uncached: ArrayLike) -> None:
    """Draw the seconds for one more token over the tokens so far, with and without KV cache."""
    figure, axis = plt.subplots(figsize=(6, 2.8))
    axis.plot(
        lengths, 1e3 * np.asarray(uncached), "o-", color=RED, label="without: all tokens again"
    )
    axis.plot(
        lengths, 1e3 * np.asarray(cached), "o-", color=BLUE, label="with the cache: one token"
    )
    axis.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="ms for one more token")
    axis.set_xticks(lengths, lengths)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend()
    show(figure)


def logit_lens(
    probabilities: ArrayLike, best: Sequence[Sequence[str]], answer: Sequence[str]
) -> None:
    """Draw what each layer would predict for each token of an answer.

    probabilities [layers + 1, S] of the answer's tokens; best: the most probable tokens, as texts.
    """
    probabilities = np.asarray(probabilities)
    figure, axis = plt.subplots(figsize=(9.5, 2.8))
    style = {"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "auto", "origin": "lower"}
    drawn = axis.imshow(probabilities, **style)
    for layer, tokens in enumerate(best):
        for place, token in enumerate(tokens):
            weight = "bold" if token == answer[place] else "normal"
            color = "white" if probabilities[layer, place] > 0.6 else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            axis.annotate(visible(token), (place, layer), weight=weight, **style)
    layers = [f"layer {layer}" for layer in range(1, len(best))]
    axis.set_xticks(range(len(answer)), [visible(token) for token in answer])
    axis.set_yticks(range(len(best)), ["embedding", *layers])
    axis.set(xlabel="the token of the answer")
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    figure.colorbar(drawn, label="its probability", pad=0.01)
    axis.set_title("most probable token after each layer; bold: that of the answer", fontsize=10)
    show(figure)


def probability_by_layer(groups: Mapping[str, ArrayLike]) -> None:
    """Draw mean probabilities by group of tokens: [tokens, layers + 1]."""
    figure, axis = plt.subplots(figsize=(6.8, 3))
    for i, (name, values) in enumerate(groups.items()):
        values = np.asarray(values)
        label = f"{name}: {len(values)}"
        color = ("gray", BLUE, ORANGE, GREEN)[i]
        axis.plot(values.mean(0), color=color, marker="so^D"[i], label=label)
    layer_ticks(axis, values.shape[1] - 1)
    axis.set(ylabel="mean probability of\nthe right token", ylim=(-0.03, 1.03))
    axis.legend(title="kind of token: how many", loc="center left", bbox_to_anchor=(1, 0.5))
    show(figure)


# ------------------------------------------------------------------------------- 5: text in and out
LINE_WIDTH = 128  # characters in a line of tokens
PALE = ("#CFE8F7", "#FBE3B5")


def token_boxes(tokens: Sequence[str], colors: Sequence[str] = PALE) -> None:
    """Draw tokens as a text of colored boxes; colors are repeated as needed."""
    placed = []
    x = 0.0
    line = 0
    for i, token in enumerate(tokens):
        label = visible(token)
        if x + len(label) + 0.8 > LINE_WIDTH:
            x = 0.0
            line += 1
        placed.append((x, -line, label, colors[i % len(colors)]))
        x += len(label) + 0.9
        if token.endswith("\n"):
            x = 0.0
            line += 1
    lines = 1 - placed[-1][1]
    figure, axis = plt.subplots(figsize=(9.5, 0.26 * lines + 0.05))
    for x, y, label, color in placed:
        axis.add_patch(plt.Rectangle((x, y + 0.08), len(label) + 0.7, 0.84, color=color, lw=0))
        axis.text(x + 0.35, y + 0.48, label, family="monospace", fontsize=8, va="center")
    axis.set(xlim=(0, LINE_WIDTH), ylim=(0.95 - lines, 1.05))
    axis.axis("off")
    show(figure)


def orange_shades(values: ArrayLike) -> list:
    """Return a color for each value from 0, white, to 1, orange."""
    return [plt.colormaps["Oranges"](0.75 * float(value)) for value in values]


def merges(histories: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Draw the parts of words after each merge of byte-pair encoding, from the top down."""
    rows = max(len(history) for history in histories.values())
    figure, axes = plt.subplots(1, len(histories), figsize=(9, 3.1))
    for axis, (word, history) in zip(axes, histories.items(), strict=True):
        previous = history[0]
        for row, parts in enumerate(history):
            x = 0
            for part in parts:
                color = LIGHT_GRAY if part in previous else SKY
                place = (x + 0.04, -row + 0.08)
                axis.add_patch(plt.Rectangle(place, len(part) - 0.08, 0.8, color=color, lw=0))
                label = part.replace("Ġ", "␣")
                style = {"ha": "center", "va": "center", "family": "monospace"}
                axis.text(x + len(part) / 2, -row + 0.46, label, **style)
                x += len(part)
            previous = parts
        axis.set(xlim=(0, 11), ylim=(0.9 - rows, 1.6))
        axis.set_title(f"{word.strip()}: {len(history) - 1} merges")
        axis.axis("off")
    show(figure)


def author_shares(counts: Mapping[str, int], colors: Mapping[str, str]) -> None:
    """Draw one bar that is divided by the numbers of tokens of each author."""
    figure, axis = plt.subplots(figsize=(9.5, 0.75))
    left = 0
    for author, count in counts.items():
        axis.barh(0, count, left=left, color=colors[author])
        label = f"{author}\n{count}"
        axis.text(left + count / 2, 0, label, ha="center", va="center")
        left += count
    axis.set(xlim=(0, left), title=f"{left} tokens: how many from whom")
    axis.axis("off")
    show(figure)


def probabilities_by_mix(
    mixes: ArrayLike,
    images: Sequence[ArrayLike],
    probabilities: Mapping[str, ArrayLike],
    colors: Mapping[str, ArrayLike],
    marked: float,
) -> None:
    """Draw the probabilities of color names over the mix of two colors, below the images."""
    figure, (strip, axis) = plt.subplots(
        2, 1, figsize=(8, 3.6), height_ratios=(1, 6.5), sharex=True
    )
    joined = np.concatenate([np.asarray(image) for image in images], axis=1)
    strip.imshow(joined, extent=(-0.025, 1.025, 0, 1), aspect="auto")
    strip.axis("off")
    for name, values in probabilities.items():
        values = np.asarray(values)
        axis.plot(mixes, values, color=colors[name], lw=2)
        peak = values.argmax()
        if values[peak] > 0.2:
            style = {"textcoords": "offset points", "ha": "center", "color": colors[name]}
            axis.annotate(name, (mixes[peak], values[peak]), (0, 4), **style)
    axis.axvline(marked, color="gray", ls=":")
    axis.text(marked, 1.13, "least certain", fontsize=8, ha="center", color="dimgray")
    axis.set(xlabel="0: red … 1: blue", ylabel='probability after "A"')
    axis.set(xlim=(-0.025, 1.025), ylim=(0, 1.12))
    show(figure)


def sampling_filters(
    tokens: Sequence[str],
    before: Mapping[str, ArrayLike],
    after: Mapping[str, ArrayLike],
    limits: Mapping[str, float],
) -> None:
    """Draw probabilities [V] by title before and after top-k and top-p; limits: top-p, if used.

    tokens: the texts of the most probable ones, which come first in every [V].
    """
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 4.6), sharey=True)
    count = len(tokens)
    for axis, title in zip(axes.flat, before, strict=True):
        kept = np.asarray(after[title])
        original = np.asarray(before[title])
        colors = np.where(kept[:count] > 0, SKY, LIGHT_GRAY)
        axis.bar(range(count), kept[:count], color=colors)
        axis.bar(range(count), original[:count], fill=False, edgecolor="black", lw=0.8)
        if title in limits:
            axis.plot(range(count), original[:count].cumsum(), "o-", color=RED, ms=3, lw=1)
            axis.axhline(limits[title], color=RED, ls=":", lw=1)
        axis.set_title(f"{title}: {(kept > 0).sum()} of {len(kept)} kept", fontsize=8)
        axis.set(ylim=(0, 1.05))
        axis.set_xticks(range(count), [visible(token) for token in tokens], rotation=60, fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    figure.suptitle("outline: before; blue: after; red: cumulative sum, and top-p", fontsize=9)
    show(figure)


def answer_counts(counts: Mapping[str, Mapping[str, int]], colors: Mapping[str, ArrayLike]) -> None:
    """Draw bars of answers by temperature, divided by the color that they name."""
    figure, axis = plt.subplots(figsize=(8, 2.3))
    for y, names in enumerate(counts.values()):
        left = 0
        for name, count in names.items():
            color = colors.get(name, LIGHT_GRAY)
            axis.barh(y, count, left=left, color=color, edgecolor="white", alpha=0.85)
            if count > 6:
                ink = "black" if name not in colors or name == "yellow" else "white"
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": ink}
                axis.text(left + count / 2, y, f"{name} {count}", **style)
            left += count
    axis.set_yticks(range(len(counts)), list(counts))
    axis.set(ylabel="temperature", xlabel="answers", xlim=(0, left))
    show(figure)


def boxes_on_images(images: Sequence[ArrayLike], titles: Sequence[str], boxes: ArrayLike) -> None:
    """Show images side by side; on the first, dotted, true boxes (left, top, right, bottom)."""
    images = [np.asarray(image) for image in images]
    figure, axes = plt.subplots(
        1, len(images), figsize=(9, 3.4), width_ratios=aspect_ratios(images)
    )
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image)
        axis.set_title(title)
        axis.axis("off")
    for left, top, right, bottom in boxes:
        style = {"fill": False, "ls": ":", "lw": 1.5}
        axes[0].add_patch(plt.Rectangle((left, top), right - left, bottom - top, **style))
    show(figure)


def prompt_positions(positions: ArrayLike) -> None:
    """Draw the positions [3, S] of the tokens of a prompt as steps."""
    figure, axis = plt.subplots(figsize=(9, 2.2))
    for i in (2, 1, 0):
        style = {"color": AXIS_COLORS[i], "label": AXIS_NAMES[i], "lw": 2.5 - 0.75 * i}
        axis.plot(positions[i], drawstyle="steps-mid", **style)
    axis.set(xlabel="token of the prompt", ylabel="position")
    axis.legend()
    show(figure)


def tokens_kept(temperatures: ArrayLike, counts: Mapping[str, ArrayLike]) -> None:
    """Draw how many tokens each filter keeps over the temperature."""
    figure, axis = plt.subplots(figsize=(6, 2.5))
    for (name, values), color in zip(counts.items(), SERIES, strict=False):
        axis.plot(temperatures, values, color=color, label=name)
    axis.set(xlabel="temperature", ylabel="tokens kept", yscale="log")
    axis.legend()
    show(figure)


# -------------------------------------------------------------------------------------- 6: training
def training_tokens(tokens: Sequence[str], kinds: Sequence[str]) -> None:
    """Draw the tokens of one sample; kinds: "answer", "image" or "prompt"."""
    figure, axis = plt.subplots(figsize=(9.5, 1.15))
    colors = {"answer": GREEN, "image": ORANGE, "prompt": LIGHT_GRAY}
    for x, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        axis.bar(x, 1, width=0.9, color=colors[kind])
        label = token.replace("\n", "⏎").strip()
        color = "white" if kind == "answer" else "black"
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
        axis.text(x, 0.5, label, rotation=90, **style)
    axis.set_xlim(-0.6, len(tokens) - 0.4)
    axis.axis("off")
    count = kinds.count("answer")
    axis.set_title(f"green: the {count} tokens that count for the loss; orange: the image")
    show(figure)


def loss_curve(losses: ArrayLike, level: float, label: str) -> None:
    """Draw the losses of all steps, and one labeled level."""
    figure, axis = plt.subplots(figsize=(6, 2.3))
    axis.plot(losses, color=BLUE)
    axis.axhline(level, color="gray", ls=":")
    style = {"ha": "right", "va": "top", "fontsize": 8, "color": "dimgray"}
    axis.text(len(losses) - 1, level * 0.95, label, **style)
    axis.set(xlabel="steps on one image", ylabel="loss per token (nats)", yscale="log")
    show(figure)


def training_progress(
    losses: Sequence[float],
    levels: Mapping[str, float],
    accuracies: Mapping[str, Sequence[float]],
    batch_size: int,
    steps: int,
    interval: int,
) -> None:
    """Replace the output of the cell by the losses of the steps so far, and accuracies (0 to 1).

    levels: losses to compare with; accuracies: one for every `interval` steps; steps: in all.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    images = np.arange(1, len(losses) + 1) * batch_size
    left.plot(images, losses, color=BLUE, lw=0.6, alpha=0.5)
    mean = np.convolve(losses, np.ones(20) / 20, "valid")
    left.plot(images[19:], mean, color=BLUE, lw=2)
    end = steps * batch_size
    for label, level in levels.items():
        left.axhline(level, color="gray", ls=":")
        style = {"ha": "right", "fontsize": 8, "color": "dimgray"}
        plate = {"color": "white", "alpha": 0.7, "pad": 1}
        left.text(end, level * 1.04, label, bbox=plate, **style)
    left.set(xlabel="images so far", ylabel="loss per token (nats)", yscale="log")
    left.set(xlim=(0, end), ylim=(0.01, 9))
    colors = (SKY, ORANGE, GREEN, "black")
    for i, (label, values) in enumerate(accuracies.items()):
        images = np.arange(len(values)) * interval * batch_size
        right.plot(images, values, color=colors[i], marker="o^Ds"[i], ms=4, label=label)
    right.set(xlabel="images so far", ylabel="right, of the evaluation images")
    right.set(xlim=(0, end), ylim=(-0.02, 1.02))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(fontsize=8, loc="lower right")
    display.clear_output(wait=True)
    show(figure)


def described_images(
    images: Sequence[ArrayLike], answers: Sequence[str], correct: Sequence[bool]
) -> None:
    """Draw images with the model's answers, right ones blue and wrong ones red, six in a row."""
    rows = -(-len(images) // 6)
    figure, axes = plt.subplots(rows, 6, figsize=(9.5, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, answer, is_correct in zip(axes.flat, images, answers, correct, strict=False):
        axis.imshow(image)
        lines = answer.replace(" at", "\nat").replace(" in", "\nin")
        mark = "✓" if is_correct else "✗"
        color = BLUE if is_correct else RED
        axis.set_title(f"{mark} {lines}", fontsize=8, color=color)
    show(figure)


def paired_losses(kinds: Sequence[str], pairs: Mapping[str, Sequence[float]]) -> None:
    """Draw two labeled bars for each kind of token."""
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    x = np.arange(len(kinds))
    for i, (label, values) in enumerate(pairs.items()):
        bars = axis.bar(x + 0.4 * i - 0.2, values, 0.4, color=SERIES[i], label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(x, kinds)
    axis.set(ylabel="loss per token (nats)")
    axis.legend()
    show(figure)


# ----------------------------------------------------------------------------------- 7: fine-tuning
def finetuning_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """Draw the losses of the steps of trainings by name, each with its mean over ten steps."""
    figure, axis = plt.subplots(figsize=(6.5, 2.6))
    for color, (label, values) in zip(SERIES, losses.items(), strict=False):
        steps = np.arange(1, len(values) + 1)
        axis.plot(steps, values, color=color, lw=0.6, alpha=0.5)
        axis.plot(
            steps[9:], np.convolve(values, np.ones(10) / 10, "valid"), color=color, label=label
        )
    axis.set(xlabel="steps of eight conversations", ylabel="loss per token (nats)", yscale="log")
    axis.legend()
    show(figure)


def skill_shares(skills: Sequence[str], shares: Mapping[str, Mapping[str, float]]) -> None:
    """Draw bars of shares of right answers (0 to 1) by model and skill."""
    figure, axis = plt.subplots(figsize=(8.5, 2.8))
    x = np.arange(len(skills))
    width = 0.8 / len(shares)
    colors = (LIGHT_GRAY, ORANGE, BLUE)
    for i, (label, share) in enumerate(shares.items()):
        values = [100 * share[skill] for skill in skills]
        bars = axis.bar(x + width * i, values, 0.95 * width, color=colors[i], label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(x + width * (len(shares) - 1) / 2, skills)
    axis.set(ylabel="right of questions without an X, %", ylim=(0, 108))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(figure)
