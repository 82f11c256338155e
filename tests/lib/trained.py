"""A short fine-tuning through the sparse path: each process of `torchrun` trains on its part of
every batch, and saves the losses of all, for `test_training.py` to compare.

    torchrun --nproc-per-node 2 tests/lib/trained.py FOLDER

What process R saw is written to `FOLDER/R.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from families import VOCAB, make_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hip_hf

STEPS, ROWS, TOKENS, RATE = 3, 4, 150, 0.05


def batches() -> torch.Tensor:
    """Token ids `[STEPS, ROWS, TOKENS]`, the same rows at every step, so that their loss must
    fall."""
    return torch.randint(
        3, VOCAB - 1, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)
    ).expand(STEPS, -1, -1)


def paths(model: torch.nn.Module) -> list[str]:
    return [row.path for row in hip_hf.explain(model)]


def losses_of(model: PreTrainedModel, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """The loss before each step of a plain loop, over the rows of all processes."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for batch in batches():
        own = batch[rank::processes]
        loss = model(own, labels=own, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach()
        if processes > 1:
            distributed.all_reduce(whole)
        losses.append(float(whole) / processes)
    return {"losses": losses, "paths": paths(model)}


def by_fsdp() -> dict[str, Any]:
    """With FSDP2: each process holds a part of every parameter."""
    mesh, model = init_device_mesh("cpu", (distributed.get_world_size(),)), make_model("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    return losses_of(model, distributed.get_rank(), distributed.get_world_size())


def by_trainer(folder: Path) -> dict[str, Any]:
    """With Transformers' `Trainer`, which is accelerate's."""
    model = make_model("llama")
    settings = dict(
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
    )
    rows = ROWS // distributed.get_world_size()
    order = dict(
        per_device_train_batch_size=rows, max_steps=STEPS, train_sampling_strategy="sequential"
    )
    quiet = dict(logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True)
    arguments = TrainingArguments(str(folder), use_cpu=True, **settings, **order, **quiet)
    data = [{"input_ids": row, "labels": row} for row in batches().flatten(0, 1)]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "paths": paths(model), "processes": trainer.accelerator.num_processes}


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    seen = {"fsdp": by_fsdp(), "trainer": by_trainer(folder)}
    torch.save(seen, folder / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
