"""The same training over several devices, and several machines.

python multi_gpu.py --demo                                      # who sees which part of a batch
python multi_gpu.py --recipe quick_cifar --epochs 3             # DataParallel: one process
torchrun --nproc-per-node=4 quick_cifar.py --epochs 3           # faster: a process for each GPU
torchrun --nproc-per-node=2 --max-restarts=3 lenet_cifar.py     # continues where a process died
torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 RECIPE.py

torchrun starts the processes, tells them how to find each other and starts them again; without GPUs
they run on CPU cores. Each gets its part of every batch, and DistributedDataParallel averages the
gradients, so that the network learns what it would learn in one process (batch normalization aside,
which sees a part alone). All flags of the recipe hold; --batch-size counts the images of all
processes together, and is a multiple of their number.
"""

import common
from predict import import_recipe

import torch
from torch import nn


class Demo(nn.Module):
    """One linear layer, which prints what it sees."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        y = self.fc(x)
        print(f"    in the model, on {x.device}: input {list(x.shape)}, output {list(y.shape)}")
        return y


def demo():
    """What each replica and the caller see of 100 rows of 5 numbers, in batches of 30."""
    device = common.pick_device("auto")
    model = Demo().to(device)
    if common.get_world_size() == 1 and torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)
    for batch in torch.randn(100, 5, device=device).split(30):
        batch = common.my_part(batch)
        output = model(batch)
        print(f"outside: input {list(batch.shape)}, output {list(output.shape)}")


def main(argv=None):
    parser = common.ArgumentParser(
        description=__doc__,
        formatter_class=common.HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("this script; all other flags are the recipe's").add_argument
    add("--recipe", default="lenet_cifar", help="of this folder, or a script of your own")
    add("--demo", help="show how a batch is split, and stop", action="store_true")
    add("--help", "-h", help="show this, and the flags of the recipe", action="store_true")
    args, flags = parser.parse_known_args(argv)
    if args.demo:
        return demo()
    if args.help:
        parser.print_help()
        flags.append("--help")
    elif common.get_world_size() == 1:
        print(f"DataParallel over {torch.cuda.device_count()} GPUs; torchrun is faster: --help")
    file = args.recipe if args.recipe.endswith(".py") else None
    return import_recipe(args.recipe, file).main(
        ["--data-parallel", "--out=runs/multi_gpu", *flags]
    )


if __name__ == "__main__":
    common.cli(main)
