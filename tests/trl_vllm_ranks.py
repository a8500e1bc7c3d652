"""Run by ``test_trl_vllm.py``: python -m torch.distributed.run --nproc-per-node 2 trl_vllm_ranks.py FOLDER MODEL"""

import functools
import sys
import time
import warnings

import torch
import transformers
import trl.generation.vllm_generation
import vllm._custom_ops
from accelerate.utils import gather_object
from trl_support import PROMPTS
from trl_vllm_support import GREEDY, Watched, draw, greedy, make, move


def main(folder, model):
    """Each rank's engine holds what it should, though ranks have drawn different completions."""
    vllm._custom_ops._supports_onednn = False  # see test_trl_vllm.py
    trl.generation.vllm_generation.LLM = functools.partial(vllm.LLM, enforce_eager=True, dtype="float32")
    trainer = make(folder, model, reward_funcs=Watched(), max_steps=2, num_generations=8, **GREEDY)
    first = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    of_reference = {p: greedy(first, p) for p in PROMPTS[:2]}
    torch.manual_seed(0)
    move(trainer)
    of_policy = {p: greedy(trainer.model.eval(), p) for p in PROMPTS[:2]}
    assert not set(of_policy.values()) & set(of_reference.values())
    assert draw(trainer) == (of_reference, of_policy)
    trainer.train()
    weights = gather_object([torch.cat([p.detach().flatten() for p in trainer.model.parameters()])])
    assert len(weights) == 2 and torch.equal(*weights)
    print("both engines", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
    time.sleep(0.2)  # a thread of gloo that has yet to let go of the last tensor would abort the process at its end
