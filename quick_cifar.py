"""CIFAR-quick on CIFAR-10, watched in TensorBoard: what a network sees, layer by layer.

python quick_cifar.py                                   # as the source: 10 epochs, then:
tensorboard --logdir runs                               # losses, graph, images: http://localhost:6006
python quick_cifar.py --tuned                           # the same network, trained better
python quick_cifar.py --activation relu                 # which the source has not
python quick_cifar.py --data drawn --tuned --epochs 3   # no download
"""

import copy
import importlib.util
import warnings
from functools import partial

import common

import torch
from torch import nn

TUNED = dict(batch_size=96, lr=0.02)
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Quick(nn.Module):
    def __init__(self, channels, size, classes, activation):
        super().__init__()
        layers = []
        for inputs, outputs in ((channels, 32), (32, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.MaxPool2d(2)]
            if activation != "none":
                layers.append(ACTIVATIONS[activation]())
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(64 * (size // 8) ** 2, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x):
        x = self.features(x)  # (N, 3, 32, 32) -> (N, 32, 16, 16) -> (N, 32, 8, 8) -> (N, 64, 4, 4)
        x = self.fc1(x.flatten(1))  # (N, 1024) -> (N, 64)
        return self.fc2(x)  # (N, classes)


def build_model(spec, args):
    """The network for images of this `common.Spec`; predict.py calls it too."""
    return Quick(spec.channels, spec.size, len(spec.classes), args.activation)


@torch.no_grad()
def log_images(writer, epoch, model, dataset, device):
    """Show TensorBoard some images, the graph, and an image's way through the layers."""
    from torchvision.utils import make_grid  # here, since to import it takes seconds

    images, _ = dataset[:8]
    x = dataset.normalize(images[:1].to(device))
    if epoch == 1:
        writer.add_images("images", images.cpu())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it traces with what PyTorch calls deprecated
            writer.add_graph(copy.deepcopy(model), x)  # which is not compiled
    for number, layer in enumerate(getattr(model, "features", ())):  # none in another network
        y = layer(x)
        for when, maps in (("before", x), ("after", y)):  # (1, C, H, W)
            grid = make_grid(maps[0][:, None], normalize=True, scale_each=True)
            name = f"layer {number} {type(layer).__name__}/{when}"
            writer.add_image(name, grid, epoch)
        x = y


def parse_args(argv=None):
    parser = common.make_parser(
        __file__, __doc__, TUNED, min_size=8, epochs=10, batch_size=64, lr=0.01, size=32
    )
    add = parser.add_argument
    add("--activation", default="none", help="after each pooling", choices=["none", *ACTIVATIONS])
    installed = importlib.util.find_spec("tensorboard") is not None
    parser.set_defaults(save_every=1, tensorboard=installed)
    return common.parse_args(parser, argv, TUNED)


def main(argv=None):
    args = parse_args(argv)
    mean, std = 0, 1  # the source has pixels from 0 to 1
    if args.tuned:
        mean, std = 0.5, 0.25
    train_set, test_set = common.load_data(args, "CIFAR10", mean=mean, std=std)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    scheduler = augment = None
    if args.tuned:
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=args.lr, momentum=0.95, nesterov=True, weight_decay=0.0005
        )
        # Stepped after every batch; other schedulers are stepped as their documentation says.
        scheduler = common.one_cycle(optimizer, train_set, args)
        # A mirrored dog is a dog, a mirrored digit is none.
        augment = partial(common.random_flip_and_crop, padding=2, flip=args.data != "drawn")

    def after_epoch(run):
        if run.writer:
            log_images(run.writer, len(run.history), model, test_set, args.device)

    return common.fit(
        model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment, after_epoch
    )


if __name__ == "__main__":
    common.cli(main)
