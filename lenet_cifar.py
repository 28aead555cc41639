"""LeNet on CIFAR-10: the first network to train.

python lenet_cifar.py                                        # as the source: 10 epochs
python lenet_cifar.py --tuned                                # the same network, trained better
python lenet_cifar.py --data drawn --tuned --epochs 3        # no download, under a minute
python lenet_cifar.py --batch-size 4 --lr 0.001 --epochs 2   # small batches, many steps
python lenet_cifar.py --data my_pictures/                    # train/<class>/, test/<class>/
python lenet_cifar.py --resume --epochs 20                   # continue

To train a network of your own: cp lenet_cifar.py my_net.py, and change the class.
"""

from functools import partial

import common

import torch
from torch import nn
from torch.nn import functional as F

TUNED = dict(batch_size=128, lr=0.03)


class LeNet(nn.Module):
    def __init__(self, channels, size, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        # A 5x5 convolution takes 4 pixels off, pooling halves: 32 -> 28 -> 14 -> 10 -> 5.
        side = ((size - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        # The source has ReLU before pooling: the same result, with four times the work for ReLU.
        x = F.relu(self.pool(self.conv1(x)))  # (N, 3, 32, 32) -> (N, 6, 28, 28) -> (N, 6, 14, 14)
        x = F.relu(self.pool(self.conv2(x)))  # -> (N, 16, 10, 10) -> (N, 16, 5, 5)
        x = x.flatten(1)  # -> (N, 400)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)  # (N, classes) logits: no softmax, CrossEntropyLoss has it built in


def build_model(spec, args):
    """The network for images of this `common.Spec`; predict.py calls it too."""
    return LeNet(spec.channels, spec.size, len(spec.classes))


def parse_args(argv=None):
    parser = common.make_parser(
        __file__, __doc__, TUNED, min_size=16, epochs=10, batch_size=128, lr=0.001, size=32
    )
    return common.parse_args(parser, argv, TUNED)


def main(argv=None):
    args = parse_args(argv)
    std = 0.25 if args.tuned else 0.5  # the source has pixels from -1 to 1
    train_set, test_set = common.load_data(args, "CIFAR10", mean=0.5, std=std)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = augment = None
    if args.tuned:
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=args.lr,
            momentum=0.95,
            nesterov=True,
            weight_decay=0.002,
            fused=True,  # one call updates all parameters
        )
        # Stepped after every batch; other schedulers are stepped as their documentation says.
        scheduler = common.one_cycle(optimizer, train_set, args)
        # A mirrored dog is a dog, a mirrored digit is none.
        augment = partial(common.random_flip_and_crop, padding=1, flip=args.data != "drawn")

    return common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment)


if __name__ == "__main__":
    common.cli(main)
