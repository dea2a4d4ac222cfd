"""What a user can get wrong: exit code 2, one line that names the mend, and nothing written."""

import json
import random
import re
import shutil

import pytest
import torch
from small_run import SMALL, TRAINING, checkpoint_of, contents

WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
# What may be said before the mistake is found.
REMARKS = ("tokenizing ", "vocabulary: ")


def check_refused(cli, workspace, words, mend):
    before = contents(workspace)
    outcome = cli(*words)
    *remarks, last = outcome.err.splitlines()
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert last.startswith("error: ") and re.search(mend, last), outcome.err
    assert all(remark.startswith(REMARKS) for remark in remarks), outcome.err
    assert contents(workspace) == before
    return last


NEW = ["train", "--out", "new"]
BOOK = ["--data", "book.txt"]
TRAIN = [*NEW, *BOOK, *TRAINING]
BENCH = ["bench", "--out", "new", *BOOK, *SMALL, "--profile", "smoke", "--only", "flops"]

FLOATS = (
    *("router-temperature", "router-aux-loss-coef", "bk-h0", "bk-hopping", "bk-energy", "bk-eta"),
    *("rope-theta", "layer-norm-eps", "initializer-range"),
)
TOO_LARGE = str(2**63)
LONG_NAME = 300 * "x"
NOT_UTF8 = "new\udcff"  # how Python has a byte of the command line that is no character
TOO_MUCH = "of memory and .* are free; take a smaller .*resnet-bk plan"

