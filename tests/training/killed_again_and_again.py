"""A program that trains one run to its end, and kills others with SIGKILL again and again until they end.

Called with a text file, a folder, a number of kills and a seed; prints one JSON document. It imports everything once
and forks its trainings, each of which runs the command line from its beginning.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import resnet_bk.memory.parameters
import resnet_bk.training.start  # noqa: F401  # so that no training has to import it
from resnet_bk.cli.main import main
from resnet_bk.training.checkpoint import checkpoints, step_of
from resnet_bk.training.metrics import read_metrics

SETTINGS = {
    **{"--preset": "tiny", "--tokenizer": "char", "--batch-size": 2, "--sequence-length": 16, "--num-threads": 1},
    **{"--gradient-accumulation-steps": 2, "--steps": 80, "--warmup-steps": 5, "--learning-rate": 0.01},
    **{"--log-every": 1, "--eval-every": 7, "--eval-tokens": 100, "--save-every": 2, "--device": "cpu"},
}
AT_ONCE, AT_START_UP, AT_STEPS, AT_SAVING = "at once", "start-up", "steps", "saving"


def fork_training(text_file, out):
    """Starts the run, or goes on with it if it is there, in a child process."""
    flags = [str(word) for flag in SETTINGS.items() for word in flag]
    arguments = ["train", "--data", str(text_file), "--out", str(out), *flags]
    if out.exists():
        arguments = ["train", "--resume", str(out)]
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(out.with_name(f"{out.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(arguments)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait_for(child):
    """The exit code; minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(condition, child):
    """Returns when ``condition`` holds or the child has ended."""
    while not condition() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)


def log_file(out):
    path = out / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def last_logged(out):
    entries = read_metrics(out / "metrics.jsonl")
    return entries[-1]["step"] if entries else 0


def half_saved(out):
    return set((out / "checkpoints").glob(".step-*"))


def kill_at(moment, text_file, out, generator, startup_seconds):
    """Forks a training, waits for a random time around ``moment``, kills it, and returns how it ended."""
    found = checkpoints(out / "checkpoints")
    first_step, old_log, old_halves = step_of(found[-1]) if found else 0, log_file(out), half_saved(out)
    child = fork_training(text_file, out)
    if moment == AT_ONCE:
        time.sleep(generator.uniform(0, 0.005))
    elif moment == AT_START_UP:
        time.sleep(generator.uniform(0, startup_seconds))
    elif moment == AT_STEPS:
        steps = generator.randrange(1, 4)
        # A training that goes on replaces the log by one that ends at its checkpoint.
        wait_until(lambda: log_file(out) != old_log and last_logged(out) >= first_step + steps, child)
        time.sleep(generator.uniform(0, 0.02))
    else:
        wait_until(lambda: half_saved(out) - old_halves, child)
        time.sleep(generator.choice([0, generator.uniform(0, 0.02)]))
    os.kill(child, signal.SIGKILL)
    return wait_for(child)


def schedule(kills, generator):
    """Moments of the kills: the first one before there is a run at all."""
    rest = [AT_START_UP, AT_STEPS, AT_SAVING] * kills
    rest = rest[: kills - 1]
    generator.shuffle(rest)
    return [AT_ONCE, *rest]


def must_be_done(code, out):
    if code:
        raise SystemExit(f"{out} ended with {code}:\n{out.with_name(out.name + '.log').read_text()[-3000:]}")


def run(text_file, folder, kills, seed):
    torch.set_num_threads(1)
    generator = random.Random(seed)
    whole = folder / "whole"
    began = time.perf_counter()
    child = fork_training(text_file, whole)
    wait_until(lambda: last_logged(whole) >= 1, child)
    startup_seconds = time.perf_counter() - began
    must_be_done(wait_for(child), whole)

    runs, killed, without_a_run, in_a_save = [folder / "killed-0"], 0, 0, 0
    moments = schedule(kills, generator)
    while killed < kills:
        out = runs[-1]
        code = kill_at(moments[killed], text_file, out, generator, startup_seconds)
        if code == -signal.SIGKILL:
            killed += 1
            without_a_run += not out.exists()
            in_a_save += bool(half_saved(out))
        else:
            # It came to its end before the kill: another run takes the kills that are left.
            must_be_done(code, out)
            runs.append(folder / f"killed-{len(runs)}")
    must_be_done(wait_for(fork_training(text_file, runs[-1])), runs[-1])
    return {
        "whole": str(whole),
        "runs": [str(out) for out in runs],
        "killed": killed,
        "without_a_run": without_a_run,
        "in_a_save": in_a_save,
        "startup_seconds": startup_seconds,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
