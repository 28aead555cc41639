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

TUNED = dict(batch_size=192, lr=0.01)


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
        # The source has the batch size in the next line, and fails on the last, smaller batch.
        x = F.relu(self.fc1(x.flatten(1)))  # -> (N, 576) -> (N, 100)
        return self.fc2(x)  # (N, classes)


class LeNet5(nn.Module):
    def __init__(self, channels, size, classes):
        super().__init__()
        side = ((size + 4 - 2) // 2 - 2) // 2  # 28, padded: 32 -> 30 -> 15 -> 13 -> 6
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
    """Digits as MNIST's, light on black: for photos of ink on paper. MNIST's own stay as they are.

    The background is the median of the border; where it is nearer to the lightest pixel than to the
    darkest, the image is inverted. Then the background becomes 0 and the lightest pixel 1.
    """

    def forward(self, x):  # (N, C, H, W), from 0 to 1
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]], 2).flatten(1)
        middle = (border.shape[1] - 1) // 2
        background = border.sort(1).values[:, middle].view(-1, 1, 1, 1)  # ONNX has no median
        darkest = x.amin((1, 2, 3), keepdim=True)
        lightest = x.amax((1, 2, 3), keepdim=True)
        is_light = background - darkest > lightest - background
        x = torch.where(is_light, 1 - x, x)
        lightest = torch.where(is_light, 1 - darkest, lightest)
        background = torch.where(is_light, 1 - background, background)
        contrast = (lightest - background).clamp(min=1 / 255)
        stretched = ((x - background) / contrast).clamp(min=0)
        return torch.where(background > 0, stretched, x)


def random_affine(images, flip):
    """Data augmentation, each image of a batch (N, C, H, W) by its own draw: random rotation by up
    to 8 degrees, scaling by up to 8 %, translation by up to 1.5 pixels; if `flip`, random
    horizontal flip. Takes uint8, returns floats from 0 to 1."""
    angle, zoom, dx, dy, side = torch.rand(5, len(images), device=images.device) * 2 - 1
    angle = angle * math.radians(8)
    scale = 1 + 0.08 * zoom
    cos = scale * torch.cos(angle)
    sin = scale * torch.sin(angle)
    shift = 3 / images.shape[-1]  # 1.5 pixels, where half a side is 1
    mirror = torch.where(side < 0, -1.0, 1.0) if flip else 1.0
    first = torch.stack([mirror * cos, -sin, shift * dx], 1)
    second = torch.stack([mirror * sin, cos, shift * dy], 1)
    affine = torch.stack([first, second], 1)  # (N, 2, 3)
    grid = F.affine_grid(affine, images.shape, align_corners=False)
    return F.grid_sample(images / 255, grid, align_corners=False)  # 0 beyond the edges


NETWORKS = {"cnn": CNN, "lenet5": LeNet5}
DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST"}  # torchvision's


def build_model(spec, args):
    """The network for images of this `common.Spec`; predict.py calls it too."""
    model = NETWORKS[args.model](spec.channels, spec.size, len(spec.classes))
    if args.dataset == "mnist":
        model = nn.Sequential(DarkBackground(), model)
    return model


def parse_args(argv=None):
    parser = common.make_parser(
        __file__, __doc__, TUNED, min_size=20, epochs=10, batch_size=256, lr=0.0002, size=28
    )
    add = parser.add_argument
    add("--model", default="cnn", choices=NETWORKS, help="the network")
    add("--dataset", default="mnist", choices=DATASETS, help="what is downloaded")
    return common.parse_args(parser, argv, TUNED)


def main(argv=None):
    args = parse_args(argv)
    train_set, test_set = common.load_data(args, DATASETS[args.dataset], channels=1, mean=0, std=1)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    loss_fn = nn.CrossEntropyLoss()
    # fused: one call updates all parameters
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    scheduler = augment = None
    if args.tuned:
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
        # Stepped after every batch; other schedulers are stepped as their documentation says.
        scheduler = common.one_cycle(optimizer, train_set, args)
        augment = partial(random_affine, flip=args.dataset == "fashion")  # a mirrored digit is none

    return common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
