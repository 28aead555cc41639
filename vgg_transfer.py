"""VGG16 with what it learnt from ImageNet's 1.2 million photos, made to tell other classes apart.

python vgg_transfer.py --data my_photos/ --freeze      # train a new last layer alone: start here
python vgg_transfer.py --data my_photos/               # train all of it; photos at 224x224
python vgg_transfer.py --weights runs/a/best.pt        # from a VGG16 of your own
python vgg_transfer.py --weights none --data drawn     # no download: from random parameters
"""

import re
from functools import partial
from pathlib import Path

import common

import torch
import torchvision
from torch import nn

IMAGENET = torchvision.models.VGG16_Weights.IMAGENET1K_V1  # and what its images are like
TUNED = dict(batch_size=64, lr=0.01)


class VGG(nn.Module):
    """torchvision's VGG16 with a new head, in the place of its last layer or behind it."""

    def __init__(self, classes, head="replace", freeze=False):
        super().__init__()
        vgg = torchvision.models.vgg16()
        last = vgg.classifier[-1]  # 4096 -> 1000
        self.features = vgg.features
        self.avgpool = vgg.avgpool
        self.classifier = vgg.classifier
        width = last.out_features
        if head == "replace":
            self.classifier = vgg.classifier[:-1]
            width = last.in_features
        self.requires_grad_(not freeze)
        self.head = nn.Linear(width, classes)

    def backbone(self, x):
        x = self.avgpool(self.features(x))  # (N, 3, 224, 224) -> (N, 512, 7, 7), whatever the size
        return self.classifier(x.flatten(1))  # -> (N, 4096), or (N, 1000)

    def forward(self, x):
        if x.ndim == 4:  # images, and not yet features
            x = self.backbone(x)
        return self.head(x)


class FrozenFeatures(common.ImageDataset):
    """A data set whose batches are the features of its images, float32 (B, F), computed before."""

    def __init__(self, dataset, features):
        self.dataset = dataset
        super().__init__(dataset.images, dataset.labels, dataset.spec, dataset.files)
        self.features = features
        self.normalize = nn.Identity()

    def check_images(self):
        pass  # `dataset` has

    def read(self, indices):
        return self.dataset.read(indices)

    def load(self, batches):
        for indices in batches:
            yield self.features[indices], self.labels[indices]


@torch.no_grad()
def compute_features(model, dataset, args):
    """What the frozen backbone makes of every image, computed once."""
    model.to(args.device).eval()  # without dropout
    features = torch.zeros(len(dataset), model.head.in_features)
    mine = common.my_part(torch.arange(len(dataset)))
    batches = mine.split(max(8, 2**16 // dataset.spec.size**2))
    bar = common.progress_bar(batches, "frozen features", args)
    loaded = common.load_batches(dataset, bar, args.device)
    for indices, (images, _) in zip(batches, loaded, strict=True):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            features[indices] = model.backbone(images).float().cpu()
    return FrozenFeatures(dataset, common.all_reduce(features))  # each process has its part


def find_state(saved):
    """The state_dict of a VGG16 in what `torch.save` wrote, however it is wrapped, or None."""
    if not isinstance(saved, dict):
        return None
    prefix = r"^.*?(features|classifier|head)\.(module\.)?"  # DataParallel's, torch.compile's
    state = {re.sub(prefix, r"\1.", str(name)): value for name, value in saved.items()}
    if "features.0.weight" in state:
        return state
    for value in saved.values():
        state = find_state(value)
        if state:
            return state
    return None


def read_weights(args):
    """The state_dict to begin with, or None; mean and std of its images; its classes, or None."""
    about = IMAGENET.transforms()
    saved = common.load_saved(args)  # of a run that is continued, or tested
    if saved is None:
        if args.weights == "none":
            return None, 0.5, 0.25, None
        if args.weights == "imagenet":  # not downloaded before the data are read
            return None, about.mean, about.std, None
        saved = common.load_file(args.weights)
    state = find_state(saved)
    if state is None:
        raise common.UserError(f"--weights {args.weights} has no features.0.weight: no VGG16")
    if "spec" not in saved:
        return state, about.mean, about.std, None
    spec = saved["spec"]
    return state, spec["mean"], spec["std"], spec["classes"]


def load_parameters(model, state, with_head, name):
    """Put a VGG16's parameters into the network."""
    names = [key for key in model.state_dict() if with_head or not key.startswith("head.")]
    try:
        model.load_state_dict({key: state[key] for key in names}, strict=False)
    except (KeyError, RuntimeError, TypeError) as error:
        raise common.UserError(
            f"--weights {name} is no VGG16 for this --head: {str(error)[:200]}"
        ) from None


def imagenet_state():
    """ImageNet's parameters, from torchvision's cache, or downloaded."""
    try:
        return IMAGENET.get_state_dict(check_hash=True)
    except Exception as error:  # no network, or half a file in the cache
        raise common.UserError(
            f"no ImageNet weights ({error}): put {IMAGENET.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or use --weights none"
        ) from None


def build_model(spec, args):
    """The network for images of this `common.Spec`; predict.py calls it too."""
    return VGG(len(spec.classes), args.head, args.freeze)


def has_photos(args):
    """Whether --data has images of one's own, and not CIFAR-10 or drawn ones."""
    root = Path(args.data)
    if common.readers.find_parts(root, ["train", "test"]):
        return True
    return args.holdout > 0 and common.readers.has_class_folders(root)


def parse_args(argv=None):
    parser = common.make_parser(
        __file__, __doc__, TUNED, min_size=32, epochs=10, batch_size=64, lr=0.001
    )
    add = parser.add_argument
    add("--weights", default="imagenet", help="imagenet, none, a checkpoint or a state_dict")
    add("--head", default="replace", choices=["replace", "add"], help="the last layer, or one more")
    add("--freeze", help="train the new layer alone", action="store_true")
    args = common.parse_args(parser, argv, TUNED)
    if args.size is None:
        args.size = 224 if has_photos(args) else 32
    return args


def main(argv=None):
    args = parse_args(argv)
    crop = 224 / 256 if has_photos(args) else 0.0  # ImageNet's networks see a photo's middle
    state, mean, std, classes = read_weights(args)
    train_set, test_set = common.load_data(args, "CIFAR10", mean=mean, std=std, crop=crop)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    if state is None and args.weights == "imagenet":
        state = imagenet_state()
    if state is not None:
        same_classes = classes == train_set.spec.classes
        load_parameters(model, state, same_classes, args.weights)
        if same_classes and not (args.resume or args.test_only):
            print(f"--weights {args.weights}: its head is kept, since the classes are the same")
    del state  # half a gigabyte
    loss_fn = nn.CrossEntropyLoss()
    # What is frozen gets no gradient, and the optimizer leaves it as it is.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=args.tuned)
    scheduler = augment = None
    if args.tuned:
        # Stepped after every batch; other schedulers are stepped as their documentation says.
        scheduler = common.one_cycle(optimizer, train_set, args)
        # A mirrored dog is a dog, a mirrored digit is none.
        augment = partial(
            common.random_flip_and_crop, padding=args.size // 16, flip=args.data != "drawn"
        )
    if args.freeze:
        augment = None  # the features of each image are computed once
        if not args.test_only:  # then it is the test set
            train_set = compute_features(model, train_set, args)
        test_set = compute_features(model, test_set, args)
    return common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
