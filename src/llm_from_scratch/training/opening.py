"""Opens a run: plans it, starts the machine and builds it; closes all of it in the reverse order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..config import Config
from ..machine import device as runtimes
from ..machine import processes
from ..machine.budget import Deadline
from ..machine.files import FolderLock
from ..machine.processes import distributed_env
from . import before_after, preferences
from .microbatch import after_shortage
from .pace import Pace
from .ranks import agreed
from .resume import resume_command
from .run import Run
from .setup import make_plan
from .signals import StopRequest


@contextlib.contextmanager
def open_run(config: Config, sources: dict[str, str] | None, command: str, deadline: Deadline | None) -> Iterator[Run]:
    training, lock = config.training, FolderLock(Path(config.training.out_dir))
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(lock.release)
        may_rename = distributed_env()[0] == 0 and not training.eval_only  # damaged checkpoints, while planning
        if may_rename and lock.path.parent.is_dir() and training.init_from in ("resume", "auto"):
            lock.acquire()
        plan = after_shortage(make_plan(config, sources))
        cleanup.callback(runtimes.stop)
        runtimes.start(plan.runtime, plan.config.system)
        cleanup.enter_context(processes.failures_named())
        plan = agreed(plan)
        stop = cleanup.enter_context(StopRequest(plan.runtime.world_size))
        run = Run(plan, stop, lock, command)
        run.pace = Pace(deadline, plan)
        if processes.watch is not None:
            processes.watch.follow(lambda: run.state.step, resume_command(run.config, command, plan.runtime.world_size))
        del plan  # it holds the loaded weights, which the run has copied
        cleanup.callback(run.close)
        preferences.add_reference(run)
        before_after.begin(run.plan, run.log, run.state.run_id, run.continued)
        with processes.failures_named():  # before the run is closed, which takes time
            yield run
