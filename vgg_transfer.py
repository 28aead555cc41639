"""VGG16 with what it learnt from ImageNet's 1.2 million photos, made to tell other classes apart.

python vgg_transfer.py --data my_photos/ --freeze      # train a new last layer alone: start here
python vgg_transfer.py --data my_photos/               # train all of it
python vgg_transfer.py --head add --freeze             # a layer more, behind ImageNet's 1000 classes
python vgg_transfer.py --weights runs/a/best.pt        # from a VGG16 of your own to other classes
python vgg_transfer.py --weights none --data drawn     # no download: from random weights
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models import VGG16_Weights

import common

IMAGENET = VGG16_Weights.IMAGENET1K_V1  # which pictures they expect, and where they are
TUNED = dict(batch_size=64, lr=0.01)


class VGG(nn.Module):
    """torchvision's VGG16 with a new head, which takes the place of its last layer or is added behind it."""

    def __init__(self, classes, head="replace", freeze=False):
        super().__init__()
        vgg = torchvision.models.vgg16()
        self.features, self.avgpool, last = vgg.features, vgg.avgpool, vgg.classifier[-1]  # 4096 -> 1000
        self.classifier = vgg.classifier[:-1] if head == "replace" else vgg.classifier
        for layer in self.classifier if freeze else []:
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # what does not learn needs none
        self.requires_grad_(not freeze)
        self.head = nn.Linear(last.in_features if head == "replace" else last.out_features, classes)

    def body(self, x):
        x = self.avgpool(self.features(x))  # (N, 3, 224, 224) -> (N, 512, 7, 7), whatever the size
        return self.classifier(x.flatten(1))  # -> (N, 4096), or (N, 1000)

    def forward(self, x):
        return self.head(x if x.ndim == 2 else self.body(x))  # 2: what the frozen body gave, see Kept


class Kept(common.Pictures):
    """Pictures that the frozen body sees once: a batch is what it gave, float32 (B, 4096) or (B, 1000). That
    is kept in memory, or where it is too much in a file in the run folder, which goes with the process."""

    def __init__(self, pictures, model):
        super().__init__(pictures.pixels, pictures.labels, pictures.spec, pictures.mirror)
        self.pictures, self.model, self.outputs = pictures, model, None
        self.known = torch.zeros(len(self), dtype=torch.bool)

    def normaliser(self):
        return nn.Identity()

    def batches(self, steps, args):
        if self.outputs is None:
            shape = len(self), self.model.head.in_features
            size = 4 * shape[0] * shape[1]
            if size <= common.IN_MEMORY:
                self.outputs = torch.empty(shape)
            elif size > shutil.disk_usage(args.out).free:
                raise common.UserError(f"{args.out} lacks room for the frozen part's outputs, {size:,} bytes")
            else:
                with tempfile.TemporaryFile(dir=args.out) as file:
                    self.outputs = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
        needed = torch.cat(steps).cpu().unique()
        if len(needed := needed[~self.known[needed]]):
            self.fill(needed, args)
        return ((self.outputs[step.cpu()], self.labels[step]) for step in steps)

    @torch.no_grad()
    def fill(self, needed, args):
        """Run the body over the pictures at these indices, int64 (M,)."""
        some = max(8, 2**16 // self.spec.size**2)  # pictures at once
        # Rounding depends on how many: where an epoch has but a part of the set, the last ones are filled up.
        more = -len(needed) % some if len(needed) < len(self) else 0
        parts = torch.cat([needed, needed[:1].expand(more)]).split(some)
        loaded = common.progress(common.batches(self.pictures, parts, args), "frozen layers", len(parts))
        for part, (pictures, _) in zip(parts, loaded, strict=True):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                self.outputs[part] = self.model.body(pictures).float().cpu()
        self.known[needed] = True


def read_weights(args):
    """The state_dict that `--weights` names, or None, and the mean and std that its pictures had."""
    if args.checkpoint:  # goes on, and has them all
        return None, args.checkpoint["spec"]["mean"], args.checkpoint["spec"]["std"]
    if args.weights == "none":
        return None, [0.5] * 3, [0.25] * 3
    if args.weights == "imagenet":
        try:
            state = IMAGENET.get_state_dict(check_hash=True)  # from torchvision's cache, or downloaded to it
        except Exception as error:  # no network, or half a file in the cache
            cache = Path(torch.hub.get_dir(), "checkpoints")
            ways = f"put the whole file {IMAGENET.url} into {cache}, or take --weights none"
            raise common.UserError(f"no ImageNet weights ({error}): {ways}") from None
    elif not Path(args.weights).is_file():
        raise common.UserError(f"--weights {args.weights} is neither imagenet nor none, nor a file")
    else:
        state = common.load_tensors(args.weights)
    if not isinstance(state, dict):
        raise common.UserError(f"{args.weights} is a {type(state).__name__}, and no VGG16's state_dict")
    if state.get("format") == common.FORMAT:  # a checkpoint of this repository
        return state["model"], state["spec"]["mean"], state["spec"]["std"]
    return state, IMAGENET.transforms().mean, IMAGENET.transforms().std


def load_body(model, state, weights):
    """Put a VGG16's weights into the network; its head stays new."""
    state = {str(name).removeprefix("module."): value for name, value in state.items()}  # DataParallel has it
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    for name, value in own.items():
        if getattr(state.get(name), "shape", None) != value.shape:
            lack = f"{weights} has no {name} {list(value.shape)}"
            raise common.UserError(f"--weights {lack}, which VGG16 with this --head has")
    model.load_state_dict({name: state[name] for name in own}, strict=False)


def build_model(spec, args):
    """The network for pictures of this `common.Spec`; predict.py calls it too."""
    return VGG(len(spec.classes), args.head, args.freeze)


def main():
    also = "Nesterov momentum, a one-cycle schedule; without --freeze, pictures mirrored and shifted"
    parser = common.Parser(__file__, __doc__, TUNED, also, epochs=10, batch_size=64, lr=0.001)
    parser.flag("--weights", "imagenet, none, or a file: checkpoint or VGG16's state_dict", metavar="NAME")
    parser.flag("--head", "the new layer, instead of the last one or behind it", choices=["replace", "add"])
    parser.flag("--freeze", "train the new layer alone", action="store_true")
    sizes = "side of the pictures, 32 or more (default: 224 for folders of them, else 32)"
    parser.add_argument("--size", type=common.number(int, 32, 2048), metavar="N", help=sizes)
    parser.set_defaults(weights="imagenet", head="replace")
    args = parser.parse_args()
    files = Path(args.data, "train.csv").is_file() or Path(args.data, "train").is_dir()
    size = args.size or (224 if files else 32)
    crop = 224 / 256 if files else 1.0  # ImageNet's networks see the middle of a photo
    state, mean, std = read_weights(args)
    train_set, test_set = common.load_data(args, "CIFAR10", size, mean=mean, std=std, crop=crop)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    if state:
        load_body(model, state, args.weights)
        del state
    loss_fn = nn.CrossEntropyLoss()
    # What is frozen gets no gradient, and the optimizer leaves it as it is.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=args.tuned)
    scheduler = augment = None
    if args.tuned:
        scheduler = common.one_cycle(optimizer, train_set, args)
    if args.freeze:
        train_set, test_set = Kept(train_set, model), Kept(test_set, model)
    elif args.tuned:
        augment = partial(common.flip_and_shift, mirror=train_set.mirror, pixels=train_set.spec.size // 16)

    common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
