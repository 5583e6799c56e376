"""What is checked before a job is queued. Each check returns what it found, or raises a UserError with the value, the bound and the fix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep import encoders
from data_prep.manifest import MANIFEST_NAME, Manifest
from data_prep.sources import FileSource, find_files
from poet_megatron.config.run import RunConfig
from poet_megatron.data.corpora import open_corpora
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError
from poet_megatron.launch.jobs import SCRIPTS, Text
from poet_megatron.launch.slurm import Partition, parse_duration
from poet_megatron.parallel.layout import check_layout, data_parallel_size, micro_batches

TRIED_NODES = 64
SHOWN_COUNTS = 12


@dataclass(frozen=True)
class Finding:
    """What a check found; `refused` if the job must not be queued."""

    name: str
    text: str
    refused: bool = False

    def line(self) -> str:
        """The finding as a line."""
        return f"{'REFUSED' if self.refused else 'ok':<8}{self.name:<10}{self.text}"


def run_checks(checks: Iterable[tuple[str, Callable[[], str]]]) -> list[Finding]:
    """Findings of all checks, whether they pass or not."""
    findings = []
    for name, check in checks:
        try:
            findings.append(Finding(name, check()))
        except (ValueError, FileNotFoundError) as error:
            findings.append(Finding(name, str(error), refused=True))
    return findings


def parse_nodes(text: str) -> tuple[int, int]:
    """Least and most nodes of `N` or `MIN-MAX`."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UserError(f"--nodes is {text}; give a number of at least 1, or MIN-MAX with MIN no larger than MAX, such as 2-4")
    return least, most


def find_root(scripts: Path | None, package: Path) -> Path:
    """The clone with launch/slurm: `scripts`, or the folder that holds the package."""
    root = (scripts or package.parent).resolve()
    if root.name == SCRIPTS.name and (root / "lib.sh").is_file():  # the folder of the scripts itself
        root = root.parents[1]
    if not (root / SCRIPTS / "lib.sh").is_file():
        raise UserError(
            f"{root} has no {SCRIPTS}: the scripts are in the clone, not in an installed package; "
            "name a clone with --scripts DIR, or run from one (pip install -e .)"
        )
    return root


def check_layouts(run: RunConfig, nodes: tuple[int, int], gpus: int) -> str:
    """Every number of nodes of the range must be possible, since Slurm may take any."""
    least, most = nodes
    for count in range(least, most + 1):
        try:
            check_layout(run, count * gpus)
        except UserError as error:
            works = [n for n in range(1, max(TRIED_NODES, most) + 1) if _fits(run, n * gpus)]
            shown = ", ".join(map(str, works[:SHOWN_COUNTS])) + (", ..." if len(works) > SHOWN_COUNTS else "")
            advice = f"numbers of nodes that work: {shown}" if works else f"no number of nodes up to {max(TRIED_NODES, most)} works"
            if works and least != most:
                advice += f" (all from {least} to {most} have to: Slurm may choose any)"
            raise UserError(f"{count} node{'s'[: count > 1]} x {gpus} GPUs: {error}; {advice}") from None
    parallel, world = run.parallel, most * gpus
    batch = f"{micro_batches(run, world)} micro-batch(es) of {run.train.micro_batch_size}"
    return (
        f"{world} GPUs = {parallel.tensor_parallel} x {parallel.pipeline_parallel} x {data_parallel_size(run, world)} "
        f"(tensor x pipeline x data parallel), {batch} per rank and step"
    )


def _fits(run: RunConfig, world: int) -> bool:
    try:
        check_layout(run, world)
    except UserError:
        return False
    return True


