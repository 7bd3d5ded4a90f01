"""Tasks of a study as processes of this machine."""

import subprocess
from collections.abc import Sequence

from preftune.study.tasks import EndedTask, Task, begin, complaint, stop


class Here:
    """One process a task, which ends when this process does."""

    def __init__(self) -> None:
        self._running: dict[Task, subprocess.Popen[bytes]] = {}

    def start(self, task: Task) -> None:
        self._running[task] = begin(task)

    def ended_tasks(self) -> Sequence[EndedTask]:
        over = {t: code for t, process in self._running.items() if (code := process.poll()) is not None}
        for task in over:
            del self._running[task]
        return [EndedTask(task=task, code=code, complaint=complaint(task)) for task, code in over.items()]

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            stop(process)
