"""Handwritten digits, or clothes, with three convolutions or with LeNet-5.

python mnist_cnn.py                                   # as the source: MNIST, 10 epochs
python mnist_cnn.py --tuned                           # the same network, trained better
python mnist_cnn.py --model lenet5                    # the classic on 32x32, MNIST being padded
python mnist_cnn.py --dataset fashion                 # FashionMNIST: ten kinds of clothes
python mnist_cnn.py --data drawn --tuned --epochs 3   # no download
"""

import math
from functools import partial

import common

import torch
from torch import nn
from torch.nn import functional as F

TUNED = dict(batch_size=64, lr=0.003)


class CNN(nn.Module):
    def __init__(self, channels, size, classes):
        super().__init__()
        side = ((size - 8) // 2 - 4) // 2  # 28 -> 24 -> 20 -> 10 -> 6 -> 3
        self.conv1 = nn.Conv2d(channels, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.conv3 = nn.Conv2d(32, 64, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * side * side, 100)
        self.fc2 = nn.Linear(100, classes)

    def forward(self, x):
        x = F.relu(self.conv1(x))  # (N, 1, 28, 28) -> (N, 16, 24, 24)
        x = F.relu(self.pool(self.conv2(x)))  # -> (N, 32, 20, 20) -> (N, 32, 10, 10)
        x = F.relu(self.pool(self.conv3(x)))  # -> (N, 64, 6, 6) -> (N, 64, 3, 3)
        # The source has the batch size in the next line, and fails on the last batch, which is smaller.
        x = F.relu(self.fc1(x.flatten(1)))  # -> (N, 576) -> (N, 100)
        return self.fc2(x)  # (N, classes)


class LeNet5(nn.Module):
    def __init__(self, channels, size, classes):
        super().__init__()
        side = ((size + 2) // 2 - 2) // 2  # 28, padded: 32 -> 30 -> 15 -> 13 -> 6
        self.conv1 = nn.Conv2d(channels, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        x = F.pad(x, [2, 2, 2, 2])  # LeNet-5 is made for 32x32: (N, 1, 28, 28) -> (N, 1, 32, 32)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # -> (N, 6, 30, 30) -> (N, 6, 15, 15)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # -> (N, 16, 13, 13) -> (N, 16, 6, 6)
        # The source counts 16 * 5 * 5 inputs here; on 32x32 they are 16 * 6 * 6.
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class DarkBackground(nn.Module):
    """Digits as MNIST's, light on black: for photos of ink on paper, since MNIST's own stay as they are.

    The background is the median of the border; where it is nearer to the lightest pixel than to the darkest,
    the image is inverted. Then the background becomes 0 and the lightest pixel 1.
    """

    def forward(self, x):  # (N, C, H, W), from 0 to 1
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]], 2).flatten(1)
        background, pixels = border.median(1).values, x.flatten(1)
        light = background - pixels.amin(1) > pixels.amax(1) - background
        x = torch.where(light[:, None, None, None], 1 - x, x)
        background = torch.where(light, 1 - background, background)[:, None, None, None]
        lightest = x.amax((1, 2, 3), keepdim=True)
        stretched = ((x - background) / (lightest - background).clamp(min=1 / 255)).clamp(min=0)
        return torch.where(background > 0, stretched, x)


def random_affine(images, flip):
    """Data augmentation, each image of a batch (N, C, H, W) by its own draw: random rotation by up to 8
    degrees, scaling by up to 8 %, translation by up to 1.5 pixels; if `flip`, random horizontal flip."""
    angle, scale, dx, dy, mirror = torch.rand(5, len(images), device=images.device) * 2 - 1
    angle, scale = angle * math.radians(8), 1 + 0.08 * scale
    shift = 3 / images.shape[-1]  # 1.5 pixels, where half a side is 1
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    side = torch.where(mirror < 0, -1.0, 1.0) if flip else 1.0
    rows = torch.stack([side * cos, -sin, shift * dx]), torch.stack([side * sin, cos, shift * dy])
    affine = torch.stack(rows).permute(2, 0, 1)  # (N, 2, 3)
    grid = F.affine_grid(affine, images.shape, align_corners=False)
    return F.grid_sample(images / 255, grid, align_corners=False)  # what comes in from outside is 0


def build_model(spec, args):
    """The network for images of this `common.Spec`; predict.py calls it too."""
    network = (LeNet5 if args.model == "lenet5" else CNN)(spec.channels, spec.size, len(spec.classes))
    return nn.Sequential(DarkBackground(), network) if args.dataset == "mnist" else network


def parser():
    parser = common.RecipeParser(
        __file__, __doc__, TUNED, min_size=20, epochs=10, batch_size=256, lr=0.0002, size=28
    )
    add = parser.add_argument_group("network and data set").add_argument
    add("--model", help="the network", choices=["cnn", "lenet5"])
    add("--dataset", help="what a download folder has", choices=["mnist", "fashion"])
    parser.set_defaults(model="cnn", dataset="mnist")
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    dataset = {"mnist": "MNIST", "fashion": "FashionMNIST"}[args.dataset]
    train_set, test_set = common.load_data(args, dataset, channels=1, mean=0, std=1)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1 if args.tuned else 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # one call for all parameters
    scheduler = augment = None
    if args.tuned:
        # Stepped after every batch; a scheduler of torch.optim is stepped as its documentation says.
        scheduler = common.one_cycle(optimizer, train_set, args)
        augment = partial(random_affine, flip=args.dataset == "fashion")  # a mirrored digit is none

    return common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
