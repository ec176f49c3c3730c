"""Calls from wherever applications make them: forked processes, threads, greenlets."""

import pytest

FORKS = """
import ctypes, multiprocessing, os, sys, threading, traceback
import numpy as np
from sutra_tasks import embed, embed_many
from sutra_tasks.engines.simulated_engine import vectors_of

def check(name, count):
    for n in range(count):
        text = f"{name} {n}"
        vector = embed.delay(text).get(timeout=20)
        assert np.allclose(vector, vectors_of([text], 384)[0], atol=1e-6), "another's vector"

def sockets():
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found

def child(name, fork=os.fork, beside_threads=False):
    pid = fork()
    if pid:
        return pid
    status = 1
    try:
        if fork is os.fork and not beside_threads:  # a thread may be about to connect
            assert not sockets(), "the parent's"
        at_once()
        check(name, 20)
        for result in before:
            assert result.get(timeout=20).shape == (384,)
        assert len(list(embed_many([name] * 100))) == 100
        embed.delay("unwanted").revoke()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)

def reap(pids):
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def at_once():
    # Threads make the first calls of a process together.
    barrier = threading.Barrier(8)
    failures = []

    def first(n):
        barrier.wait()
        try:
            check(f"first {n}", 5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=first, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures

before = []
reap([child("before the first call")])
before += [embed.delay("for all"), embed.delay("for all")]
check("parent", 3)
children = [child(f"child {n}") for n in range(2)]
children.append(child("told nothing, as by uWSGI", ctypes.PyDLL(None).fork))
check("parent beside them", 20)
assert before[0].get(timeout=20).shape == (384,)
reap(children)
check("parent after them", 3)

texts = [f"one of many {n}" for n in range(200)]
vectors = embed_many(texts, batch=10)
rows = [next(vectors) for _ in range(15)]
for goes_on in (False, True):
    pid = os.fork()
    if pid == 0:
        if goes_on:
            rows += vectors
            assert np.allclose(rows, vectors_of(texts, 384), atol=1e-6)
        vectors.close()
        os._exit(0)
    reap([pid])
rows += vectors
assert np.allclose(rows, vectors_of(texts, 384), atol=1e-6)

stop = threading.Event()
failures = []

def hammer(n):
    try:
        while not stop.is_set():
            check(f"thread {n}", 1)
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=hammer, args=(n,), daemon=True) for n in range(4)]
for thread in threads:
    thread.start()
for n in range(4):
    reap([child(f"beside threads {n}", beside_threads=True)])
stop.set()
for thread in threads:
    thread.join()
assert not failures, failures
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.starmap(check, [("pool", 5), ("pool", 5)])
print("all answered")
"""


@pytest.mark.usefixtures("fleet")
def test_all_calls_of_forked_processes_are_answered(run_python):
    assert "all answered" in run_python(FORKS)


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import os, sys, time
import gevent
from sutra_tasks import embed, embed_many

turns = 0

def count_turns():
    global turns
    while True:
        gevent.sleep(0.001)
        turns += 1

def call(n):
    return [embed.delay(f"{n} {i}").get(timeout=20).shape for i in range(5)]

counting = gevent.spawn(count_turns)
jobs = [gevent.spawn(call, n) for n in range(20)]
many = gevent.spawn(lambda: len(list(embed_many([str(n) for n in range(500)]))))
gevent.joinall([*jobs, many], raise_error=True)
assert all(job.value == [(384,)] * 5 for job in jobs)
assert many.value == 500
assert turns > 20, turns  # others run while greenlets wait
pid = os.fork()
if pid == 0:
    try:
        gevent.joinall([gevent.spawn(call, n) for n in range(5)], raise_error=True)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert call("parent") == [(384,)] * 5
print("all answered")
"""


@pytest.mark.usefixtures("fleet")
def test_greenlets_wait_beside_each_other_and_after_a_fork(run_python):
    assert "all answered" in run_python(GREENLETS)
