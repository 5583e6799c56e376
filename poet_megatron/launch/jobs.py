"""The jobs of a request, in the order of their dependencies, and their sbatch commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from poet_megatron.launch.sweep import Point

SCRIPTS = Path("launch") / "slurm"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text that becomes the training data; all paths are absolute."""

    inputs: tuple[str, ...]
    valid_inputs: tuple[str, ...]
    """Files of the validation split; empty: a share of `inputs`."""
    tokenizer: str
    """Its file; empty: one of `vocab_size` tokens is trained."""
    vocab_size: int
    tasks: int
    """Tasks of the array that tokenizes `inputs`."""
    valid_tasks: int = 0
    """Tasks of the one that tokenizes `valid_inputs`."""
    valid_fraction: float | None
    output: Path
    """Folder that training opens."""

    @property
    def work(self) -> Path:
        """Folder of what comes in between: the trained tokenizer and the parts."""
        return self.output.with_name(self.output.name + ".work")

    @property
    def tokenizer_path(self) -> str:
        """The tokenizer's file, given or to be made."""
        return self.tokenizer or str(self.work / "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be submitted."""

    root: Path
    """Clone that holds launch/slurm; the jobs run there."""
    run_dir: Path
    folder: Path
    """Launch folder: recipe.yaml, points.txt, logs."""
    nodes: tuple[int, int]
    """Least and most nodes."""
    gpus_per_node: int
    time: str
    data_time: str
    """Time limit of jobs without GPUs."""
    options: tuple[str, ...] = ()
    """Options of sbatch for every job."""
    gpu_options: tuple[str, ...] = ()
    """Those of jobs with GPUs alone."""
    cpu_options: tuple[str, ...] = ()
    """Those of jobs without."""
    text: Text | None = None
    points: tuple[Point, ...] = ()
    """Of a sweep; empty: a single run."""
    export: bool = False


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    name: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Names of the jobs that it waits for."""
    condition: str = "afterok"

    @property
    def script(self) -> str:
        """Its script, relative to the clone."""
        return str(SCRIPTS / f"{self.name.removesuffix('-valid')}.sbatch")

    def words(self, jobs: Mapping[str, object]) -> list[str]:
        """Words after `sbatch`; `jobs` has the numbers of those submitted before. It does not wait for others than these."""
        dependency = []
        if numbers := [str(jobs[name]) for name in self.after if name in jobs]:
            dependency = [f"--dependency={self.condition}:{':'.join(numbers)}", "--kill-on-invalid-dep=yes"]
        return [*dependency, *self.options, self.script, *self.arguments]


def plan_jobs(request: Request) -> list[Job]:
    """Every job of the request; one comes after those that it depends on."""
    jobs = _text_jobs(request, request.text) if request.text else []
    last = tuple(job.name for job in jobs[-1:])
    if request.points:
        return [*jobs, _sweep(request, last), _summary(request)]
    jobs.append(_pretrain(request, last))
    if request.export:
        jobs.append(Job("export", _options(request, "export", gpus=True), (str(request.run_dir),), after=("pretrain",)))
    return jobs


def shell_line(job: Job) -> str:
    """The submission as a line for the shell, which keeps the job's number in a variable named after it."""
    name = _variable(job.name)
    words = job.words({other: f"${{{_variable(other)}}}" for other in job.after})
    shown = [word if word.startswith("--dependency=") else shlex.quote(word) for word in words]
    return f"{name}=$(sbatch --parsable {' '.join(shown)})"


def log_path(job: Job, request: Request, number: object) -> Path:
    """The job's log; the tasks of an array have one each."""
    return request.folder / (f"{job.name}-{number}_*.log" if is_array(job) else f"{job.name}-{number}.log")


def is_array(job: Job) -> bool:
    """Whether the job is an array of tasks."""
    return any(option.startswith("--array=") for option in job.options)


def _options(request: Request, name: str, *own: str, gpus: bool) -> tuple[str, ...]:
    array = any(option.startswith("--array=") for option in own)
    log = request.folder / f"{name}-{'%A_%a' if array else '%j'}.log"
    kind = request.gpu_options if gpus else request.cpu_options
    limit = request.time if gpus else request.data_time
    label = f"--job-name={name}-{request.run_dir.name}"  # squeue shows eight characters
    return (label, f"--chdir={request.root}", f"--output={log}", f"--time={limit}", *request.options, *kind, *own)


def _text_jobs(request: Request, text: Text) -> list[Job]:
    jobs = []
    if not text.tokenizer:
        words = ("--input", *text.inputs, "--vocab-size", str(text.vocab_size), "--output", text.tokenizer_path)
        jobs.append(Job("tokenizer", _options(request, "tokenizer", gpus=False), words))
    first = tuple(job.name for job in jobs)
    fraction = "0" if text.valid_inputs else "" if text.valid_fraction is None else repr(text.valid_fraction)
    arrays = [_tokenize(request, text, "tokenize", text.inputs, text.tasks, fraction, first)]
    if text.valid_inputs:
        arrays.append(_tokenize(request, text, "tokenize-valid", text.valid_inputs, text.valid_tasks, "1", first))
    parts = [_parts(text, job.name) for job in arrays]
    # What is in the folder is no complete data (launch.check), so that it may go.
    words = ("--parts", *parts, "--output", str(text.output), "--tokenizer", text.tokenizer_path, "--force")
    return [*jobs, *arrays, Job("merge", _options(request, "merge", gpus=False), words, after=tuple(job.name for job in arrays))]


def _tokenize(request: Request, text: Text, name: str, inputs: Sequence[str], tasks: int, fraction: str, after: tuple[str, ...]) -> Job:
    words = ["--input", *inputs, "--tokenizer", text.tokenizer_path, "--output", _parts(text, name)]
    if fraction:
        words += ["--valid-fraction", fraction]
    return Job(name, _options(request, name, f"--array=0-{tasks - 1}", gpus=False), tuple(words), after=after)


def _parts(text: Text, name: str) -> str:
    return str(text.work / name.replace("tokenize", "parts"))


def _sizes(request: Request) -> tuple[str, str]:
    least, most = request.nodes
    return f"--nodes={most if least == most else f'{least}-{most}'}", f"--gpus-per-node={request.gpus_per_node}"


def _settings(request: Request) -> tuple[str, ...]:
    least, most = request.nodes
    return (*(("--min-nodes", str(least)) if least != most else ()), "--config", str(request.folder / "recipe.yaml"))


def _pretrain(request: Request, after: tuple[str, ...]) -> Job:
    return Job("pretrain", _options(request, "pretrain", *_sizes(request), gpus=True), _settings(request), after=after)


def _sweep(request: Request, after: tuple[str, ...]) -> Job:
    own = (*_sizes(request), f"--array=0-{len(request.points) - 1}")
    words = (str(request.folder / "points.txt"), str(request.run_dir), *_settings(request))
    return Job("sweep", _options(request, "sweep", *own, gpus=True), words, after=after)


def _summary(request: Request) -> Job:
    words = (str(request.run_dir), "--output", str(request.run_dir / "summary"))
    return Job("summary", _options(request, "summary", gpus=False), words, after=("sweep",), condition="afterany")


def _variable(name: str) -> str:
    return name.replace("-", "_")