BY_BLOCK = ["--offload-optimizer", "True", "--checkpointing", "offload"]
MISTAKES = [
    ([*TRAIN, "--cuda-graphs", "True"], r"add --offload-optimizer True --checkpointing offload, or leave them out"),
    ([*TRAIN, *BY_BLOCK, "--cuda-graphs", "True", "--device", "cpu"], r"leave out --cuda-graphs"),
    # Words that are not the command line's.
    ([], r"Expected one of \{plan, .*see `resnet-bk --help`"),
    (["teach"], "teach; see `resnet-bk --help`"),
    (["--bogus"], "--bogus; see `resnet-bk --help`"),
    ([*TRAIN, "--bogus", "1"], "--bogus.*see `resnet-bk train --help`"),
    (["plan", "--bogus"], "--bogus.*see `resnet-bk plan --help`"),
    (["train", "--out"], "'--out'.*see `resnet-bk train --help`"),
    ([*TRAIN, "--steps"], "'--steps'.*see `resnet-bk train --help`"),
    ([*TRAIN, "--steps", "many"], "--steps.*'many'.*see `resnet-bk train --help`"),
    ([*TRAIN, "--mixer", "conv"], "'conv'.*see `resnet-bk train --help`"),
    ([*TRAIN, "--precision", "fp8"], "'fp8'.*see `resnet-bk train --help`"),
    (["eval"], "run_folder|PATH"),
    (["bench", "--only", "luck"], "'luck'.*stability.*see `resnet-bk bench --help`"),
    (["bench", "--profile", "endless"], "'endless'.*see `resnet-bk bench --help`"),
    # Numbers out of range.
    ([*TRAIN, "--steps", "-3"], "steps is -3; give a number of at least 1"),
    ([*TRAIN, "--steps", "0"], "at least 1"),
    ([*TRAIN, "--batch-size", "0"], "batch_size is 0; give a number of at least 1"),
    ([*TRAIN, "--sequence-length", "0"], "sequence_length is 0; give a number of at least 1"),
    ([*TRAIN, "--learning-rate", "-1"], "above 0"),
    ([*TRAIN, "--learning-rate", "nan"], "above 0"),
    ([*TRAIN, "--warmup-steps", "-1"], "0 or more"),
    ([*TRAIN, "--num-threads", "0"], "at least 1"),
    ([*TRAIN, "--beta1", "2"], "0 to 1"),
    ([*TRAIN, "--validation-fraction", "1"], "between 0 and 1"),
    ([*TRAIN, "--num-layers", "0"], "num_layers is 0; give a number of at least 1"),
    ([*TRAIN, "--bk-eta", "0"], "above 0"),
    ([*TRAIN, "--mixer", "attention", "--num-attention-heads", "5"], "change num_attention_heads"),
    ([*TRAIN, "--num-resolvent-heads", "5"], "change num_resolvent_heads"),
    ([*TRAIN, "--conv-size", "1"], "or 0 for no convolution"),
    ([*TRAIN, "--resolvent-key-size", "wide"], "give a number, or none"),
    ([*TRAIN, "--resolvent-regime", "scattering", "--resolvent-state", "vector"], "choose resolvent_state matrix"),
    ([*TRAIN, "--causal", "False"], "choose mixer bk or attention"),
    ([*TRAIN, "--vocab-size", "3"], "leave --vocab-size out"),
    *(
        ([*TRAIN, f"--{name}", "inf"], "is inf; give a finite number")
        for name in ("learning-rate", "weight-decay", "max-grad-norm", *FLOATS)
    ),
    *(([*TRAIN, f"--{name}", "nan"], "is nan; give") for name in FLOATS),
    *(([*TRAIN, f"--{name}", "1e300"], "is 1e.300; give") for name in ("learning-rate", "weight-decay", "bk-h0")),
    ([*TRAIN, "--num-threads", "100000000"], "num_threads is 100000000; give at most"),
    ([*TRAIN, "--seed", TOO_LARGE], "seed is .*; give a number up to"),
    ([*TRAIN, "--warmup-steps", "1" + 400 * "0"], "warmup_steps is .*; give a number up to"),
    ([*TRAIN, "--max-position-embeddings", "many"], "give a number, or none"),
    # What no machine has room for.
    *(([*TRAIN, f"--{name}", "100000000"], TOO_MUCH) for name in ("hidden-size", "num-layers", "batch-size")),
    ([*TRAIN, "--vocab-size", "10000000000"], TOO_MUCH),
    ([*TRAIN, "--hidden-size", "1" + 400 * "0"], "parameters; make it smaller"),
    ([*BENCH, "--batch-size", "100000000"], TOO_MUCH),
    ([*BENCH, "--num-layers", "100000000"], TOO_MUCH),
    # Presets, lengths, devices.
    ([*NEW, *BOOK, "--preset", "huge"], "no preset 'huge'; choose one of seed, tiny"),
    ([*NEW, *BOOK, "--tokenizer", "char", "--preset", "seed", "--sequence-length", "129"], "of 128; shorten it"),
    ([*TRAIN, "--device", "abacus"], "use --device auto or cpu"),
    ([*TRAIN, "--device", "meta"], "use --device auto or cpu"),
    ([*BENCH, "--device", "meta"], "use --device auto or cpu"),
    ([*BENCH, "--num-threads", "100000000"], "give at most"),
    ([*BENCH, "--seed", TOO_LARGE], "give a number up to"),
    # Text.
    ([*NEW, *TRAINING, "--data", "missing.txt"], "missing.txt does not exist; give stdlib, a text file"),
    ([*NEW, *TRAINING, "--data", "empty.txt"], "empty.txt is empty; give a file with text"),
    ([*NEW, *TRAINING, "--data", "blank.txt"], "blank.txt is empty; give a file with text"),
    ([*NEW, *TRAINING, "--data", "binary.bin"], "not UTF-8 text.*convert it or choose another"),
    ([*NEW, *TRAINING, "--data", "latin.txt"], "not UTF-8 text.*convert it or choose another"),
    ([*NEW, *TRAINING, "--data", "short.txt"], "fewer than sequence_length.*give more text or a shorter"),
    ([*NEW, *TRAINING, "--data", "one.txt"], "give more text"),
    ([*NEW, *TRAINING, "--data", "hollow"], "no text.*choose another"),
    ([*NEW, *TRAINING, "--data", "*.nothing"], "check the pattern"),
    ([*NEW, *TRAINING, "--data", "hf:"], "write hf:ORG/NAME"),
    ([*TRAIN, "--tokenizer", "runes!"], "no tokenizer runes!; choose byte, char"),
    ([*TRAIN, "--tokenizer", "bpe:10"], "at least 257"),
    ([*TRAIN, "--tokenizer", "bytes"], r"no tokenizer bytes \(did you mean byte\?\); choose byte"),
    ([*TRAIN, "--tokenizer", "absent.json"], "check the path"),
    # Where it goes.
    (["train", *BOOK, *TRAINING], "--out runs/NAME"),
    (["train", "--out", "run", *BOOK, *TRAINING], "--resume run, or choose another --out"),
    (["train", "--out", "hollow", *BOOK, *TRAINING], "not empty; choose another --out"),
    (["train", "--out", "book.txt", *BOOK, *TRAINING], "is a file; choose another place"),
    (["train", "--out", "book.txt/new", *BOOK, *TRAINING], "choose another place"),
    (["train", "--out", "/proc/new", *BOOK, *TRAINING], "choose another place"),
    (["train", "--out", LONG_NAME, *BOOK, *TRAINING], "name too long; choose another place"),
    (["train", "--out", f"above/{LONG_NAME}", *BOOK, *TRAINING], "name too long; choose another place"),
    (["train", "--out", NOT_UTF8, *BOOK, *TRAINING], r"the name 'new\\udcff' is not UTF-8; choose another place"),
    (["train", "--out", f"{NOT_UTF8}/run", *BOOK, *TRAINING], r"is not UTF-8; choose another place"),
    ([*BENCH, "--out", NOT_UTF8], r"the name 'new\\udcff' is not UTF-8; choose another place"),
    ([*BENCH, "--out", LONG_NAME], "name too long; choose another place"),
    (["train", "--resume", LONG_NAME], "choose another path"),
    ([*NEW, "--config", LONG_NAME], "restore it"),
    ([*TRAIN, "--tokenizer", LONG_NAME], "choose"),
    ([*NEW, *TRAINING, "--data", LONG_NAME], "choose another file"),
    (["report", LONG_NAME], "check the path"),
    # Other configurations and runs.
    ([*NEW, "--config", "run/run.json", "--preset", "tiny"], "--preset or --config, not both"),
    ([*NEW, "--config", "missing.json"], "missing.json does not exist; check the path"),
    ([*NEW, "--config", "book.txt"], "not readable JSON.*restore it"),
    ([*NEW, "--config", "run/tokenizer.json"], "give the one that a run folder holds"),
    (["train", "--resume", "nowhere"], "not a run folder.*train --out nowhere"),
    (["train", "--resume", "hollow"], "not a run folder.*train --out hollow"),
    (["train", "--resume", "book.txt"], "not a run folder but a file; give the folder"),
    (["train", "--resume", "run/checkpoints/step-00000004"], "is a checkpoint; give its run, run$"),
    (
        ["train", "--resume", "run", "--mixer", "attention", "--seed", "5"],
        "--mixer, --seed differ from.*leave them out",
    ),
    (["train", "--resume", "run", "--moments", "bf16"], "--moments differs from.*leave it out"),
    (["train", "--resume", "run", "--steps", "9", "--stream-weights", "True"], "stream_weights needs the masters"),
    (["train", "--resume", "run", "--out", "new"], "leave out --out"),
    (["train", "--resume", "run", "--steps", "9", "--learning-rate", "0.5"], "--learning-rate.*leave it out"),
    (["train", "--resume", "run", "--mixer", "attention"], "--mixer.*or start a new run"),
    (["train", "--resume", "run", "--data", "other.txt"], "of other.txt is not the one.*that was, or start a new run"),
    (["train", "--resume", "run", "--data", "nowhere.txt"], "nowhere.txt does not exist; give"),
    (["train", "--resume", "run", "--data", ""], "data is empty; give"),
    (["train", "--resume", "run", "--steps", "0"], "at least 1"),
    # Evaluation and generation.
    (["eval", "nowhere"], "not a run folder.*start one with"),
    (["eval", "book.txt"], "not a run folder but a file; give the folder"),
    (["eval", "run/checkpoints"], "not a run folder.*start one with"),
    (["eval", "run", "--batch-size", "0"], "at least 1"),
    (["eval", "run", "--sequence-length", "-2"], "at least 1"),
    (["eval", "run", "--data", "missing.txt"], "give stdlib, a text file"),
    (["eval", "run", "--data", "one.txt"], "error: one.txt has 1 token, and a prediction takes two; give more text"),
    (["eval", "run", "--data", ""], "data is empty; give"),
    (["eval", "model"], "model is a model's folder .*no run.json.*; give the run folder that `train --out` made"),
    (["eval", "step-00000004"], "is a model's folder .*; give the run folder"),
    (["generate", "model"], "model is a model's folder"),
    (["generate", "run", "--prompt", "a b\udcff"], r"not UTF-8 text \(character 4 is not\); convert it"),
    (["eval", "run", "--device", "abacus"], "use --device auto or cpu"),
    (["eval", "run", "--device", "meta"], "use --device auto or cpu"),
    (["eval", LONG_NAME], "choose another path"),
    (["generate", "nowhere"], "not a run folder.*start one with"),
    (["generate", "run", "--max-new-tokens", "0"], "at least 1"),
    *(
        (["generate", "run", "--temperature", value], "0.001 to 1000, or --greedy")
        for value in ("0", "nan", "inf", "1e-40", "-1")
    ),
    (["generate", "run", "--seed", "-1"], "from 0 to"),
    (["generate", "run", "--seed", TOO_LARGE], "from 0 to"),
    (["generate", "run", "--device", "meta"], "use --device auto or cpu"),
    (["generate", LONG_NAME], "choose another path"),
    (["generate", "run", "--top-k", "-1"], "0 for all"),
    (["generate", "run", "--top-p", "1.5"], "up to 1"),
    (["generate", "run", "--prompt", ""], "give some text"),
    # Plans.
    (["plan", "--preset", "huge"], "choose one of seed"),
    (["plan", "--sequence-length", "129"], "position table of 128; shorten it"),
    (["plan", "--sequence-length", "0"], "at least 1"),
    (["plan", "--batch-size", "0"], "at least 1"),
    (["plan", "--gpu-memory", "lots"], "write it like 12GB"),
    (["plan", "--gpu-memory", "-4GB"], "above 0, like 12GB"),
    (["plan", "--gpu-memory", "1e30GB"], "more than an exabyte"),
    (["plan", "--gpu-memory", "auto", "--device", "cpu"], "asks for a GPU and there is none"),
    (["plan", "--gpu-memory", "4"], "'4' is less than a kilobyte; write an amount with its unit, like 4GB"),
    (["plan", "--ladder", "--gpu-memory", "4GB"], "--gpu-memory has no effect on --ladder"),
    (["plan", "--ladder", "--preset", "1b"], "--preset has no effect on --ladder"),
    (["plan", "--model", "hf:gpt2", "--num-layers", "3"], "--num-layers has no effect on --model"),
    (["plan", "--model", "hf:gpt2", "--verify"], "--verify has no effect on --model"),
    (["plan", "--figure", "ladder.svg"], "--figure has no effect on a plan of one model; add --ladder"),
    (["report", "."], "is a folder; give the report.json"),
    (["report", ".", "."], "is a folder; give the report.json"),
    (
        [*NEW, *TRAINING, "--data", "book.txt", "book.txt"],
        "for several files give their folder, or a pattern in quotes",
    ),
    (["plan", "--device", "rtx-9999"], "is not known; choose auto, cpu or one of"),
    (["plan", "--model", "gpt2"], "write it like hf:gpt2"),
    (["plan", "--model", "hf:"], "write it like hf:gpt2"),
    (["plan", "--model", "hf:/no/such/folder"], "there is no folder /no/such/folder"),
    (["plan", "--model", "hf:gpt2", "--batch-size", "2", "--micro-batch-size", "3"], "micro_batch_size 3 is more than"),
    (["plan", "--micro-batch-size", "0"], "at least 1"),
    (["plan", "--max-grad-norm", "-1"], "above 0"),
    (["plan", "--gpu-memory", "0GB"], "above 0, like 12GB"),
    (["plan", "--host-memory", "12 apples"], "write it like 12GB"),
    (["plan", "--host-memory", ""], "write it like 12GB"),
    # Benchmarks.
    ([*BENCH, "--causal", "False"], "with causal=False choose mixer bk or attention"),
    ([*BENCH, "--mixer", "bk", "--causal", "False"], "leave it out"),
    ([*BENCH, "--preset", "huge"], "choose one of seed"),
    ([*BENCH, "--sequence-length", "4"], "lengthen it"),
    ([*BENCH, "--data", "missing.txt"], "give stdlib, a text file"),
    ([*BENCH, "--preset", "seed", "--sequence-length", "129"], "of 128; shorten it"),
    ([*BENCH, "--out", "book.txt/new"], "choose another place"),
    ([*BENCH, "--out", "book.txt"], "choose another place"),
]


