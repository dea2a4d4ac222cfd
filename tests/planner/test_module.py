"""Any nn.Module can be planned, and what is planned is what a real step takes."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from resnet_bk.memory.plan import Budget
from resnet_bk.planner import module
from resnet_bk.planner.devices import DEVICES, this_cpu
from resnet_bk.planner.verify import verify_step

CPU = torch.device("cpu")
FOREIGN = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "resid_pdrop": 0.1, "bos_token_id": 0}
    | {"eos_token_id": 0},
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 500},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"vocab_size": 500},
}


def block():
    return nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96))


class Blocks(nn.Module):
    """A model that knows nothing of this library."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(5))
        self.head = nn.Linear(96, 7)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def mean_square(model, batch):
    x, y = batch
    return (model(x).float() - y).square().mean()


BATCH = (torch.empty(64, 96, device="meta"), torch.empty(64, 7, device="meta"))


def job_of(model_fn, batch, **options):
    return module.Job.of(model_fn, batch, device=this_cpu(), **options)


@pytest.mark.parametrize("way", module.WAYS, ids=lambda way: way.name)
def test_a_module_of_ones_own_takes_what_is_planned(way):
    job = job_of(Blocks, BATCH, loss=mean_square, blocks=lambda model: model.layers)
    predicted = module.predict_way(job, way, this_cpu()).footprint.tensor_bytes
    measured = verify_step(lambda: job.prepared(way, CPU), CPU).tensor_bytes
    assert measured <= predicted <= 1.01 * measured


@pytest.mark.parametrize("way", module.WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_transformers_takes_what_is_planned(name, way):
    config = AutoConfig.for_model(name, **FOREIGN[name])
    tokens = torch.empty(2, 48, dtype=torch.int64, device="meta")
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    job = job_of(lambda: AutoModelForCausalLM.from_config(config), batch)
    predicted = module.predict_way(job, way, this_cpu()).footprint.tensor_bytes
    measured = verify_step(lambda: job.prepared(way, CPU), CPU).tensor_bytes
    assert measured <= predicted <= 1.01 * measured


def test_each_way_saves_on_a_gpu_and_a_budget_has_a_verdict():
    def deep():
        return nn.Sequential(*(block() for _ in range(40)))

    batch = (torch.empty(8192, 96, device="meta"), torch.empty(8192, 96, device="meta"))
    found = module.plan(deep, batch, device="h100", loss=mean_square, blocks=list)
    sizes = [row.footprint.tensor_bytes for row in found.predictions]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(module.WAYS)
    assert found.fastest_that_fits is None and found.predictions[0].fits is None
    between = (found.predictions[1].gpu_bytes + found.predictions[2].gpu_bytes) // 2
    judged = module.plan(
        deep, batch, budget=Budget(gpu_bytes=between), device=DEVICES["h100"], loss=mean_square, blocks=list
    )
    assert judged.fastest_that_fits.strategy.name == "full checkpointing"
    assert judged.parameters == sum(parameter.numel() for parameter in deep().parameters())


def test_an_optimizer_of_ones_own_counts():
    plain, heavy = (
        module.plan(Blocks, BATCH, optimizer, device="cpu", loss=mean_square).predictions[0].footprint.tensor_bytes
        for optimizer in (torch.optim.SGD, torch.optim.AdamW)
    )
    parameters = sum(parameter.numel() for parameter in Blocks().parameters())
    assert 8 * parameters <= heavy - plain <= 13 * parameters


def encoder():
    layer = nn.TransformerEncoderLayer(96, 4, 200, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)  # copies of it


@pytest.mark.parametrize("way", module.WAYS, ids=lambda way: way.name)
def test_a_module_made_of_copies_takes_what_is_planned(way):
    batch = torch.empty(4, 20, 96, device="meta")
    job = job_of(encoder, batch, loss=lambda model, x: model(x).square().mean(), blocks=lambda model: model.layers)
    predicted = module.predict_way(job, way, this_cpu()).footprint.tensor_bytes
    measured = verify_step(lambda: job.prepared(way, CPU), CPU).tensor_bytes
    assert measured <= predicted <= 1.01 * measured


def test_copies_keep_what_is_tied_and_what_needs_a_gradient():
    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            one = nn.Linear(300, 300)
            one.other, one.bias.requires_grad = one.weight, False
            one.register_buffer("table", torch.zeros(7))
            self.two = copy.deepcopy(one)
            assert self.two.other is self.two.weight is not one.weight
            assert isinstance(self.two.weight, nn.Parameter) and isinstance(self.two.bias, nn.Parameter)
            assert self.two.weight.requires_grad and not self.two.bias.requires_grad
            assert self.two.table.shape == (7,) and "table" in dict(self.two.named_buffers())

        def forward(self, x):
            return self.two(x).mean()

    found = module.plan(Copied, torch.empty(2, 300, device="meta"), device="h100", loss=lambda model, x: model(x))
    assert found.parameters == 300 * 300 + 300
    weights = [part.num_bytes for part in found.predictions[0].parts if part.kind == "weights"]
    assert sum(weights) == 4 * (300 * 300 + 300 + 7)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Batch:
    pair: Pair
    again: torch.Tensor


def test_a_batch_is_any_structure_and_its_tensors_stay_the_same_ones():
    x, y = BATCH
    seen = []

    def loss(model, batch):
        seen.append(type(batch.pair))
        assert batch.again is batch.pair.x
        return mean_square(model, batch.pair)

    found = module.plan(Blocks, Batch(Pair(x, y), x), device="cpu", loss=loss)
    plain = module.plan(Blocks, BATCH, device="cpu", loss=mean_square)
    sizes, wanted = ([row.footprint.tensor_bytes for row in each.predictions] for each in (found, plain))
    assert sizes == wanted and set(seen) == {Pair}


@pytest.mark.parametrize(
    ("model_fn", "loss", "message"),
    [
        (lambda: 3, None, "model_fn made a int"),
        (lambda: nn.Linear(2, 2), lambda model, x: 1.0, "the loss is a float"),
        (lambda: nn.Linear(2, 2), lambda model, x: model(x), r"the loss has shape \(3, 2\)"),
    ],
)
def test_what_functions_return_is_checked(model_fn, loss, message):
    with pytest.raises(ValueError, match=message):
        module.plan(model_fn, torch.empty(3, 2, device="meta"), device="cpu", loss=loss)


def test_a_model_of_transformers_without_labels_has_no_loss():
    config = AutoConfig.for_model("llama", **FOREIGN["llama"])
    batch = {"input_ids": torch.empty(1, 8, dtype=torch.int64, device="meta")}
    with pytest.raises(ValueError, match="has no loss; have labels"):
        module.plan(lambda: AutoModelForCausalLM.from_config(config), batch, device="cpu")


def test_without_a_loss_the_batch_is_the_models_arguments():
    with pytest.raises(TypeError, match="give loss="):
        module.plan(Blocks, BATCH, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_fn": nn.Linear(2, 2)}, "give a function"),
        ({"budget": 10**9}, r"Budget\(gpu_bytes="),
        ({"budget": "1GB"}, r"Budget.parse\("),
        ({"half_type": torch.float32}, "choose torch.bfloat16 or torch.float16"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, message):
    given = {"model_fn": lambda: nn.Linear(2, 2), "batch": torch.empty(3, 2, device="meta"), **arguments}
    with pytest.raises(ValueError, match=message):
        module.plan(**given)
