"""The same training over several devices, and several machines.

python multi_gpu.py --demo                                          # who sees which part of a batch
python multi_gpu.py                                                 # DataParallel: one process, all GPUs
torchrun --nproc-per-node=4 multi_gpu.py --recipe quick_cifar       # a process a GPU, or on CPU cores
torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 multi_gpu.py
torchrun --nproc-per-node=2 --max-restarts=3 multi_gpu.py           # goes on where a process died

torchrun starts the processes, tells them how to find each other and starts them again. This script gives
each its part of every batch and has DistributedDataParallel average the gradients, so that the network
learns what it would learn in one process. --recipe names a script of this folder, or your own copy,
my_net.py; all its flags hold here, and --batch-size counts the pictures of all processes together.
"""

import os
import socket
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import common

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # else the processes were started by hand
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class Replicas(common.Alone):
    """One process. DataParallel copies the network to all GPUs for each batch, and splits the batch."""

    def spread(self, network, device):
        gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        if gpus == 1:
            print(f"one device, {device}: there is nothing to split a batch over")
            return network
        print(f"DataParallel: each batch is split over {gpus} GPUs")
        return nn.DataParallel(network, sorted(range(gpus), key=lambda gpu: gpu != (device.index or 0)))


def end_with(parent):
    """End this process when torchrun is gone: else it would train on unseen, with other machines."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def wait_for(address, seconds=60):
    """Until somebody listens at (host, port); else UserError, in one line where PyTorch has fifty."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise common.UserError(f"nobody answers at {address}, is rank 0 up? ({error})") from None
            time.sleep(0.5)


class Group(common.Alone):
    """The processes that torchrun started: one of them writes, all of them train."""

    def __init__(self):
        address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
        if os.environ["RANK"] != "0":
            wait_for(address)
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
        # torchrun may keep its store over a restart: without a prefix, Gloo looks for dead processes in it.
        self.store = dist.PrefixStore(f"start {RESTARTS}", store)
        dist.init_process_group(store=self.store, rank=self.rank, world_size=self.size)  # NCCL; Gloo for CPUs
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if TORCHRUN:
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    def gather(self, value):
        """What each process gives, a list in the order of their ranks."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def speaks_first(self):
        try:
            first = self.store.add("spoken", 1) == 1
        except RuntimeError:  # the process that has the store is gone: rank 0, if torchrun has it not
            return TORCHRUN
        if self.rank == 0 and not TORCHRUN:
            time.sleep(0.3)  # for the others to ask
        return first

    def from_first(self, function):
        answer = [None, None]
        if self.rank == 0:
            try:
                answer = [function(), None]
            except (common.UserError, OSError) as error:
                answer = [None, error]
        dist.broadcast_object_list(answer)
        if answer[1]:
            raise answer[1]
        return answer[0]

    def read_once(self, read):
        """One process a machine reads, and leaves a file that all of them map: the pixels are in a machine's
        memory once, in its page cache, however many processes look at them."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path, error = os.path.join(folder, "data.pt"), None
            if self.local == 0:
                try:
                    torch.save([(d.pixels, d.labels, asdict(d.spec), d.mirror) for d in read()], path)
                except (common.UserError, OSError, RuntimeError) as problem:  # RuntimeError: the disk is full
                    error = common.UserError(str(problem))
            everyone = self.gather((path, error))
            if errors := [error for _, error in everyone if error]:
                raise errors[0]
            mine = everyone[self.rank - self.local][0]  # torchrun numbers a machine's processes in a row
            sets = torch.load(mine, mmap=True, weights_only=True)
            self.gather(None)  # until all have it open: then its name can go
        return [common.Pictures(pixels, labels, common.Spec(**spec), m) for pixels, labels, spec, m in sets]

    def share(self, step):
        part = step.tensor_split(self.size)[self.rank]
        # DistributedDataParallel takes the mean over the processes, of gradients of means over their parts.
        weight = len(part) * self.size / len(step)
        return (part, weight) if len(part) else (step[:1], 0.0)  # every process takes part in every step

    def add_up(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def spread(self, network, device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        print(f"DistributedDataParallel: each batch is split over {self.size} processes")
        return DistributedDataParallel(network, [device.index] if device.type == "cuda" else None)

    def must_agree(self, train_set, test_set, args):
        crc = [zlib.crc32(data.labels.cpu().numpy()) for data in (train_set, test_set)]
        more = {"device": None, "resume": args.resume, "recipe": args.recipe.stem, "the labels' sums": crc}
        everyone = self.gather({**args.settings, **more})
        for name in everyone[0]:
            if len(values := sorted({str(one.get(name)) for one in everyone})) > 1:
                what = f"the processes disagree on {name}, {' and '.join(values)}"
                raise common.UserError(f"{what}: start all of them with the same flags and data")


def demo():
    """What each replica and the caller see of 100 rows of 5 numbers, in batches of 30."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            y = self.fc(x)
            shapes = f"input {list(x.shape)}, output {list(y.shape)}"
            print(f"    in the model, on {x.device}: {shapes}", flush=True)
            return y

    device = common.pick_device("auto")
    rows, model = torch.randn(100, 5, device=device), common.team.spread(Model().to(device), device)
    for step in torch.arange(100).split(30):
        part, _ = common.team.share(step)
        output = model(rows[part])
        print(f"outside: {len(step)} rows, input {list(rows[part].shape)}, output {list(output.shape)}")


@record  # torchrun then shows what went wrong, and where
def main():
    parser = common.OneLineParser(__doc__, add_help=False, allow_abbrev=False)
    parser.flag("--recipe", "the script whose network and settings to train", metavar="NAME")
    parser.flag("--demo", "show how a batch is split, and stop", action="store_true")
    parser.flag("--out", "the run folder", metavar="DIR")
    parser.flag("--resume", "go on with the run in --out", action="store_true")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the flags of the recipe")
    parser.set_defaults(recipe="lenet_cifar", out="runs/multi_gpu")
    args, flags = parser.parse_known_args()
    if args.help:
        parser.print_help()
        print("\nand all flags of the recipe:\n")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not args.help
    common.team = Group() if several else Replicas()
    if args.demo:
        return demo()
    if common.team.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process prints
    try:
        recipe = common.import_recipe(args.recipe, args.recipe if args.recipe.endswith(".py") else None)
        resume = common.team.from_first(lambda: goes_on(args))
        sys.argv[1:] = ["--out", args.out, *["--resume"] * resume, *["--help"] * args.help, *flags]
        recipe.main()
    except (common.UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not common.team.speaks_first():
            raise SystemExit(1) from None  # another process has said what went wrong
        if dist.is_initialized() and "onnection" in str(error):  # refused or reset, say Gloo and NCCL
            print(f"multi_gpu.py: another process is gone: {str(error).splitlines()[0]}", file=sys.stderr)
            raise SystemExit(1) from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def goes_on(args):
    """Whether to resume: if asked to, or if torchrun has started this script again."""
    if RESTARTS:
        return True
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and not args.resume and Path(args.out, "last.pt").exists():
        ways = "--resume, or another --out"
        raise common.UserError(f"{args.out} has an earlier run, that a restart would go on with: {ways}")
    return args.resume


if __name__ == "__main__":
    common.cli(main)
