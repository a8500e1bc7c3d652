"""AAPO in plain PyTorch: sample, score, advantages, loss, step. No trainer.

    python examples/plain_loop.py [--steps 150]

The model sees a number's digits and is rewarded for repeating them. Replace ``LanguageModel`` and ``reward`` with your
own; what the loss needs is hidden states, the head's weight, the sampled tokens and one advantage a sequence.
"""

import argparse
import copy

import torch
from model import LanguageModel
from torch import Tensor

import aapo_fast as af

VOCAB, PROMPT, COMPLETION = 32, 3, 3
PROMPTS, GROUP, MICROBATCH = 16, 8, 64  # sequences: PROMPTS * GROUP a step, MICROBATCH in one forward pass


@torch.no_grad()
def sample(model: LanguageModel, prompts: Tensor) -> Tensor:
    """(B, PROMPT) to (B, PROMPT + COMPLETION)."""
    ids = prompts
    for _ in range(COMPLETION):
        ids = torch.cat([ids, torch.multinomial(model(ids).softmax(-1), 1)], dim=1)
    return ids


def reward(ids: Tensor) -> Tensor:
    """(B,): the share of digits that were repeated."""
    return (ids[:, PROMPT:] == ids[:, :PROMPT]).float().mean(1)


def train(steps: int) -> list[float]:
    """Mean reward of each step."""
    torch.manual_seed(0)
    policy = LanguageModel(VOCAB)
    reference = copy.deepcopy(policy).requires_grad_(False)  # frozen: it must not become the policy again
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    rewards_of_steps = []
    for step in range(steps):
        prompts = torch.randint(10, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
        ids = sample(policy, prompts)
        rewards, reference_rewards = reward(ids), reward(sample(reference, prompts))
        advantages = af.aapo_advantages(rewards, reference_rewards, group_size=GROUP)

        num_tokens = len(ids) * COMPLETION  # of the whole step: microbatches then add up to one batch
        for part, weights in zip(ids.split(MICROBATCH), advantages.split(MICROBATCH), strict=True):
            hidden = policy.decoder(part[:, :-1])[:, PROMPT - 1 :]  # the states that predict completion tokens
            sequence_index = torch.arange(len(part)).repeat_interleave(COMPLETION)
            out = af.linear_policy_loss(
                hidden.flatten(0, 1),
                policy.head.weight,
                part[:, PROMPT:].flatten(),
                objective=af.AAPO(weights, sequence_index, num_tokens),
            )
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        rewards_of_steps.append(rewards.mean().item())
        if step % 10 == 0 or step == steps - 1:
            means = f"reward {rewards_of_steps[-1]:.2f}  reference {reference_rewards.mean():.2f}"
            print(f"step {step:3d}  {means}  entropy {out.entropy.nanmean():.2f}", flush=True)
    return rewards_of_steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (%(default)s)")
    train(parser.parse_args().steps)