@pytest.mark.parametrize(
    ("words", "mend"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_that_names_the_mend(cli, workspace, words, mend):
    (workspace / "empty.txt").touch()
    (workspace / "blank.txt").write_text(" \n\t\n")
    (workspace / "binary.bin").write_bytes(bytes(range(256)))
    (workspace / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    (workspace / "short.txt").write_text("eighteen signs now")
    (workspace / "one.txt").write_text("a")
    (workspace / "other.txt").write_text("another text, long enough to learn from\n" * 20)
    for model in ("model", "step-00000004"):
        shutil.copytree(checkpoint_of("run"), workspace / model)
    (workspace / "hollow").mkdir()
    (workspace / "hollow" / "noise.bin").write_bytes(b"\0\1\2")
    check_refused(cli, workspace, words, mend)


USES = {
    "eval": ["eval", "run"],
    "eval of the checkpoint": ["eval", str(checkpoint_of("run"))],
    "generate": ["generate", "run"],
    "resume": ["train", "--resume", "run"],
    "longer resume": ["train", "--resume", "run", "--steps", "9"],
}
each_use = pytest.mark.parametrize("words", USES.values(), ids=USES)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


@each_use
@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, "config.json", "state.json"])
@pytest.mark.parametrize(
    ("damage", "words_for_it"),
    [(cut_short, "bytes instead of"), (flip_a_byte, "a byte has changed"), (lambda path: path.unlink(), "is missing")],
    ids=["cut short", "flipped byte", "missing"],
)
def test_a_damaged_checkpoint_is_found_before_it_is_used(cli, workspace, words, name, damage, words_for_it):
    damage(checkpoint_of("run") / name)
    last = check_refused(cli, workspace, words, f"{words_for_it}.*delete step-00000004 to continue from step-00000002")
    assert name in last


@each_use
@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"model.safetensors": {"sha256": "0"}}', '{"a": {"bytes": "b"}}']
)
def test_a_damaged_list_of_checksums_is_found_too(cli, workspace, words, text):
    (checkpoint_of("run") / "manifest.json").write_text(text)
    check_refused(cli, workspace, words, "manifest.json.*restore it")


