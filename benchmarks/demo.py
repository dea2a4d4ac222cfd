"""The demo: plan, train, evaluate, generate, benchmark, report, each by the command that a user would type.

What is finished is kept in runs/demo/, in a folder named by the code and the commit: a second call shows it at once, an
interrupted one goes on, and nothing of another version is overwritten.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
VOCABULARY = 2048
TOKENIZER = f"bpe:{VOCABULARY}"
STEPS = 600
LEARNING_RATE = "5e-3"
# The seed's width, depth and experts around the resolvent mixer, which needs no position table.
MODEL = ["--preset", "seed", "--mixer", "resolvent", "--conv-size", "4", "--max-position-embeddings", "none"]
WANTED_BELOW_UNIGRAM = 1.0


def main() -> int:
    """Runs what has not been run; the last line is the PDF's path."""
    began = time.perf_counter()
    folder = ROOT / "runs" / "demo" / version_of_the_code()
    folder.mkdir(parents=True, exist_ok=True)
    run, bench = folder / "run", folder / "bench"
    text = ["--data", "stdlib", "--tokenizer", TOKENIZER]
    budget = ["--gpu-memory", "12GB", "--host-memory", "15GB"]
    train = ["train", *MODEL, *text, "--steps", str(STEPS), "--learning-rate", LEARNING_RATE]
    unfinished = (run / "run.json").exists()
    steps: list[tuple[str, str, list[str]]] = [
        (
            "What will training need? The seed as it is, with a vocabulary of 30,000",
            "plan-seed.txt",
            ["plan", "--preset", "seed", *budget],
        ),
        (
            f"The same width and depth with the resolvent mixer and this demo's vocabulary of {VOCABULARY:,}",
            "plan.txt",
            ["plan", *MODEL, "--vocab-size", str(VOCABULARY), *budget],
        ),
        (
            "Train the second of them on the source text of Python's standard library",
            "train.json",
            ["train", "--resume", relative(run), "--json"]
            if unfinished
            else [*train, "--out", relative(run), "--json"],
        ),
        ("How good is it on text that it has not seen?", "eval.json", ["eval", relative(run), "--json"]),
        (
            "And if it reads that in one pass, in windows sixteen times as long as training's?",
            "eval-long.json",
            ["eval", relative(run), "--sequence-length", "2048", "--batch-size", "1", "--json"],
        ),
        (
            "Let it write",
            "sample.txt",
            ["generate", relative(run), "--prompt", "import os\n\ndef main(", "--max-new-tokens", "100"],
        ),
        (
            "Measure it against a Transformer of the same size, the seed's mixer beside them",
            "bench.txt",
            ["bench", "--profile", "quick", *MODEL, *text, "--out", relative(bench)],
        ),
        ("Write the report", "report.txt", ["report", relative(bench / "report.json")]),
    ]
    for title, result, arguments in steps:
        print(f"\n== {title}", file=sys.stderr)
        show(folder / result, arguments)
    return conclude(folder, bench / "report.pdf", time.perf_counter() - began)


def version_of_the_code() -> str:
    """Ten digits that change when the code, the pinned versions or the commit do."""
    digest = hashlib.sha256()
    files = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "constraints.txt", Path(__file__)]
    for path in files:
        digest.update(path.read_bytes())
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, check=False)
    digest.update(commit.stdout)
    digest.update(sys.version.encode())
    return digest.hexdigest()[:10]


def show(result: Path, arguments: list[str]) -> None:
    """Runs a command, shows and keeps what it prints; or shows what it printed the last time."""
    print(f"$ resnet-bk {shlex.join(arguments)}", file=sys.stderr)
    if result.exists():
        print(result.read_text(encoding="utf-8"), end="")
        return
    lines: list[str] = []
    command = [sys.executable, "-m", "resnet_bk", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout
        read: Callable[[], str] = lambda: process.stdout.read(1)  # noqa: E731  # generation is shown as it is made
        for character in iter(read, ""):
            lines.append(character)
            print(character, end="", flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    temporary = result.with_suffix(".part")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(result)


def conclude(folder: Path, pdf: Path, seconds: float) -> int:
    """The figure that shows that the model learned something, and the PDF's path."""
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    below = found["unigram_entropy"] - found["loss"]
    print(
        f"\nHeld-out loss {found['loss']:.3f} nats a token ({TOKENIZER}), {below:.2f} below the unigram entropy of the "
        f"same {found['tokens']:,} tokens. {seconds / 60:.1f} minutes.",
        file=sys.stderr,
    )
    if below < WANTED_BELOW_UNIGRAM:
        print(f"error: less than {WANTED_BELOW_UNIGRAM} nat below: training did not work as it should", file=sys.stderr)
        return 1
    print("Go on by yourself: `. .venv/bin/activate`, then `resnet-bk --help`. The report:", file=sys.stderr)
    print(relative(pdf))
    return 0


def relative(path: Path) -> str:
    """Paths as they read in a README."""
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    raise SystemExit(main())
