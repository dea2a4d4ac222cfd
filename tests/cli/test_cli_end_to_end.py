"""Plan, train, evaluate, generate and go on, as a user would."""

import json
import math
import re
import shlex
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from small_run import SMALL, TEXT, TRAINING, checkpoint_of, contents

from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.data import TextTokenizer


def weights(run, step):
    return load_file(checkpoint_of(run, step) / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(bool((left[name] == right[name]).all()) for name in left)


def test_training_says_how_it_ended(cli, workspace):
    document = cli("train", "--data", "book.txt", "--out", "new", "--json", *TRAINING).document
    assert (document["run"], document["steps"], document["tokens"]) == ("new", 4, 4 * 4 * 16)
    assert document["checkpoint"] == str(checkpoint_of("new"))
    assert document["leaks_targets"] is False
    assert 0 < document["validation_loss"] < math.log(80)
    metrics = [json.loads(line) for line in (workspace / "new" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["validation_loss"] == document["validation_loss"]
    assert metrics[-1]["validation_tokens"] == document["validation_tokens"]


def test_progress_goes_to_standard_error_only(cli, workspace):
    outcome = cli("train", "--data", "book.txt", "--out", "new", *TRAINING)
    assert (outcome.code, outcome.out) == (0, "")
    assert "parameters" in outcome.err and "done: 4 steps" in outcome.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], r"mixer resolvent \(tunnelling, chains on the \w+ backend, carry on torch\), convolution over 4 tokens"),
        (["--mixer", "bk", "--conv-size", "0"], r"mixer bk \(\w+ backend\)\n"),
        (["--mixer", "attention"], r"mixer attention, convolution over 4 tokens"),
    ],
    ids=str,
)
def test_training_says_what_mixes_and_what_computes_it(cli, workspace, flags, said):
    outcome = cli("train", "--data", "book.txt", "--out", "new", *TRAINING, *flags)
    assert re.search(said, outcome.err), outcome.err


@pytest.mark.parametrize(
    ("flags", "is_said"),
    [
        (["--local-attention-positions", "rotary"], True),
        (["--local-attention-positions", "rotary", "--local-attention-window", "16"], False),
        ([], False),
    ],
    ids=str,
)
def test_training_says_which_distances_it_leaves_untrained(cli, workspace, flags, is_said):
    outcome = cli("train", "--data", "book.txt", "--out", "new", *TRAINING, "--local-attention-every", "2", *flags)
    said = (
        "sees 1,024 tokens and is trained on 16: it will read longer texts badly, but for --local-attention-window 16"
    )
    assert (outcome.code, said in outcome.err) == (0, is_said), outcome.err
    assert ("longer texts" in outcome.err) == is_said


def test_the_same_command_trains_the_same_weights(cli, workspace):
    assert cli("train", "--data", "book.txt", "--out", "new", *TRAINING).code == 0
    assert same(weights("new", 4), weights("run", 4))


def test_a_runs_record_reproduces_it(cli, workspace):
    assert cli("train", "--config", "run/run.json", "--out", "again").code == 0
    assert same(weights("again", 4), weights("run", 4))
    assert cli("train", "--config", "run/run.json", "--seed", "1", "--out", "other").code == 0
    assert not same(weights("other", 4), weights("run", 4))


def test_going_on_is_what_a_longer_run_would_have_been(cli, workspace):
    longer = [*TRAINING, "--steps", "7"]
    assert cli("train", "--data", "book.txt", "--out", "long", *longer).code == 0
    document = cli("train", "--resume", "run", "--steps", "7", "--json").document
    assert (document["steps"], document["checkpoint"]) == (7, str(checkpoint_of("run", 7)))
    assert same(weights("run", 7), weights("long", 7))
    assert json.loads((workspace / "run" / "run.json").read_text())["training"]["steps"] == 7


@pytest.mark.parametrize("steps", [[], ["--steps", "4"], ["--steps", "2"]])
def test_a_run_that_is_done_stays_as_it_is(cli, workspace, steps):
    before = contents(workspace)
    assert cli("train", "--resume", "run", "--json", *steps).document == {"run": "run", "steps": 4, "finished": True}
    assert contents(workspace) == before


