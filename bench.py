"""How fast is the data path? Three ways to train the same network on the same pictures, taking turns:

this repository   common.train_one_epoch: uint8 in memory, one index operation a batch
compute alone     one batch, already in place, again and again: nothing can be faster
DataLoader        a picture at a time through torchvision's transforms, as most tutorials do it

python bench.py lenet_cifar                       # needs CIFAR-10 in data/
python bench.py lenet_cifar --data drawn --rounds 3
"""

import importlib
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import common

RECIPES = {  # the sources' settings: data set, size, channels, mean, std, batch size, optimizer
    "lenet_cifar": ("CIFAR10", 32, 3, 0.5, 0.5, 128, lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9)),
    "quick_cifar": ("CIFAR10", 32, 3, 0, 1, 64, lambda p: torch.optim.SGD(p, lr=0.01)),
    "mnist_cnn": ("MNIST", 28, 1, 0, 1, 256, lambda p: torch.optim.Adam(p, lr=0.0002)),
}


class OneByOne(Dataset):
    """The same pictures, each made a PIL image, then a tensor, then normalised, when it is asked for."""

    def __init__(self, data):
        self.pixels, self.labels, spec = data.pixels.cpu(), data.labels.tolist(), data.spec
        normalise = transforms.Normalize([spec.mean] * spec.channels, [spec.std] * spec.channels)
        self.transform = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.pixels[index].numpy()), self.labels[index]


def plain_loop(model, loss_fn, optimizer, loader, args):
    """The loop of the tutorials, over anything that yields (pictures, labels); returns seconds."""
    start = time.perf_counter()
    model.train()
    for pictures, labels in loader:
        loss = loss_fn(model(pictures.to(args.device)), labels.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def main():
    parser = common.OneLineParser(__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", default="data", help="as for the recipe (default: %(default)s)")
    parser.add_argument("--rounds", type=common.number(int), default=5, help="(default: %(default)s)")
    parser.add_argument("--batches", type=common.number(int), default=150, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    args.device, args.limit_batches = common.pick_device(args.device), args.batches
    args.amp, args.seed, args.epochs, args.holdout, args.skip_bad = False, 0, 1, 0, False
    args.activation, args.model = "none", "cnn"  # of the recipes that have these flags
    dataset, size, channels, mean, std, args.batch_size, make_optimizer = RECIPES[args.recipe]

    common.keep_memory()  # as `fit` does
    start = time.perf_counter()
    data, _ = common.load_data(args, dataset, size, channels=channels, mean=mean, std=std)
    seconds = time.perf_counter() - start
    print(f"{len(data):,} pictures read in {seconds:.2f} s, {torch.get_num_threads()} threads")
    model = importlib.import_module(args.recipe).build_model(data.spec, args).to(args.device)
    model.to(memory_format=torch.channels_last)
    loss_fn, optimizer = nn.CrossEntropyLoss(), make_optimizer(model.parameters())
    images, steps = common.size_of_epoch(data, args.batch_size, args)
    pictures, labels = next(common.batches(data, [torch.arange(args.batch_size)], args))
    in_place = [(pictures, labels)] * steps
    some = torch.utils.data.Subset(OneByOne(data), range(images))
    loader = DataLoader(some, args.batch_size, shuffle=True)
    ways = {
        "this repository": lambda: common.train_one_epoch(model, data, loss_fn, optimizer, args, 1)[2],
        "compute alone": lambda: plain_loop(model, loss_fn, optimizer, in_place, args),
        "DataLoader": lambda: plain_loop(model, loss_fn, optimizer, loader, args),
    }
    rounds = []
    for turn in range(args.rounds + 1):
        order = list(ways)[:: 1 if turn % 2 else -1]  # so that nobody always comes after the same other
        rounds.append({name: images / ways[name]() for name in order})
    rounds = rounds[1:]  # the first one warms up
    for name in ways:
        speed = sorted(one[name] for one in rounds)
        line = f"{name:<16}{statistics.median(speed):>9,.0f} images/s ({speed[0]:,.0f} to {speed[-1]:,.0f})"
        if name != "this repository":
            ratios = sorted(one["this repository"] / one[name] for one in rounds)
            spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            line += f"; this repository is {statistics.median(ratios):.2f} {spread} times as fast"
        print(line)


if __name__ == "__main__":
    common.cli(main)
