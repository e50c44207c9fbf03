"""Which of a bank's traces a method uses."""

from __future__ import annotations

import math

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import SideBank
from bvpo_stats.gradients.options import MarginalMethod
from bvpo_stats.records import TraceRecord


def select_traces(bank: SideBank, method: MarginalMethod, most: int | None) -> tuple[TraceRecord, ...]:
    """The traces of a side that a method uses.

    ``posterior`` takes the pair's own trace, same-answer draws and chain states, in this order. Where the pair was
    sampled at a temperature T other than 1, the first two are draws of q_T(r | x, y) and the chain's are draws of
    pi_ref(r | x, y); normalisers differ, so the larger group is used alone. ``multilevel`` needs independent draws of
    one law: own and same-answer traces, or prior ones where there are more.

    Args:
        bank: The side's traces.
        method: The method.
        most: K; None for all.

    Raises:
        UserError: The bank lacks what the method needs.
    """
    # Of an unknown temperature the law of the pair's own trace is unknown too.
    independent = () if bank.own.temperature is None else (bank.own, *bank.same_answer)
    where = f"prompt {bank.own.prompt_id} ({bank.own.side})"
    if method == "prior" or method == "anchored":
        if not bank.prior:
            raise UserError(
                f"The trace bank has no prior traces for {where}, which `method={method!r}` needs; make the bank with "
                "`sources=('anchor', 'prior')`, or choose another method."
            )
        if method == "prior":
            return bank.prior[:most]
        if math.isnan(bank.own.trace_logp):
            raise UserError(f"The trace bank has no anchor for {where}; make it with `sources=('anchor', 'prior')`.")
        return (bank.own, *bank.prior)[:most]
    if method == "multilevel":
        return (independent if len(independent) >= len(bank.prior) else bank.prior)[:most]
    if method == "jackknife" and len(bank.prior) > len(independent) + len(bank.chain):
        return bank.prior[:most]
    if bank.own.temperature == 1.0:
        return (*independent, *bank.chain)[:most]
    return (bank.chain if len(bank.chain) > len(independent) else independent)[:most]
