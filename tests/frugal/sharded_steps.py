"""Run by torchrun: a sharded model trained by torch's AdamW and by the one on the host is the same, bit for bit."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resnet_bk.frugal.host_slot import host_gradient
from resnet_bk.frugal.optimizer import OffloadedAdamW


def sharded(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 33), nn.GELU(), nn.Linear(33, 8), nn.LayerNorm(8))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for mode in ("clipped", "in-backward"):
        check(mesh, in_backward=mode == "in-backward")
        if dist.get_rank() == 0:
            print(mode)
    dist.destroy_process_group()


def check(mesh, *, in_backward):
    ours, torchs = sharded(mesh), sharded(mesh)
    optimizers = [OffloadedAdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(torchs.parameters(), 1e-2, fused=True)]
    for step in range(10):
        norms = []
        for model, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            for micro_step in range(3):
                seed = 100 * step + 10 * micro_step + dist.get_rank()
                x = torch.randn(4, 10, generator=torch.Generator().manual_seed(seed))
                loss = model(x).square().sum()
                if in_backward and micro_step == 2 and isinstance(optimizer, OffloadedAdamW):
                    with optimizer.updating_in_backward():
                        loss.backward()
                else:
                    loss.backward()
            if isinstance(optimizer, OffloadedAdamW) and not in_backward:
                assert all(host_gradient(parameter) is not None for parameter in model.parameters())
            if not in_backward:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item())
            optimizer.step()
        assert len(set(norms)) <= 1, norms
        for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local()), step


if __name__ == "__main__":
    main()
