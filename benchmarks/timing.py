"""Times of several actions in one process, taken in turn, so that whatever else the machine does meets them alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from machine import load, processor

from zsq.runtime.cuda_graphs import WARM_UP
from zsq.runtime.memory import kept_memory

Times = Mapping[str, list[float]]
"""Seconds by action, one value a round."""


def interleaved(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Call every action once a round and return its times; on a GPU each call is waited for, before and after."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    with kept_memory():  # as training does
        for _ in range(warm_up + (WARM_UP if device.type == "cuda" else 0)):
            for action in actions.values():
                action()
        for _ in range(rounds):
            for name, action in actions.items():
                wait(device)
                start = time.perf_counter()
                action()
                wait(device)
                times[name].append(time.perf_counter() - start)
    return times


def recorded(actions: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return actions as zsq does its steps on a GPU: each a CUDA graph that is replayed; elsewhere as they are."""
    if device.type != "cuda":
        return dict(actions)
    found: dict[str, Callable[[], object]] = {}
    for name, action in actions.items():
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                action()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            action()
        found[name] = partial(_replay, graph, action)
    return found


def _replay(graph: torch.cuda.CUDAGraph, action: Callable[[], object]) -> None:
    """Replay what an action did; the action is held, since it holds what the kernels read."""
    del action
    graph.replay()


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times: Times, over: str, under: Iterable[str]) -> float:
    """Return the median over the rounds of one action's time over the sum of others'."""
    names = list(under)
    rounds = range(len(times[over]))
    return round(statistics.median(times[over][i] / sum(times[name][i] for name in names) for i in rounds), 3)


def milliseconds(times: Times) -> dict[str, float]:
    """Return each action's median."""
    return {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}


def hardware(device: torch.device) -> dict[str, object]:
    """Say where the times were taken."""
    card = {"card": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    threads = torch.get_num_threads()
    return {"processor": processor(), "load": load(), "device": device.type, "threads": threads, **card}
