"""Tasks of a study as jobs of Slurm, by submitit.

Function, arguments and result of a job travel as pickles in `folder`, which is shared storage: whoever may
write there can run code as whoever runs the study. That is submitit's way; this file reads what it gives.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.errors import BackendMissing, UsageError
from preftune.study.tasks import EndedTask, Task, perform

_MINUTES = 720  # a job's limit unless it is set; Slurm warns 90 s before, and the task saves
_LOOKS = 20  # of half a second, between questions to Slurm
_INSTALL = "pip install 'preftune[cluster]'"


class Slurm:
    """`cluster`: "slurm", or "local": submitit's own processes on this machine, to rehearse."""

    def __init__(self, folder: Path, resources: Mapping[str, Any], cluster: str = "slurm") -> None:
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # the one that preftune takes as a warning
        try:
            import submitit  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError as error:
            raise BackendMissing("studies on Slurm need submitit", f"install it: {_INSTALL}") from error
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        except RuntimeError as error:  # no srun
            hint = "run the study where jobs are submitted from, or leave --on out"
            raise BackendMissing(f"Slurm is not here: {error}", hint) from error
        try:
            self._executor.update_parameters(**{"timeout_min": _MINUTES, **resources})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            hint = "they are submitit's, such as slurm_partition=gpu timeout_min=240 gpus_per_node=1"
            raise UsageError(f"--resource: {error}", hint) from error
        self._asks, self._looks = cluster == "slurm", 0
        self._jobs: dict[Task, Any] = {}
        self._missed: set[str] = set()

    def start(self, task: Task) -> None:
        self._executor.update_parameters(name="preftune-" + task.name.replace(", ", "-").replace(" ", "-"))
        try:
            self._jobs[task] = self._executor.submit(perform, task)
        except Exception as error:  # submitit has several, none of them documented
            hint = "sbatch's own words are above; check --resource"
            raise BackendMissing(f"Slurm does not take {task.name}: {error}"[:600], hint) from error

    def ended_tasks(self) -> Sequence[EndedTask]:
        gone = self._gone()
        over = {
            t: job for t, job in self._jobs.items() if job.paths.result_pickle.exists() or job.job_id in gone
        }
        for task in over:
            del self._jobs[task]
        return [_outcome(task, job) for task, job in over.items()]

    def stop(self) -> None:
        for job in self._jobs.values():
            job.cancel(check=False)

    def _gone(self) -> set[str]:
        """Ids of jobs that run no more. Of Slurm twice in a row: a result may come late over the network."""
        if not self._asks:
            return {job.job_id for job in self._jobs.values() if job.done()}
        self._looks += 1
        if self._looks % _LOOKS:
            return set()
        queue = subprocess.run(["squeue", "--me", "-h", "-o", "%i"], capture_output=True, text=True)  # noqa: S607
        if queue.returncode:  # the controller is down; it will be back
            return set()
        missing = {job.job_id for job in self._jobs.values()} - set(queue.stdout.split())
        gone, self._missed = missing & self._missed, missing
        return gone


def _outcome(task: Task, job: Any) -> EndedTask:
    """Without a result the machine is gone; with an error in its place Slurm ended the job at its limit."""
    if not job.paths.result_pickle.exists():
        return EndedTask(task=task, code=None)
    error = job.exception()
    if error is not None:
        return EndedTask(task=task, code=None, complaint=str(error).strip().rpartition("\n")[2][:300])
    code, complaint = job.result()
    return EndedTask(task=task, code=code, complaint=complaint)
