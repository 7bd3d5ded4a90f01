"""Tasks of a study as tasks of Ray.

Ray hands functions and results over as pickles: whoever reaches its ports can run code on its machines. Its
cluster is started and guarded by whoever owns it; this file only uses one.
"""

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.errors import BackendMissing, UsageError
from preftune.study.tasks import EndedTask, Task, perform

_INSTALL = "pip install 'preftune[cluster]'"


class Ray:
    """The cluster that RAY_ADDRESS names or that runs on this machine; without one Ray starts its own."""

    def __init__(self, resources: Mapping[str, Any]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send statistics to its makers
        try:
            import ray  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError as error:
            raise BackendMissing("studies on Ray need ray", f"install it: {_INSTALL}") from error
        self._ray, before = ray, signal.getsignal(signal.SIGTERM)
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError) as error:
                hint = "see RAY_ADDRESS, and `ray status` on this machine"
                raise BackendMissing(f"no Ray can be reached: {error}"[:600], hint) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray sets its own
        try:
            self._perform = ray.remote(max_retries=0, **resources)(perform)
        except (TypeError, ValueError) as error:
            hint = "they are Ray's, such as num_cpus=4 num_gpus=1"
            raise UsageError(f"--resource: {error}", hint) from error
        self._refs: dict[Any, Task] = {}

    def start(self, task: Task) -> None:
        self._refs[self._perform.options(name=task.name).remote(task)] = task

    def ended_tasks(self) -> Sequence[EndedTask]:
        if not self._refs:
            return []
        over, _ = self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        return [self._outcome(self._refs.pop(ref), ref) for ref in over]

    def stop(self) -> None:
        for ref in self._refs:
            self._ray.cancel(ref, force=True)

    def _outcome(self, task: Task, ref: Any) -> EndedTask:
        """A task that raised is a fault that comes again; other errors of Ray say that a worker is gone."""
        try:
            code, complaint = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            return EndedTask(task=task, code=70, complaint=str(error).strip().rpartition("\n")[2][:300])
        except self._ray.exceptions.RayError as error:
            return EndedTask(task=task, code=None, complaint=str(error).partition("\n")[0][:300])
        return EndedTask(task=task, code=code, complaint=complaint)
