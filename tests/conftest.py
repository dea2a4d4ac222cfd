import gc
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

# Two workers side by side (make test) have a core each, and so have the processes that they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where `make test` looks for tests that are to run with nothing beside them.
ALONE = Path(__file__).parent / "bench"

# What is imported and collected stays: looking for garbage in it would take a fifth of the time.
gc.disable()

import torch  # noqa: E402  # reads that variable when it is loaded

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Each of these would keep every seed for later, with the stack in words.
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        kind.manual_seed_all = lambda seed: None
    # It knows the insides of one version; others are as slow as they are.
    if find_spec("triton") and version("triton").startswith("3.7."):
        sys.path.insert(0, str(Path(__file__).parent))
        import quick_interpreter

        quick_interpreter.hurry()
sys.path.insert(0, str(Path(__file__).parent / "ops"))
# What tests write need not outlive the machine.
os.fsync = lambda descriptor: None
torch.set_num_threads(1 if WORKERS > 1 else 2)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that workers which take file after file end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if elsewhere := [item.nodeid for item in items if item.get_closest_marker("alone") and item.path.parent != ALONE]:
        raise pytest.UsageError(f"`make test` looks for tests marked alone in {ALONE}, not for {elsewhere}")


def pytest_runtestloop():
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before():
    """Is looked through no more: much here collects garbage, which takes a second among all that tests import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """Such small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smoke_config(tmp_path_factory):
    """A benchmark of seconds, on the text of this project's own source."""
    from resnet_bk.bench.profiles import PROFILES
    from resnet_bk.bench.suite import BenchmarkConfig
    from resnet_bk.training.config import DataConfig, TrainingConfig

    source = Path(__file__).parents[1] / "src" / "resnet_bk" / "ops"
    return BenchmarkConfig(
        profile=PROFILES["smoke"],
        preset="tiny",
        overrides={},
        # Not the folder: what compilers put into its caches would count as files too.
        data=DataConfig(data=str(source / "**" / "*.py"), tokenizer="byte"),
        training=TrainingConfig(batch_size=4, sequence_length=64, device="cpu"),
    )


@pytest.fixture(scope="session")
def smoke_report(smoke_config, tmp_path_factory):
    """The report of that benchmark, measured once, and where it lies."""
    from resnet_bk.bench.suite import run_benchmark

    folder = tmp_path_factory.mktemp("bench")
    report = run_benchmark(smoke_config, folder, command=["bench", "--profile", "smoke"])
    return report, folder / "report.json"
