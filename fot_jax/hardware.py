"""Chips that runs are planned and compiled for: `2*v5e:4x8` is two slices of 4 x 8 chips, `h100:8` a node of eight."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """What XLA wants to know of a GPU that it compiles for and that is not there.

    Attributes:
        name: as the GPU says it.
        capability: CUDA compute capability.
        clock: GHz.
        bandwidth: bytes/s of its memory.
        cache: bytes of its second-level cache.
        shared: bytes of shared memory of a multiprocessor; a block can have all but 1 KiB of them.
        multiprocessors: how many it has.
    """

    name: str
    capability: tuple[int, int]
    clock: float
    bandwidth: float
    cache: int
    shared: int
    multiprocessors: int

    def description(self, nbytes: int) -> str:
        """As a text of XLA's GpuTargetConfigProto, of a GPU with so many bytes of memory."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.multiprocessors}
              clock_rate_ghz: {self.clock}
              memory_bandwidth: {int(self.bandwidth)}
              device_memory_size: {nbytes}
              l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared}
              shared_memory_per_block: {48 * 2**10}
              shared_memory_per_block_optin: {self.shared - 2**10}
              fpus_per_core: {128 if major >= 9 else 64}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: {2**31 - 1}
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


class Chip(NamedTuple):
    """Data of one chip, by its maker's data sheet.

    Attributes:
        flops: bfloat16 FLOP/s, dense.
        nbytes: of its memory.
        gpu: of a GPU, more of it; None for a TPU.
        megacore: whether a program runs on the two cores of a chip as one.
    """

    flops: float
    nbytes: int
    gpu: Gpu | None = None
    megacore: bool = False


CHIPS = {
    "v4": Chip(275e12, 32 * 10**9, megacore=True),
    "v5e": Chip(197e12, 16 * 10**9),
    "v5p": Chip(459e12, 95 * 10**9, megacore=True),
    "v6e": Chip(918e12, 32 * 10**9),
    "a100": Chip(312e12, 80 * 10**9, Gpu("NVIDIA A100", (8, 0), 1.41, 2.0e12, 40 * 2**20, 164 * 2**10, 108)),
    "h100": Chip(989e12, 80 * 10**9, Gpu("NVIDIA H100", (9, 0), 1.98, 3.35e12, 50 * 2**20, 228 * 2**10, 132)),
    "h200": Chip(989e12, 141 * 10**9, Gpu("NVIDIA H200", (9, 0), 1.98, 4.8e12, 60 * 2**20, 228 * 2**10, 132)),
}


class Hardware(NamedTuple):
    """Chips that work together.

    Attributes:
        name: of the chip, in `CHIPS`.
        shape: chips along each axis of a slice.
        slices: how many slices there are, joined by a slower network than the chips of one.
    """

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def platform(self) -> str:
        """What JAX calls such devices."""
        return "gpu" if self.chip.gpu else "tpu"

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return self.slices * math.prod(self.shape)

    @property
    def topology(self) -> str:
        """Of a slice, as `jax.experimental.topologies` calls it."""
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.topology if self.slices == 1 else f"{self.slices}*{self.topology}"


def hardware(text: str) -> Hardware:
    """What a text like `v5e:16x16`, `2*v5e:4x8` or `h100:8` names.

    Raises:
        ValueError: another form, or an unknown chip.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"hardware is {text!r}; wanted CHIP:SHAPE like v5e:16x16, 2*v5e:4x8 for two slices, or h100:8, of "
            f"{', '.join(CHIPS)}"
        )
    shape, slices = tuple(map(int, found[3].split("x"))), int(found[1] or 1)
    if min(*shape, slices) < 1:
        raise ValueError(f"hardware is {text!r}; wanted at least 1 everywhere")
    return Hardware(found[2], shape, slices)
