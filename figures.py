"""From arrays to figures: numbers and images in, a file out. The one module with matplotlib."""

import logging
import math
import warnings

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

# A letter is drawn in the first of these that is installed and has it: matplotlib's own, or one
# with Chinese, Japanese or Korean.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "SimHei", "Malgun Gothic"]
FONTS += ["Yu Gothic", "PingFang SC", "Arial Unicode MS"]


def save(figure, file):
    """Write a figure, in fonts that have the letters of its texts, or say that there are none."""
    # It would name each of FONTS that is not installed.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    for text in figure.findobj(Text):
        text.set_fontfamily(FONTS)
        text.set_parse_math(False)  # a class may be called $1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(file)
    if "Glyph" in "".join(map(str, caught)):
        print(f"{file}: no installed font has all letters: install one, as Noto Sans CJK")


def draw_grid(images, titles, heading, red=()):
    """A figure of images (C, H, W), uint8 or floats from 0 to 1, eight a row, with titles; those
    whose indices are in `red` are red."""
    rows = math.ceil(len(images) / 8)
    figure = Figure(figsize=(9.6, 1.7 * rows + 0.5), layout="constrained")
    figure.suptitle(heading)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        if image.is_floating_point():
            image = (image * 255).clamp(0, 255).byte()
        axes = figure.add_subplot(rows, 8, i + 1)
        axes.set_axis_off()
        axes.imshow(image.movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=255)
        title = "\n".join(line[:15] for line in title.split("\n"))
        axes.set_title(title, size=8, color="red" if i in red else "black")
    return figure


def draw_samples(images, augmented, titles, file):
    """Training images with their classes; below, the same as they are augmented, if they are."""
    heading = "Training images"
    if augmented is not None:
        images = [*images, *augmented]
        titles = titles * 2
        heading = "Training images; below, augmented"
    save(draw_grid(images, titles, heading), file)


def draw_results(history, losses, predictions, dataset, tested_on, folder):
    """curves.png, confusion.png and mistakes.png. history, losses: rows of history.csv, loss.csv;
    predictions: of the images of `dataset`; tested_on: "test" or "validation"."""
    if losses:
        save(draw_curves(history, losses, tested_on), folder / "curves.png")
    save(draw_confusion(predictions, dataset.spec.classes, tested_on), folder / "confusion.png")
    save(draw_mistakes(predictions, dataset), folder / "mistakes.png")


def draw_curves(history, losses, tested_on):
    """Loss and accuracy by epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, values = np.array(losses).T
    left.plot(steps / steps[-1] * len(history), values, "0.75", label="training")
    epochs = [row["epoch"] for row in history]
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for part, label in (("train", "training, mean of epoch"), ("test", tested_on)):
            axes.plot(epochs, [row[f"{part}_{what}"] for row in history], ".-", label=label)
        axes.set(xlabel="epoch", ylabel=what)
        axes.legend()
    return figure


def draw_confusion(predictions, classes, tested_on):
    """Which class is predicted as which, with numbers where they are legible. Where there are more
    than 200 classes, a cell stands for several that are neighbours."""
    cells = min(len(classes), 200)
    rows = predictions.labels.numpy() * cells // len(classes)
    columns = predictions.classes.numpy() * cells // len(classes)
    counts = np.zeros((cells, cells), int)
    np.add.at(counts, (rows, columns), 1)
    fractions = counts / counts.sum(1, keepdims=True).clip(1)

    figure = Figure(figsize=(11, 10), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="fraction of the true class")
    if cells <= 20:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color)
    ticks = range(0, cells, math.ceil(cells / 40))  # more names would overlap
    names = [classes[math.ceil(tick * len(classes) / cells)][:15] for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted class", ylabel=f"true class of {tested_on} images")
    return figure


def draw_mistakes(predictions, dataset):
    """Images that are predicted wrongly, the most confident mistakes first."""
    wrong = (predictions.classes != predictions.labels).nonzero()[:, 0]
    shown = wrong[predictions.probabilities[wrong].argsort(descending=True)][:32]
    classes = dataset.spec.classes
    titles = [
        f"{classes[predictions.classes[i]]}\n{predictions.probabilities[i]:.2f}\n"
        f"({classes[predictions.labels[i]]})"
        for i in shown
    ]
    heading = f"{len(wrong)} mistakes: predicted class, probability, (true class)"
    return draw_grid(dataset[shown][0].cpu(), titles, heading)
