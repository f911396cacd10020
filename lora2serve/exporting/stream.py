"""The loop: open every sink, read each block once, hand it to each sink that wants it, publish by rename."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from threading import Event, Lock
from typing import Any

from lora2serve.artifacts import staging
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import Manifest, versions
from lora2serve.artifacts.staging import DryRunDir, StagedDir
from lora2serve.errors import ExportError, Lora2ServeError
from lora2serve.exporting.settings_plan import recorded_options
from lora2serve.exporting.sinks import Exporter, ExportFacts, ExportModel, Sink
from lora2serve.progress import Progress
from lora2serve.system import malloc, own_process
from lora2serve.system.hardware import cores
from lora2serve.weights.tensors import TensorSpec, row_blocks

BYTES_IN_FLIGHT = 20  # per element of a block: as stored, before and after the fold, the delta, as written
CPU = "cpu"  # among the versions: which kernels of torch this processor has, since they sum in other orders
AROUND = 32 << 20  # bytes for headers, handles and what is imported late: measured


@dataclass(frozen=True)
class Plan:
    """One output to write."""

    target: str
    exporter: Exporter
    options: Any
    out: Path

    @property
    def quant(self) -> str | None:
        """The --quant of this output, if its format has them."""
        return getattr(self.options, "quant", None)


@dataclass(frozen=True)
class PlannedOutput:
    """What one output would take."""

    files: int  # large ones, of tensors
    bytes: int


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write. Sizes are in bytes."""

    tensors: int
    changed: int  # by the adapter
    outputs: Mapping[str, PlannedOutput]  # by directory
    disk: int
    free: int
    memory: int  # plus the libraries


def export(
    model: ExportModel,
    plans: Sequence[Plan],
    progress: Progress,
    *,
    overwrite: bool = False,
    threads: int | None = None,
) -> list[Export]:
    """Write every planned output in one pass over the model; all of them, or none.

    ``threads`` workers fold independent blocks, so memory is ``threads`` blocks whatever the model's size.
    """
    with ExitStack() as stack:
        outputs = [stack.enter_context(staging.opened(plan.out, overwrite=overwrite)) for plan in plans]
        sinks = _open_sinks(model, plans, outputs, stack)
        try:
            feed(model, sinks, progress, threads_for(threads))
            for warning in model.source.survival.check():
                progress.warn(warning)
            finished = [sink.finish() for sink in sinks]
            for warning in dict.fromkeys(warning for facts in finished for warning in facts.warnings):
                progress.warn(warning)
            sealed = [
                out.seal(manifest_of(model, plan, facts))
                for plan, facts, out in zip(plans, finished, outputs, strict=True)
            ]
        except OSError as error:
            raise ExportError(
                f"{error.filename or plans[0].out}: {error.strerror}",
                "nothing was left behind; free some disk space and run again",
            ) from error
        return [Export(out.swap(), manifest) for out, manifest in zip(outputs, sealed, strict=True)]


def threads_for(requested: int | None) -> int:
    """Workers: as asked, or one per core up to eight, where the disk is the limit."""
    return requested or min(8, cores())


def _open_sinks(
    model: ExportModel, plans: Sequence[Plan], outputs: Sequence[StagedDir], stack: ExitStack
) -> list[Sink]:
    """Every sink, or every reason why not."""
    sinks: list[Sink] = []
    refusals: list[Lora2ServeError] = []
    for plan, out in zip(plans, outputs, strict=True):
        try:
            sink = plan.exporter(model, out, plan.options)
        except Lora2ServeError as error:
            refusals.append(error)
            continue
        except OSError as error:
            refusals.append(
                ExportError(f"{plan.out}: {error.strerror}", "free the disk, or choose another directory with -o")
            )
            continue
        stack.callback(sink.close)
        sinks.append(sink)
    if refusals:
        message = "\n".join(f"{refusal.message}" for refusal in refusals)
        raise ExportError(message, next((refusal.hint for refusal in refusals if refusal.hint), ""))
    return sinks


