"""Is it better? Contestants of equal size on the same tokens, each at its best rate and dropout, with three seeds.

    python benchmarks/quality.py run --data tinyshakespeare.txt --out benchmarks/results/gpu/quality.json --jobs 6
    python benchmarks/quality.py merge --into benchmarks/results/gpu/quality.json other.json
    python benchmarks/quality.py document

`run` trains every cell (study, contestant, rate, dropout, weight decay, dropout of tokens, seed) in a process of its
own, `--jobs` of them on each GPU, or on the CPU where there is none, and writes the results after each; what they have
is not run again, so an interrupted study goes on. The first seed tries all rates with the study's first value of
everything else, then the other decays at the best rate, then the other dropouts at the best of these, then those of
tokens; the best of all by the half of the held-out text that chooses is trained with the other seeds, and the other
half is what claims are made by. Before all else, ours and attention's steps are timed, in turns and alone; the quicker
one is then also trained for as many steps as fit in the time of the slower one, where one run has both.

`merge` adds the results of machines that ran side by side, each with contestants or studies of its own.
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

import msgspec
import torch

from quality_study.cells import KNOBS, Cell, Results, choice, keep, merge, nothing
from quality_study.contestants import CONTESTANTS
from quality_study.speed import TIMED, step_seconds
from quality_study.studies import PUBLISHED, STUDIES, Study
from quality_study.training import run
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
    running.add_argument(
        "--cells", nargs="+", type=cell_named, metavar="NAME", help="only these of the studies, as results name them"
    )
    running.add_argument("--data", type=Path, help="the text of Tiny Shakespeare")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--jobs", type=int, default=1, help="processes on each device")
    running.add_argument("--threads", type=int, default=1, help="CPU threads of a process")
    running.add_argument(
        "--stop-after", type=float, default=float("inf"), help="seconds; no cell begins that would end later"
    )
    merging = commands.add_parser("merge", help="add other machines' results")
    merging.add_argument("--into", type=Path, required=True, help="the results that grow")
    merging.add_argument("others", type=Path, nargs="+")
    document = commands.add_parser("document", help="write docs/quality.md's tables and figures")
    document.add_argument("--check", action="store_true", help="only say whether they are those of the results")
    arguments = parser.parse_args()
    if arguments.command == "document":
        from quality_study.document import write

        sys.exit(write(check=arguments.check))
    if arguments.command == "merge":
        merge_files(arguments.into, arguments.others)
        return
    studies = [STUDIES[name] for name in arguments.studies]
    if arguments.data is None and any(study.corpus == "characters" for study in studies):
        parser.error("these studies read Tiny Shakespeare: give --data")
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"--data {arguments.data} is not a file")
    for cell in arguments.cells or []:
        if cell.study not in arguments.studies:
            parser.error(f"--cells {cell.name} is not of these studies: give --studies {cell.study}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Runner(studies, arguments).run()


def cell_named(name: str) -> Cell:
    """For the parser, which says in one line what is wrong."""
    try:
        cell = Cell.named(name)
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{name} is no cell; they are like nanogpt/ours/0.001/d0.3/w1/0") from None
    for kind, found, known in (("study", cell.study, STUDIES), ("contestant", cell.contestant, CONTESTANTS)):
        if found not in known:
            raise argparse.ArgumentTypeError(f"{name}: there is no {kind} {found}; choose one of {', '.join(known)}")
    return cell


def merge_files(into: Path, others: list[Path]) -> None:
    """Says what the results hold then, and which of the others' did not go in because they had their own."""
    results = read_json(into) if into.exists() else nothing()
    for other in others:
        for name in merge(results, read_json(other)):
            print(f"{name}: {into} has another measurement, which stays")
    write_json(into, results)
    print(f"{into}: {len(results['cells'])} cells of {len(results['environments'])} environments")


