"""Options of the pytest-benchmark cases."""


def pytest_addoption(parser):
    group = parser.getgroup("aapo-fast benchmarks")
    group.addoption("--shape", default="64,64,4999", help="N,H,V of the problem, or the name of a head (256 rows)")
    group.addoption("--dtype", default="float32", help="of hidden states and weight")
    group.addoption("--device", default="cpu", help="cpu or cuda")
