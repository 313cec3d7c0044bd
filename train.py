"""Trains a Focused Transformer.

    python train.py --config=configs/tiny.py --workdir=/tmp/tiny --config.steps=100

The same command again goes on from the latest checkpoint in the working directory, with the same bits as if it had
never stopped. `--config.KEY=VALUE` replaces any key of the file; unknown keys are errors.

Before anything is paid for:

    python train.py --config=configs/longllama_3b.py --plan
    python train.py --config=configs/longllama_3b.py --compile_only
    python train.py --config=configs/longllama_3b.py:v5e:8x8 --compile_only --report=r.json

The first reckons; the second runs the compiler for chips that need not be there (pip install '.[tpu]' for TPUs,
'.[gpu_compiler]' for GPUs). Both need neither data nor a working directory. The second ends with 1 where the step does
not fit the chips.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import platform
import sys

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from fot_jax import checkpoint, data, exports, files, processes, programs, run_config, staging, training, watching
from fot_jax.hardware import hardware
from fot_jax.host import keep_freed_memory, one_line, source, versions
from fot_jax.tokenizer import Tokenizer, check_vocab

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File in configs/, with a function get_config().", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder, or URL (gs://, s3://), for checkpoints and metrics.")
_PLAN = flags.DEFINE_bool("plan", False, "Reckon what the run needs, and end.")
_SHARE = flags.DEFINE_float("share", 0.5, "Share of the chips' peak FLOP/s that --plan reckons with.")
_COMPILE = flags.DEFINE_bool("compile_only", False, "Compile a step for chips that need not be there, and end.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "What for, like v5e:16x16 or 2*v5e:4x8; by default config.hardware.")
_REPORT = flags.DEFINE_string("report", "", "JSON file for what --plan or --compile_only find.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "",
    "Folder of compiled programs; by default JAX_COMPILATION_CACHE_DIR, or else WORKDIR/compiled, but for CPUs. 'none' "
    "for none of ours.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where nothing else (TPU pod, SLURM, Open MPI, Kubernetes) says it."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this one, with --coordinator.", lower_bound=0)
_TIMEOUT = flags.DEFINE_float("start_timeout", 300.0, "Seconds to wait for the other processes.", lower_bound=1.0)
_STOPPED = flags.DEFINE_integer(
    "stopped_status", 0, "Exit status of a run that SIGTERM or SIGINT stopped, for schedulers that start it again."
)
_PROFILE = flags.DEFINE_string("profile_steps", "", "FIRST:LAST; a trace of these steps goes to WORKDIR/profile.")


def forecast_only(config: ConfigDict) -> int:
    """--plan and --compile_only: prints what was found; 1 where a step does not fit."""
    from fot_jax import forecast

    if not (text := _TOPOLOGY.value or config.hardware):
        raise ValueError("no hardware is stated; wanted --topology or config.hardware, like v5e:16x16 or h100:8")
    chips = hardware(text)
    if config.hardware and text != config.hardware:  # mesh, microbatches and loss_chunk are for other chips
        print(f"laid out for {text}, not for {config.hardware}")
        run_config.set_hardware(config, text)
    jax.config.update("jax_platforms", "cpu")  # what is reckoned or compiled for need not be here
    # JAX keeps programs for chips that are not there, but cannot read them again without the chips.
    jax.config.update("jax_enable_compilation_cache", False)
    report = pathlib.Path(_REPORT.value) if _REPORT.value else None
    try:
        found = forecast.arithmetic(config, chips, _SHARE.value) if _PLAN.value else forecast.compiled(config, chips)
    except forecast.DoesNotFit as error:
        if report:
            files.write_json(report, {"hardware": text, "fits": False, "refused": one_line(error)})
        raise
    print(found.table())
    if report:
        files.write_json(report, found.summary())
    return 0 if _PLAN.value or found.fits else 1


def main(argv: list[str]) -> int | None:
    """Reads the flags, and runs what they say."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; overrides are written --config.KEY=VALUE")
    # JAX would take three quarters of a GPU; forecasts reckon with all that the data sheet has, which is 94% of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if _PLAN.value and _COMPILE.value:
        raise app.UsageError("--plan and --compile_only; wanted one of them")
    if not (_PLAN.value or _COMPILE.value) and (_TOPOLOGY.value or _REPORT.value):
        raise app.UsageError("--topology and --report go with --plan or --compile_only")
    if (_PLAN.value or _COMPILE.value) and _CACHE.value:  # JAX reads no programs for chips that are not there
        raise app.UsageError("--compilation_cache goes with runs, not with --plan or --compile_only")
    if _PLAN.value or _COMPILE.value:
        try:
            return forecast_only(_CONFIG.value)
        except ValueError as error:
            raise SystemExit(f"train.py: {one_line(error)}") from error
    if not _WORKDIR.value:
        raise app.UsageError("--workdir is not set; wanted a folder")
    config, workdir = _CONFIG.value, files.location(_WORKDIR.value)
    profile = watching.steps_of_profile(_PROFILE.value, config.steps)
    if files.store_of(workdir) and not config.data.prepared:
        raise ValueError(f"workdir is {workdir}; wanted config key data.prepared too, a folder for tokenised documents")
    packages = versions("fot-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint")
    packages |= versions("grain", "numpy", "tensorstore")
    packages |= {"python": platform.python_version(), "source": source()}
    facts = {"versions": packages, "workdir": str(workdir), "config": json.loads(json.dumps(config.to_dict()))}

    try:
        at = processes.place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _TIMEOUT.value)
        with processes.together(at, facts, timeout_s=_TIMEOUT.value, stopped_status=_STOPPED.value) as group:
            done = run(config, workdir, group, profile)
    except processes.ProcessError as error:
        raise SystemExit(f"train.py: {error}") from error
    except training.TrainingError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_status
    return 0 if done else _STOPPED.value


