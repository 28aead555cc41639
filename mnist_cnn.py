"""Handwritten digits, or clothes, with three convolutions or with LeNet-5.

python mnist_cnn.py                                   # as the source: MNIST, 10 epochs
python mnist_cnn.py --tuned                           # the same network, trained better
python mnist_cnn.py --model lenet5                    # the classic on 32x32, MNIST being padded
python mnist_cnn.py --dataset fashion                 # FashionMNIST: ten kinds of clothes
python mnist_cnn.py --data drawn --tuned --epochs 3   # no download
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import common

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
        side = ((size - 2) // 2 - 2) // 2  # 32 -> 30 -> 15 -> 13 -> 6
        self.conv1 = nn.Conv2d(channels, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 1, 32, 32) -> (N, 6, 30, 30) -> (N, 6, 15, 15)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # -> (N, 16, 13, 13) -> (N, 16, 6, 6)
        # The source counts 16 * 5 * 5 inputs here; on 32x32 they are 16 * 6 * 6.
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def turn_and_shift(pictures, generator, mirror):
    """Augment a batch (N, C, H, W), each picture by its own draw: turned by up to 8 degrees, up to 8 % larger
    or smaller, moved by up to 1.5 pixels; mirrored half the time, if `mirror`."""
    turn, scale, dx, dy, flip = torch.rand(5, len(pictures), generator=generator) * 2 - 1
    turn, scale = turn * math.radians(8), 1 + 0.08 * scale
    shift = 3 / pictures.shape[-1]  # 1.5 pixels, where half a side is 1
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    side = torch.where(flip < 0, -1.0, 1.0) if mirror else 1.0
    rows = torch.stack([side * cos, -sin, shift * dx]), torch.stack([side * sin, cos, shift * dy])
    where = torch.stack(rows).permute(2, 0, 1).to(pictures.device)  # (N, 2, 3)
    grid = F.affine_grid(where, pictures.shape, align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)  # what comes in from outside is 0, the ground


def build_model(spec, args):
    """The network for pictures of this `common.Spec`; predict.py calls it too."""
    network = LeNet5 if args.model == "lenet5" else CNN
    return network(spec.channels, spec.size, len(spec.classes))


def main():
    also = "a one-cycle schedule, smoothed labels, pictures turned, scaled, shifted (clothes also mirrored)"
    parser = common.Parser(__file__, __doc__, TUNED, also, epochs=10, batch_size=256, lr=0.0002)
    parser.flag("--model", "the network", choices=["cnn", "lenet5"])
    parser.flag("--dataset", "what a download folder has", choices=["mnist", "fashion"])
    parser.set_defaults(model="cnn", dataset="mnist")
    args = parser.parse_args()
    dataset = {"mnist": "MNIST", "fashion": "FashionMNIST"}[args.dataset]
    size = 32 if args.model == "lenet5" else 28
    train_set, test_set = common.load_data(args, dataset, size, channels=1, mean=0, std=1, dark_ground=True)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1 if args.tuned else 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = augment = None
    if args.tuned:
        scheduler = common.one_cycle(optimizer, train_set, args)
        augment = partial(turn_and_shift, mirror=train_set.mirror and args.dataset == "fashion")

    common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
