"""The roads of the matrix products: which is taken, and what it costs in accuracy."""

import threading

import pytest
import torch
from op_support import problem, relative

import aapo_fast as af
from aapo_fast.ops.linear_policy import products
from aapo_fast.ops.linear_policy.products import Products, Road, bf16_inside, choose_road

SETTING = torch.backends.mkldnn.matmul
AMX_IS_HERE = products.cpu_has_amx()


@pytest.fixture(params=[True, False], ids=["bf16 inside", "widened"])
def has_amx(request, monkeypatch):
    monkeypatch.setattr(products, "cpu_has_amx", lambda: request.param)
    return request.param


def test_which_road(has_amx):
    def road(hidden, weight, dtype=torch.float32):
        return choose_road(torch.empty(1, 1, dtype=hidden), torch.empty(1, 1, dtype=weight), dtype)

    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    assert road(bf16, bf16) == (Road.BF16_INSIDE if has_amx else Road.WIDEN)
    assert {road(half, half), road(single, bf16), road(bf16, single)} == {Road.WIDEN}
    assert road(bf16, bf16, torch.float64) == Road.WIDEN and road(single, single) == Road.SAME


@pytest.fixture
def settings():
    """PyTorch's own, as it begins with them."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = SETTING.fp32_precision = "none"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("wide", ["none", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize("narrow", ["none", "ieee", "tf32", "bf16"])
def test_the_setting_is_what_it_was(wide, narrow):
    """Of oneDNN's products, also where it is a wider one's: that one still decides afterwards."""
    torch.backends.fp32_precision, SETTING.fp32_precision = wide, narrow
    before = SETTING.fp32_precision
    with bf16_inside:
        assert SETTING.fp32_precision == "bf16"
    with pytest.raises(ZeroDivisionError), bf16_inside:
        raise ZeroDivisionError
    assert SETTING.fp32_precision == before
    torch.backends.fp32_precision = "ieee"
    # An own value that was equal to the wider one is that one's now, but for bf16, which is left alone.
    inherited = narrow == "none" or narrow == wide != "bf16"
    assert SETTING.fp32_precision == ("ieee" if inherited else narrow)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_was_set_by_the_older_name(precision):
    torch.set_float32_matmul_precision(precision)
    before = SETTING.fp32_precision
    with bf16_inside:
        pass
    assert SETTING.fp32_precision == before and torch.get_float32_matmul_precision() == precision


def test_the_last_thread_puts_it_back():
    """The first to come leaves before the second, which found the setting changed."""
    before, first_is_in, second_is_in, first_is_out = SETTING.fp32_precision, *(threading.Event() for _ in range(3))
    seen = []

    def first():
        with bf16_inside:
            first_is_in.set()
            assert second_is_in.wait(10)
        seen.append(SETTING.fp32_precision)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_in.wait(10)
    with bf16_inside:
        second_is_in.set()
        assert first_is_out.wait(10)
    thread.join()
    assert seen == ["bf16"] and SETTING.fp32_precision == before


def test_products_of_bf16_operands(has_amx):
    """Logits to fp32's rounding; gradient rows are rounded to bf16 once at most."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(96, 64, generator=g).bfloat16(), torch.randn(1000, 64, generator=g).bfloat16()
    d = torch.randn(96, 1000, generator=g)
    ours, every = Products(x, w, torch.float32), slice(0, 96)
    logits, dx, dw = torch.empty(96, 1000), torch.empty(96, 64), torch.empty(1000, 64)
    ours.logits(every, logits)
    assert relative(logits, x.double() @ w.double().t()) < 1e-6
    ours.hidden_gradient(d, dx)
    ours.weight_gradient(d, every, dw, add=False)
    ours.weight_gradient(d, every, dw, add=True)
    errors = [
        max(relative(dx, rows @ w.double()), relative(dw, 2 * rows.t() @ x.double()))
        for rows in (d.double(), d.bfloat16().double())
    ]
    rounds = has_amx and AMX_IS_HERE
    assert errors[rounds] < 1e-6 and (not rounds or errors[0] > 1e-4)


@pytest.mark.parametrize("backward", ["exact", "sparse"])
def test_a_loss_of_bf16_operands(has_amx, backward):
    """Within a rounding of the result and one of gradient rows; materialised logits lose ten times as much."""
    hidden, weight, targets, _ = problem(64, 64, 2003)
    x, w = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    truth = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = af.linear_policy_loss(*truth, targets, af.SFT(64.0), implementation="reference")
    exact.loss.backward()
    ours = af.linear_policy_loss(x, w, targets, af.SFT(64.0), backward=backward, sparsity_threshold=2**-20)
    ours.loss.backward()
    assert (ours.logps - exact.logps).abs().max() < 2e-5
    assert all(relative(a.grad.double(), b.grad) < 2.5e-3 for a, b in zip((x, w), truth, strict=True))
