"""What tests of the Triton kernel do in a process of its own, because Triton reads TRITON_INTERPRET
when it is imported:

    TRITON_INTERPRET=1 python -m tests.methods.triton_process interpret   equal to PyTorch, by case
    python -m tests.methods.triton_process compile                        what ptxas says, by tokens
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toma_fx.methods.facility import facility_location
from toma_fx.methods.toma import cosine_similarity

Case = tuple[Callable[[], Tensor], int]
"""Makes similarities; destinations."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tokens = torch.randn(*shape, 8, generator=torch.Generator().manual_seed(shape[-1]))
    return cosine_similarity(tokens.to(dtype))


def duplicates(n: int) -> Tensor:
    tokens = torch.randn(2, n // 2, 8, generator=torch.Generator().manual_seed(n))
    return cosine_similarity(tokens.repeat(1, 2, 1))


def mutual_neighbors(n: int) -> Tensor:
    """Pairs that are equally similar, and nothing else is."""
    return torch.block_diag(*[torch.tensor([[1.0, 0.5], [0.5, 1.0]])] * (n // 2))


def signs(n: int) -> Tensor:
    sign = torch.randn(2, n, generator=torch.Generator().manual_seed(n)).sign()
    return sign.unsqueeze(-1) * sign.unsqueeze(-2)


def with_nan(*places: tuple[int, ...]) -> Tensor:
    similarity = random(2, 36)
    for place in places:
        similarity[place] = float("nan")
    return similarity


def rounded(n: int) -> Tensor:
    """Not symmetric to the last bit."""
    return random(2, n) + 1e-5 * torch.rand(2, n, n, generator=torch.Generator().manual_seed(n))


def make_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for n in (2, 5, 16, 36, 64, 100, 256):
        for keep in sorted({1, n // 2, n}):
            cases[f"random {n}, {keep}"] = partial(random, 2, n), keep
        cases[f"bfloat16 {n}"] = partial(random, 1, n, dtype=torch.bfloat16), max(1, n // 2)
    for n in (16, 100, 256):
        for value in (1.0, 0.0, -1.0):
            cases[f"flat {value} {n}"] = partial(torch.full, (1, n, n), value), 10
        cases[f"opposites {n}"] = (lambda n=n: 2 * torch.eye(n) - 1), 10
        for make in (duplicates, mutual_neighbors, signs, rounded):
            cases[f"{make.__name__} {n}"] = partial(make, n), n // 2
    return cases | {
        "one token": (partial(random, 3, 1), 1),
        "more than a tile, 129": (partial(random, 1, 129), 20),
        "more than a tile, 300": (partial(random, 1, 300), 20),
        "most tokens": (partial(random, 1, 512), 20),
        "batches": (partial(random, 2, 3, 4, 36), 9),
        "one matrix": (partial(random, 36), 9),
        "no windows": (partial(random, 0, 36), 9),
        "transposed": (lambda: random(36, 36).permute(1, 2, 0), 9),
        "NaN token": (lambda: with_nan((0, 7), (0, slice(None), 7)), 20),
        "NaN pair": (lambda: with_nan((1, 20, 30), (1, 30, 20)), 20),
        "NaN window": (lambda: with_nan((0,)), 36),
    }


CASES = make_cases()


def compare(device: str, name: str) -> bool:
    """Whether the kernel chooses what PyTorch chooses."""
    from toma_fx.methods import facility_triton

    make, keep = CASES[name]
    similarity = make().to(device)
    chosen = facility_triton.facility_location(similarity, keep)
    expected = facility_location(similarity, keep)
    return chosen.dtype == torch.int64 and torch.equal(chosen, expected)


def compile_kernel(n: int) -> dict[str, Any]:
    """Bytes of shared memory, registers a thread, and bytes of the stack (where registers spill) of
    windows of n tokens on an H100; needs none."""
    import triton
    from triton.backends.compiler import GPUTarget

    from toma_fx.methods import facility_triton

    kernel = facility_triton.facility_location_kernel
    options = facility_triton.launch_options(n)
    constants = {name: options[name] for name in ("ROWS", "COLUMNS")}
    types = {"similarity": "*fp32", "chosen": "*i64", "n": "i32", "stride": "i32", "keep": "i32"}
    aligned = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        {(kernel.arg_names.index(name),): aligned for name in ("similarity", "chosen", "stride")},
    )
    target, warps = GPUTarget("cuda", 90, 32), {"num_warps": options["num_warps"]}
    compiled = triton.compile(source, target=target, options=warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"shared": compiled.metadata.shared, "warps": options["num_warps"], **usage}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        print(json.dumps({name: compare("cpu", name) for name in CASES}))
    else:
        sizes = (16, 36, 64, 100, 128, 200, 256, 512)
        print(json.dumps({n: compile_kernel(n) for n in sizes}))
