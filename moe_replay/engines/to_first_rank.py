"""Named tensors of all ranks, brought to the first."""

import torch
from torch import Tensor
from torch.distributed import all_gather_object, get_rank, get_world_size, recv, send
from verl.utils.device import get_device_id


def on_first_rank(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks by name, on the CPU of the first; nothing on the others. All ranks call it together.

    Where several have a name, the lowest of them gives it: they hold the same. One tensor is on its way at a time.
    """
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    of_all: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}] * get_world_size()
    all_gather_object(of_all, described)
    here = get_rank()
    whole = {name: tensor.detach().cpu() for name, tensor in own.items()} if here == 0 else {}
    taken = set(of_all[0])
    for rank, theirs in enumerate(of_all):
        for name, (shape, dtype) in theirs.items():
            if name in taken:
                continue
            taken.add(name)
            if here == rank:
                send(own[name].detach().to(get_device_id()).contiguous(), 0)
            elif here == 0:
                arrived = torch.empty(shape, dtype=dtype, device=get_device_id())
                recv(arrived, rank)
                whole[name] = arrived.cpu()
    return whole
