"""Independent pieces of work, done here or by the workers of a Ray cluster.

A worker that is killed is started anew and does its piece again, so a piece may be done twice: it should leave the same
behind each time. Ray is found by its own variable `RAY_ADDRESS`; without that a cluster of this machine is started for
as long as the work lasts.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from smalti.core.errors import UserError, unknown_name

CLUSTERS = ("", "ray")
RESTARTS = 8
"""So often a worker may die before its work is given up."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_all(
    prepare: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    cluster: str = "",
    workers: int = 2,
    gpus: int = 0,
) -> Iterator[tuple[int, Result]]:
    """Does every piece of work, and gives its index and result when it is done; on a cluster in any order.

    Args:
        prepare: gives the function that does a piece; called once a worker, so what is dear belongs there.
        items: the pieces.
        cluster: empty for this process, or ray.
        workers: of the cluster, one processor each, from 1.
        gpus: that each worker takes for itself.

    Raises:
        UserError: the cluster is unknown or not installed, or a worker died again and again; what a piece raises.
    """
    if cluster not in CLUSTERS:
        raise unknown_name("cluster", cluster, CLUSTERS[1:])
    if workers < 1:
        raise UserError(f"got {workers} workers; give at least 1")
    if cluster == "ray":
        yield from _on_ray(prepare, items, workers, gpus)
        return
    work = prepare() if items else None
    for index, item in enumerate(items):
        assert work is not None
        yield index, work(item)


class _Worker:
    def __init__(self, prepare: Callable[[], Callable[[Any], Any]]):
        self.work = prepare()

    def do(self, item: Any) -> Any:
        return self.work(item)


def _on_ray(
    prepare: Callable[[], Callable[[Item], Result]], items: Sequence[Item], workers: int, gpus: int
) -> Iterator[tuple[int, Result]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's next default, of which it warns otherwise
    try:
        import ray  # type: ignore[reportMissingImports]
        from ray.exceptions import RayActorError, RayTaskError  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("a cluster needs ray, which is not installed; run: pip install 'smalti[cluster]'") from error
    is_ours = not ray.is_initialized()
    if is_ours and os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    elif is_ours:
        ray.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS)(_Worker)
        idle = [kind.remote(prepare) for _ in range(min(workers, len(items)))]
        waiting, running = deque(enumerate(items)), {}
        while waiting or running:
            while waiting and idle:
                worker = idle.pop()
                index, item = waiting.popleft()
                running[worker.do.remote(item)] = index, worker
            [done], _ = ray.wait(list(running), num_returns=1)
            index, worker = running.pop(done)
            idle.append(worker)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                raise UserError(
                    f"a worker cannot be started, or died {RESTARTS + 1} times; see why in Ray's log: {error}"
                ) from error
            yield index, result
    finally:
        if is_ours:
            ray.shutdown()
