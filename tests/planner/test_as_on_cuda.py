"""What torch's kernels take on a GPU, against what an H100 was seen to take (torch 2.11)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_bk.imagined import Machine, imagining
from resnet_bk.ops.local_attention import local_attention
from resnet_bk.planner.as_on_cuda import AsOnCuda, workspace_bytes
from resnet_bk.planner.trace import trace_step

H100 = Machine(kind="cuda", capability=(9, 0), multiprocessors=132)
CPU = Machine(kind="cpu")
T4 = Machine(kind="cuda", capability=(7, 5), multiprocessors=40)
SUM = torch.ops.aten.sum.dim_IntList


@pytest.mark.parametrize(("columns", "seen"), [(256, 2_097_664), (768, 6_291_968), (1024, 8_389_120)])
def test_a_sum_over_rows_takes_what_was_seen(columns, seen):
    with imagining(H100):
        assert workspace_bytes(SUM, (torch.empty(1024, columns, dtype=torch.bfloat16, device="meta"), [0]), {}) == seen


@pytest.mark.parametrize(
    ("shape", "dims"), [((1024, 256), [1]), ((1024, 256), [0, 1]), ((4, 256, 256), [0]), ((64, 256), [0])], ids=str
)
def test_other_sums_take_nothing(shape, dims):
    with imagining(H100):
        assert workspace_bytes(SUM, (torch.empty(shape, device="meta"), dims), {}) == 0


def test_fewer_multiprocessors_share_a_sum_among_fewer():
    x = torch.empty(262_144, 256, dtype=torch.bfloat16, device="meta")
    with imagining(H100):
        of_many = workspace_bytes(SUM, (x, [0]), {})
    with imagining(T4):
        assert 0 < workspace_bytes(SUM, (x, [0]), {}) < of_many


def attention_of(dtype, machine, **heads):
    """The kernel that a trace would count, told by what is asked of torch."""
    asked = []
    names = {
        "_scaled_dot_product_flash_attention": "flash",
        "_scaled_dot_product_efficient_attention": "efficient",
        "_scaled_dot_product_attention_math": "plain",
    }

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(str(func._overloadpacket).removeprefix("aten."))
            return func(*args, **(kwargs or {}))

    q, k = (torch.empty(1, count, 8, 16, dtype=dtype, device="meta") for count in (4, heads.get("key_heads", 4)))
    with imagining(machine), AsOnCuda(), Names():
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=q.shape != k.shape)
    found = {names[name] for name in asked if name in names}
    return found.pop() if found else "plain"


@pytest.mark.parametrize(
    ("dtype", "machine", "key_heads", "kernel"),
    [
        (torch.bfloat16, H100, 4, "flash"),
        (torch.bfloat16, H100, 2, "flash"),
        (torch.float32, H100, 4, "efficient"),
        (torch.float32, H100, 2, "plain"),
        (torch.float16, T4, 4, "efficient"),
        (torch.float16, T4, 2, "plain"),
    ],
    ids=str,
)
def test_attention_is_by_the_kernel_that_torch_would_take(dtype, machine, key_heads, kernel):
    assert attention_of(dtype, machine, key_heads=key_heads) == kernel


def local_attention_of(dtype, machine, head_size=16, length=24, **others):
    """Whether a trace would count the kernel for windows, forward and backward."""
    asked = set()

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.add(str(func._overloadpacket))
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(2, length, 4, head_size, dtype=dtype, device="meta", requires_grad=True) for _ in range(3))
    rates = torch.empty(4, device="meta")
    with imagining(machine), AsOnCuda(), Names():
        local_attention(q, k, v, window=8, rates=rates, **others).sum().backward()
    return {"torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"} <= asked


@pytest.mark.parametrize(
    ("dtype", "machine", "case", "windowed"),
    [
        (torch.bfloat16, H100, {}, True),
        (torch.float16, H100, {}, True),
        (torch.float32, H100, {}, False),
        (torch.float16, T4, {}, False),
        (torch.bfloat16, CPU, {}, False),
        (torch.bfloat16, H100, {"length": 8}, False),
        (torch.bfloat16, H100, {"head_size": 12}, False),
        (torch.bfloat16, H100, {"dropout": 0.1}, False),
        (torch.bfloat16, H100, {"documents": torch.zeros(2, 24, dtype=torch.int64, device="meta")}, False),
    ],
    ids=str,
)
def test_local_attention_is_by_the_kernel_for_windows_where_there_is_one(dtype, machine, case, windowed):
    assert local_attention_of(dtype, machine, **case) == windowed


def test_the_kernel_for_windows_takes_its_queries_gradient_in_float32():
    backward = torch.ops.torch_attn._varlen_attn_backward.default
    names = [argument.name for argument in backward._schema.arguments]
    q, ends = torch.empty(2000, 12, 72, device="meta"), torch.empty(3, device="meta")
    bound = dict.fromkeys(names) | {"query": q, "cu_seq_q": ends}
    assert workspace_bytes(backward, tuple(bound.values()), {}) == 4 * 12 * (2000 + 2 * 128) * (96 + 1)


@pytest.mark.parametrize(("bias", "checkpointed", "threads"), [(True, False, 1), (True, True, 2), (False, True, 0)])
def test_threads_of_biased_products_are_counted(bias, checkpointed, threads):
    def prepare():
        model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(), nn.Linear(8, 8, bias=bias))
        x = torch.zeros(4, 8)

        def step():
            if checkpointed:
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
            else:
                model(x).sum().backward()

        return model, torch.optim.AdamW(model.parameters()), step, [x]

    assert trace_step(prepare, H100).threads_of_biased_products == threads
