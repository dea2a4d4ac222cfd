"""What the small run of the command-line tests is made of, and what a folder holds."""

import hashlib
from pathlib import Path

TEXT = "The quick brown fox jumps over the lazy dog; how vexingly quick daft zebras jump!\n" * 60
SMALL = ["--preset", "tiny", "--tokenizer", "char", "--batch-size", "4", "--sequence-length", "16"]
TRAINING = [*SMALL, "--steps", "4", "--save-every", "2", "--warmup-steps", "1", "--learning-rate", "0.01"]


def checkpoint_of(run, step=4):
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def contents(folder):
    """Every file and folder below, with what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }
