"""What a comparison says, in sentences."""

from moe_replay.reports.comparison import Cell, GroupComparison, MethodComparison, Row
from moe_replay.reports.measures import shown

_HEADLINES = ("mismatch KL(k3)", "iterations with an extreme token", "agreement at mini-step", "reward", "avg@n")
_ENOUGH_SEEDS = 5
_SPREAD = ("median", "p90", "last")
"""Other views of a measure, which the table has."""


def summary_of(comparison: MethodComparison) -> list[tuple[str, list[str]]]:
    """For each group its heading and its sentences."""
    return [(_heading(group), _sentences(group)) for group in comparison.groups]


def _heading(group: GroupComparison) -> str:
    seeds = sorted({len(method.runs) for method in group.methods})
    told = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    plural = "" if seeds == [1] else "s"
    number = len(group.iterations)
    return f"κ = {group.mini_steps}: {told} seed{plural} a method, {number} iteration{'' if number == 1 else 's'} each"


def _sentences(group: GroupComparison) -> list[str]:
    sentences = []
    if len(group.methods) > 1:
        headlines = [row for row in group.rows if _is_headline(row)]
        sentences += [_sentence(row, group.baseline) for row in headlines]
    sentences += [
        f"{cell.method} had no predictor in use in these iterations: its routes were those of plain replay."
        for row in group.rows
        if row.measure == "predictor: iterations served by one"
        for cell in row.cells
        if cell.number is not None and cell.number.value == 0
    ]
    gains = [row for row in group.rows if row.measure == "predictor: agreement gained"]
    sentences += [_gain(row) for row in gains]
    fewest = min(len(method.runs) for method in group.methods)
    if fewest < _ENOUGH_SEEDS and len(group.methods) > 1:
        sentences.append(
            f"With {fewest} seed{'' if fewest == 1 else 's'} a method intervals are too narrow: of differences that "
            "are nothing but noise, more than 1 in 20 are called lower or higher."
        )
    if all(len(method.runs) == 1 for method in group.methods):
        sentences.append(
            "With one seed a method, intervals tell how iterations scatter and nothing of how seeds would: a "
            "difference may be this seed's alone."
        )
    return sentences


def _is_headline(row: Row) -> bool:
    # The first mini-step says little: under R2 its agreement is 1 by definition.
    is_first = " 1 of " in row.measure and not row.measure.endswith("1 of 1")
    return row.measure.startswith(_HEADLINES) and not row.measure.endswith(_SPREAD) and not is_first


def _sentence(row: Row, baseline: str) -> str:
    """Which methods are lower, higher or not told apart, under one measure."""
    by_verdict: dict[str, list[str]] = {}
    for cell in row.cells:
        if cell.verdict is not None:
            by_verdict.setdefault(cell.verdict, []).append(_named(cell, row))
    told = [
        f"{verdict}: {', '.join(by_verdict[verdict])}"
        for verdict in ("lower", "higher", "within noise", "too few values")
        if verdict in by_verdict
    ]
    return f"{row.measure[0].upper()}{row.measure[1:]}, against {baseline}: {'; '.join(told) or 'not measured'}."


def _named(cell: Cell, row: Row) -> str:
    if cell.verdict not in ("lower", "higher") or cell.difference is None:
        return cell.method
    return f"{cell.method} ({shown(cell.difference.value, row.unit, signed=True)})"


def _gain(row: Row) -> str:
    told = [f"{cell.method} {shown(cell.number.value, row.unit)} ({cell.verdict})" for cell in row.cells if cell.number]
    return f"Agreement that the predictor gains on held-out tokens: {', '.join(told)}."