def test_what_the_message_advises_works(cli, workspace):
    flip_a_byte(checkpoint_of("run") / WEIGHTS)
    for file in checkpoint_of("run").iterdir():
        file.unlink()
    checkpoint_of("run").rmdir()
    assert cli("eval", "run", "--json").document["step"] == 2
    assert cli("train", "--resume", "run", "--json").document["steps"] == 4


@each_use
def test_a_run_without_checkpoints_says_so(cli, workspace, words):
    (workspace / "run" / "checkpoints").rename(workspace / "elsewhere")
    check_refused(cli, workspace, words, "train again with another --out|not a run folder.*start one")


def another_tokenizer(workspace):
    (workspace / "other.txt").write_text("0123456789" * 50)
    return ["train", "--data", "other.txt", "--out", "other", *TRAINING]


@pytest.mark.parametrize("use", ["eval", "generate", "resume", "longer resume"])
def test_a_vocabulary_that_is_not_the_runs_is_refused(cli, workspace, use):
    assert cli(*another_tokenizer(workspace)).code == 0
    (workspace / "run" / "tokenizer.json").write_text((workspace / "other" / "tokenizer.json").read_text())
    check_refused(cli, workspace, USES[use], "not the vocabulary this run was trained with; restore it")


@pytest.mark.parametrize("use", ["eval", "generate", "resume"])
def test_a_damaged_tokenizer_is_refused(cli, workspace, use):
    (workspace / "run" / "tokenizer.json").write_text("{")
    check_refused(cli, workspace, USES[use], "not a readable tokenizer.json.*restore it")


