"""``resnet-bk env``."""

from dataclasses import asdict, dataclass
from typing import Any

from resnet_bk.cli.console import print_json, result_console

_FREED = {"kept": "kept for what comes next (glibc)", "returned": "returned to the system"}


@dataclass(frozen=True, kw_only=True)
class EnvCommand:
    """Say what machine and versions these are, and what each operator will use here.

    Examples:
      resnet-bk env
      resnet-bk env --json
      resnet-bk env --calibrate
    """

    calibrate: bool = False
    """Measure this machine's rates and the driver's context for the planner, which uses them from then on."""
    json: bool = False
    """Print it as one JSON document on standard output."""

    def run(self) -> None:
        """Looks and prints."""
        from resnet_bk.environment import describe_environment
        from resnet_bk.heap import keep_freed_memory
        from resnet_bk.training.step import choose_device

        keep_freed_memory(choose_device("auto"))  # as whatever computes here does before anything else
        document = {**describe_environment(), **_capabilities()}
        if self.calibrate:
            document["calibration"] = _calibrated()
        if self.json:
            print_json(document)
            return
        from resnet_bk.memory.units import format_bytes

        hardware = document["hardware"]
        gpu = hardware["gpu"]
        lines = [
            f"CPU         {hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} torch threads",
            f"memory      {format_bytes(hardware['memory_bytes'])}; freed memory is {_FREED[hardware['freed_memory']]}",
            f"GPU         {gpu['name'] + ', ' + format_bytes(gpu['memory_bytes']) if gpu else 'none'}",
            f"system      {document['system']}, Python {document['python']}",
            f"packages    {', '.join(f'{name} {found}' for name, found in document['packages'].items())}",
            f"commit      {document['commit'] or 'not a checkout'}",
            f"device      {document['device']}: precisions {', '.join(document['precisions'])}",
            *(f"{name:11s} {choice['backend']}: {choice['reason']}" for name, choice in document["operators"].items()),
        ]
        if self.calibrate:
            lines += [f"{name:15s} {value:,.0f}" for name, value in document["calibration"].items()]
        for line in lines:
            result_console.print(line, markup=False, soft_wrap=True)


def _calibrated() -> dict[str, Any]:
    """What was measured just now, and kept."""
    import torch

    from resnet_bk.cli.console import remark
    from resnet_bk.planner.calibration import calibrate, save_calibration
    from resnet_bk.planner.devices import name_of
    from resnet_bk.training.budget import half_type_of
    from resnet_bk.training.step import choose_device

    device = choose_device("auto")
    half = torch.bfloat16 if half_type_of(device) == "bf16" else torch.float16
    calibration = calibrate(device, half)
    remark(f"kept in {save_calibration(name_of(device), calibration)}")
    return asdict(calibration)


def _capabilities() -> dict[str, Any]:
    import torch

    from resnet_bk.ops.bk import choose_backend
    from resnet_bk.ops.carry import choose_carry_backend
    from resnet_bk.ops.convolution import choose_convolution_backend
    from resnet_bk.ops.grouped import choose_moe_backend
    from resnet_bk.ops.layer_norm import choose_norm_backend
    from resnet_bk.ops.loss import choose_loss_backend
    from resnet_bk.ops.one_token import choose_one_token_backend
    from resnet_bk.ops.projections import choose_projections_backend
    from resnet_bk.ops.single import choose_single_backend
    from resnet_bk.training.step import choose_device

    device = choose_device("auto")
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    attention = "torch's scaled_dot_product_attention chooses among its kernels by shape and dtype"
    choices = {
        "bk_core": choose_backend(device),
        "bk_tunnel": choose_backend(device),
        "bk_carry": choose_carry_backend(device),
        "convolution": choose_convolution_backend(device),
        "projections": choose_projections_backend(device),
        "norm bf16": choose_norm_backend(torch.empty(0, device=device), torch.bfloat16),
        "router bf16": choose_single_backend(device, torch.bfloat16),
        "moe": choose_moe_backend(device, torch.bfloat16, 0, 0, 0),
        "one token": choose_one_token_backend(device),
        "loss": choose_loss_backend(device, torch.float32),
    }
    return {
        "device": device.type,
        "precisions": ["fp32", *(["bf16"] if bf16 else []), "fp16"],
        "operators": {
            **{name: {"backend": choice.name, "reason": choice.reason} for name, choice in choices.items()},
            "attention": {"backend": "sdpa", "reason": attention},
        },
    }