def run(config: ConfigDict, workdir: files.Location, group: processes.Group, profile: tuple[int, int] | None) -> bool:
    """Checks, then data, then training, by all processes; whether all steps are done, and exported."""
    stated = _CACHE.value or jax.config.jax_compilation_cache_dir
    # A CPU's programs are compiled in seconds, and are for the machine that they were compiled on.
    if _CACHE.value != "none" and (stated or jax.default_backend() != "cpu"):
        jax.config.update("jax_compilation_cache_dir", str(stated or workdir / "compiled"))
    keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax has fifty lines to say about a checkpoint
    log = logging.getLogger("fot_jax")
    log.setLevel(logging.INFO if group.at.process == 0 else logging.ERROR)

    # 1. Everything that can be wrong with the configuration, before any long work.
    group.check_shared(workdir)
    if files.store_of(workdir) == "s3":
        group.check_shared(staging.folder(workdir))
    model, mesh = training.check(config, workdir)
    if not config.data.tokenizer:
        raise ValueError("config key data.tokenizer is empty; wanted a SentencePiece model or a tokenizer.json")
    tokenizer = Tokenizer.load(config.data.tokenizer)
    check_vocab(tokenizer, model.vocab_size, padded=bool(config.init_from))
    if checkpoint.is_workdir(workdir):
        for kept in (workdir / name for name in ("tokenizer.model", "tokenizer.json")):
            if kept.exists() and Tokenizer.load(kept).fingerprint != tokenizer.fingerprint:
                raise ValueError(
                    f"{config.data.tokenizer} is another tokenizer than {kept}, which the checkpoints there are of"
                )
    splits = ("train", "validation") if config.validation.every else ("train",)
    corpora = {split: run_config.open_corpora(config, split) for split in splits}
    log.info("model %s on mesh %s", model, dict(mesh.shape))
    if group.at.process == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / tokenizer.file_name)

    # 2. Data: tokenised the first time, then opened. Batches are made ahead in a thread.
    prepared = config.data.prepared or workdir / "data"
    documents = run_config.data_source(config, "train", corpora["train"], tokenizer, prepared)
    rows = programs.Rows(config, mesh).numbers
    batches = data.Batches(run_config.packed(config, model, documents, rows))
    validation, fingerprints = (), [documents.fingerprint]
    if config.validation.every:
        held_out = run_config.data_source(config, "validation", corpora["validation"], tokenizer, prepared)
        validation = data.Batches(run_config.packed(config, model, held_out, rows))
        fingerprints.append(held_out.fingerprint)
    # Where each host tokenises for itself, one may take longer than another.
    group.agree({"data": fingerprints, "steps saved": checkpoint.steps(workdir)}, timeout_s=24 * 3600)

    # 3. Parameters, optimizer and data position: from the latest checkpoint in the working directory; else parameters
    #    from init_from; else initial ones. Then steps until config.steps, or SIGTERM.
    if group.at.process:  # whose steps stall, only they can say
        log.setLevel(logging.WARNING)
    state = training.train(config, workdir, batches, validation, profile, group)
    if int(state.step) < config.steps:
        return False
    group.wait()  # for process 0, which may be making the last exports
    return not (group.asked and exports.exports_due(workdir, config.export.every))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main)
