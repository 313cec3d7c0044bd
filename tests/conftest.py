"""What every test runs under: eight CPU devices, exact matrix products, no silent broadcasting between ranks."""

from __future__ import annotations

import os

# Before jax is imported: both are read once, at start-up.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {"xla_force_host_platform_device_count": 8}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the tests' time is compilation, and half of that is LLVM's optimisations. What XLA does comes before them
    # and is tested as it is; `make nightly` tests with both.
    FLAGS["xla_backend_optimization_level"] = 0
given = os.environ.get("XLA_FLAGS", "")
missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

# Before gcsfs is imported, which would ask Google, again for each file, what kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Compiling inside an example takes longer than hypothesis's default deadline; the same examples on every run.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="module", autouse=True)
def programs_forgotten():
    """Each compiled program maps some ten pieces of memory, of which Linux allows a process 65,530 (vm.max_map_count):
    with those of a whole suite the compiler dies of a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def programs_of_all(tmp_path_factory):
    """Folder of compiled programs, of the runs of this process."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compiled_once(programs_of_all):
    """Training runs of the same configuration compile once."""
    keys = {"jax_compilation_cache_dir": str(programs_of_all), "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {key: getattr(jax.config, key) for key in keys}
    for key, value in keys.items():
        jax.config.update(key, value)
    yield
    for key, value in before.items():
        jax.config.update(key, value)


@pytest.fixture(scope="session")
def devices():
    """The eight CPU devices; the test is skipped where there are fewer (an accelerator asked for by JAX_PLATFORMS)."""
    found = jax.devices()
    if len(found) < 8:
        pytest.skip(f"{len(found)} devices; wanted 8")
    return found[:8]
