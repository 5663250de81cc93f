"""Sparse attention beside RecBole's attention, torch's SDPA and flex_attention: time and memory.

    PYTHONPATH=. nice python benchmarks/sparse_attention.py [--lengths 50 200 ...] [--repeats 9]
    PYTHONPATH=. nice python benchmarks/sparse_attention.py --block-size 16
    PYTHONPATH=. python benchmarks/sparse_attention.py --device cuda --dtype bfloat16 --tokens 65536

Prints markdown. All contestants of a length take turns in every round, so that a busy machine
slows all of them; a figure is the least of the rounds (of two, for one that takes over 2 s). On a
CPU it is processor time of one thread, on CUDA it is time to completion. Inputs hold ``--tokens``
positions in all, without padding.

Both forms must equal the loop of tests/reference in float64, in value and every gradient, on a
short sequence; and at each length the form that is measured must equal the dense one. If not,
nothing is reported.

Memory is how much the largest resident set of a process of its own grows over one forward and
backward pass, inputs and weights excluded (on CUDA: the largest allocation).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.layers.encoder import TransformerEncoder
from recbole_mm.modules.sparse_alignment import SparseAlignmentEncoder
from recbole_mm.ops.sparse_attention import sparse_attention
from recbole_mm.run_folder import processor
from tests.reference import sparse_attention as reference

HIDDEN, HEADS, INNER = 64, 2, 256
WINDOW, SELECTED = 64, 5  # the own block and four more
SELECTIONS = ("query", "query_block")
QUADRATIC_UP_TO = 8192  # positions; beyond it the peers with an (L, L) tensor are left out
_SLOW = 2000  # ms
NAMES = ("query", "key", "value", "gate", "block_key", "block_value")


_block_size = 0  # of --block-size; 0: by length


def block_size(length: int) -> int:
    return _block_size or (16 if length < 512 else 32)


# ------------------------------------------------------------------------------ contestants


def vectors(length: int, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of an attention op in the layout in which a layer hands them over."""
    B, width = max(1, tokens // length), HIDDEN // HEADS

    def heads(size: int, last: int) -> Tensor:
        return torch.randn(B, size, HEADS, last, device=device, dtype=dtype).transpose(1, 2)

    n_blocks = length // block_size(length)
    values = [heads(length, width) for _ in range(3)] + [heads(length, 3).sigmoid()]
    values += [heads(n_blocks, width) for _ in range(2)]
    return {n: x.detach().requires_grad_() for n, x in zip(NAMES, values, strict=True)}


def ours(inputs: dict[str, Tensor], selection: str, dropout: float, form: str = "auto") -> Tensor:
    B, _, length, _ = inputs["query"].shape
    return sparse_attention(
        **inputs,
        length=torch.full((B,), length, device=inputs["query"].device),
        block_size=block_size(length),
        window_size=WINDOW,
        n_selected_blocks=SELECTED,
        selection=selection,
        dropout=dropout,
        form=form,
    )


def sdpa(inputs: dict[str, Tensor], dropout: float) -> Tensor:
    q, k, v = (inputs[name] for name in NAMES[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def recbole(inputs: dict[str, Tensor], dropout: float) -> Tensor:
    """The lines of RecBole's MultiHeadAttention between its linear maps, with its mask."""
    q, k, v = (inputs[name] for name in NAMES[:3])
    size = q.shape[2]
    visible = torch.ones(len(q), 1, size, size, dtype=torch.bool, device=q.device).tril_()
    mask = torch.where(visible, 0.0, -10000.0).to(q.dtype)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
    return F.dropout(scores.softmax(-1), dropout) @ v


def flex(device: str) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """Compiled flex_attention over window and own block; it has no branch to choose blocks."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return None
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def attend(inputs: dict[str, Tensor]) -> Tensor:
        q, k, v = (inputs[name].detach().contiguous() for name in NAMES[:3])
        size = q.shape[2]
        if size not in masks:

            def seen(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (key > query - WINDOW)

            masks[size] = create_block_mask(seen, None, None, size, size, device=device)
        return compiled(q, k, v, block_mask=masks[size])

    return attend


# ----------------------------------------------------------------------------------- checks


def assert_exact(device: str) -> None:
    """Both forms against the loop, in float64."""
    for selection in SELECTIONS:
        torch.manual_seed(0)
        inputs = vectors(131, 131, device, torch.float64)
        by_loop = reference.sparse_attention(
            *(inputs[name][0] for name in NAMES[:4]),
            131,
            block_size=block_size(131),
            window_size=WINDOW,
            block_key=inputs["block_key"][0],
            block_value=inputs["block_value"][0],
            n_selected_blocks=SELECTED,
            selection=selection,
        )[None]
        weight = torch.randn_like(by_loop)
        expected = torch.autograd.grad(by_loop, list(inputs.values()), weight)
        for form in ("dense", "sparse"):
            output = ours(inputs, selection, 0.0, form)
            torch.testing.assert_close(output, by_loop, rtol=0, atol=1e-10)
            got = torch.autograd.grad(output, list(inputs.values()), weight)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def assert_forms_agree(inputs: dict[str, Tensor], selection: str) -> None:
    """The form measured against the dense one; rounding may sway a choice, so compare in bulk."""
    with torch.no_grad():
        measured = ours(inputs, selection, 0.0).float()
        dense = ours(inputs, selection, 0.0, "dense").float()
    tolerance = 1e-4 if inputs["query"].dtype == torch.float32 else 5e-2
    agrees = (measured - dense).abs().amax(-1) < tolerance
    if agrees.float().mean() < 0.99 or not measured.isfinite().all():
        raise SystemExit(f"{selection}: sparse and dense form disagree; nothing is reported")


# ---------------------------------------------------------------------------------- measure


def timed(device: str, function: Callable[[], object]) -> float:
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    device: str, contestants: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Least milliseconds of each; the first round only warms up."""
    rounds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, function in contestants.items():
            if len(rounds[name]) == 2 and min(rounds[name]) > _SLOW:
                continue
            milliseconds = 1000 * timed(device, function)
            if number > 0 or milliseconds > _SLOW:
                rounds[name].append(milliseconds)
    return {name: min(values) for name, values in rounds.items()}


def forward_and_backward(
    function: Callable[[], Tensor], inputs: list[Tensor]
) -> Callable[[], None]:
    def run() -> None:
        output = function()
        torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)

    return run


def without_gradient(function: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def ops(length: int, inputs: dict[str, Tensor], dropout: float) -> dict[str, Callable[[], Tensor]]:
    contestants: dict[str, Callable[[], Tensor]] = {
        selection: lambda selection=selection: ours(inputs, selection, dropout)
        for selection in SELECTIONS
    }
    if dropout == 0.0 or length <= QUADRATIC_UP_TO:
        contestants["SDPA"] = lambda: sdpa(inputs, dropout)
    if length <= QUADRATIC_UP_TO:
        contestants["RecBole"] = lambda: recbole(inputs, dropout)
    return contestants


def layers(
    length: int, tokens: int, dropout: float, device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, list[Tensor]]]:
    """One whole layer each: projections, attention, feed-forward, norms."""
    from recbole.model.layers import TransformerEncoder as RecBoleEncoder

    sizes = {
        "n_layers": 1,
        "n_heads": HEADS,
        "hidden_size": HIDDEN,
        "inner_size": INNER,
        "hidden_dropout_prob": dropout,
        "attn_dropout_prob": dropout,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    B = max(1, tokens // length)
    x = torch.randn(B, length, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    real = torch.full((B,), length, device=device)
    contestants: dict[str, Callable[[], Tensor]] = {}
    trained: dict[str, list[Tensor]] = {}

    def enter(name: str, model: torch.nn.Module, run: Callable[[], Tensor]) -> None:
        model.to(device, dtype).train()
        contestants[name] = run
        trained[name] = [x, *model.parameters()]

    for selection in SELECTIONS:
        sal = SparseAlignmentEncoder(
            window_size=WINDOW,
            block_size=block_size(length),
            n_selected_blocks=SELECTED,
            selection=selection,
            **sizes,
        )
        enter(selection, sal, lambda sal=sal: sal(x, real))
    if dropout == 0.0 or length <= QUADRATIC_UP_TO:
        plain = TransformerEncoder(**sizes)
        enter("SDPA", plain, lambda: plain(x, real))
    if length <= QUADRATIC_UP_TO:
        stock = RecBoleEncoder(**sizes)

        def run_stock() -> Tensor:
            visible = torch.ones(B, 1, length, length, dtype=torch.bool, device=device).tril_()
            mask = torch.where(visible, 0.0, -10000.0).to(dtype)
            return stock(x, mask, output_all_encoded_layers=False)[0]

        enter("RecBole", stock, run_stock)
    return contestants, trained


# ----------------------------------------------------------------------------------- memory


def memory_of(
    name: str, length: int, dropout: float, args: argparse.Namespace, *, whole_layer: bool
) -> float:
    """Megabytes by which a process grows over one pass."""
    job = {"name": name, "length": length, "dropout": dropout, "whole_layer": whole_layer}
    if args.device != "cpu":  # torch counts there, whatever the process did before
        return grown_in(job, args)
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    command += ["--device", args.device, "--dtype", args.dtype, "--tokens", str(args.tokens)]
    command += ["--block-size", str(args.block_size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def grown_in(job: dict[str, object], args: argparse.Namespace) -> float:
    dtype = getattr(torch, args.dtype)
    dropout, name = float(str(job["dropout"])), str(job["name"])

    def run(length: int, tokens: int) -> float:
        if job["whole_layer"]:
            contestants, trained = layers(length, tokens, dropout, args.device, dtype)
            wanted = trained[name]
        else:
            inputs = vectors(length, tokens, args.device, dtype)
            contestants, wanted = ops(length, inputs, dropout), list(inputs.values())
        return grown_by(forward_and_backward(contestants[name], wanted), args.device)

    run(600, 600)  # libraries take their own memory first
    return run(int(str(job["length"])), args.tokens)


def grown_by(function: Callable[[], None], device: str) -> float:
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest set so far
    before_kb = status("VmRSS")
    function()
    return (status("VmHWM") - before_kb) / 1024


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# ----------------------------------------------------------------------------------- report


def times_faster(rows: dict[str, float], name: str, peer: str) -> str:
    return f"{rows[peer] / rows[name]:.2f}" if peer in rows else "-"


def table(title: str, columns: list[str], lines: list[list[str]]) -> None:
    print(f"\n## {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


def report(
    title: str,
    args: argparse.Namespace,
    measure: Callable[[int], dict[str, float]],
    peers: list[str],
) -> None:
    columns = ["L", *(f"{name}, ms" for name in (*SELECTIONS, *peers))]
    columns += [f"{name} vs {peer}" for peer in peers for name in SELECTIONS]
    lines = []
    for length in args.lengths:
        rows = measure(length)
        cells = [f"{rows[name]:.1f}" if name in rows else "-" for name in (*SELECTIONS, *peers)]
        cells += [times_faster(rows, name, peer) for peer in peers for name in SELECTIONS]
        lines.append([str(length), *cells])
        print(f"{title}: {lines[-1]}", file=sys.stderr, flush=True)
    table(title, columns, lines)


def measured_ops(
    length: int, args: argparse.Namespace, dropout: float, backward: bool
) -> dict[str, float]:
    dtype = getattr(torch, args.dtype)
    inputs = vectors(length, args.tokens, args.device, dtype)
    for selection in SELECTIONS:
        assert_forms_agree(inputs, selection)
    contestants = ops(length, inputs, dropout)
    wanted = list(inputs.values())
    turns = {
        name: forward_and_backward(function, wanted) if backward else without_gradient(function)
        for name, function in contestants.items()
    }
    if not backward and args.flex is not None:
        turns["flex"] = without_gradient(lambda: args.flex(inputs))
    return in_turns(args.device, turns, args.repeats)


def measured_layers(
    length: int, args: argparse.Namespace, dropout: float, backward: bool
) -> dict[str, float]:
    contestants, trained = layers(
        length, args.tokens, dropout, args.device, getattr(torch, args.dtype)
    )
    turns = {
        name: forward_and_backward(function, trained[name])
        if backward
        else without_gradient(function)
        for name, function in contestants.items()
    }
    return in_turns(args.device, turns, args.repeats)


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} cores {processor()}, {pages / 2**30:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [50, 200, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--tokens", type=int, default=8192, help="positions of all rows together")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--block-size", type=int, default=0, help="default: 32, 16 below L = 512")
    parser.add_argument("--no-flex", action="store_true", help="leave flex_attention out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    global _block_size
    _block_size = args.block_size
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.worker:
        print(grown_in(json.loads(args.worker), args))
        return

    torch.manual_seed(0)
    assert_exact(args.device)
    args.flex = None if args.no_flex else flex(args.device)
    if args.flex is not None:
        try:
            with torch.no_grad():
                args.flex(vectors(256, 256, args.device, getattr(torch, args.dtype)))
        except Exception as error:  # compilers fail in many ways
            print(f"flex_attention does not run here: {error}", file=sys.stderr)
            args.flex = None

    print("# Sparse attention: time and memory\n")
    print(f"{datetime.date.today()}, {machine(args.device)}, {args.dtype}, one thread,")
    print(f"Python {platform.python_version()}, torch {torch.__version__}.")
    print(f"Load average of the machine at the start: {os.getloadavg()[0]:.1f}.")
    print(
        f"D {HIDDEN}, {HEADS} heads, window {WINDOW}, {SELECTED} selected blocks with the own one,"
    )
    blocks = args.block_size or "32 (16 below L = 512)"
    print(f"blocks of {blocks}, {args.tokens} positions in all; {args.repeats} rounds.")
    print("`query`, `query_block`: sparse attention by kind of selection. Ratios above 1: faster")
    print("than the peer.")
    with_flex = ["flex"] if args.flex is not None else []
    report(
        "Op, forward + backward, no dropout",
        args,
        lambda n: measured_ops(n, args, 0.0, True),
        ["SDPA", "RecBole"],
    )
    report(
        "Op, forward + backward, dropout .5",
        args,
        lambda n: measured_ops(n, args, 0.5, True),
        ["SDPA", "RecBole"],
    )
    report(
        "Op, forward, no dropout (flex: the window alone)",
        args,
        lambda n: measured_ops(n, args, 0.0, False),
        ["SDPA", "RecBole", *with_flex],
    )
    for dropout in (0.0, 0.5):
        report(
            f"Layer, forward + backward, dropout {dropout:g}",
            args,
            lambda n, dropout=dropout: measured_layers(n, args, dropout, True),
            ["SDPA", "RecBole"],
        )
    report(
        "Layer, forward, no dropout",
        args,
        lambda n: measured_layers(n, args, 0.0, False),
        ["SDPA", "RecBole"],
    )
    for part in ("Op", "Layer"):
        columns = [(name, dropout) for dropout in (0.0, 0.5) for name in (*SELECTIONS, "SDPA")]
        columns.append(("RecBole", 0.5))
        lines = []
        for length in args.lengths:
            cells = [str(length)]
            for name, dropout in columns:
                linear = name in SELECTIONS or (name == "SDPA" and dropout == 0.0)
                if linear or length <= QUADRATIC_UP_TO:
                    grown = memory_of(name, length, dropout, args, whole_layer=part == "Layer")
                    cells.append(f"{grown:.0f}")
                else:
                    cells.append("-")
            lines.append(cells)
        titles = [f"{name}, dropout .5" if dropout else name for name, dropout in columns]
        table(f"{part}: memory of one forward and backward pass, MB", ["L", *titles], lines)
    print(f"\nLoad average at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
