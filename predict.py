"""Classify images with a checkpoint, prepared exactly as in training.

python predict.py runs/lenet_cifar/best.pt dog.png
python predict.py runs/lenet_cifar/best.pt dog.png holiday/ --top 3 --figure out.png --csv out.csv
python predict.py --recipe my_net.py runs/my_net/best.pt dog.png      # a recipe of your own
"""

import argparse
import csv
import importlib.util
import sys
from pathlib import Path

import common

import torch


def import_recipe(name, file=None):
    """The module of a recipe: the script `file`, else the one of this repository that is called `name`. What
    is imported is never for a checkpoint to decide. Raises UserError where it is no recipe."""
    if not file and name not in common.RECIPES:
        raise common.UserError(f"{name} is not in this repository: add --recipe {name}.py, its script")
    file = Path(file) if file else Path(__file__).with_name(f"{name}.py")
    if not file.is_file() or file.suffix != ".py":
        raise common.UserError(f"no recipe {file}: --recipe takes the Python script that made the checkpoint")
    sys.path.insert(0, str(file.parent.resolve()))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise common.UserError(f"{file}: {error}: add its folder to PYTHONPATH") from None
    if not hasattr(module, "build_model"):
        raise common.UserError(f"{file} has no build_model(spec, args), which makes its network")
    return module


def load_model(path, recipe=None, device="cpu"):
    """A checkpoint's network, for uint8 images (N, C, H, W) -> logits (N, classes), in eval mode, and the
    `common.Spec` of its images. recipe: the script that made it, where that is not of this repository."""
    checkpoint = common.load_checkpoint(path)
    spec = common.Spec(**checkpoint["spec"])
    name = checkpoint.get("recipe")
    module = import_recipe(name, recipe)
    try:
        network = module.build_model(spec, argparse.Namespace(**checkpoint["settings"]))
        network.load_state_dict(checkpoint["model"])
    except Exception as error:  # settings that it has not, or cannot have, or another network
        first = str(error).split("\n\t")[:2][-1]  # of all differences
        raise common.UserError(f"{path} was made by {name}, and not by this --recipe: {first}") from None
    return torch.nn.Sequential(common.Normalize(spec), network).to(device).eval(), spec


def find_files(paths):
    """The files that are named, and the images below the folders that are."""
    files = []
    for path in map(Path, paths):
        found = common.find_images(path) if path.is_dir() else [path]
        if not found:
            raise common.UserError(f"no images in {path}, whose names end in {' '.join(common.SUFFIXES)}")
        files += found
    return files


@torch.inference_mode()
def classify(model, spec, files, device="cpu"):
    """Yield (file, uint8 image (C, H, W), probabilities (classes,)) of each file, (file, None, None) where
    it cannot be read. Reads a batch at a time: memory does not grow with the number of files."""
    batch_size = min(64, max(1, 2**22 // spec.size**2))
    for start in range(0, len(files), batch_size):
        some = files[start : start + batch_size]
        images = list(common.read_images(some, spec))
        images = [None if image is None else torch.from_numpy(image).movedim(-1, 0) for image in images]
        good = [image for image in images if image is not None]
        rows = model(torch.stack(good).to(device)).float().softmax(1).cpu() if good else torch.zeros(0)
        if not rows.isfinite().all():
            raise common.UserError("the network's outputs are not finite: it was not trained to the end")
        rows = iter(rows)
        for file, image in zip(some, images, strict=True):
            yield file, image, None if image is None else next(rows)


def parse_args():
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, and folders of images")
    parser.add_argument("--recipe", metavar="FILE", help="the script that made the checkpoint, if your own")
    parser.add_argument("--top", default=1, help="classes an image", type=int, metavar="N")
    parser.add_argument("--figure", metavar="FILE", help="draw the images with their classes, a PNG say")
    parser.add_argument("--csv", metavar="FILE", help="write files, classes, probabilities as a table")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    args = parser.parse_args()
    if args.figure and not common.HAS_MATPLOTLIB:
        raise common.UserError("--figure needs a package: pip install matplotlib")
    if args.figure and Path(args.figure).suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise common.UserError(f"--figure {args.figure}: end its name in .png, .jpg, .pdf or .svg")
    if args.top < 1:
        raise common.UserError(f"--top {args.top} is less than 1")
    return args


def main():
    args = parse_args()
    device = common.pick_device(args.device)
    model, spec = load_model(args.checkpoint, args.recipe, device)
    table, drawn, marked = [["file", "rank", "class", "probability"]], [], []
    unreadable = known = right = 0
    for file, image, probabilities in classify(model, spec, find_files(args.images), device):
        if image is None:
            why = "no image, or a damaged one" if file.is_file() else "no such file"
            print(f"predict.py: error: cannot read {common.printable(str(file))}: {why}", file=sys.stderr)
            unreadable += 1
            continue
        values, indices = probabilities.topk(min(args.top, len(spec.classes)))
        best = [(spec.classes[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
        line = ", ".join(f"{name} {value:.4f}" for name, value in best)
        print(common.printable(f"{file}: {line}"))
        table += [[str(file), rank, name, f"{value:.6f}"] for rank, (name, value) in enumerate(best, 1)]
        if file.parent.name in spec.classes:  # a folder that is named as a class says what is right
            known += 1
            right += best[0][0] == file.parent.name
            marked += [len(drawn)] * (best[0][0] != file.parent.name)
        if len(drawn) < 64:  # more would not be legible
            drawn.append((image, f"{file.name}\n{best[0][0]} {best[0][1]:.2f}"))
    if known:
        print(f"{right} of {known} right, {right / known:.4f}, by the names of their folders")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(table)
    if args.figure and drawn:
        images, titles = zip(*drawn, strict=True)
        heading = "What the network sees, its class and the probability; in red what is wrong"
        common.draw_grid(torch.stack(images), titles, heading, marked).savefig(args.figure)
    sys.exit(2 if unreadable else 0)


if __name__ == "__main__":
    common.cli(main)
