"""VGG16 with what it learnt from ImageNet's 1.2 million photos, made to tell other classes apart.

python vgg_transfer.py --data my_photos/ --freeze      # train a new last layer alone: start here
python vgg_transfer.py --data my_photos/               # train all of it; photos are 224x224 without --size
python vgg_transfer.py --weights runs/a/best.pt        # from a VGG16 of your own to other classes
python vgg_transfer.py --weights none --data drawn     # no download: from random parameters
"""

import copy
from functools import partial
from pathlib import Path

import common

import torch
import torchvision
from torch import nn

IMAGENET = torchvision.models.VGG16_Weights.IMAGENET1K_V1  # its parameters, and the images they expect
TUNED = dict(batch_size=64, lr=0.01)


class VGG(nn.Module):
    """torchvision's VGG16 with a new head, which takes the place of its last layer or is added behind it."""

    def __init__(self, classes, head="replace", freeze=False):
        super().__init__()
        vgg = torchvision.models.vgg16()
        self.features, self.avgpool, last = vgg.features, vgg.avgpool, vgg.classifier[-1]  # 4096 -> 1000
        self.classifier = vgg.classifier[:-1] if head == "replace" else vgg.classifier
        self.requires_grad_(not freeze)
        self.head = nn.Linear(last.in_features if head == "replace" else last.out_features, classes)

    def backbone(self, x):
        x = self.avgpool(self.features(x))  # (N, 3, 224, 224) -> (N, 512, 7, 7), whatever the size
        return self.classifier(x.flatten(1))  # -> (N, 4096), or (N, 1000)

    def forward(self, x):
        return self.head(x if x.ndim == 2 else self.backbone(x))  # 2: from `cache_features`


@torch.no_grad()
def cache_features(model, dataset, args):
    """The data set with the features of all images, computed once, in its batches: float32 (B, F)."""
    model.to(args.device).eval()  # without dropout
    features, cached = torch.zeros(len(dataset), model.head.in_features), copy.copy(dataset)
    batches = torch.arange(len(dataset)).split(max(8, 2**16 // dataset.spec.size**2))
    bar = common.progress_bar(batches, "frozen features", args)
    for indices, images, _ in common.load_batches(dataset, bar, args):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            features[indices] = model.backbone(images).float().cpu()
    common.all_reduce(features)  # of which each process has computed its part
    cached.normalize, cached.load = nn.Identity(), lambda i: (features[i], dataset.labels[i])
    return cached


def read_weights(args):
    """The state_dict to begin with, or None, and the mean and std that its images had."""
    imagenet, file = IMAGENET.transforms(), args.checkpoint
    if args.weights == "none" and not file:
        return None, 0.5, 0.25
    if args.weights == "imagenet" and not file:
        try:
            return IMAGENET.get_state_dict(check_hash=True), imagenet.mean, imagenet.std  # or downloads
        except Exception as error:  # no network, or half a file in the cache
            ways = f"put {IMAGENET.url} into {torch.hub.get_dir()}/checkpoints, or use --weights none"
            raise common.UserError(f"no ImageNet weights ({error}): {ways}") from None
    file = file or common.load_checkpoint(args.weights, any_format=True)
    if isinstance(file, dict) and "format" in file:
        return file["model"], file["spec"].get("mean", 0.5), file["spec"].get("std", 0.5)
    return file, imagenet.mean, imagenet.std


def load_backbone(model, state, weights):
    """Put a VGG16's parameters into the network; its head stays new."""
    state = state.items() if isinstance(state, dict) else ()
    state = {str(name).removeprefix("module."): value for name, value in state}  # DataParallel's
    own = [name for name in model.state_dict() if not name.startswith("head.")]
    try:
        model.load_state_dict({name: state[name] for name in own}, strict=False)
    except (KeyError, RuntimeError) as error:
        raise common.UserError(f"--weights {weights} is no VGG16: {error}") from None


def build_model(spec, args):
    """The network for images of this `common.Spec`; predict.py calls it too."""
    return VGG(len(spec.classes), args.head, args.freeze)


def parser():
    parser = common.RecipeParser(__file__, __doc__, TUNED, min_size=32, epochs=10, batch_size=64, lr=0.001)
    add = parser.add_argument_group("transfer").add_argument
    add("--weights", default="imagenet", help="imagenet, none, or a checkpoint or state_dict", metavar="NAME")
    add("--head", default="replace", help="instead of or after the last layer", choices=["replace", "add"])
    add("--freeze", help="train the new layer alone", action="store_true")
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    is_folder = Path(args.data, "train.csv").is_file() or Path(args.data, "train").is_dir()
    args.size = args.size or (224 if is_folder else 32)
    crop = 224 / 256 if is_folder else 0.0  # ImageNet's networks see the middle of a photo
    state, mean, std = read_weights(args)
    train_set, test_set = common.load_data(args, "CIFAR10", mean=mean, std=std, crop=crop)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    if state is not None:
        load_backbone(model, state, args.weights)
    del state
    loss_fn = nn.CrossEntropyLoss()
    # What is frozen gets no gradient, and the optimizer leaves it as it is.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=args.tuned)
    # Stepped after every batch; a scheduler of torch.optim is stepped as its documentation says.
    scheduler, augment = common.one_cycle(optimizer, train_set, args) if args.tuned else None, None
    if args.freeze:
        train_set, test_set = (cache_features(model, dataset, args) for dataset in (train_set, test_set))
    elif args.tuned:
        augment = partial(common.random_flip_and_crop, padding=args.size // 16, flip=args.data != "drawn")
    return common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