class Runner:
    """Cells on devices: of each contestant of each study first the sweep, then the seeds; earlier studies first."""

    def __init__(self, studies: list[Study], arguments: argparse.Namespace) -> None:
        self.studies, self.arguments = studies, arguments
        self.began = time.monotonic()
        self.devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
        out = arguments.out
        self.results: Results = read_json(out) if out.exists() else nothing()
        self.lock = threading.RLock()
        self.waiting: queue.PriorityQueue[tuple[float, int, Cell | None, Callable[[], None]]] = queue.PriorityQueue()
        self.counter, self.outstanding = itertools.count(), 0
        self.longest: dict[str, float] = {}  # seconds of a study's cells

    def run(self) -> None:
        self.time_steps()
        with self.lock:
            for study in self.studies:
                if self.arguments.cells:
                    mine = [cell for cell in self.arguments.cells if cell.study == study.name]
                    self.submit_all(study, 0, mine, lambda: None)
                    continue
                for name in self.chosen(study):
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

    def chosen(self, study: Study) -> list[str]:
        """Who of the study's contestants is to run here, and can."""
        wanted = self.arguments.contestants or study.contestants
        return [name for name in study.contestants if name in wanted and CONTESTANTS[name].is_available]

    def time_steps(self) -> None:
        """Alone on the first device, before anything else is there."""
        for study in self.studies:
            key = f"{study.name} on {self.device_name()}"
            is_timed = set(TIMED) <= set(self.results["steps"].get(key, {}))
            if study.corpus is None or is_timed or not set(TIMED) <= set(self.chosen(study)):
                continue
            arguments = (study.name, self.arguments.data, self.devices[0], self.arguments.threads)
            ended = run_apart(step_seconds, arguments, timeout=LONGEST_CELL, kind_of=failure_kind)
            self.keep("steps", key, ended)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(0) if self.devices[0] != "cpu" else "CPU"

    def sweep(self, study: Study, contestant: str) -> None:
        knobs = [(knob, getattr(study, values)) for knob, values in KNOBS.items()]
        firsts = {knob: values[0] for knob, values in knobs}
        self.turn(study, Cell(study=study.name, contestant=contestant, seed=study.seeds[0], **firsts), [], knobs)

    def turn(self, study: Study, at: Cell, tried: list[Cell], knobs: list[tuple[str, tuple[float, ...]]]) -> None:
        """Tries all values of the first knob, then of the others, each at the best so far; then the other seeds."""
        (knob, values), *later = knobs
        cells = [msgspec.structs.replace(at, **{knob: value}) for value in values]

        def then() -> None:
            swept = [*tried, *cells]
            best = self.best(swept)
            if best is not None and later:
                self.turn(study, best, swept, later)
            elif best is not None:
                self.other_seeds(study, self.best([*swept, *self.beside(at)]) or best)

        # What was begun is ended first.
        self.submit_all(study, 0.2 * (len(KNOBS) - len(knobs)), cells, then)

    def best(self, swept: list[Cell]) -> Cell | None:
        """By the loss that chooses; None where not all have run, or all have failed."""
        results = self.results["cells"]
        if not all(cell.name in results for cell in swept):
            return None
        measured = [cell for cell in swept if "choosing" in results[cell.name]]
        return min(measured, key=lambda cell: choice(cell, results[cell.name]), default=None)

    def beside(self, like: Cell) -> list[Cell]:
        """All that has run of its study and contestant with its seed, at the study's own steps, swept or not."""
        cells = map(Cell.named, self.results["cells"])
        whose = like.study, like.contestant, like.seed, 1.0
        return [cell for cell in cells if (cell.study, cell.contestant, cell.seed, cell.share) == whose]

    def other_seeds(self, study: Study, best: Cell) -> None:
        cells = [msgspec.structs.replace(best, seed=seed) for seed in study.seeds[1:]]
        longer = self.as_long_as_the_slower(study, best.contestant)
        if longer is not None:
            cells += [msgspec.structs.replace(best, seed=seed, share=longer) for seed in study.seeds]
        self.submit_all(study, 0.2 * len(KNOBS), cells, lambda: None)

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
        failed = {"failure": msgspec.to_builtins(ended.failure)}
        found = failed if ended.result is None else msgspec.json.decode(ended.result)
        with self.lock:
            keep(self.results, kind, name, found, describe_environment())
            write_json(self.arguments.out, self.results)
            gone = time.monotonic() - self.began
            what = found.get("failure") or found.get("answers") or found.get("test") or found
            print(f"[{gone:.0f} s] {name}: {what} ({ended.seconds:.0f} s, {self.outstanding} left)", flush=True)


if __name__ == "__main__":
    main()
