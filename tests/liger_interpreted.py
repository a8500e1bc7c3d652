"""What Liger's patches do to models on a CPU, by its own kernels in Triton's interpreter; only the device is made up.

A script, for it changes modules of Transformers and of Triton. Prints for each family of its arguments what was
patched, and how far the gradient of the loss has moved.
"""

import json
import sys
from types import SimpleNamespace

import numpy
import support
import torch
import triton.language as tl
from policy_support import make_samples, relative
from triton.language.extra import libdevice
from triton.runtime import interpreter

from aapo_fast.models import attention, liger
from aapo_fast.trainer.policy import Policy


def fill_in_what_the_interpreter_lacks():
    """CUDA's library of functions, and a number as an argument of a kernel, which compiled is a float32 scalar."""
    libdevice.rsqrt = lambda x: tl.rsqrt(x)
    libdevice.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats


def gradient(model):
    model.zero_grad()
    policy = Policy(model, support.tokenizer(), 0.9)
    assert policy.packed
    policy.loss(policy.batch(make_samples()), 50).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def report(family):
    model = support.tiny(family)
    model.set_attn_implementation(attention.NAME)
    plain = gradient(model)
    patched = liger.use_liger(model)
    parts = (model.model.norm, model.model.layers[0].mlp, model)
    in_place = ["liger" in part.forward.__func__.__module__ for part in parts]
    rotation = sys.modules[type(model).__module__].apply_rotary_pos_emb
    return {
        "patched": [patched, *in_place, "liger" in rotation.__module__],
        "moved": relative(gradient(model), plain),
    }


fill_in_what_the_interpreter_lacks()
liger.find_head = lambda _: SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
print(json.dumps({family: report(family) for family in sys.argv[1:]}))
