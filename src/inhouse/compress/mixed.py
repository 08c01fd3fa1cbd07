"""Mixed precision: which format each group of matrices gets under a budget of stored bytes.

Cost is the group's bytes as stored, loss what was measured for it; the knapsack is exact (`allocate`). A local search
then swaps formats where a measured loss of the whole falls. Pure: knows formats and numbers, no model.

Sources: ModelOpt's auto_quantize and llama.cpp's target-size work for the shape of the problem; fusion groups as there.
"""

from collections.abc import Callable, Mapping, Sequence

from inhouse.compress.allocate import Choice, allocate
from inhouse.core.errors import UsageError
from inhouse.runtime.packed_stored import stored_nbytes

Group = tuple[str, ...]
Plan = dict[Group, str]  # group -> format


def group_bytes(group: Group, fmt: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a group's matrices as stored."""
    return sum(stored_nbytes(fmt, (shapes[name][0], shapes[name][1])) for name in group)


def share_out(
    groups: Sequence[Group],
    losses: Mapping[tuple[Group, str], float],
    shapes: Mapping[str, tuple[int, ...]],
    budget: int,
) -> Plan:
    """The plan of least total loss within `budget` bytes, of the formats that `losses` has for each group.

    Raises UsageError where even the cheapest formats exceed it.
    """
    options = {
        "+".join(group): [
            Choice(fmt, group_bytes(group, fmt, shapes), max(0.0, loss))
            for (of, fmt), loss in losses.items()
            if of == group
        ]
        for group in groups
    }
    found = allocate(options, budget)
    return {group: found["+".join(group)].label for group in groups}


def plan_bytes(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a whole plan as stored."""
    return sum(group_bytes(group, fmt, shapes) for group, fmt in plan.items())


def local_search(
    plan: Plan,
    losses: Mapping[tuple[Group, str], float],
    shapes: Mapping[str, tuple[int, ...]],
    budget: int,
    measure: Callable[[Plan], float],
    trials: int,
) -> tuple[Plan, float, int]:
    """Swaps (one group up alone, or one up and another down) while the measured loss falls.

    Swaps are tried in the order of what the separate losses promise, `trials` measurements at most; no plan ever
    exceeds the budget. Returns the plan, its measured loss, and how many swaps were taken.
    """
    if trials < 1:
        raise UsageError(f"{trials} trials search nothing", param="trials")
    best, taken, tried = measure(plan), 0, {_key(plan)}
    trials -= 1
    while trials > 0:
        swaps = [swap for swap in _swaps(plan, losses, shapes, budget) if _key(swap) not in tried]
        if not swaps:
            break
        for swap in swaps:
            tried.add(_key(swap))
            found = measure(swap)
            trials -= 1
            if found < best:
                plan, best, taken = swap, found, taken + 1
                break
            if trials <= 0:
                break
        else:
            break
    return plan, best, taken


def _key(plan: Plan) -> tuple[str, ...]:
    return tuple(plan.values())


def _swaps(
    plan: Plan, losses: Mapping[tuple[Group, str], float], shapes: Mapping[str, tuple[int, ...]], budget: int
) -> list[Plan]:
    """Plans one or two formats away that fit, the most promising first."""
    now = plan_bytes(plan, shapes)
    moves: list[tuple[Group, str, int, float]] = []
    for (group, fmt), loss in losses.items():
        if fmt != plan[group]:
            more = group_bytes(group, fmt, shapes) - group_bytes(group, plan[group], shapes)
            moves.append((group, fmt, more, loss - losses[group, plan[group]]))
    found: list[tuple[float, Plan]] = []
    for i, (group, fmt, more, gain) in enumerate(moves):
        if gain < 0 and now + more <= budget:
            found.append((gain, {**plan, group: fmt}))
        for other, cheaper, less, harm in moves[i + 1 :]:
            if other != group and now + more + less <= budget and (more > 0) != (less > 0):
                found.append((gain + harm, {**plan, group: fmt, other: cheaper}))
    return [swap for _, swap in sorted(found, key=lambda entry: (entry[0], _key(entry[1])))]
