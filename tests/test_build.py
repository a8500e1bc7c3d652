"""The native extension's build (setup.py): what it makes, what it leaves alone, and that it never stands in the way.

Most tests have a compiler that only notes what it is asked, so they take no time; one makes and uses a wheel.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, with no trace of an earlier one."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("_native*", "__pycache__")
    for name in ("aapo_fast", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture
def compiler(tmp_path):
    """A compiler that writes down its arguments, and what it wrote down so far."""
    program, log = tmp_path / "compiler", tmp_path / "log"
    program.write_text(COMPILER.format(log=log))
    program.chmod(0o755)

    def compiled():
        return [line for line in log.read_text().splitlines() if " -c " in line] if log.exists() else []

    return {"CXX": str(program)}, compiled


def build(tree, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "LDFLAGS", "AAPO_FAST_NATIVE")}
    command = [sys.executable, "setup.py", "--quiet", *(arguments or ("build_ext", "--inplace"))]
    return subprocess.run(command, cwd=tree, env=clean | environment, capture_output=True, text=True, check=False)


def ops(tree, pattern):
    return list((tree / "aapo_fast" / "ops").glob(pattern))


def test_without_a_compiler_it_installs_and_says_so(tree, tmp_path):
    done = build(tree, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("aapo-fast:")]
    assert "no native CPU kernels, everything works without them: no C++ compiler (g++) in PATH; install one" in line
    assert not ops(tree, "_native*.so") and "no C++ compiler" in ops(tree, "_native.txt")[0].read_text()


def test_a_compiler_that_fails_is_no_obstacle_either(tree, tmp_path):
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: too old' >&2\nexit 1\n")
    program.chmod(0o755)
    done = build(tree, CXX=str(program))
    assert done.returncode == 0 and not ops(tree, "_native*.so")
    assert (
        "broken failed: kernels.cpp:1: error: too old; update the compiler" in ops(tree, "_native.txt")[0].read_text()
    )


@pytest.mark.parametrize(("wish", "said"), [
    ("cpu", "error: AAPO_FAST_NATIVE=cpu cannot be met: no C++ compiler (nowhere) in PATH; install one"),
    ("cuda", "there are no CUDA kernels, because on a GPU the row kernels are Triton's"),
    ("gpu", "error: AAPO_FAST_NATIVE='gpu' is unknown; use auto, cpu, cuda or off"),
])  # fmt: skip
def test_a_wish_that_cannot_be_met_fails_with_the_remedy(tree, wish, said):
    done = build(tree, CXX="nowhere", AAPO_FAST_NATIVE=wish)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


def test_compiled_again_only_where_something_changed(tree, compiler):
    environment, compiled = compiler
    assert build(tree, **environment).returncode == 0
    levels = 3 if os.uname().machine == "x86_64" else 1
    assert len(compiled()) == levels + 3 and len(ops(tree, "_native*.so")) == 1
    assert build(tree, **environment).returncode == 0
    assert len(compiled()) == levels + 3
    header = tree / "csrc" / "vector.h"
    os.utime(header, (header.stat().st_mtime + 1e6,) * 2)
    assert build(tree, **environment).returncode == 0
    assert len(compiled()) == 2 * (levels + 3)
    assert build(tree, **environment, CXXFLAGS="-g").returncode == 0
    assert len(compiled()) == 3 * (levels + 3)
    assert all("-DTORCH_TARGET_VERSION=0x020a000000000000" in c for c in compiled() if "operators.cpp" in c)


def test_switched_off_nothing_is_built_and_nothing_older_stays(tree, compiler):
    environment, compiled = compiler
    assert build(tree, **environment).returncode == 0 and ops(tree, "_native*.so")
    before = len(compiled())
    assert build(tree, **environment, AAPO_FAST_NATIVE="off").returncode == 0
    assert len(compiled()) == before and not ops(tree, "_native*.so")
    assert "AAPO_FAST_NATIVE=off" in ops(tree, "_native.txt")[0].read_text()
    assert build(tree, **environment).returncode == 0 and not ops(tree, "_native.txt")
    assert build(tree, "bdist_wheel", AAPO_FAST_NATIVE="off").returncode == 0
    [wheel] = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") and not [n for n in zipfile.ZipFile(wheel).namelist() if ".so" in n]


def test_the_source_distribution_has_the_sources(tree):
    assert build(tree, "sdist").returncode == 0
    [archive] = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        listed = "\n".join(opened.getnames())
    assert all(f"/csrc/{path.relative_to(ROOT / 'csrc')}" in listed for path in (ROOT / "csrc").rglob("*.[hc]*"))


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder, minor):
    header = folder / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n")
    return folder


def test_where_torch_is_looked_for(script, monkeypatch, tmp_path):
    assert script.find_torch() == Path(torch.__file__).parent
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(script.NotBuiltError, match="torch was not found, .* install torch first and then aapo-fast"):
        script.find_torch()
    old, new = fake_torch(tmp_path / "old", 9), fake_torch(tmp_path / "env/lib/python3.12/site-packages", 10)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(old))
    with pytest.raises(script.NotBuiltError, match="only torch 2.9 was found"):
        script.find_torch()
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "env"))
    assert script.find_torch() == new / "torch"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(fake_torch(tmp_path / name, 11)))
    assert script.find_torch() == tmp_path / "platlib" / "torch"


USE = """
import torch
from aapo_fast.ops import native
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Transform, finish
print(native.__file__, native.describe())
x = torch.randn(3, 500)
truth = x.logsumexp(1)  # sweep 1 may write on its products
rows = finish(NativeRows(x).statistics(x, torch.tensor([1, 2, 3]), Transform()))
assert torch.allclose(rows.logsumexp, truth), rows
"""


@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler")
def test_a_wheel_that_is_installed_elsewhere_and_used(tree, tmp_path):
    """A minute where nothing has been compiled before; otherwise the objects of this tree serve again."""
    if (ROOT / "build" / "native").exists():
        shutil.copytree(ROOT / "build" / "native", tree / "build" / "native")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    environment = {**os.environ, "AAPO_FAST_NATIVE": "cpu"}
    wish = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path, tree]
    subprocess.run([*pip, *wish], check=True, env=environment)
    [wheel] = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean"], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    # torch alone is borrowed: a .pth file adds this environment's packages, not its editable installations.
    [packages] = (tmp_path / "clean").glob("lib/python3*/site-packages")
    (packages / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "AAPO_FAST"))}
    used = subprocess.run([python, "-c", USE], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    assert str(packages) in used.stdout and "native kernels: for CPUs" in used.stdout
    undefined = subprocess.run(["nm", "-D", "--undefined-only", next(packages.glob("aapo_fast/ops/_native*.so"))],
                               capture_output=True, text=True, check=False).stdout  # fmt: skip
    assert " Py" not in undefined and " _Py" not in undefined  # no Python API: any Python will do
