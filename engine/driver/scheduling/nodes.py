"""Machines: how many workers they have room for, and which of them are avoided because everything fails there."""

from __future__ import annotations

from engine.driver.scheduling.messages import Action, AvoidNodes, CapacityChanged, StopWorker
from engine.driver.scheduling.state import State, WorkerState, remove_worker


def start_of(worker: int) -> int:
    """What failed if a worker did not start, or died without a shard: a number that no shard has."""
    return -1 - worker


def follow_capacity(state: State, event: CapacityChanged, actions: list[Action]) -> State:
    """Let the number of workers follow the room that there is; workers for which there is none are stopped."""
    nodes = frozenset(event.nodes)
    faults = {node: failed for node, failed in state.node_faults.items() if node in nodes}
    state = state._replace(max_workers=max(1, event.num_workers), nodes=event.nodes, node_faults=faults)
    if avoided := state.avoided:
        # Where nothing else is left, they are tried again.
        state = state._replace(avoided=avoided & nodes if nodes - avoided else frozenset())
        if state.avoided != avoided:
            actions.append(AvoidNodes(tuple(sorted(state.avoided))))
    return stop_unplaced(state, len(state.workers) - state.max_workers, actions)


def stop_unplaced(state: State, num: int, actions: list[Action]) -> State:
    """Stop so many of the workers that wait for a machine, those that were started last first."""
    if num > 0:
        waiting = sorted(number for number, worker in state.workers.items() if not worker.is_placed)
        for number in reversed(waiting[-num:]):
            actions.append(StopWorker(number))
            state = remove_worker(state, number, state.workers[number])
    return state


def note_node_fault(state: State, worker: WorkerState, cause: int, message: str, actions: list[Action]) -> State:
    """Count a fault of a worker on its machine, and avoid that after several in a row.

    A shard counts once, since its faults may be its own. The last machine is never avoided.

    Args:
        cause: the shard, or `start_of` the worker.
    """
    if not (worker.node and state.nodes):
        return state
    failed = state.node_faults.get(worker.node, frozenset()) | {cause}
    state = state._replace(node_faults={**state.node_faults, worker.node: failed})
    others = set(state.nodes) - state.avoided - {worker.node}
    if len(failed) < state.limits.max_node_faults or worker.node in state.avoided or not others:
        return state
    avoided = state.avoided | {worker.node}
    text = f"{len(failed)} faults in a row on machine {worker.node}, the last one: {message}"
    actions.append(AvoidNodes(tuple(sorted(avoided)), text))
    # The machine was at fault, so others get as many tries as if nothing had failed.
    return state._replace(avoided=avoided, consecutive_start_faults=0)


def note_node_success(state: State, node: str, actions: list[Action]) -> State:
    """A shard was finished on a machine: what failed there before is forgotten."""
    if node not in state.node_faults:
        return state
    faults = {other: failed for other, failed in state.node_faults.items() if other != node}
    if node in state.avoided:
        state = state._replace(avoided=state.avoided - {node})
        actions.append(AvoidNodes(tuple(sorted(state.avoided))))
    return state._replace(node_faults=faults)