def check_cluster(partition: Partition, nodes: tuple[int, int], gpus: int, time: str) -> str:
    """The partition must have the nodes, the GPUs in each and the time."""
    name, (least, most) = partition.name, nodes
    best = max((node.gpus for node in partition.nodes), default=0)
    fitting = partition.with_gpus(gpus)
    elsewhere = "or name another partition with --partition"
    if not fitting:
        raise UserError(f"--gpus-per-node is {gpus}; nodes of partition {name} have at most {best} GPUs: ask for {best}, {elsewhere}")
    if most > len(fitting):
        raise UserError(
            f"--nodes is {most}; partition {name} has {len(fitting)} nodes with {gpus} GPUs: ask for at most {len(fitting)}, {elsewhere}"
        )
    if partition.max_nodes is not None and most > partition.max_nodes:
        raise UserError(f"--nodes is {most}; partition {name} allows {partition.max_nodes} per job: ask for fewer, {elsewhere}")
    seconds = parse_duration(time)
    if partition.max_seconds is not None and (seconds is None or seconds > partition.max_seconds):
        raise UserError(
            f"--time is {time}; partition {name} allows {format_duration(partition.max_seconds)}: ask for less (the job saves and "
            f"requeues itself before its time is up), {elsewhere}"
        )
    usable = sum(node.usable for node in fitting)
    limit = "none" if partition.max_seconds is None else format_duration(partition.max_seconds)
    waits = f"; the job waits until {least} are" if usable < least else ""
    return f"partition {name}: {len(fitting)} nodes with {gpus} GPUs, {usable} of them usable now{waits}; time limit {limit}"


def check_array(tasks: int, option: str, largest: int) -> str:
    """An array must not have more tasks than the cluster allows."""
    if tasks < 1:
        raise UserError(f"{option} is {tasks}; it must be at least 1")
    if tasks > largest:
        raise UserError(f"{option} makes an array of {tasks} tasks; this cluster allows {largest}: split it")
    return f"{option}: {tasks} tasks"


def check_data(run: RunConfig) -> str:
    """The data must be there, whole, and fit the model: what pretraining checks first."""
    if run.data.path and not run.data.blend and not (Path(run.data.path) / MANIFEST_NAME).exists():
        raise UserError(
            f"data.path {run.data.path} holds no prepared data: add --input FILES, which makes it first, or name another folder"
        )
    corpora = open_corpora(run.data, run.model.vocab_size, run.model.seq_length)
    evaluated = PreparedData.open(run.data.path, run.model.vocab_size, run.model.seq_length)
    tokens = sum(corpus.data.train_tokens for corpus in corpora)
    return f"{evaluated.path}: {tokens:,} training tokens, vocabulary of {evaluated.vocab_size:,}"


def check_text(run: RunConfig, text: Text) -> str:
    """The text must be there, and the vocabulary must be the model's."""
    files = _files(text)
    vocabulary, origin = text.vocab_size, "--vocab-size is"
    if text.tokenizer:
        vocabulary, origin = encoders.load(Path(text.tokenizer)).vocab_size, f"--tokenizer {text.tokenizer} has a vocabulary of"
    if vocabulary != run.model.vocab_size:
        raise UserError(f"{origin} {vocabulary}, but model.vocab_size is {run.model.vocab_size}: set model.vocab_size to {vocabulary}")
    megabytes = sum(file.bytes for file in files) / 1e6
    return f"{len(files)} files, {megabytes:,.1f} MB, become {text.output} with a vocabulary of {vocabulary:,}"


def made_already(text: Text) -> bool:
    """Whether data.path holds what the text becomes, as after an earlier submission; UserError if it holds something else."""
    if not (text.output / MANIFEST_NAME).exists():
        return False
    request = Manifest.load(text.output).request
    there = Counter((Path(source.name).name, source.bytes) for source in [*request.inputs, *request.valid_inputs])
    if there != Counter((file.path.name, file.bytes) for file in _files(text)):
        raise UserError(
            f"data.path {text.output} holds data made of other files: leave out --input to train on it, or set another data.path"
        )
    return True


def _files(text: Text) -> list[FileSource]:
    return [*find_files(text.inputs), *(find_files(text.valid_inputs) if text.valid_inputs else [])]


def format_duration(seconds: int) -> str:
    """D-HH:MM:SS."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02}:{minute:02}:{second:02}"
