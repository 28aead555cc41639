"""The same training over several devices, and several machines.

python multi_gpu.py --demo                                      # who sees which part of a batch
python multi_gpu.py --recipe quick_cifar --epochs 3             # DataParallel: one process, all GPUs
torchrun --nproc-per-node=4 quick_cifar.py --epochs 3           # faster: a process for each GPU, or CPU cores
torchrun --nproc-per-node=2 --max-restarts=3 lenet_cifar.py     # continues where a process died
torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 lenet_cifar.py

torchrun starts the processes, tells them how to find each other and starts them again. Each gets its part of
every batch, and DistributedDataParallel averages the gradients, so that the network learns what it would
learn in one process (batch normalization aside, which sees a part alone). All flags of the recipe hold;
--batch-size counts the images of all processes together.
"""

import common
from predict import import_recipe

import torch
from torch import nn


def data_parallel(model, args):
    """The model on all GPUs: DataParallel copies it to each for every batch, and splits the batch."""
    gpus = torch.cuda.device_count() if args.device == torch.device("cuda:0") else 1
    if gpus == 1:
        print(f"one device, {args.device}: there is nothing to split a batch over")
        return torch.compile(model) if args.compile else model
    print(f"DataParallel over {gpus} GPUs; faster: torchrun --nproc-per-node={gpus} {args.recipe} ...")
    return nn.DataParallel(model)


def demo():
    """What each replica and the caller see of 100 rows of 5 numbers, in batches of 30."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            y = self.fc(x)
            print(
                f"    in the model, on {x.device}: input {list(x.shape)}, output {list(y.shape)}", flush=True
            )
            return y

    device = common.pick_device("auto")
    model = Model().to(device)
    if common.get_world_size() == 1 and torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)
    rows = torch.randn(100, 5, device=device)
    for batch in rows.split(30):
        batch = batch.tensor_split(common.get_world_size())[common.get_rank()]
        output = model(batch)
        print(f"outside: input {list(batch.shape)}, output {list(output.shape)}", flush=True)


def main():
    parser = common.ArgumentParser(__doc__, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("this script; all other flags are the recipe's").add_argument
    add("--recipe", help="the script to train, of this folder or your own, my_net.py", metavar="NAME")
    add("--demo", help="show how a batch is split, and stop", action="store_true")
    add("--out", help="the run folder", metavar="DIR")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the flags of the recipe")
    parser.set_defaults(recipe="lenet_cifar", out="runs/multi_gpu")
    args, flags = parser.parse_known_args()
    if args.demo:
        return demo()
    if args.help:
        parser.print_help()
        flags.append("--help")
    if common.get_world_size() == 1:
        common.parallelize = data_parallel
    recipe = import_recipe(args.recipe, args.recipe if args.recipe.endswith(".py") else None)
    return recipe.main(["--out", args.out, *flags])


if __name__ == "__main__":
    common.cli(main)
