"""The whole pass with the Triton row kernels, through Triton's interpreter where there is no GPU."""

import pytest
import torch
from op_support import VARIANTS, objectives, problem, relative, run, sequences, variant_problem

import aapo_fast as af
from aapo_fast.ops import dispatch
from aapo_fast.ops.linear_policy import sizes, sparse

pytest.importorskip("triton", reason="Triton is not installed")
from aapo_fast.ops.linear_policy import sparse_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(inputs):
    """fp32 inputs on the device."""
    return [None if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in inputs]


def wide(inputs):
    return [
        None if t is None else (t.detach().double().cpu().requires_grad_() if t.is_floating_point() else t.cpu())
        for t in inputs
    ]


def on_device(objective):
    """A dataclass objective with its tensors on the device, fp32."""
    if DEVICE == "cpu" or not hasattr(objective, "__dataclass_fields__"):
        return objective
    fields = {name: getattr(objective, name) for name in objective.__dataclass_fields__}
    return type(objective)(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in fields.items()})


@pytest.mark.parametrize("name", list(objectives(4)))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_as_accurate_as_float64_rounded_along_the_way(variant, name, monkeypatch):
    monkeypatch.setattr(sizes, "CHUNK_ROWS", 5)
    inputs, options = variant_problem(variant, 13, 8, 101, dtype=torch.float32)
    objective = objectives(13)[name]
    truth, true_grads = run("reference", wide(inputs), objective, upstream=1.7, **options)
    _, eager = run("reference", inputs, objective, upstream=1.7, **options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].to(DEVICE)
    ours, grads = run("triton", moved(inputs), on_device(objective), upstream=1.7, **options)
    assert relative(ours.loss.cpu(), truth.loss) < 2e-6
    assert torch.equal(ours.logps.isnan().cpu(), truth.logps.isnan())
    for a, b in ((ours.logps, truth.logps), (ours.entropy, truth.entropy)):
        assert relative(a.cpu().nan_to_num(), b.nan_to_num()) < 2e-6
    for grad, true_grad, plain in zip(grads, true_grads, eager, strict=True):
        assert relative(grad.cpu(), true_grad) < max(1e-6, 1.5 * relative(plain, true_grad))


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_any_upstream_gradient(variant):
    inputs, options = variant_problem(variant, 13, 8, 101, dtype=torch.float32)
    inputs[2][3] = -100
    upstream = torch.randn(3, 13, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = {}
    for implementation, (hidden, weight, targets, bias) in (("reference", wide(inputs)), ("triton", moved(inputs))):
        extra = {} if bias is None else {"bias": bias}
        extra |= {k: v.to(hidden.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        res = af.linear_logprobs(hidden, weight, targets, implementation=implementation, **extra)
        values = torch.stack([res.logps, res.entropy, res.logsumexp])
        (values * upstream.to(values)).sum().backward()
        found[implementation] = [values, *(t.grad for t in (hidden, weight, bias) if t is not None)]
    for ours, truth in zip(found["triton"], found["reference"], strict=True):
        assert relative(ours.cpu(), truth) < 2e-6


@pytest.mark.parametrize(("variant", "name"), [("plain", "aapo"), ("everything", "user's, of all three")])
def test_sparse_rows_are_those_of_the_torch_implementation(variant, name, monkeypatch):
    """Same seed, same uniforms, same walk: a dust entry that stands on a rounding tie may move to its neighbour."""
    for module in (sparse, sparse_triton):
        monkeypatch.setattr(module, "DENSE_SHARE", 10.0)
    monkeypatch.setattr(sizes, "CHUNK_ROWS", 5)
    inputs, options = variant_problem(variant, 9, 8, 401, dtype=torch.float32)
    options |= {"backward": "sparse", "sparsity_threshold": 2**-7, "seed": 5}
    objective = objectives(9)[name]
    _, truth = run("torch", inputs, objective, **options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].to(DEVICE)
    _, ours = run("triton", moved(inputs), on_device(objective), **options)
    for a, b in zip(ours, truth, strict=True):
        assert relative(a.cpu(), b) < 2e-3
    _, again = run("triton", moved(inputs), on_device(objective), **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_sparse_falls_back_to_exact_rows_where_they_are_cheaper():
    inputs = problem(9, 8, 499, dtype=torch.float32, scale=1e-3)
    objective = af.SFT(9.0)
    _, exact = run("triton", moved(inputs), objective)
    _, ours = run("triton", moved(inputs), objective, backward="sparse")
    assert all(relative(a, b) < 1e-6 for a, b in zip(ours, exact, strict=True))


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_operands(dtype):
    inputs = problem(40, 32, 499, dtype=dtype, scale=1.5)
    advantages, index = sequences(40)
    objective = af.AAPO(advantages, index, 40.0)
    _, true_grads = run("reference", wide(inputs), objective)
    _, grads = run("triton", moved(inputs), on_device(objective))
    for grad, truth in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        # where bf16 gradient rows feed the tensor cores they are rounded once more
        assert relative(grad.cpu(), truth) <= (1.1 if DEVICE == "cpu" else 2.0) * relative(truth.to(dtype), truth)


def test_rows_without_target_are_masked_where_none_may_be_dropped(monkeypatch):
    """What a GPU does with all_logps: no row is looked for, so the kernels see rows that have no target."""
    monkeypatch.setattr(af.ops.linear_policy.autograd, "rows_to_visit", lambda *_: None)
    inputs = problem(12, 8, 101, dtype=torch.float32)
    inputs[2][::3] = -100
    monkeypatch.undo() if DEVICE == "cuda" else None
    for implementation in ("torch", "triton"):
        for objective in (af.SFT(12.0), af.Regularized(af.SFT(12.0), 12.0, 0.3, 0.1)):
            truth, true_grads = run("reference", wide(inputs), objective)
            ours, grads = run(implementation, moved(inputs), objective, all_logps=True)
            assert relative(ours.loss.cpu(), truth.loss) < 2e-6
            assert ours.logps[::3].isnan().all() and not ours.logps[1::3].isnan().any()
            assert all(relative(g.cpu(), t) < 2e-6 for g, t in zip(grads, true_grads, strict=True))
            assert grads[0][::3].norm() == 0


def test_double_precision_is_refused_and_never_chosen():
    hidden, weight, targets, _ = problem(4, 8, 11)
    with pytest.raises(RuntimeError, match="compute in fp32, not torch.float64; use implementation='torch'"):
        af.linear_policy_loss(hidden, weight, targets, af.SFT(4.0), implementation="triton")
    assert dispatch.resolve("auto", torch.device("cuda"), torch.float64) == "torch"


def test_without_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, not cpu; use implementation='torch'"):
        dispatch.resolve("triton", torch.device("cpu"))
    assert dispatch.resolve("auto", torch.device("cpu")) in ("native", "torch")