def test_a_run_goes_on_in_less_memory_to_the_same_weights(cli, workspace):
    less = ["--checkpointing", "offload", "--offload-optimizer", "True", "--stream-weights", "True"]
    written = ["--save-every", "1", "--log-every", "1", "--keep-checkpoints", "3"]
    assert cli("train", "--data", "book.txt", "--out", "long", *TRAINING, "--steps", "7").code == 0
    before = json.loads((workspace / "run" / "run.json").read_text())
    found = cli("train", "--resume", "run", "--steps", "7", *less, *written)
    assert "a step block by block" in found.err
    assert same(weights("run", 7), weights("long", 7))
    after = json.loads((workspace / "run" / "run.json").read_text())
    changed = {name for name, value in after["training"].items() if value != before["training"][name]}
    assert changed == {"steps", "checkpointing", "offload_optimizer", "stream_weights", "save_every", "log_every"} | (
        {"keep_checkpoints"} if before["training"]["keep_checkpoints"] != 3 else set()
    )
    assert [path.name for path in sorted((workspace / "run" / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (5, 6, 7)
    ]


def test_a_short_held_out_text_is_measured_once_at_the_end(cli, workspace):
    for tokens, times in (("1000000", 1), ("20", 2)):
        assert cli("train", "--data", "book.txt", "--out", tokens, *TRAINING, "--eval-tokens", tokens).code == 0
        lines = [json.loads(line) for line in (workspace / tokens / "metrics.jsonl").read_text().splitlines()]
        last = [entry for entry in lines if entry["step"] == 4 and "validation_loss" in entry]
        assert len(last) == times


def test_flags_that_repeat_the_record_are_welcome_on_resume(cli, workspace):
    assert cli("train", "--resume", "run", *TRAINING[2:]).code == 0


def test_evaluation_repeats_what_training_measured_last(cli, workspace):
    document = cli("eval", "run", "--json").document
    last = json.loads((workspace / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert document["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert document["tokens"] == last["validation_tokens"]
    assert document["perplexity"] == pytest.approx(math.exp(document["loss"]), rel=1e-12)
    bits = document["loss"] * document["tokens"] / math.log(2)
    assert document["bits_per_byte"] == pytest.approx(bits / document["bytes"], rel=1e-12)
    assert (document["split"], document["step"], document["leaks_targets"]) == ("validation", 4, False)


def test_evaluation_of_another_text_takes_all_of_it(cli, workspace):
    (workspace / "other.txt").write_text("the lazy fox\n" * 20)
    document = cli("eval", "run", "--data", "other.txt", "--json").document
    assert (document["split"], document["data"]) == ("all", "other.txt")
    assert (document["bytes"], document["tokens"]) == (13 * 20, 13 * 20 - 1)


def test_evaluation_does_not_depend_on_how_many_rows_go_at_once(cli, workspace):
    one, many = (cli("eval", "run", "--batch-size", size, "--json").document["loss"] for size in (1, 50))
    assert one == pytest.approx(many, rel=1e-5)


def test_an_older_checkpoint_can_be_evaluated_too(cli, workspace):
    document = cli("eval", checkpoint_of("run", 2), "--json").document
    assert (document["step"], document["checkpoint"]) == (2, str(checkpoint_of("run", 2)))


def test_evaluation_in_words_has_the_same_figures(cli, workspace):
    document = cli("eval", "run", "--json").document
    out = cli("eval", "run").out
    for figure in (f"{document['loss']:.4f}", f"{document['perplexity']:.2f}", f"{document['bits_per_byte']:.4f}"):
        assert figure in out


def test_greedy_text_is_the_models_likeliest(cli, workspace):
    words = ("generate", "run", "--prompt", "The quick", "--greedy", "--max-new-tokens", "12", "--json")
    document = cli(*words).document
    assert document["text"] == cli(*words, "--seed", "5").document["text"], "no choice is random"
    assert (document["prompt"], document["new_tokens"], document["leaks_targets"]) == ("The quick", 12, False)
    assert document["tokens_per_second"] == pytest.approx(12 / document["seconds"])
    tokenizer = TextTokenizer.load(workspace / "run" / "tokenizer.json", "char")
    model = ResNetBKForCausalLM.from_pretrained(checkpoint_of("run")).eval()
    row = torch.tensor([tokenizer.encode("The quick")])
    for _ in range(12):
        row = torch.cat([row, model(row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert document["text"] == tokenizer.decode(row[0, 9:].tolist())


def test_sampling_depends_on_the_seed_alone(cli, workspace):
    def sample(seed):
        words = ("generate", "run", "--prompt", "The", "--seed", seed, "--max-new-tokens", "30", "--json")
        return cli(*words).document["text"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_text_is_streamed_to_standard_output(cli, workspace):
    words = ("generate", "run", "--prompt", "The", "--greedy", "--max-new-tokens", "8")
    outcome = cli(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "The" + cli(*words, "--json").document["text"] + "\n"


def test_a_plan_is_one_document_with_every_strategy(cli, workspace):
    document = cli(
        "plan", "--preset", "1b", "--batch-size", "8", "--sequence-length", "1024", "--gpu-memory", "24GB", "--json"
    ).document
    assert document["shape"] == {
        "batch_size": 8,
        "sequence_length": 1024,
        "micro_batches": 1,
        "loss_chunk_tokens": None,
    }
    assert document["budget"] == {"gpu_bytes": 24 * 10**9, "host_bytes": None}
    config = ResNetBKConfig.from_preset("1b")
    assert document["model"] == config.own_fields()
    fitting = [plan["strategy"]["name"] for plan in document["strategies"] if plan["fits"]]
    assert document["fastest_that_fits"] == (fitting[0] if fitting else None)
    for plan in document["strategies"]:
        assert plan["gpu_headroom"] == 24 * 10**9 - document["context_bytes"] - plan["gpu_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "seed"], ["4,112,776 parameters", "4,112,512", "Give --gpu-memory"]),
        (
            ["--preset", "tiny", "--gpu-memory", "2GB"],
            ["Fastest that fits, on h100: bf16, everything on the device", "of 2.00 GB", "L x [c W T]", "room there"],
        ),
        (
            ["--preset", "70b", "--gpu-memory", "12GB", "--host-memory", "15GB"],
            ["Nothing fits: ", "of host memory", "misses 1.1"],
        ),
        (
            ["--preset", "1b", "--device", "colab-t4", "--batch-size", "1", "--sequence-length", "1024"],
            ["misses by ", "By formula this would fit, the rest as it is: --num-layers "],
        ),
        (
            ["--preset", "tiny", "--device", "cpu", "--explain", "--verify"],
            ["Traced, tensor by tensor", "on a CPU the trace counts", "all tensors at the peak", "+0.00%"],
        ),
        (
            ["--ladder", "--sequence-length", "1024", "--batch-size", "1"],
            ["69,556M", "streamed weights", "h100s with FSDP2", "is in brackets"],
        ),
        (["--preset", "100m", "--mixer", "attention"], ["mixer attention", "query, key and value projections"]),
    ],
)
def test_a_plan_in_words_gives_a_verdict(cli, words, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = cli("plan", *words)
    assert outcome.code == 0
    assert outcome.err == ("running two steps on cpu ...\n" if "--verify" in words else "")
    for sentence in said:
        assert sentence in outcome.out


def test_the_command_that_a_plan_prints_trains_so(cli, workspace, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["--preset", "tiny", "--mixer", "attention", "--num-layers", "6", "--batch-size", "8", "--device", "cpu"]
    planned = cli("plan", *words, "--sequence-length", "64", "--gpu-memory", "3MB", "--json").document["chosen"]
    assert planned["footprint"]["tensor_bytes"] <= 3_000_000
    assert planned["strategy"]
    command = shlex.split(planned["command"])
    assert command[:2] == ["resnet-bk", "train"]
    command[command.index("--out") + 1] = str(workspace / "planned")
    more = ["--data", str(text), "--tokenizer", "char", "--steps", "1", "--vocab-size", "256", "--device", "cpu"]
    outcome = cli("train", *command[2:], "--strategy", "given", *more)
    assert outcome.code == 0, outcome.err
    assert f"memory: {planned['strategy']}" in outcome.err


def test_an_explanation_has_formulas_and_tensors_that_agree(cli):
    words = ["--preset", "100m", "--num-layers", "2", "--batch-size", "4", "--sequence-length", "512"]
    found = cli("plan", *words, "--device", "h100", "--explain", "--json").document["explanation"]
    assert sum(part["num_bytes"] for part in found["traced"]) == found["traced_bytes"]
    assert found["traced_bytes"] <= found["formula_bytes"] <= 1.02 * found["traced_bytes"]
    assert all(part["formula"] for part in found["formulas"])


def test_a_ladder_is_drawn(cli, workspace):
    figure = workspace / "ladder.svg"
    outcome = cli("plan", "--ladder", "--figure", str(figure), "--json")
    rungs = outcome.document["rungs"]
    assert [rung["preset"] for rung in rungs] == ["seed", "100m", "1b", "7b", "70b"]
    drawn = figure.read_text()
    assert drawn.startswith("<?xml") and "70b" in drawn
    assert cli("plan", "--ladder", "--figure", str(workspace / "ladder.png")).code == 2


def test_any_model_of_transformers_is_planned_from_its_configuration(cli, tmp_path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
    LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    words = [
        "plan",
        "--model",
        f"hf:{tmp_path}",
        "--batch-size",
        "2",
        "--sequence-length",
        "64",
        "--device",
        "rtx-3060",
    ]
    document = cli(*words, "--json").document
    assert document["parameters"] > 2 * 500 * 64
    names = [row["name"] for row in document["strategies"]]
    assert names == ["fp32", "mixed precision", "full checkpointing", "offloaded optimizer"]
    assert document["fastest_that_fits"] == "fp32"
    needs = {row["name"]: row["footprint"]["tensor_bytes"] for row in document["strategies"]}
    assert needs["offloaded optimizer"] < needs["full checkpointing"] < needs["mixed precision"]
    outcome = cli(*words)
    assert outcome.code == 0 and "A training step with AdamW, traced" in outcome.out
    heads = next(line for line in outcome.out.splitlines() if "GPU needs" in line)
    cells = next(line for line in outcome.out.splitlines() if line.startswith("│ fp32"))
    found = dict(zip(*([cell.strip() for cell in line[1:-1].split(line[0])] for line in (heads, cells)), strict=True))
    plain = document["strategies"][0]
    assert found["GPU needs"] == format_bytes(plain["gpu_bytes"]) and found["fits"] == "yes"
    assert found["host needs"] == format_bytes(plain["host_bytes"])
    assert found["reserved"] == format_bytes(plain["footprint"]["reserved_bytes"])
    longer = cli("plan", "--model", f"hf:{tmp_path}", "--sequence-length", "4096")
    assert longer.code == 2 and "is for at most 2,048 tokens" in longer.err


def test_the_printed_command_keeps_the_budget_and_the_device(cli):
    words = ["plan", "--preset", "tiny", "--batch-size", "4", "--sequence-length", "64"]
    chosen = cli(*words, "--gpu-memory", "4GB", "--host-memory", "8GB", "--json").document["chosen"]
    assert "--gpu-memory 4GB --host-memory 8GB" in chosen["command"] and "--device" not in chosen["command"]
    on_cpu = cli(*words, "--device", "cpu")
    assert "--device cpu --out" in on_cpu.out and "waiting for the processor" in on_cpu.out
    assert "GPU needs" not in on_cpu.out
    assert cli(*words, "--device", "cpu", "--json").document["chosen"]["cost"]["bound_by"] == "the processor"


def test_what_does_not_fit_is_said_before_the_tables(cli):
    said = cli("plan", "--preset", "tiny", "--gpu-memory", "1MB").out
    assert 0 < said.index("Nothing fits") < said.index("Parameters")


def test_a_machine_is_calibrated_once_and_planned_with(cli, workspace, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_BK_CACHE", str(tmp_path))
    measured = cli("env", "--calibrate", "--json").document["calibration"]
    assert all(value > 0 for name, value in measured.items() if name != "context_bytes")
    planned = cli("plan", "--preset", "tiny", "--device", "cpu", "--json").document["chosen"]
    kept = json.loads((tmp_path / "calibration.json").read_text())["devices"]["cpu"]
    assert kept == measured
    assert planned["host_parts"]["process"] >= measured["process_bytes"]
    good = (tmp_path / "calibration.json").read_text()
    halved = good[: len(good) // 2]
    for damaged in ("{}", "[]", halved, good.replace('"half_flops"', '"half"'), good.replace(": 1", ": -1")):
        (tmp_path / "calibration.json").write_text(damaged)
        refused = cli("plan", "--preset", "tiny", "--device", "cpu")
        assert refused.code == 2 and "run `resnet-bk env --calibrate` again" in refused.err, damaged
    # What is to mend it does.
    assert cli("env", "--calibrate").code == 0
    assert cli("plan", "--preset", "tiny", "--device", "cpu").code == 0


def test_a_plan_writes_nothing(cli, workspace):
    before = contents(workspace)
    assert cli("plan", "--preset", "tiny").code == 0
    assert contents(workspace) == before


def test_the_environment_is_one_document(cli, workspace):
    document = cli("env", "--json").document
    assert {"hardware", "system", "python", "packages", "commit", "device", "precisions", "operators"} == set(document)
    operators = {"bk_core", "bk_tunnel", "bk_carry", "convolution", "projections", "moe", "loss", "attention"}
    assert operators | {"norm bf16", "router bf16", "one token"} == set(document["operators"])
    words = cli("env")
    assert document["packages"]["torch"] in words.out and document["operators"]["moe"]["reason"] in words.out


@pytest.mark.slow
def test_a_second_benchmark_waits_for_the_folder_but_not_for_one_that_was_killed(cli, workspace):
    words = ["bench", "--profile", "smoke", "--data", "book.txt", *SMALL, "--only", "flops", "--out", "measured"]
    command = [sys.executable, "-c", "from resnet_bk.cli.main import main; raise SystemExit(main())", *words]
    # With one thread as here, so that both are the same benchmark.
    with subprocess.Popen([*command, "--num-threads", "1"], stderr=subprocess.DEVNULL) as first:
        try:
            until = time.monotonic() + 120
            while not (workspace / "measured" / "report.json").exists() and time.monotonic() < until:
                time.sleep(0.05)
            second = cli(*words, "--num-threads", "1")
            assert first.poll() is None
        finally:
            first.kill()
    said = "error: measured is in use by another benchmark; wait until it ends, or choose another --out\n"
    assert (second.code, second.out, second.err) == (2, "", said)
    report = cli(*words, "--num-threads", "1", "--json").document
    assert report["results"]["flops"] and not [cell for cell in report["cells"].values() if cell["failure"]]


@pytest.mark.slow
def test_a_benchmark_prints_the_report_it_writes(cli, workspace):
    words = ("bench", "--profile", "smoke", "--preset", "tiny", "--data", "book.txt", "--tokenizer", "char")
    sizes = ("--sequence-length", "16", "--batch-size", "2", "--only", "flops", "memory", "--out", "measured")
    document = cli(*words, *sizes, "--json").document
    assert document == json.loads((workspace / "measured" / "report.json").read_text())
    assert document["results"]["flops"] and document["results"]["memory"] and not document["results"]["timing"]
    for model in document["results"]["memory"]["models"]:
        assert model["peak_step"] <= model["predicted_peak"] <= 1.15 * model["peak_step"]
