"""Is it better? Contestants of equal size on the same tokens, each at its best learning rate, with three seeds.

    python benchmarks/quality.py run --data tinyshakespeare.txt --out benchmarks/results/gpu/quality.json --jobs 6
    python benchmarks/quality.py document

`run` trains every cell (study, contestant, rate, seed) in a process of its own, `--jobs` of them on each GPU, or on the
CPU where there is none, and writes the document after each; what it has is not run again, so an interrupted study
goes on. The first seed tries all rates; the best by the half of the held-out text that chooses is trained with the
other seeds, and the other half is what claims are made by. Before all else, ours and attention's steps are timed, in
turns and alone; the quicker one is then also trained for as many steps as fit in the time of the slower one.

`document` writes the tables and figures of docs/quality.md from the results.
"""

import argparse
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from quality_study.contestants import CONTESTANTS
from quality_study.speed import TIMED, step_seconds
from quality_study.studies import PUBLISHED, STUDIES, Study
from quality_study.training import Cell, run
from resnet_bk.bench.process import Ended, run_apart
from resnet_bk.bench.suite import failure_kind
from resnet_bk.environment import describe_environment
from resnet_bk.files import read_json, write_json

LONGEST_CELL = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train what is missing")
    running.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(PUBLISHED))
    running.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="only these")
    running.add_argument("--data", type=Path, help="the text of Tiny Shakespeare")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--jobs", type=int, default=1, help="processes on each device")
    running.add_argument("--threads", type=int, default=1, help="CPU threads of a process")
    running.add_argument(
        "--stop-after", type=float, default=float("inf"), help="seconds; no cell begins that would end later"
    )
    document = commands.add_parser("document", help="write docs/quality.md's tables and figures")
    document.add_argument("--check", action="store_true", help="only say whether they are those of the results")
    arguments = parser.parse_args()
    if arguments.command == "document":
        from quality_study.document import write

        sys.exit(write(check=arguments.check))
    studies = [STUDIES[name] for name in arguments.studies]
    if arguments.data is None and any(study.corpus == "characters" for study in studies):
        parser.error("these studies read Tiny Shakespeare: give --data")
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"--data {arguments.data} is not a file")
    Runner(studies, arguments).run()


class Runner:
    """Cells on devices: of each contestant of each study first the rates, then the seeds; earlier studies first."""

    def __init__(self, studies: list[Study], arguments: argparse.Namespace) -> None:
        self.studies, self.arguments = studies, arguments
        self.began = time.monotonic()
        self.devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
        out = arguments.out
        self.results: dict[str, Any] = read_json(out) if out.exists() else {"cells": {}, "steps": {}}
        self.lock = threading.RLock()
        self.waiting: queue.PriorityQueue[tuple[float, int, Cell | None, Callable[[], None]]] = queue.PriorityQueue()
        self.counter, self.outstanding = itertools.count(), 0
        self.longest: dict[str, float] = {}  # seconds of a study's cells

    def run(self) -> None:
        self.time_steps()
        with self.lock:
            for study in self.studies:
                for name in study.contestants:
                    chosen = self.arguments.contestants or study.contestants
                    if name in chosen and CONTESTANTS[name].is_available:
                        self.sweep(study, name)
            if not self.outstanding:
                return
        workers = [
            threading.Thread(target=self.work, args=(device,))
            for _ in range(self.arguments.jobs)
            for device in self.devices
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def time_steps(self) -> None:
        """Alone on the first device, before anything else is there."""
        for study in self.studies:
            key = f"{study.name} on {self.device_name()}"
            if study.corpus is None or key in self.results["steps"] or not set(TIMED) <= set(study.contestants):
                continue
            arguments = (study.name, self.arguments.data, self.devices[0], self.arguments.threads)
            ended = run_apart(step_seconds, arguments, timeout=LONGEST_CELL, kind_of=failure_kind)
            self.keep("steps", key, ended)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(0) if self.devices[0] != "cpu" else "CPU"

    def sweep(self, study: Study, contestant: str) -> None:
        cells = [Cell(study=study.name, contestant=contestant, rate=rate, seed=study.seeds[0]) for rate in study.rates]
        self.submit_all(study, 0, cells, lambda: self.other_seeds(study, cells))

    def other_seeds(self, study: Study, swept: list[Cell]) -> None:
        results = self.results["cells"]
        if not all(cell.name in results for cell in swept):
            return
        measured = [cell for cell in swept if "choosing" in results[cell.name]]
        if not measured:
            return
        best = min(measured, key=lambda cell: float(results[cell.name]["choosing"]))
        cells = [msgspec.structs.replace(best, seed=seed) for seed in study.seeds[1:]]
        longer = self.as_long_as_the_slower(study, best.contestant)
        if longer is not None:
            cells += [msgspec.structs.replace(best, seed=seed, share=longer) for seed in study.seeds]
        self.submit_all(study, 0.5, cells, lambda: None)

    def as_long_as_the_slower(self, study: Study, contestant: str) -> float | None:
        """How many times the steps fit in the slower one's time; None for the slower one, and for all others."""
        seconds = self.results["steps"].get(f"{study.name} on {self.device_name()}", {})
        if contestant not in TIMED or not all(name in seconds for name in TIMED):
            return None
        share = round(max(seconds[name] for name in TIMED) / seconds[contestant], 3)
        return share if share > 1 else None

    def submit_all(self, study: Study, phase: float, cells: list[Cell], then: Callable[[], None]) -> None:
        """``then`` is called when all of them are there."""
        missing = [cell for cell in cells if cell.name not in self.results["cells"]]
        left = len(missing)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                then()

        if not missing:
            then()
        for cell in missing:
            self.outstanding += 1
            # A second phase before another study's first one.
            priority = self.studies.index(study) - phase
            self.waiting.put((priority, next(self.counter), cell, one_less))

    def work(self, device: str) -> None:
        while True:
            _, _, cell, then = self.waiting.get()
            if cell is None:
                return
            longest = self.longest.get(cell.study, 0.0) * max(1.0, cell.share)
            if time.monotonic() - self.began + longest < self.arguments.stop_after:
                arguments = (cell, self.arguments.data, device, self.arguments.threads)
                ended = run_apart(run, arguments, timeout=LONGEST_CELL, kind_of=failure_kind)
                self.keep("cells", cell.name, ended)
                self.longest[cell.study] = max(self.longest.get(cell.study, 0.0), ended.seconds / max(1.0, cell.share))
            with self.lock:
                then()
                self.outstanding -= 1
                if not self.outstanding:
                    for _ in range(len(self.devices) * self.arguments.jobs):
                        self.waiting.put((float("inf"), next(self.counter), None, lambda: None))

    def keep(self, kind: str, name: str, ended: Ended) -> None:
        found: dict[str, Any] = {"failure": msgspec.to_builtins(ended.failure)} if ended.result is None else {}
        if ended.result is not None:
            found = msgspec.json.decode(ended.result)
        with self.lock:
            self.results[kind][name] = found
            environment = describe_environment()
            # Cells may come from several machines.
            known = self.results.setdefault("environments", [])
            if environment not in known:
                known.append(environment)
            found["environment"] = known.index(environment)
            write_json(self.arguments.out, self.results)
            gone = time.monotonic() - self.began
            what = found.get("failure") or found.get("answers") or found.get("test") or found
            print(f"[{gone:.0f} s] {name}: {what} ({ended.seconds:.0f} s, {self.outstanding} left)", flush=True)


if __name__ == "__main__":
    main()
