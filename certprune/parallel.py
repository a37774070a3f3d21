"""One training by several processes, started by `torchrun`: each takes its part of every batch, all take the same step.

A step's gradient is the mean of the processes' gradients, each of an equal part of the batch. So where the loss is a
mean over images, weights, scores, masks and the chosen epoch are those of one process with the same batches, to
floating-point tolerance. Two things are not the same: random draws of an objective (noise, an attack's start) are each
process's own, and the warm-up of interval bounds sees the process's part alone. So does BatchNorm, whose running
statistics are averaged after each epoch, unless it is synchronised (batch_norm.py).

Gradients are averaged here and not by DistributedDataParallel, since that acts in `forward`, which bounds do without.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from certifiers.errors import InputError


@dataclass(frozen=True)
class World:
    """The processes of this training; this is number ``rank`` of ``size``, and number 0 leads: it alone writes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def check_batch(self, size: int) -> None:
        """Raise InputError unless a batch can be parted evenly."""
        if size % self.size:
            raise InputError(
                f"A batch of {size} images cannot be parted evenly among {self.size} processes. Give a batch_size that "
                f"{self.size} divides (the training set must hold as many images)."
            )

    def parts(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of each batch. The batches' own random draws are the same in every process, and as in a
        single one; what is drawn between them is each process's own."""
        if self.size == 1:
            yield from batches
            return
        iterator, common = iter(batches), _random_state()
        torch.manual_seed((torch.initial_seed() + 1 + self.rank) % 2**63)
        while True:
            own = _random_state()
            _set_random_state(common)
            try:
                x, y = next(iterator)
            except StopIteration:
                return
            finally:
                common = _random_state()
                _set_random_state(own)
            yield x[self.rank :: self.size], y[self.rank :: self.size]

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the mean over the processes."""
        self._average([parameter.grad for parameter in parameters if parameter.grad is not None])

    def average_statistics(self, model: nn.Module) -> None:
        """Make BatchNorm's running statistics the means over the processes."""
        self._average(
            [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        )

    def as_leader(self, model: nn.Module) -> None:
        """Give all processes the leader's parameters and buffers, masks among them."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                plain = (
                    (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor)
                    .detach()
                    .clone(memory_format=torch.contiguous_format)
                )
                _together(lambda plain=plain: dist.broadcast(plain, 0))
                tensor.copy_(plain)

    def gather(self, figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Every process's plain figures, in the order of their numbers."""
        found: list[Any] = [figures]
        if self.size > 1:
            found = [None] * self.size
            _together(lambda: dist.all_gather_object(found, figures))
        return found

    def all_of(self, figures: Tensor) -> Tensor:
        """(size, *shape): every process's tensor of that shape; gradients find their way back to each."""
        if self.size == 1:
            return figures.unsqueeze(0)
        ours = torch.arange(self.size, device=figures.device).eq(self.rank).to(figures.dtype)
        return _Sum.apply(torch.tensordot(ours, figures, 0))

    def wait(self) -> None:
        """Return once every process is here."""
        if self.size > 1:
            _together(dist.barrier)

    def _average(self, tensors: Sequence[Tensor]) -> None:
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        _together(lambda: dist.all_reduce(flat))
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each one's loss depends on all summands, so gradients are summed up, too."""

    @staticmethod
    def forward(ctx, summand: Tensor) -> Tensor:
        total = summand.contiguous().clone()
        _together(lambda: dist.all_reduce(total))
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def world() -> World:
    """The processes that this one has joined; alone by default."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else World()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that `torchrun` started, where it did, for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Certification may keep one process busy for long while the others wait; a dead one is noticed at once anyway.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield world()
        world().wait()  # nobody closes its connections while another still reads from them
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs, the one of this process."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if local >= torch.cuda.device_count():
        raise InputError(
            f"Process {local} of this machine needs a GPU of its own, but there are {torch.cuda.device_count()}. Start "
            "no more processes than that (torchrun --nproc-per-node), or train with device=cpu."
        )
    return torch.device("cuda", local)


def _together(act: Callable[[], Any]) -> None:
    try:
        act()
    except RuntimeError as error:  # all of torch.distributed's errors are
        raise InputError(
            f"Another process of this training has ended or cannot be reached ({str(error).splitlines()[0]}). What was "
            "finished is kept: the same command goes on from the last whole epoch, with any number of processes."
        ) from error


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
