"""Tasks in threads and on a cluster of two processes: all results, also where a worker is killed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sparsecc.errors import MissingExtraError, RuntimeMissingError, UsageError
from sparsecc.exec import Threads, open_executor


@pytest.fixture(scope="module")
def work():
    """The module of tasks, found by this process and by workers that it starts."""
    folder = str(Path(__file__).parent)
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        import slow_work

        yield slow_work
        del sys.modules["slow_work"]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_every_task_with_its_result(work, threads):
    with open_executor(threads=threads) as executor:
        found = dict(executor.map(work.squared, range(20)))
    assert found == {number: number**2 for number in range(20)}
    assert list(Threads(threads).map(work.squared, [])) == []


def test_results_come_as_they_are_ready(work):
    tasks = [(0.5, 0), (0.0, 1), (0.0, 2)]
    assert next(iter(Threads(3).map(work.waited, tasks))) != (tasks[0], 0)
    assert [result for _, result in Threads(1).map(work.waited, tasks)] == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_tasks_are_made_when_they_are_needed(work, threads):
    made = []

    def tasks():
        for number in range(50):
            made.append(number)
            yield number

    running = Threads(threads).map(work.squared, tasks())
    next(running)
    assert len(made) <= threads + 1
    running.close()
    assert threading.active_count() < 10


@pytest.mark.parametrize("threads", [1, 2])
def test_the_error_of_a_task_comes_through(work, threads):
    with pytest.raises(UsageError, match="three is too many"):
        list(Threads(threads).map(work.refused, range(10)))


def test_texts_that_name_no_executor():
    for text in ("ray://here:1", "dask://", "dask://host", "threads:2", "dask://a b:1"):
        with pytest.raises(UsageError, match="give threads or dask://HOST:PORT"):
            open_executor(text)
    with pytest.raises(UsageError, match="at least one thread"):
        open_executor("threads", threads=0)


def test_threads_go_by_those_of_blas(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert open_executor().threads == 1
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert open_executor("threads").threads == os.cpu_count()
    assert open_executor(threads=3).threads == 3


def test_without_dask_the_pip_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsecc\[dask\]'") as caught:
        open_executor("dask://localhost:8786")
    assert caught.value.exit_code == 6


@pytest.fixture(scope="module")
def cluster(work):
    """A scheduler and two workers, each a process."""
    distributed = pytest.importorskip("distributed", reason="needs sparsecc[dask]")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as found:
        yield found


def address(cluster):
    return cluster.scheduler_address.replace("tcp://", "dask://")


@pytest.mark.filterwarnings("default")
def test_a_cluster_gives_every_task_with_its_result(work, cluster):
    with open_executor(address(cluster)) as executor:
        assert dict(executor.map(work.squared, range(30))) == {n: n**2 for n in range(30)}
        with pytest.raises(UsageError, match="three is too many"):
            list(executor.map(work.refused, range(10)))
        made = []

        def tasks():
            for number in range(50):
                made.append(number)
                yield number

        running = executor.map(work.squared, tasks())
        next(running)
        assert len(made) < 10
        running.close()


@pytest.mark.filterwarnings("default")
def test_a_cluster_that_drops_tasks_is_told(work, cluster):
    from distributed import Future

    with open_executor(address(cluster)) as executor:
        running = executor.map(work.waited, [(0.0, 0), *((1.0, number) for number in range(1, 9))])
        next(running)
        for key in list(executor._client.futures):
            Future(key, executor._client).cancel()
        with pytest.raises(RuntimeMissingError, match="is gone; what was finished is kept"):
            list(running)


@pytest.mark.filterwarnings("default")
def test_a_worker_that_is_killed_loses_nothing(work, cluster, tmp_path):
    tasks = [(str(tmp_path), number) for number in range(16)]
    with open_executor(address(cluster)) as executor:
        running = executor.map(work.noted, tasks)
        found = [next(running), next(running)]
        pids = {int(path.name.split("-")[1]) for path in tmp_path.iterdir()}
        assert len(pids) == 2
        os.kill(max(pids), signal.SIGKILL)
        found += running
    assert sorted(result for _, result in found) == list(range(16))
    assert all(task[1] == result for task, result in found)


@pytest.mark.filterwarnings("default")
def test_what_ends_every_worker_and_absent_clusters_are_told(work, cluster):
    with open_executor(address(cluster)) as executor, pytest.raises(RuntimeMissingError, match="more memory"):
        list(executor.map(work.ended, [0]))
    cluster.scale(0)
    deadline = time.monotonic() + 30
    while cluster.scheduler.workers and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(RuntimeMissingError, match="has no workers"):
        open_executor(address(cluster))


@pytest.mark.filterwarnings("default")
def test_a_scheduler_that_is_not_there(monkeypatch):
    pytest.importorskip("distributed", reason="needs sparsecc[dask]")
    monkeypatch.setattr("sparsecc.exec.dask_cluster._PATIENCE", 0.5)
    with pytest.raises(RuntimeMissingError, match="no Dask scheduler answers at tcp://localhost:1"):
        open_executor("dask://localhost:1")
