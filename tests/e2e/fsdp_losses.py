"""One of several processes that hold a student step in parts: writes its loss and its gradients to a file.

python fsdp_losses.py RANK WORLD RENDEZVOUS OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from stillroom.batch import Batch
from stillroom.lm_head import LMHead
from stillroom.losses.config import LOSSES
from stillroom.losses.objective import Objective
from stillroom.signals import Attention, Dense, HiddenStates, TeacherOutput
from stillroom.training.hidden_objective import HiddenLoss, HiddenSpec
from stillroom.training.step import StudentStep

OBJECTIVES = [
    Objective(name, LOSSES[name].load(), weight)
    for name, weight in (("forward_kl", 0.5), ("jensen_shannon", 0.3), ("cross_entropy", 0.2))
]

SPECS = [
    HiddenSpec("hidden", "mse", ((0, 1), (1, 3), ("final_norm", "final_norm")), (16, 20), start="orthogonal"),
    HiddenSpec("relations", "attention_relation", ((1, 2),), (16, 20), {"heads": 4}),
]


def step() -> StudentStep:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    terms = [HiddenLoss(spec) for spec in SPECS]
    return StudentStep(LlamaForCausalLM(config), OBJECTIVES, vocab_size=None, logits_bytes=4096, hidden=terms)


def batch_and_told() -> tuple[Batch, Dense, HiddenStates]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 48, (4, 9), generator=g)
    positions = torch.arange(9).expand(4, 9)
    keep = torch.rand(4, 9, generator=g) > 0.2
    batch = Batch(tokens, tokens.roll(-1, 1), keep, positions, torch.zeros(4, 9, dtype=torch.long))
    head = LMHead(torch.randn(48, 20, generator=g))
    n = batch.num_kept
    states = {layer: torch.randn(n, 20, generator=g) for layer in (1, 3, "final_norm")}
    attention = {2: Attention(*(torch.randn(n, 20, generator=g) for _ in range(3)))}
    return batch, Dense(torch.randn(n, 20, generator=g), head), HiddenStates(states, attention)


def part(hidden: HiddenStates, rows: Tensor) -> HiddenStates:
    """The inner states of some of the positions."""
    states = {layer: state[rows] for layer, state in hidden.states.items()}
    return HiddenStates(states, {layer: Attention(*(x[rows] for x in a)) for layer, a in hidden.attention.items()})


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    module = step()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        for layer in module.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    batch, signal, hidden = batch_and_told()
    rows = slice(4 * rank // world, 4 * (rank + 1) // world)
    mine = Batch(*(getattr(batch, name)[rows] for name in ("tokens", "labels", "loss_mask", "positions", "documents")))
    first = int(batch.loss_mask[: rows.start].sum())
    positions = torch.arange(first, first + mine.num_kept)
    result = module(mine, TeacherOutput(signal.at(positions), part(hidden, positions)), batch.num_kept)
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
