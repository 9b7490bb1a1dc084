"""The precision that a network runs in: fp32, or bf16 or fp16 under autocast."""

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name, device):
    """(fp32, bf16 or fp16, reason) for auto or one of these on a device.

    A CPU gets no fp16: it computes in fp32 then.
    """
    if device.type == "cpu" and name == "auto":
        # Processors with AMX have these, too. Without them bf16 is emulated, and slower.
        able = torch.cpu._is_avx512_bf16_supported()
        text = "the processor has its instructions" if able else "the processor has none for bf16"
        return "bf16" if able else "fp32", text
    if device.type == "cpu" and name == "fp16":
        return "fp32", "a CPU has no fp16"
    if name == "auto":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU supports it") if able else ("fp16", "the GPU has no bf16")
    return name, "as set"


def keep_precision(plan, saved):
    """Let a `build.Plan` go on in the precision of a saved state, where the settings leave it open:
    lines for people. A GPU chooses for itself, and a CPU does not emulate bf16.

    saved: that precision, None in states of older versions, for which auto was fp32 on a CPU.
    """
    before, now = saved or "fp32", plan.precision
    if plan.settings.training.precision != "auto" or plan.device.type != "cpu" or before == now:
        return []
    if before != "fp32":
        return [f"resume: training goes on in {now}, after {before}: {plan.precision_reason}"]
    plan.precision, plan.precision_reason = before, "as the run began"
    return ["resume: training goes on in fp32, as it began; training.precision=bf16 is faster here"]


def autocast(device, precision):
    """The context in which a network runs on a device in one of PRECISIONS."""
    lower = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=lower, enabled=lower is not None)
