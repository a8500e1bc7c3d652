"""The methods of ``aapo-fast bench head`` as pytest-benchmark cases, small by default; not part of the test suite.

    pytest benchmarks [--shape 1024,576,49152] [--dtype bfloat16] [--device cuda] [--benchmark-compare ...]

For figures to report use ``aapo-fast bench head``, which lets the methods take turns and has the floors in every round.
"""

import pytest
import torch

from aapo_fast.bench import check, inputs, methods, shapes
from aapo_fast.bench.method import obstacle

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


@pytest.fixture(scope="session")
def yardstick(request):
    option = request.config.getoption
    [case] = shapes.cases([option("--shape")], [256], [option("--dtype")], ["model-like"])
    problem = inputs.make_problem(case, torch.device(option("--device")))
    return check.make_yardstick(problem, methods.find(list(methods.DEFAULT)))


@pytest.mark.parametrize("name", methods.DEFAULT)
def test_head(benchmark, yardstick, name, request):
    [method] = methods.find([name])
    problem = yardstick.problem
    reason = obstacle(method, problem)
    if reason:
        pytest.skip(reason)
    run = method.build(problem)
    if method.kind != "floor":
        errors = check.errors_of(run, problem, yardstick.truth_for(method))
        assert not check.complaint(method, errors, yardstick.naive, request.config.getoption("--dtype"))
        benchmark.extra_info["errors"] = errors

    def to_the_end():
        run()
        if problem.hidden.is_cuda:
            torch.cuda.synchronize()

    benchmark.group = request.config.getoption("--shape")
    benchmark.pedantic(to_the_end, setup=problem.clear_gradients, rounds=5, warmup_rounds=1)
