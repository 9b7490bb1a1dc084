"""The optimizer of a run."""

import torch


def make_optimizer(network, settings, device):
    """AdamW of a network's weights, by the settings of `optim`; on CUDA in one kernel.

    It loads the state of either kind, and goes on as its own.
    """
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused,
    )

    def as_its_own(_, state):
        return state | {"param_groups": [g | {"fused": fused} for g in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(as_its_own)
    return optimizer