def feed(
    model: ExportModel, sinks: Sequence[Sink], progress: Progress, threads: int,
    part: Sequence[TensorSpec] | None = None, label: str = "export",
) -> None:  # fmt: skip
    """Read each block once and hand it to each sink that wants it, in several threads; of a ``part`` of the tensors."""
    import torch

    if own_process.is_ours():
        malloc.keep_freed_memory()
    tensors = model.source.specs() if part is None else part
    specs = [spec for spec in tensors if any(spec.name in sink.wanted for sink in sinks)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool is the parallelism: BLAS threads inside it would fight over the same cores
    try:
        with progress.track(label, sum(spec.numel for spec in specs)) as advance:

            def fold(spec: TensorSpec, rows: slice) -> None:
                block = model.source.read(spec.name, rows)
                for sink in sinks:
                    if spec.name in sink.wanted:
                        sink.write(spec, rows, block)
                advance(max(1, (rows.stop - rows.start) * spec.row_numel))

            _run(((spec, rows) for spec in specs for rows in _blocks(spec, sinks)), fold, threads)
    finally:
        torch.set_num_threads(before)


def _run(jobs: Iterator[tuple[TensorSpec, slice]], work: Callable[[TensorSpec, slice], None], threads: int) -> None:
    """Do the jobs in order, each by the next free thread; the first error, or Ctrl-C, ends it."""
    lock, stop = Lock(), Event()

    def worker() -> None:
        while not stop.is_set():
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            work(*job)

    with ThreadPoolExecutor(threads, thread_name_prefix="fold") as pool:
        try:
            running = [pool.submit(worker) for _ in range(threads)]
            for done in as_completed(running):
                done.result()
        finally:
            stop.set()


def _blocks(spec: TensorSpec, sinks: Sequence[Sink]) -> Iterator[slice]:
    """Row blocks of one tensor, each as large as the most demanding sink needs and no larger than it must be."""
    return row_blocks(spec, lcm(*(max(1, sink.wanted[spec.name]) for sink in sinks if spec.name in sink.wanted)))


def manifest_of(model: ExportModel, plan: Plan, facts: ExportFacts) -> Manifest:
    """The manifest, apart from the files."""
    lineage = model.lineage
    return Manifest(
        target=plan.target,
        quant=plan.quant,
        name=model.name,
        run=lineage.run,
        base=lineage.base,
        merge_base=lineage.merge_base,
        base_mismatch=lineage.base_mismatch,
        adapter=lineage.adapter,
        adapters=lineage.adapters,
        dtype=facts.dtype,
        architecture=facts.architecture,
        file=facts.file,
        projector=facts.projector,
        match_reference=facts.match_reference,
        tokens_proven=facts.tokens_proven,
        template=facts.template,
        from_model=facts.from_model,
        rank=facts.rank,
        served_base=facts.served_base,
        options={**recorded_options(plan.options), **({"dtype": model.dtype} if model.dtype else {})},
        use=facts.use,
        unknown=facts.details,
        survival={name: round(share, 6) for name, share in model.source.survival.shares().items()},
        versions={**versions(), CPU: cpu_kernels()},
    )


def cpu_kernels() -> str:
    """What torch computes with on this processor, such as ``AVX2``."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def dry_run(model: ExportModel, plans: Sequence[Plan]) -> ExportPlan:
    """What ``export`` would write; raises every refusal, and reads no weight."""
    with ExitStack() as stack:
        outputs = [DryRunDir(plan.out) for plan in plans]
        for out in outputs:
            stack.callback(out.discard)
        sinks = _open_sinks(model, plans, outputs, stack)
        specs = [spec for spec in model.source.specs() if any(spec.name in sink.wanted for sink in sinks)]
        firsts = [(spec, next(_blocks(spec, sinks))) for spec in specs if spec.rows]
        largest = max(((rows.stop - rows.start) * spec.row_numel for spec, rows in firsts), default=0)
        folder = next(parent for parent in plans[0].out.absolute().parents if parent.exists())
        planned = {
            str(plan.out): PlannedOutput(len(out.sizes), sum(out.sizes.values()))
            for plan, out in zip(plans, outputs, strict=True)
        }
        return ExportPlan(
            tensors=len(model.source.specs()),
            changed=len(model.source.changed()),
            outputs=planned,
            disk=sum(sum(out.sizes.values()) + sum(out.passing.values()) for out in outputs),
            free=shutil.disk_usage(folder).free,
            memory=threads_for(None) * largest * BYTES_IN_FLIGHT + len(outputs) * staging.UNHASHED_BYTES + AROUND,
        )
