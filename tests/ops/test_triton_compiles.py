"""Every Triton kernel compiles for NVIDIA GPUs that are not here: sm_80, sm_90 and sm_100, ahead of time.

Run as a script, this file compiles them all and prints what came out; the test does that in a process of its own,
since kernels that the interpreter has taken over cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "aapo_fast.ops.linear_policy.kernels_triton",
    "aapo_fast.ops.linear_policy.sparse_triton",
    "aapo_fast.ops.linear_policy.targets_triton",
    "aapo_fast.ops.group_advantages.advantages_triton",
)
ARCHITECTURES = (80, 90, 100)

TYPES = {
    **dict.fromkeys(["stride", "out_stride", "source_stride", "vocab", "width", "num_rows", "num_tiles"], "i32"),
    **dict.fromkeys(["temperature", "scale", "softcap", "threshold"], "fp32"),
    **dict.fromkeys(["delta_low", "delta_high"], "fp64"),
    **dict.fromkeys(["targets", "target", "starts", "stands_before", "dusts"], "*i64"),
    **dict.fromkeys(["sorted_target", "ends", "order"], "*i64"),
    "index": "*i32",
    **dict.fromkeys(["weight_stride", "num_sections"], "i32"),
    "size": "i64",
    **dict.fromkeys(["counts", "entry_row", "entry_column"], "*i32"),
    "group_size": "i32",
}
"""Of arguments by name; the others are pointers to fp32."""

UNALIGNED = ("temperature", "targets", "num_rows", "index", "row_max", "total", "entropy", "on_logp", "on_entropy",
             "on_logsumexp", "num_tiles", "group_size", "num_sections", "size", "seed", "told")  # fmt: skip
"""What a launch cannot rely on to be a multiple of 16."""


def variants():
    """(module, kernel, constants, launch options, argument types that differ): each flag on and off."""
    rows, sparse, targets, groups = MODULES
    plain = {"SOFTCAP": False, "ROW_TEMPERATURE": False}
    full = {"SOFTCAP": True, "ROW_TEMPERATURE": True}
    narrow, row = {"out": "*bf16"}, {"temperature": "*fp32"}
    eight, one = ({"num_warps": warps, "enable_fp_fusion": False} for warps in (8, 1))
    many = one | {"num_warps": 4}
    on, off = {"ENTROPY": True, "LOGSUMEXP": True}, {"ENTROPY": False, "LOGSUMEXP": False}
    return [
        (rows, "statistics_kernel", {**plain, "KEEP_TILES": False, "TILE": 256, "BLOCK": 4096}, eight, {}),
        (rows, "statistics_kernel", {**plain, "KEEP_TILES": True, "TILE": 256, "BLOCK": 2048}, eight, {}),
        (rows, "statistics_kernel", {**full, "KEEP_TILES": True, "TILE": 256, "BLOCK": 2048}, eight, row),
        (rows, "gradient_kernel", {**plain, **off, "APART": True, "BLOCK": 4096}, eight, narrow),
        (rows, "gradient_kernel", {**plain, **off, "APART": False, "BLOCK": 4096}, eight, narrow),
        (rows, "gradient_kernel", {**full, **on, "APART": False, "BLOCK": 4096}, eight, row),
        (rows, "both_sweeps_kernel", {**plain, "APART": True, "BLOCK": 4096}, eight, {**narrow, "index": "*i64"}),
        (rows, "both_sweeps_kernel", {**full, "APART": False, "BLOCK": 4096}, eight, row),
        (sparse, "count_kernel", {**plain, **off, "TILE": 256, "SECTION": 32}, one, {}),
        (sparse, "count_kernel", {**full, **on, "TILE": 256, "SECTION": 32}, one, row),
        (sparse, "emit_kernel", {**plain, **off, "TILE": 256, "SECTION": 32}, one, {}),
        (sparse, "emit_kernel", {**full, **on, "TILE": 256, "SECTION": 32}, one, row),
        (sparse, "uniforms_kernel", {"BLOCK": 256}, {"num_warps": 4}, {"rows": "*i64", "seed": "i64"}),
        (sparse, "plan_kernel", {"SECTIONS": 32}, {"num_warps": 1}, {"numbers": "*i64", "expected": "*fp64"}),
        (sparse, "scan_kernel", {"BLOCK": 4096}, {"num_warps": 8},
         {"numbers": "*i64", "size": "i32", "expected": "*fp64", "told": "*fp64"}),
        (sparse, "gather_kernel", {"ADD": True, "GROUP": 8, "WIDTH": 1024}, {"num_warps": 4}, {"source": "*bf16"}),
        (sparse, "gather_kernel", {"ADD": False, "GROUP": 2, "WIDTH": 2048}, {"num_warps": 4},
         {"source": "*bf16", "out": "*bf16", "scale": "*fp32"}),
        (sparse, "gather_kernel", {"ADD": False, "GROUP": 2, "WIDTH": 1024}, {"num_warps": 4}, {"scale": "*fp32"}),
        (rows, "finish_kernel", {"BLOCK": 128}, {"num_warps": 4}, {}),
        (rows, "scale_kernel", {"BLOCK": 4096}, eight, {**narrow, "scale": "*fp32"}),
        (targets, "add_times_weight_kernel", {"WIDTH": 1024}, {"num_warps": 4}, {"value": "*fp64", "weight": "*bf16"}),
        (targets, "add_times_weight_kernel", {"WIDTH": 1024}, {"num_warps": 4}, {"value": "*fp64"}),
        (targets, "add_transposed_times_kernel", {"GROUP": 2, "WIDTH": 1024}, {"num_warps": 4},
         {"value": "*fp64", "source": "*bf16"}),
        (targets, "add_transposed_times_kernel", {"GROUP": 2, "WIDTH": 1024}, {"num_warps": 4}, {"value": "*fp64"}),
        (groups, "group_advantages_kernel", {"SCALE": True, "MOMENTUM": True, "GROUP": 8}, one, {}),
        (groups, "group_advantages_kernel", {"SCALE": True, "MOMENTUM": True, "GROUP": 256}, one, {}),
        (groups, "group_advantages_kernel", {"SCALE": True, "MOMENTUM": True, "GROUP": 1024}, many, {}),
        (groups, "group_advantages_kernel", {"SCALE": False, "MOMENTUM": False, "GROUP": 1024}, many,
         {"rewards": "*bf16", "reference": "*bf16"}),
    ]  # fmt: skip


def compile_all():
    """One line of JSON a compilation, and the kernels that the modules hold."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for module, kernel, constants, options, types in variants():
        function = getattr(importlib.import_module(module), kernel)
        names = function.arg_names
        signature = {n: "constexpr" if n in constants else {**TYPES, **types}.get(n, "*fp32") for n in names}
        aligned = [n for n in names if n not in constants and n not in UNALIGNED and not signature[n].startswith("fp")]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        for architecture in ARCHITECTURES:
            source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            print(json.dumps({
                "kernel": kernel, "architecture": architecture, "cubin_bytes": len(compiled.asm["cubin"]),
                "shared_bytes": compiled.metadata.shared, "local_arrays": ".local" in compiled.asm["ptx"],
                **_resources(compiled.asm["cubin"]),
            }))  # fmt: skip
    for module in MODULES:
        print(json.dumps({"module": module, "kernels": _kernels(importlib.import_module(module))}))


