"""A tiny case and ways to be wrong."""

import torch

from aapo_fast.bench import builtin, methods, work
from aapo_fast.bench.method import Method, Outputs
from aapo_fast.bench.shapes import Case, Head

CPU = torch.device("cpu")
TINY = Case(Head("tiny", 16, 211), 64, "float32", "model-like")


def settings(names, *more, **options):
    return work.Settings([*methods.find(["3G", *names]), *more], CPU, rounds=2, **options)


def altered(change, name="altered", **options):
    """The naive method with something done to its gradients afterwards."""

    def build(problem):
        run = builtin.naive(problem)

        def wrong():
            out = run()
            change(problem)
            return out

        return wrong

    return Method(name, name, "3", build, **options)


def one_per_cent_too_large(problem):
    problem.hidden.grad *= 1.01
    problem.weight.grad *= 1.01


def flipped(problem):
    problem.hidden.grad *= -1
    problem.weight.grad *= -1


def nothing(problem):
    problem.hidden.grad.zero_()
    problem.weight.grad.zero_()


def nan(problem):
    problem.weight.grad[0, 0] = float("nan")


def _short(problem):
    """Forgets the last eighth of the rows."""

    def run():
        n = problem.num_rows * 7 // 8
        logps = (problem.hidden[:n] @ problem.weight.t()).log_softmax(1).gather(1, problem.targets[:n, None]).squeeze(1)
        (-(problem.token_weights[:n] * logps).sum() / problem.num_rows).backward()
        return Outputs()

    return run


SHORT = Method("short", "short", "3", _short)


def raises(error, name="raises", kind="peer"):
    def build(problem):
        def run():
            raise error

        return run

    return Method(name, name, "3", build, kind=kind)
