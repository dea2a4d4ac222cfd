"""Several ranks are one run: the same losses as one process, the same checkpoints, one voice.

As a program, this file is the process that ranks are forked from: importing takes them longer than what they do.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from small_training import finish, refused, resume, start

from resnet_bk.cli.main import main
from resnet_bk.errors import UserError
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.planner.devices import device_for
from resnet_bk.planner.predict import predict
from resnet_bk.training.checkpoint import MOMENTS, WEIGHTS, checkpoints, step_of, verify_checkpoint
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import ALONE, World, joined, shard_model
from resnet_bk.training.distributed_checkpoint import gathered_weights
from resnet_bk.training.metrics import read_metrics

# 3 experts: two ranks share their columns, three their rows. Gradients of early steps are clipped.
MODEL = {"num_experts": 3, "tie_word_embeddings": True, "router_bias_update_rate": 0.01}
TRAINING = {
    "steps": 20,
    "batch_size": 6,
    "sequence_length": 16,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 4,
    "learning_rate": 0.003,
    "log_every": 1,
    "eval_every": 10,
    "eval_tokens": 100,
    "save_every": 10,
    "num_threads": 1,
    "device": "cpu",
}
RELATIVE = 1e-5
PATIENCE = 60
KINDS = ("output", "errors")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    code: int
    output: str
    errors: str


def train_command(out, text_file, **changes):
    flags = {"data": text_file, "tokenizer": "char", **MODEL, **TRAINING, **changes, "out": out, "preset": "tiny"}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", *words]


def environment(cache):
    return {**os.environ, "OMP_NUM_THREADS": "1", "RESNET_BK_CACHE": str(cache)}


class Launcher:
    """Starts ranks as torchrun does on one machine, but with outputs apart and nobody who ends them."""

    def __init__(self, cache, folder):
        self.cache, self.folder = cache, folder
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment(cache), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, count, arguments):
        """Process ids; without arguments, ranks run :func:`inside_a_rank`."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        ranks = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self._send({"arguments": arguments, "ranks": ranks, "folder": str(self.folder)})
        return json.loads(self.process.stdout.readline())

    def ends(self):
        """How each rank ended."""
        codes = json.loads(self.process.stdout.readline())
        texts = [[(self.folder / f"{kind}-{rank}").read_text() for kind in KINDS] for rank in range(len(codes))]
        return [
            Outcome(code=code, output=output, errors=errors)
            for code, (output, errors) in zip(codes, texts, strict=True)
        ]

    def run(self, count, arguments):
        self.start(count, arguments)
        return self.ends()

    def _send(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()


def serve():
    """The program: for each line of orders, a line of process ids and one of exit codes."""
    for line in sys.stdin:
        order = json.loads(line)
        children = [fork(order, rank) for rank in range(len(order["ranks"]))]
        print(json.dumps(children), flush=True)
        print(json.dumps(exit_codes(children)), flush=True)


def fork(order, rank):
    if child := os.fork():
        return child
    os.environ.update(order["ranks"][rank])
    for number, kind in enumerate(KINDS, start=1):
        os.dup2(os.open(f"{order['folder']}/{kind}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    code = 1
    try:
        sys.argv = ["resnet-bk", *order["arguments"]]
        code = main(order["arguments"]) if order["arguments"] else inside_a_rank()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def exit_codes(children):
    """Waits for them, but not for ever."""
    codes, deadline = {}, time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
            elif child not in codes and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def losses(run_folder, kind):
    return {entry["step"]: entry[kind] for entry in read_metrics(run_folder / "metrics.jsonl") if kind in entry}


def assert_same_losses(run_folder, expected):
    for kind in ("loss", "validation_loss"):
        ours, theirs = losses(run_folder, kind), losses(expected, kind)
        assert ours.keys() == theirs.keys()
        for step, loss in ours.items():
            assert loss == pytest.approx(theirs[step], rel=RELATIVE), f"{kind} at step {step}"


def shapes(file):
    return {name: (value.shape, value.dtype) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, shared_token_cache):
    ranks = Launcher(shared_token_cache, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.process.communicate()
    assert ranks.process.returncode == 0


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, text_file, shared_token_cache):
    """A run of one process, which the others are compared with."""
    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_BK_CACHE", str(shared_token_cache))
        finish(start(out, text_file, model=MODEL, **TRAINING))
    return out


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, text_file, shared_token_cache):
    """The same run on two ranks of torchrun, and what it printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "resnet_bk"]
    done = subprocess.run(
        [sys.executable, *launcher, *train_command(out, text_file)],
        env=environment(shared_token_cache),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def stopped_at_10(tmp_path, two_ranks):
    """What two ranks left after 10 of 20 steps."""
    out = shutil.copytree(two_ranks[0], tmp_path / "run")
    *_, last = checkpoints(out / "checkpoints")
    assert step_of(last) == 20
    shutil.rmtree(last)
    return out


@pytest.mark.slow
def test_two_ranks_reach_the_losses_of_one_process(two_ranks, one_process):
    out, done = two_ranks
    assert len(losses(out, "loss")) == 20
    assert losses(out, "loss")[20] < 0.8 * losses(out, "loss")[1]
    norms = [entry["grad_norm"] for entry in read_metrics(out / "metrics.jsonl") if "grad_norm" in entry]
    assert max(norms) > 1, "gradients were clipped"
    assert_same_losses(out, one_process)
    assert done.stderr.count("step      7/20") == 1, "one rank speaks"


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_one_of_one_process(two_ranks, one_process):
    ours, theirs = (checkpoints(out / "checkpoints") for out in (two_ranks[0], one_process))
    assert [path.name for path in ours] == [path.name for path in theirs] == ["step-00000010", "step-00000020"]
    assert sorted((two_ranks[0] / "checkpoints").iterdir()) == ours, "nothing half written is left"
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        verify_checkpoint(ours_)
        assert [path.name for path in sorted(ours_.iterdir())] == [path.name for path in sorted(theirs_.iterdir())]
        assert (ours_ / "config.json").read_bytes() == (theirs_ / "config.json").read_bytes()
        for file in (WEIGHTS, MOMENTS):
            assert shapes(ours_ / file) == shapes(theirs_ / file)
            ours_values, theirs_values = load_file(ours_ / file), load_file(theirs_ / file)
            for name, value in ours_values.items():
                torch.testing.assert_close(value, theirs_values[name], rtol=1e-3, atol=1e-4)
    model = ResNetBKForCausalLM.from_pretrained(ours[-1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(ours[-1] / WEIGHTS)["model.embed_tokens.weight"])


@pytest.mark.slow
def test_one_process_goes_on_from_two_ranks(stopped_at_10, one_process):
    assert resume(stopped_at_10).state.step == 10
    finish(resume(stopped_at_10))
    assert_same_losses(stopped_at_10, one_process)


@pytest.mark.slow
def test_three_ranks_go_on_from_two(stopped_at_10, one_process, launcher):
    first, *others = launcher.run(3, ["train", "--resume", str(stopped_at_10), "--json"])
    assert first.code == 0, first.errors
    assert "going on after step 10" in first.errors
    assert '"steps": 20' in first.output
    assert others == [Outcome(code=0, output="", errors="")] * 2, "only rank 0 speaks"
    assert_same_losses(stopped_at_10, one_process)
    verify_checkpoint(checkpoints(stopped_at_10 / "checkpoints")[-1])


@pytest.mark.slow
def test_ctrl_c_to_one_rank_stops_all_after_the_same_step(tmp_path, text_file, launcher):
    out = tmp_path / "run"
    _, one = launcher.start(2, train_command(out, text_file, steps=100_000))
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(one, signal.SIGINT)
    first, second = launcher.ends()
    assert (first.code, second.code) == (130, 130), first.errors + second.errors
    last = checkpoints(out / "checkpoints")[-1]
    assert step_of(last) == max(losses(out, "loss")) >= 3
    assert f"interrupted after step {step_of(last)}; saved {last}" in first.errors.splitlines()[-1]
    assert (second.output, second.errors) == ("", "")
    verify_checkpoint(last)
    assert resume(out).state.step == step_of(last)


@pytest.mark.slow
def test_a_batch_that_ranks_do_not_divide_is_refused_once(tmp_path, text_file, launcher):
    out = tmp_path / "run"
    first, second = launcher.run(2, train_command(out, text_file, batch_size=5))
    assert (first.code, second.code) == (2, 2)
    message = "batch_size 5 is for all 2 ranks together, which cannot share it evenly; take a multiple of 2"
    assert first.errors == f"error: {message}\n"
    assert (first.output, second.output, second.errors) == ("", "", "")
    assert not out.exists()


@pytest.mark.slow
def test_arguments_that_cannot_be_read_are_refused_once(launcher):
    first, second = launcher.run(2, ["train", "--steps", "many"])
    assert (first.code, second.code) == (2, 2)
    assert len(first.errors.splitlines()) == 1
    assert (second.output, second.errors) == ("", "")


@pytest.mark.slow
def test_what_only_ranks_can_check(launcher):
    """See :func:`inside_a_rank`."""
    first, second = launcher.run(2, [])
    assert (second.code, second.output, second.errors) == (2, "all is well\n", "error: rank 1 alone; mend it\n")
    assert (first.code, first.output, first.errors) == (1, "all is well\n", "")


def inside_a_rank():
    """Collectives, one overflow that skips a step everywhere, and a mistake that only rank 1 sees."""
    torch.set_num_threads(1)
    try:
        with joined() as world:
            check_collectives(world)
            check_one_overflow_skips_the_step_everywhere(world)
            print("all is well", flush=True)
            if world.rank == 1:
                raise UserError("rank 1 alone; mend it")
            world.wait()
            raise AssertionError("rank 1 came")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_collectives(world):
    assert world == World(rank=int(os.environ["RANK"]), size=2, local_rank=int(os.environ["RANK"]))
    assert world.sum(torch.tensor([1.0, world.rank])).tolist() == [2, 1]
    assert world.mean(torch.tensor(float(world.rank))).item() == 0.5
    assert world.totals(2**40, world.rank) == [2**41, 1]
    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert world.as_main(7 + world.rank) == 7
    started = time.monotonic()
    with world.one_here_first():
        time.sleep(0.5 if world.is_main else 0)
    assert time.monotonic() - started > 0.4


def check_one_overflow_skips_the_step_everywhere(world):
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **MODEL))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard_model(model, world, torch.device("cpu")).train()
    assert type(model.lm_head) is torch.nn.Linear
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    tokens = torch.randint(0, 512, (2, 16))
    for bad in (True, False):
        optimizer.zero_grad()
        output = model(tokens, shift_labels=tokens, use_cache=False)
        assert output.logits is None, "the head's matrix was used a chunk of tokens at a time"
        scaler.scale(output.loss).backward()
        if bad and world.rank == 1:
            next(iter(model.parameters())).grad.to_local().view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4, "halved, once"
        weights = gathered_weights(model, world)
        if world.is_main:
            same = [name for name, value in weights.items() if torch.equal(value, expected[name])]
            assert len(same) == len(expected) if bad else "lm_head.weight" not in same
            assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined() as world:
        assert world == World.current() == ALONE == World(rank=0, size=1, local_rank=0)
        assert world.is_main
        assert world.rows(7) == slice(0, 7)
        assert world.any(True) and not world.any(False)
        assert (world.as_main(3), world.totals(1, 2.5)) == (3, [1, 2.5])
        values = torch.tensor([1.0])
        assert world.sum(values) is world.mean(values) is values
        world.wait()
        with world.one_here_first():
            assert world.place(torch.device("cuda", 3)) == torch.device("cuda", 3)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "values", [("1", "x", "0"), ("2", "2", "0"), ("-1", "2", "0"), ("0", "2", ""), ("0", "2", "2"), ("0", "0", "0")]
)
def test_ranks_that_cannot_be_are_refused(monkeypatch, values):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True):
        monkeypatch.setenv(name, value)
    with refused(r"is no rank among others; start with torchrun"):
        World.current()


def test_rows_are_dealt_in_order_and_evenly():
    rows = torch.arange(6)
    shares = [rows[World(rank=rank, size=3).rows(6)].tolist() for rank in range(3)]
    assert shares == [[0, 1], [2, 3], [4, 5]]
    with refused("batch_size 7 is for all 3 ranks together"):
        World(rank=2, size=3).rows(7)


def test_ranks_take_one_plan_that_is_made_for_all_of_them(tmp_path, launcher, text_file):
    flags = {"strategy": "auto", "host_memory": "8GB", "steps": 2, "batch_size": 4}
    first, second = launcher.run(2, train_command(tmp_path / "run", text_file, **flags))
    assert first.code == second.code == 0, first.errors
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    model, training = ResNetBKConfig(**recorded["model"]), TrainingConfig(**recorded["training"])
    wanted = predict(model, training, device_for(torch.device("cpu")), ranks=2)
    planned = f"planned: host {format_bytes(wanted.host_bytes)}, tensors {format_bytes(wanted.footprint.tensor_bytes)}"
    assert f"{planned} on each device" in first.errors and not second.errors


def test_ranks_are_refused_together_where_nothing_fits(tmp_path, launcher, text_file):
    first, second = launcher.run(2, train_command(tmp_path / "run", text_file, host_memory="300MB"))
    assert first.code == second.code == 2
    assert "nothing fits" in first.errors and "on each of 2" in first.errors and not second.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_shares_of_an_evaluation_batch_have_every_target_once(rows):
    input_ids = torch.arange(rows).unsqueeze(1)
    shares = [World(rank=rank, size=3).share(input_ids, input_ids + 100) for rank in range(3)]
    targets = torch.cat([share[1] for share in shares]).flatten()
    assert sorted(targets[targets != IGNORE_INDEX].tolist()) == [row + 100 for row in range(rows)]
    assert all(len(ids) == len(targets) >= 1 for ids, targets in shares), "every rank runs the model"


if __name__ == "__main__":
    serve()
