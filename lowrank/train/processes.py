"""Several processes of one run: how they are started, and how the frozen base is sharded over them.

Every process has the whole adapter and optimizer. Their gradients are averaged in one message
(`loop.average_gradients`). With FSDP2 (torch's `fully_shard`) each process keeps a part of the base's
weights, and the parts of a block are gathered while the block computes. accelerate's own FSDP does not fit:
it shards the trained parameters with the model, and an adapter is no part of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from lowrank.config.train import TrainOptions, declared
from lowrank.errors import Refused

_WAY_OUT = (
    "use `accelerate launch --config_file configs/accelerate/ddp.yaml`, or configs/accelerate/fsdp2.yaml to "
    "divide the base model among the GPUs"
)
# flags that need the whole weights of a layer in each process
_WHOLE_BASE = ("fp8_base", "fp8_base_unet", "fp8_scaled", "base_storage", "blocks_to_swap", "abm_enabled")


@dataclass(frozen=True)
class Sharding:
    """FSDP2 of the frozen base: every process keeps a part of each block's weights."""

    reshard: bool = True  # free a block's gathered weights after its forward
    offload: bool = False  # keep the parts in host memory

    def shard(self, denoiser: nn.Module, device: torch.device) -> None:
        """Shard a denoiser in place, block by block, so that no device ever has all of it."""
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        kinds = set(getattr(denoiser, "_no_split_modules", None) or ())  # diffusers' names of its blocks
        blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
        for module in (*reversed(blocks), denoiser):  # inner blocks first
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard, offload_policy=policy)


def launched_sharding(options: TrainOptions, environment: Mapping[str, str] = os.environ) -> Sharding | None:
    """The sharding that `accelerate launch` was configured for. None for one process.

    Raises `Refused` for DeepSpeed, Megatron-LM and FSDP 1, and for options that FSDP2 does not work with.
    """
    for name, variable in (("DeepSpeed", "DEEPSPEED"), ("Megatron-LM", "MEGATRON_LM")):
        if _is_set(environment, f"ACCELERATE_USE_{variable}"):
            raise Refused(
                f"{name} is not supported: an adapter has little optimizer state to divide; {_WAY_OUT}"
            )
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        return None
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise Refused(f"FSDP version {version} is not supported; set fsdp_version: 2, or {_WAY_OUT}")
    values = {spec.name: value for spec, value in declared(options)}
    for flag in _WHOLE_BASE:
        if values.get(flag):
            raise Refused(
                f"--{flag} does not work with FSDP; leave it out, or {_WAY_OUT.partition(', or')[0]}"
            )
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return None
    return Sharding(
        reshard=environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("true", "full_shard"),
        offload=_is_set(environment, "FSDP_OFFLOAD_PARAMS"),
    )


def without_fsdp_of_accelerate() -> None:
    """Keep accelerate from preparing FSDP itself: the base is sharded here."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def on_cpu() -> bool:
    """Whether this is one of several processes without a GPU, which accelerate does not find by itself."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and not torch.accelerator.is_available()


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")
