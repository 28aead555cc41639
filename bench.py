"""How fast does a recipe train? Three ways to train its network on the same images, taking turns:

recipe           common.train_one_epoch: uint8 in memory, one index operation a batch
compute alone    one batch, already on the device, again and again: nothing can be faster
DataLoader       an image at a time through torchvision's transforms, as most tutorials do it

python bench.py lenet_cifar                             # needs CIFAR-10 in data/
python bench.py mnist_cnn --rounds 3 -- --data drawn    # after --, flags of the recipe
"""

import statistics
import time
from unittest import mock

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import common
from predict import import_recipe


class OneByOne(Dataset):
    """The same images, each made a PIL image, then a tensor, then normalized, when it is asked for."""

    def __init__(self, data):
        self.images, self.labels, spec = data.images.cpu(), data.labels.tolist(), data.spec
        mean, std = (torch.tensor(value).expand(spec.channels) for value in (spec.mean, spec.std))
        steps = [transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index].numpy()), self.labels[index]


def plain_loop(model, loss_fn, optimizer, batches, args):
    """The loop of the tutorials, over anything that yields (images, labels); returns seconds."""
    start = time.perf_counter()
    model.train()
    for images, labels in batches:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            loss = loss_fn(model(images.to(args.device)), labels.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def main():
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("recipe", choices=common.RECIPES)
    add = parser.add_argument
    add("--rounds", help="rounds, of which the first warms up", default=5, type=int, metavar="N")
    add("--batches", help="batches a round", default=150, type=int, metavar="N")
    add("--threads", help="threads of PyTorch", default=torch.get_num_threads(), type=int, metavar="N")
    parser.add_argument("flags", nargs="*", help="flags of the recipe, after --")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with mock.patch.object(common, "fit") as fit:  # the recipe does all but train
        flags = ["--limit-batches", str(args.batches), *args.flags]
        import_recipe(args.recipe).main(flags)
    model, data, _, loss_fn, optimizer, recipe, _, augment, *_ = (*fit.call_args.args, None, None)[:8]
    model.to(recipe.device, memory_format=torch.channels_last)
    batch = next(common.load_batches(data, [torch.arange(recipe.batch_size)], recipe, augment))
    loader = DataLoader(OneByOne(data), recipe.batch_size, shuffle=True)

    def train():
        return common.train_one_epoch(model, data, loss_fn, optimizer, recipe, 1, None, augment)[0][
            "train_seconds"
        ]

    ways = {
        "recipe": train,
        "compute alone": lambda: plain_loop(model, loss_fn, optimizer, [batch] * args.batches, recipe),
        "DataLoader": lambda: plain_loop(model, loss_fn, optimizer, loader, recipe),
    }
    rounds = []
    for turn in range(args.rounds + 1):
        order = list(ways)[:: 1 if turn % 2 else -1]  # so that nobody always comes after the same other
        rounds.append({name: len(data) / ways[name]() for name in order})
    threads, precision = torch.get_num_threads(), "bfloat16" if recipe.amp else "float32"
    print(
        f"{args.recipe}, {recipe.device}, {threads} threads, {precision}, batch {recipe.batch_size}, images/s"
    )
    for name in ways:
        speed = sorted(one[name] for one in rounds[1:])  # the first one warms up
        ratio = sorted(one["recipe"] / one[name] for one in rounds[1:])
        line = f"{name:<14}{statistics.median(speed):>9,.0f} ({speed[0]:,.0f} to {speed[-1]:,.0f})"
        print(f"{line}; the recipe: {statistics.median(ratio):.2f} times ({ratio[0]:.2f} to {ratio[-1]:.2f})")


if __name__ == "__main__":
    common.cli(main)