def _kernels(module):
    """Functions for Triton in a module that no other one of them calls."""
    import triton

    functions = {
        name: f
        for name, f in vars(module).items()
        if isinstance(f, triton.JITFunction) and f.fn.__module__ == module.__name__
    }
    called = {
        name
        for f in functions.values()
        for name in f.fn.__code__.co_names
        if name in functions and functions[name] is not f
    }
    return sorted(functions.keys() - called)


def _resources(cubin):
    """Registers and stack bytes, which is where spilt registers go, if Triton brings the tool that tells."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(field.split(":") for field in told.stdout.split() if field.startswith(("REG:", "STACK:")))
    return {"registers": int(found["REG"]), "stack_bytes": int(found["STACK"])}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return [line for line in lines if "kernel" in line], [line for line in lines if "module" in line]


def test_every_variant_compiles_and_keeps_to_its_registers(compiled):
    results, _ = compiled
    assert len(results) == len(variants()) * len(ARCHITECTURES)
    for result in results:
        print(result)
        assert result["cubin_bytes"] > 0 and not result["local_arrays"], result
        assert result.get("stack_bytes", 0) == 0, result
        assert result["shared_bytes"] <= 48 * 1024, result


def test_no_kernel_is_forgotten(compiled):
    _, modules = compiled
    listed = {(module, kernel) for module, kernel, *_ in variants()}
    assert {(m["module"], kernel) for m in modules for kernel in m["kernels"]} == listed


if __name__ == "__main__":
    compile_all()
