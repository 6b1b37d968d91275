"""One of several processes that hold a student step in parts: writes its loss and its gradients to a file.

python fsdp_losses.py RANK WORLD RENDEZVOUS OUT
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from stillroom.batch import Batch
from stillroom.distill.step import StudentStep
from stillroom.head import Head
from stillroom.losses import LOSSES, Objective
from stillroom.signals import Dense

OBJECTIVES = [
    Objective(name, LOSSES[name], weight)
    for name, weight in (("forward_kl", 0.5), ("jensen_shannon", 0.3), ("cross_entropy", 0.2))
]


def step() -> StudentStep:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return StudentStep(LlamaForCausalLM(config), OBJECTIVES, num_columns=None, logits_bytes=4096)


def batch_and_signal() -> tuple[Batch, Dense]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 48, (4, 9), generator=g)
    positions = torch.arange(9).expand(4, 9)
    keep = torch.rand(4, 9, generator=g) > 0.2
    batch = Batch(tokens, tokens.roll(-1, 1), keep, positions, torch.zeros(4, 9, dtype=torch.long))
    head = Head(torch.randn(48, 20, generator=g))
    return batch, Dense(torch.randn(batch.num_kept, 20, generator=g), head)


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    module = step()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        for layer in module.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    batch, signal = batch_and_signal()
    rows = slice(4 * rank // world, 4 * (rank + 1) // world)
    mine = Batch(*(getattr(batch, name)[rows] for name in ("tokens", "next_tokens", "keep", "positions", "documents")))
    first = int(batch.keep[: rows.start].sum())
    result = module(mine, signal.at(torch.arange(first, first + mine.num_kept)), batch.num_kept)
    (result.loss * world).backward()  # the gradients are averaged over the processes
    loss = result.loss.detach()
    found = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    if world > 1:
        dist.all_reduce(loss)
        dist.destroy_process_group()
    if rank == 0:
        torch.save({"loss": loss, "gradients": found}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