@pytest.mark.parametrize("use", ["eval", "resume", "longer resume"])
def test_a_text_that_has_changed_is_refused(cli, workspace, use):
    with (workspace / "book.txt").open("a") as file:
        file.write("The end.\n")
    check_refused(cli, workspace, USES[use], "not the one run was trained on; restore it")


@pytest.mark.parametrize("use", ["eval", "resume", "longer resume"])
def test_a_text_that_is_gone_is_refused(cli, workspace, use):
    (workspace / "book.txt").unlink()
    last = check_refused(cli, workspace, USES[use], "give --data with the place where it is now")
    assert f"book.txt, the text that run was trained on, is not there (seen from {workspace})" in last


@each_use
@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: {**record, "kind": "shopping list"},
        lambda record: {**record, "version": 99},
        lambda record: {**record, "dataset": None},
        lambda record: {**record, "dataset": {}},
        lambda record: {key: value for key, value in record.items() if key != "training"},
        lambda record: {**record, "training": {**record["training"], "steps": 0}},
        lambda record: {**record, "training": {**record["training"], "luck": 7}},
        lambda record: {**record, "model": {**record["model"], "hidden_size": -1}},
        lambda record: {**record, "data": None},
    ],
)
def test_a_damaged_record_is_refused(cli, workspace, words, change):
    path = workspace / "run" / "run.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    check_refused(cli, workspace, words, "restore it|give the one|update it|give a number")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "tokenizer.json", "manifest.json", "state.json", "config.json"])
