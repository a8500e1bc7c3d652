"""Run by ``test_trl_ranks.py`` on two ranks: python -m torch.distributed.run --nproc-per-node 2 trl_ranks.py FOLDER"""

import os
import sys
import warnings

import torch
from accelerate.utils import gather_object
from support import tiny
from trl_support import make_trainer, relative

from aapo_fast.integrations.trl import AAPOConfig, AAPOTrainer, fuse


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logs(trainer, *names):
    found = [log for log in trainer.state.log_history if "loss" in log]
    return torch.tensor([[log[name] for name in names] for log in found])


def fused_is_trl(folder, loss_type):
    names = ("loss", "grad_norm", "entropy", "clip_ratio/region_mean", "kl")
    found = []
    for fused in (False, True):
        trainer = make_trainer(
            folder, f"{folder}/model", per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=2,
            max_steps=3, loss_type=loss_type, beta=0.05, learning_rate=1e-4,
        )  # fmt: skip
        if fused:
            fuse(trainer)
        trainer.train()
        found.append((flat(trainer.model) - flat(tiny()), logs(trainer, *names)))
    (moved, log), (our_moved, our_log) = found
    assert moved.norm() > 0 and relative(our_moved, moved) < 1e-3
    assert torch.allclose(log, our_log, rtol=2e-3, atol=1e-5), (log, our_log)


def written_out(trainer, model):
    """The first step's loss over the tokens of both ranks, from materialised logits."""
    total, tokens = 0.0, 0
    for inputs in gather_object(trainer._buffered_inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        logps = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].log_softmax(-1)
        logps = logps.gather(2, inputs["completion_ids"][..., None])[..., 0]
        total = total - (inputs["advantages"][:, None] * logps * inputs["completion_mask"]).sum()
        tokens += inputs["completion_mask"].sum()
    return total / tokens


def advantages_are_those_of_their_completions(trainer):
    """Each row of each rank has the advantage that was logged with its completion, and all are there."""
    logged = list(zip(trainer._logs["completion"], [round(a, 4) for a in trainer._logs["advantages"]], strict=True))
    decode = trainer.processing_class.decode
    mine = [
        (decode(ids[mask.bool()], skip_special_tokens=True), round(advantage.item(), 4))
        for inputs in trainer._buffered_inputs
        for ids, mask, advantage in zip(
            inputs["completion_ids"], inputs["completion_mask"], inputs["advantages"], strict=True
        )
    ]
    assert sorted(gather_object(mine)) == sorted(logged)


def aapo_divides_by_all_tokens(folder, mode):
    trainer = make_trainer(
        folder, tiny(), AAPOTrainer, AAPOConfig, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_steps=1, max_grad_norm=0.0, reference_mode=mode, max_completion_length=12,
    )  # fmt: skip
    trainer.train()
    advantages_are_those_of_their_completions(trainer)
    model = tiny()
    loss = written_out(trainer, model)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    truth = torch.stack([loss.detach(), norm])
    # What is logged is the mean over ranks of losses that DDP averages, too.
    assert torch.allclose(logs(trainer, "loss", "grad_norm")[0], truth, rtol=1e-3), (truth, trainer.state.log_history)
    weights = gather_object([flat(trainer.model)])
    assert len(weights) == 2 and torch.equal(*weights)


def main(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for loss_type in ("dapo", "grpo"):
        fused_is_trl(folder, loss_type)
    for mode in ("cached", "online"):
        aapo_divides_by_all_tokens(folder, mode)
    print("as on one rank", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    # Without Python's own end, in which a thread of gloo that still lets go of the last tensor aborts the process.
    os._exit(0)
