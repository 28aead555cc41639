"""Classify pictures with a checkpoint, prepared exactly as in training.

python predict.py runs/lenet_cifar/best.pt dog.png
python predict.py runs/lenet_cifar/best.pt dog.png holiday/ --top 3 --figure out.png --csv out.csv
python predict.py --recipe my_net.py runs/my_net/best.pt dog.png      # a recipe of your own
python predict.py runs/lenet_cifar/best.pt --export model.pt2         # for where this repository is not

model.pt2 opens with torch alone. It takes uint8 pictures (N, C, H, W) and gives probabilities (N, classes):

    about = {"about.json": ""}           # filled in: class names, and how pictures are to be prepared
    model = torch.export.load("model.pt2", extra_files=about).module()
"""

import argparse
import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

import common


def load_model(path, recipe, device):
    """A checkpoint's network, ready for uint8 pictures (N, C, H, W), and the `common.Spec` of these."""
    checkpoint = common.load_checkpoint(path)
    spec = common.Spec(**checkpoint["spec"])
    recipe = common.import_recipe(checkpoint["recipe"], recipe)
    try:
        network = recipe.build_model(spec, argparse.Namespace(**checkpoint["settings"]))
    except AttributeError as error:  # a flag that its run had not
        made_by = f"{path} was made by {checkpoint['recipe']}"
        raise common.UserError(f"{made_by}, and not by this --recipe: {error}") from None
    common.load_weights(network, checkpoint)
    return torch.nn.Sequential(common.Normalise(spec), network).to(device).eval(), spec


def export(model, spec, path):
    """Write a torch.export program of the network, uint8 pictures to probabilities, for any batch size."""
    example = torch.zeros(2, spec.channels, spec.size, spec.size, dtype=torch.uint8)
    whole = torch.nn.Sequential(model.cpu(), torch.nn.Softmax(1)).eval().requires_grad_(False)
    program = torch.export.export(whole, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with common.replacing(Path(path)) as file:
        torch.export.save(program, file, extra_files={"about.json": json.dumps(asdict(spec))})


def find_files(paths):
    """The files that are named, and the pictures below the folders that are."""
    files = []
    for path in map(Path, paths):
        found = common.find_pictures(path) if path.is_dir() else [path]
        if not found:
            raise common.UserError(f"no pictures in {path}, whose names end in {common.KINDS}")
        files += found
    return files


def why_not(file):
    """What is wrong with a file that `common.decode` cannot read."""
    if not file.exists():
        return "no such file"
    if not os.access(file, os.R_OK):
        return "no permission to read it"
    return "an empty file" if not file.stat().st_size else "not a picture, or damaged"


@torch.inference_mode()
def classify(model, spec, files, device, batch_size=64):
    """Yield (file, uint8 picture (C, H, W), probabilities (classes,)) a file, or (file, None, None) where it
    cannot be read. Decodes a batch at a time, in threads: memory does not grow with the number of files."""

    def read(file):
        picture = common.decode(file)
        if picture is not None:
            return torch.from_numpy(common.prepare(picture, spec)).movedim(-1, 0)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            some = files[start : start + batch_size]
            pictures = list(pool.map(read, some))
            good = [picture for picture in pictures if picture is not None]
            rows = iter(model(torch.stack(good).to(device)).float().softmax(1).cpu() if good else [])
            for file, picture in zip(some, pictures, strict=True):
                yield file, picture, None if picture is None else next(rows)


def main():
    parser = common.OneLineParser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run folder")
    parser.add_argument("pictures", metavar="PICTURE", nargs="*", help="files, and folders of pictures")
    parser.add_argument("--recipe", metavar="FILE", help="the script that made the checkpoint, if your own")
    parser.flag("--top", "classes a picture", metavar="K", type=common.number(int), default=1)
    parser.add_argument("--figure", metavar="FILE", help="draw the pictures with their classes, a PNG say")
    parser.add_argument("--csv", metavar="FILE", help="write files, classes, probabilities as a table")
    parser.add_argument("--export", metavar="FILE", help="write the network for torch.export.load")
    parser.flag("--device", "auto, cpu, cuda, cuda:1 or mps", default="auto")
    args = parser.parse_args()
    if args.figure and not (empty := common.figure(1, 1)):
        raise common.UserError("--figure needs a package: pip install matplotlib")
    if args.figure and Path(args.figure).suffix[1:].lower() not in empty.canvas.get_supported_filetypes():
        raise common.UserError(f"--figure {args.figure}: end its name in .png, .jpg, .pdf or .svg")
    if not args.pictures and args.export is None:
        parser.error("name at least one PICTURE, a file or a folder")
    device = common.pick_device(args.device)
    model, spec = load_model(args.checkpoint, args.recipe, device)
    if args.export is not None:
        export(model, spec, args.export)
        print(f"{args.export}: uint8 ({spec.channels}, {spec.size}, {spec.size}) pictures to probabilities")
        model.to(device)
    files, top = find_files(args.pictures), min(args.top, len(spec.classes))

    table, drawn, unreadable = [["file", "rank", "class", "probability"]], [], 0
    for file, picture, probabilities in classify(model, spec, files, device):
        if picture is None:
            print(f"{parser.prog}: error: cannot read {file}: {why_not(file)}", file=sys.stderr)
            unreadable += 1
            continue
        values, indices = probabilities.topk(top)
        best = [(spec.classes[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
        print(f"{file}: " + ", ".join(f"{name} {value:.4f}" for name, value in best))
        table += [[str(file), rank, name, f"{value:.6f}"] for rank, (name, value) in enumerate(best, 1)]
        if len(drawn) < 64:  # more would not be legible
            drawn.append((picture, f"{file.name}\n{common.short(best[0][0])} {best[0][1]:.2f}"))
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(table)
    if args.figure and drawn:
        heading = "What the network sees, its class and the probability"
        common.save_figure(common.draw_grid(*zip(*drawn, strict=True), heading), args.figure)
    raise SystemExit(2 if unreadable else 0)


if __name__ == "__main__":
    common.cli(main)