def test_no_flipped_bit_of_a_text_file_ends_in_a_traceback(cli, workspace, name):
    path = (workspace / "run" if name in ("run.json", "tokenizer.json") else checkpoint_of("run")) / name
    good = path.read_bytes()
    chance = random.Random(name)
    for place in chance.sample(range(len(good)), 12):
        damaged = bytearray(good)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(damaged))
        for use in ("eval", "generate", "resume"):
            outcome = cli(*USES[use])
            assert outcome.code in (0, 2), (place, use)
            assert outcome.code == 0 or outcome.err.splitlines()[-1].startswith("error: ")
            if name != "run.json":
                assert outcome.code == 2, f"bit {place} of {name} is not noticed by {use}"


DAMAGE = {
    "random bytes": lambda good: random.Random(0).randbytes(200),
    "a list": lambda good: b"[1]\n" + good,
    "a line without a step": lambda good: b"{}\n" + good,
    "a step that is none": lambda good: b'{"step": true}\n' + good,
    "a number that JSON lacks": lambda good: b'{"step": 1, "loss": NaN}\n' + good,
    "nests": lambda good: 100_000 * b"[" + b"\n" + good,
    "half a character": lambda good: good + b'{"step": 2, "\xc3"}\n',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_log_does_not_keep_a_run_from_going_on(cli, workspace, damage):
    path = workspace / "run" / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    assert cli("train", "--resume", "run", "--steps", "6", "--json").document["steps"] == 6
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["step"] == 6 and all(type(line["step"]) is int for line in lines)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_running_out_of_memory_is_one_line_that_names_the_plan(cli, workspace, monkeypatch, error):
    def too_much(*_, **__):
        raise error

    monkeypatch.setattr("resnet_bk.training.start.ResNetBKForCausalLM", too_much)
    check_refused(cli, workspace, TRAIN, "out of memory; take a smaller .*resnet-bk plan")


def test_another_runtime_error_is_not_called_a_lack_of_memory(cli, workspace, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("resnet_bk.training.start.ResNetBKForCausalLM", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        cli(*TRAIN)


@pytest.mark.parametrize("slip", [["--tokenizer", "nosuch.json"], ["--device", "abacus"], ["--out", LONG_NAME]])
@pytest.mark.parametrize("command", [TRAIN, BENCH], ids=["train", "bench"])
def test_a_slip_is_found_before_the_text_is_read(cli, workspace, monkeypatch, command, slip):
    def read(*_, **__):
        pytest.fail("the text was read first")

    monkeypatch.setattr("resnet_bk.training.data.dataset.load_corpus", read)
    check_refused(cli, workspace, [*command, *slip], "choose|check the path|use --device")


@pytest.mark.parametrize("word", ["none", "0", "None"])
def test_no_position_table_is_a_length_that_nothing_bounds(cli, workspace, word):
    without = ["--preset", "seed", "--max-position-embeddings", word]
    document = cli("plan", *without, "--sequence-length", "4096", "--json").document
    assert document["model"]["max_position_embeddings"] is None
    assert "position embedding" not in document["parameters"]["by_component"]
    small = [*TRAINING[2:], "--num-layers", "1", "--sequence-length", "200"]
    assert cli("train", "--data", "book.txt", "--out", "free", *small, *without).code == 0
    assert json.loads((workspace / "free" / "run.json").read_text())["model"]["max_position_embeddings"] is None
    assert cli("train", "--resume", "free", "--max-position-embeddings", word).code == 0


def test_generation_past_the_position_table_says_how_much_fits(cli, workspace):
    with_table = [*TRAINING, "--max-position-embeddings", "20"]
    assert cli("train", "--data", "book.txt", "--out", "table", *with_table).code == 0
    words = ["generate", "table", "--prompt", "The quick"]
    check_refused(cli, workspace, [*words, "--max-new-tokens", "12"], "position table of 20; use --max-new-tokens 11")
    long = ["generate", "table", "--prompt", "The quick " * 3]
    check_refused(cli, workspace, long, "position table of 20; use a shorter prompt")
    assert cli(*words, "--max-new-tokens", "11", "--json").document["new_tokens"] <= 11
    check_refused(cli, workspace, ["eval", "table", "--sequence-length", "21"], "position table of 20; shorten it")


def test_another_benchmark_is_not_written_over(cli, workspace):
    assert cli(*BENCH, "--json").code == 0
    check_refused(cli, workspace, [*BENCH, "--batch-size", "2"], "of another benchmark.*choose another --out")


def test_ctrl_c_leaves_with_130_and_no_traceback(cli, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("resnet_bk.environment.describe_environment", interrupted)
    outcome = cli("env")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
