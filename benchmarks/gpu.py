"""All measurements on a GPU in one run: correctness, speed, memory, two ranks, and the paper's images at full size.

    python -m benchmarks.gpu --data FOLDER --out results/gpu     # at most eight minutes of one GPU
    python -m benchmarks.gpu --tiny                              # a rehearsal on the CPU, with everything small

Writes ``gpu.json`` and ``gpu.md`` anew after every section. If a section fails, its traceback stands there; if no time is
left for it, a note. The other sections run all the same. The folder of ``--data`` has the folders ``mnist`` and
``fashion-mnist`` (IDX files, gzip or xz) and ``cifar10-jpeg75`` (all images as JPEG in one npz file). A data set without
files is left out.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import torchdyn_mintime as tm
from benchmarks import gpu_images
from benchmarks.contestants import contestants, node_of, task
from benchmarks.timing import MIB, Row, Run, compare
from torchdyn_mintime.experiments.models import ConvField


class Session:
    """A run: the device, the sizes, the time left, and the results so far."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.found = options, dict[str, Row]()
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.name = f"{'CPU' if options.tiny else torch.cuda.get_device_name()}, torch {torch.__version__}"
        self.width, self.batch = (8, 16) if options.tiny else (64, int(options.batch))
        self.end = self.stop = math.inf  # a rehearsal has no limit of time
        if not options.tiny:
            self.end = time.monotonic() + options.total
            # Everything runs on one stream that a CUDA graph can capture. The default stream cannot be captured, and
            # gradients are added up on the stream where a parameter was first used.
            torch.cuda.set_stream(torch.cuda.Stream())

    def clock(self) -> float:
        """Waits until the device has finished, and returns a time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, name: str, least: float, most: float, section: Callable[["Session", Row], None]) -> None:
        """Runs a section, and writes all results so far.

        Args:
            name: of the section.
            least: seconds that the section needs; with less time left it is left out.
            most: seconds after which it stops.
            section: the function that measures.
        """
        part = self.found[name] = {"rows": [], "notes": []}
        start = time.monotonic()
        self.stop = min(self.end, start + most) if self.end < math.inf else math.inf
        try:
            if self.end - start < least:
                raise TimeoutError(f"{self.end - start:.0f} seconds are left, and it needs {least:.0f}")
            section(self, part)
        except (FileNotFoundError, TimeoutError) as error:
            part["notes"].append(f"left out: {error}")
        except Exception:
            part["notes"].append(f"failed:\n\n```\n{traceback.format_exc()}```")
        torch.cuda.empty_cache()
        part["notes"].append(f"{time.monotonic() - start:.1f} seconds")
        print(name, *part["notes"], sep="\n  ", flush=True)
        self.write(self.options.out)

    def write(self, folder: Path) -> None:
        """Writes ``gpu.json`` and ``gpu.md`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(
            json.dumps({"device": self.name, "sections": self.found}, indent=1, default=str)
        )
        text = f"# {self.name}{', rehearsal' * self.options.tiny}\n"
        for name, part in self.found.items():
            text += "\n\n".join([f"\n## {name}", *part["notes"], as_markdown(part["rows"])]) + "\n"
        (folder / "gpu.md").write_text(text)


def as_markdown(rows: Sequence[Row]) -> str:
    """Returns a table with a column for each key, in the order of their first use."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = [row.get(column, "") for column in columns]
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines if line)


def correctness(session: Session, part: Row) -> None:
    """Runs the tests in tests/gpu in a process of their own, with the numbers that they record."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Without the project's pytest options, except the import mode: plugins such as nbmake may not be installed.
        options = "-q -p no:cacheprovider -o addopts=--import-mode=importlib -W default tests/gpu"
        command = [sys.executable, "-m", "pytest", *options.split(), f"--junitxml={report}"]
        env = os.environ | ({"GPU_TESTS_DEVICE": "cpu"} if session.options.tiny else {})
        limit = min(session.stop - time.monotonic(), 3600.0)
        done = subprocess.run(command, env=env, timeout=limit, capture_output=True, text=True, check=False)
        part["notes"].append(f"```\n{done.stdout[-6000 if done.returncode else -80 :]}{done.stderr[-1000:]}\n```")
        for case in ElementTree.parse(report).iter("testcase"):
            told = [f"{child.tag}: {child.get('message')}"[:120] for child in case if child.tag != "properties"]
            counted = {p.get("name", ""): p.get("value") for p in case.iter("property")}
            part["rows"].append({"test": case.get("name"), "verdict": told[0] if told else "passed", **counted})


# ------------------------------------------------------------------------------------------------ speed and memory


def plain_loop(field: Callable, x: Tensor, steps: int) -> Tensor:
    """Returns z(1) by classical Runge-Kutta steps written by hand, for a field that depends on time."""
    times, dt = torch.linspace(0, 1, 2 * steps + 1, device=x.device).unbind(), 1 / steps
    for i in range(0, 2 * steps, 2):
        k1 = field(times[i], x)
        k2 = field(times[i + 1], x + dt / 2 * k1)
        k3 = field(times[i + 1], x + dt / 2 * k2)
        k4 = field(times[i + 2], x + dt * k3)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def as_graph(run: Run) -> Run:
    """Captures ``run`` in a CUDA graph, and returns the replay of the graph."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def speed(session: Session, part: Row, compiled: bool = False) -> None:
    """Times the field of the paper's image network on the feature maps of MNIST, [batch, 64, 6, 6]; or the field compiled."""
    field = ConvField(session.width).to(session.device)
    quick = cast(nn.Module, torch.compile(field, dynamic=False))
    for steps, backward in product((1, 2) if session.options.tiny else (1, 2, 4, 10, 100), (False, True)):
        if time.monotonic() > session.stop:
            raise TimeoutError(f"the rest, from {steps} steps on")
        # The first state requires a gradient, as later ones have one. Else the field would be compiled for both kinds.
        x = torch.randn(session.batch, session.width, 6, 6, device=session.device, requires_grad=backward)
        runs = contestants(field, x, steps, backward=backward, plain=plain_loop, timed=True)
        if compiled:
            other = contestants(quick, x, steps, backward=backward, plain=plain_loop, timed=True)
            runs = {"plain loop": runs["plain loop"], "plain loop, compiled field": other["plain loop"]}
        if session.device.type == "cuda":
            runs |= {f"{name}, CUDA graph": as_graph(run) for name, run in runs.items() if "plain" in name}
        case = f"{steps} x rk4, forward{' + backward' * backward}"
        rows = compare("speed", case, runs, 5, seconds_a_round=0.1, clock=session.clock)
        graph = {row["contestant"]: row["milliseconds"] for row in rows}.get("plain loop, CUDA graph", math.nan)
        for row in rows:
            spent = row["milliseconds"]
            each = {"us an evaluation": 250 * spent / steps, "more than the CUDA graph": 250 * (spent - graph) / steps}
            part["rows"].append(row | {"evaluations": 4 * steps} | each)


def memory(session: Session, part: Row) -> None:
    """Measures peak memory of forward and backward at batch 1,024, beyond what is held before, and their time."""
    batch, field = 16 if session.options.tiny else 1024, ConvField(session.width).to(session.device)
    x = torch.randn(batch, session.width, 6, 6, device=session.device)
    for steps in (2,) if session.options.tiny else (1, 4, 10, 100):
        runs = {}
        for checkpoint in (False, True):
            grid = torch.linspace(0, 1, steps + 1)
            span = tm.LearnableSpan(node_of(field), grid, checkpoint=checkpoint).to(session.device)
            solve = partial(lambda span: span(x)[1][-1], span)
            runs["checkpoint=True" if checkpoint else "autograd"] = task(solve, [span.t_f, *field.parameters()])
        for row in compare(
            "memory", f"{steps} x rk4, batch {batch}", runs, 3, seconds_a_round=0.1, clock=session.clock
        ):
            if session.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            runs[row["contestant"]]()
            part["rows"].append(row | {"mebibytes": (torch.cuda.max_memory_allocated() - held) / MIB})


# ----------------------------------------------------------------------------------------------------------- ranks


def ranks(session: Session, part: Row) -> None:
    """Compares a training by two processes on one device, each with half of the batch, with one process and all of it."""
    part["notes"].append("gloo with tensors on the device: nccl refuses two ranks on one GPU")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (2, session.device, folder), nprocs=2)
        _rank(0, 1, session.device, folder)
        alone, first, second = (torch.load(Path(folder) / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    for name, found in {"rank 0": first, "rank 1": second, "one process": alone}.items():
        difference = max((value - first[key]).abs().max().item() for key, value in found.items())
        part["rows"].append({"by": name, "t_f": found["t_f"].item(), "difference from rank 0": difference})


def _rank(rank: int, size: int, device: torch.device, folder: str) -> None:
    """Trains by minimum-time for ten iterations in float64, and saves the parameters."""
    torch.manual_seed(0)
    span = tm.LearnableSpan(node_of(ConvField(8).double()), torch.linspace(0, 1, 5)).to(device)
    x = torch.randn(32, 8, 6, 6, dtype=torch.float64)[rank::size].to(device)
    model: nn.Module = span
    if size > 1:
        torch.set_num_threads(1)
        meet, limit = f"file://{folder}/meet", timedelta(minutes=1)
        torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=limit)
        model = nn.parallel.DistributedDataParallel(span)
    optimizer = torch.optim.Adam(tm.parameter_groups(span, lr=1e-3, span_lr=1e-2))
    for _ in range(10):
        optimizer.zero_grad()
        (model(x)[1][-1].square().mean() + 0.1 * span.duration).backward()
        optimizer.step()
    torch.save({name: p.detach().cpu() for name, p in span.named_parameters()}, Path(folder) / f"{rank}-of-{size}")


def images(session: Session, part: Row, name: str) -> None:
    """Trains on a data set (:mod:`benchmarks.gpu_images`), for the seconds asked for or for those that are left."""
    # Two trainings, and 15 seconds for reading, tests and exact solves.
    longest = 4.0 if session.options.tiny else (session.stop - time.monotonic() - 15) / 2
    seconds = min(session.options.seconds, longest)
    folder = session.options.data / name
    gpu_images.compare_trainings(part, folder, session.device, seconds, session.batch, session.options.tiny)


SECTIONS: dict[str, tuple[float, float, Callable[[Session, Row], None]]] = {
    "correctness": (30, 90, correctness),
    "memory": (15, 30, memory),
    "ranks": (20, 60, ranks),
    "mnist": (50, 100, partial(images, name="mnist")),
    "cifar10-jpeg75": (50, 100, partial(images, name="cifar10-jpeg75")),
    "fashion-mnist": (50, 100, partial(images, name="fashion-mnist")),
    # Last, since a CUDA graph that cannot be captured leaves the device's random numbers unusable.
    "speed": (30, 70, speed),
    "compiled": (50, 70, partial(speed, compiled=True)),
}
"""Each section with its least and most seconds."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command ``python -m benchmarks.gpu``, and returns the results by section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU, with everything small")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the images (default data)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/gpu"), help="folder for gpu.json and gpu.md (default results/gpu)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, help="some sections (default: all; a rehearsal leaves out compiled)"
    )
    parser.add_argument("--total", type=float, default=460, help="seconds of the whole run (default 460)")
    parser.add_argument("--seconds", type=float, default=40, help="seconds of each training on images (default 40)")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default 128)")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --tiny rehearses on the CPU")
    session = Session(options)
    for name in options.only or [name for name in SECTIONS if not (options.tiny and name == "compiled")]:
        session.run(name, *SECTIONS[name])
    print((options.out / "gpu.md").read_text())
    return session.found


if __name__ == "__main__":
    main()
