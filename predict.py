"""Classify images with a checkpoint, prepared exactly as in training.

python predict.py runs/lenet_cifar/best.pt dog.png
python predict.py runs/lenet_cifar/best.pt dog.png holiday/ --top 3 --figure out.png --csv out.csv
python predict.py --recipe my_net.py runs/my_net/best.pt dog.png      # a recipe of your own
"""

import argparse
import glob
import importlib.util
import sys
from pathlib import Path

import common
import readers
from readers import UserError, printable

import torch


def import_recipe(name, file=None):
    """The module of a recipe: the script `file`, else the one of this repository that is called
    `name`. What is imported is never for a checkpoint to decide. Raises UserError if it is none."""
    if not file and name not in common.RECIPES:
        raise UserError(f"{name} is not in this repository: add --recipe {name}.py, its script")
    file = Path(file or common.HERE / f"{name}.py")
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"no recipe {file}: --recipe takes the script that made the checkpoint")
    sys.path.insert(0, str(file.parent.resolve()))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{file}: {error}: add its folder to PYTHONPATH") from None
    if not hasattr(module, "build_model"):
        raise UserError(f"{file} has no build_model(spec, args), which makes its network")
    return module


def load_model(path, recipe=None, device="cpu", model=None):
    """A checkpoint's network in eval mode, from uint8 images (N, C, H, W), values from 0 to 255, to
    logits (N, classes); and the `Spec` of its images.

    recipe: the script that made it, if that is not of this repository; model: the network itself,
    without a recipe. Raises UserError where it is not the checkpoint's.
    """
    checkpoint = common.load_checkpoint(path)
    spec = readers.Spec(**checkpoint["spec"])
    name = checkpoint["recipe"]
    try:
        if model is None:
            settings = argparse.Namespace(**checkpoint["settings"])
            model = import_recipe(name, recipe).build_model(spec, settings)
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, KeyError, RuntimeError) as error:
        reason = printable(error)
        raise UserError(f"{path} was made by {name}, with another network: {reason}") from None
    return common.Classifier(common.Normalize(spec), model).to(device).eval(), spec


def find_files(arguments, classes):
    """(file, label) pairs of files, folders and patterns. The label is a folder's name that is a
    class: the first below a given folder, else its own, or that of a file's folder; else None."""
    roots = []
    for argument in arguments:
        paths = [argument]
        if not Path(argument).exists():  # a pattern, where the shell does not know them
            paths = sorted(glob.glob(argument, recursive=True)) or paths
        roots += map(Path, paths)

    pairs = []
    for root in roots:
        files = [root]
        if root.is_dir():
            files, left_out = readers.find_images(root)
            if not files:
                raise UserError(f"no images in {root}: their names end in .jpg, .png and the like")
            if left_out:
                print(f"left out of {root}: {readers.tell(left_out)}")
        else:
            root = root.parent
        for file in files:
            names = [*file.relative_to(root).parts[:-1], root.absolute().name]
            label = next((name for name in map(readers.nfc, names) if name in classes), None)
            pairs.append((file, label))
    return pairs


@torch.inference_mode()
def classify(model, spec, files, device="cpu"):
    """Yield (file, uint8 image (C, H, W), probabilities (classes,)) of each file; (file, UserError,
    None) where it cannot be read. Memory does not grow with the number of files."""
    batch_size = min(64, max(1, 2**22 // spec.size**2))
    for start in range(0, len(files), batch_size):
        some = files[start : start + batch_size]
        images = list(readers.read_images(some, spec))
        good = [torch.from_numpy(one) for one in images if not isinstance(one, UserError)]
        results = iter(())
        if good:
            batch = torch.stack(good).movedim(-1, 1)  # (B, H, W, C) -> (B, C, H, W)
            rows = model(batch.to(device)).float().softmax(1).cpu()
            if not rows.isfinite().all():
                raise UserError("the outputs are not finite: was it trained to the end?")
            results = zip(batch, rows, strict=True)
        for file, image in zip(some, images, strict=True):
            if isinstance(image, UserError):
                yield file, image, None
            else:
                yield file, *next(results)


def parse_args(argv):
    parser = common.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run folder")
    add("images", metavar="IMAGE", nargs="+", help="files, folders of images, patterns of files")
    add("--recipe", help="the script that made the checkpoint, if it is your own")
    add("--top", default=1, type=common.between(1, 10_000), help="classes an image")
    add("--figure", help="a file, in which images are drawn with their classes: .png, say")
    add("--csv", help="a file, for a table of files, classes, probabilities")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    args = parser.parse_args(argv)
    if args.figure and not common.import_figures():
        raise UserError("--figure needs a package: pip install matplotlib")
    if args.figure and Path(args.figure).suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise UserError(f"--figure {args.figure}: end its name in .png, .jpg, .pdf or .svg")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    model, spec = load_model(args.checkpoint, args.recipe, device)
    pairs = find_files(args.images, spec.classes)
    found = []  # (file, label, (class, probability) pairs, the best first) of each image
    images = []
    results = classify(model, spec, [file for file, _ in pairs], device)
    for (file, label), (_, image, probabilities) in zip(pairs, results, strict=True):
        if isinstance(image, UserError):
            print(f"predict.py: error: {image}", file=sys.stderr)
            continue
        values, indices = probabilities.topk(min(args.top, len(spec.classes)))
        names = [spec.classes[i] for i in indices]
        best = list(zip(names, values.tolist(), strict=True))
        print(f"{file}:", ", ".join(f"{name} {value:.4f}" for name, value in best))
        found.append((file, label, best))
        if len(images) < 64:  # more would not be legible
            images.append(image)
    print_accuracy(found)
    if args.csv:
        write_csv(found, args.csv)
    if args.figure and images:
        draw(found[:64], images, args.figure)
    sys.exit(2 if len(found) < len(pairs) else 0)


def print_accuracy(found):
    """How many images are of the class whose name their folder has."""
    right = [best[0][0] == label for _, label, best in found if label]
    if not right:
        return
    print(f"{sum(right)} of {len(right)} right, {sum(right) / len(right):.4f}, by their folders")
    if len(right) < len(found):
        print(f"{len(found) - len(right)} images are in no folder with a class's name")


def write_csv(found, path):
    rows = []
    for file, _, best in found:
        for rank, (name, value) in enumerate(best, 1):
            rows.append((file, rank, name, f"{value:.6f}"))
    common.write_table(path, ("file", "rank", "class", "probability"), rows)


def draw(found, images, path):
    """Images as the network sees them; the titles of those that are wrong are red."""
    titles = []
    red = []
    for i, (file, label, best) in enumerate(found):
        name, value = best[0]
        titles.append(f"{printable(file.name)}\n{name} {value:.2f}")
        if label not in (None, name):
            red.append(i)
    heading = "What the network sees, its class and the probability; in red what is wrong"
    figures = common.import_figures()
    figures.save(figures.draw_grid(images, titles, heading, red), path)


if __name__ == "__main__":
    common.cli(main)
