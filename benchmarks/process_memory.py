"""Resident set of a training process without its tensors, on a CPU: what the planner says it is.

Trains preset tiny for three steps on the CPU and takes the live tensors off what the process holds at its peak.

    python benchmarks/process_memory.py --out benchmarks/results/process-memory.json
"""

import argparse
from pathlib import Path

import torch

from resnet_bk.bench.memory import peak_bytes
from resnet_bk.bench.subject import Subject, random_batch
from resnet_bk.environment import describe_environment, peak_resident_bytes
from resnet_bk.files import write_json
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import CPU_PROCESS_BYTES
from resnet_bk.training import data, loop  # what `resnet-bk train` imports
from resnet_bk.training.config import TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    assert data and loop
    config = ResNetBKConfig.from_preset("tiny")
    training = TrainingConfig(batch_size=2, sequence_length=64)
    subject = Subject.build(config, training, random_batch(config, 2, 64, torch.device("cpu")))
    subject.step()
    tensors = peak_bytes(subject)
    resident = peak_resident_bytes()
    document = {
        "what": "resident set of a training process at its peak, less the tensors of its step; bytes",
        "resident_bytes": resident,
        "tensor_bytes": tensors,
        "process_bytes": resident - tensors,
        "planner_says": CPU_PROCESS_BYTES,
        "environment": describe_environment(),
    }
    write_json(out, document)
    print(f"{resident - tensors:,} bytes; the planner says {CPU_PROCESS_BYTES:,}")
    if resident - tensors > CPU_PROCESS_BYTES:
        raise SystemExit("the planner's figure is too small: raise it")


if __name__ == "__main__":
    main()
