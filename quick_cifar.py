"""CIFAR-quick on CIFAR-10, watched in TensorBoard: what a network sees, layer by layer.

python quick_cifar.py                                   # as the source: 10 epochs, then:
tensorboard --logdir runs                               # scalars, graph and images on http://localhost:6006
python quick_cifar.py --tuned                           # the same network, trained better
python quick_cifar.py --activation relu                 # with activation functions, which the source has not
python quick_cifar.py --data drawn --tuned --epochs 3   # no download
"""

import importlib.util
import warnings
from functools import partial

import torch
import torchvision
from torch import nn

import common

TUNED = dict(batch_size=64, lr=0.01)
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Quick(nn.Module):
    def __init__(self, channels, size, classes, activation):
        super().__init__()
        layers = []
        for wide, wider in ((channels, 32), (32, 32), (32, 64)):
            layers += [nn.Conv2d(wide, wider, 5, padding=2), nn.MaxPool2d(2)]
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
    """The network for pictures of this `common.Spec`; predict.py calls it too."""
    return Quick(spec.channels, spec.size, len(spec.classes), args.activation)


@torch.no_grad()
def log_pictures(log, epoch, model, data, device):
    """Show TensorBoard the input, the graph, a picture's way through the layers, and predictions."""
    pictures, names = common.sample(data)
    x = data.normaliser().to(device)(pictures.to(device))
    if epoch == 1:
        log.add_image("input", torchvision.utils.make_grid(pictures), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it traces with what PyTorch calls deprecated
            log.add_graph(model, x)
    guesses = [data.spec.classes[i] for i in model(x).argmax(1).tolist()]
    titles = [f"{guess}\n({name})" for guess, name in zip(guesses, names, strict=True)]
    if figure := common.draw_grid(pictures, titles, "Predicted (true) classes of test pictures"):
        log.add_figure("predictions", figure, epoch)
    x = x[:1]
    for number, layer in enumerate(model.features):
        for when, maps in (("before", x), ("after", x := layer(x))):
            grid = torchvision.utils.make_grid(maps[0][:, None], normalize=True, scale_each=True)
            log.add_image(f"layer {number} {type(layer).__name__}/{when}", grid, epoch)


def main():
    also = "Nesterov momentum, a one-cycle schedule, pictures standardised, mirrored, shifted"
    parser = common.Parser(__file__, __doc__, TUNED, also, epochs=10, batch_size=64, lr=0.01)
    parser.flag("--activation", "after each pooling", choices=["none", *ACTIVATIONS])
    here = importlib.util.find_spec("tensorboard") is not None
    parser.set_defaults(activation="none", tensorboard=here, save_every=1)
    args = parser.parse_args()
    mean, std = (0.5, 0.25) if args.tuned else (0, 1)  # the source has pixels from 0 to 1
    train_set, test_set = common.load_data(args, "CIFAR10", size=32, mean=mean, std=std)

    torch.manual_seed(args.seed)
    model = build_model(train_set.spec, args)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    scheduler = augment = None
    if args.tuned:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
        scheduler = common.one_cycle(optimizer, train_set, args)
        augment = partial(common.flip_and_shift, mirror=train_set.mirror, pixels=2)

    def after_epoch(epoch, log):
        if log:
            log_pictures(log, epoch, model, test_set, args.device)

    common.fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment, after_epoch)


if __name__ == "__main__":
    common.cli(main)
