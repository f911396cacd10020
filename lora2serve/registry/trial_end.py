"""The end of a trial: an alias moves only if it is still what was tested, so that of several that decide one acts."""

from __future__ import annotations

from collections.abc import Mapping

from lora2serve.registry import alias_moves
from lora2serve.registry.ledger import Ledger
from lora2serve.registry.promotion_gates import GateRecipe
from lora2serve.registry.trial_decision import TrialDecision
from lora2serve.registry.version_reference import VersionReference
from lora2serve.registry.version_rows import aliases_of


def end_trial(
    ledger: Ledger, name: str, outcome: TrialDecision, champion: tuple[str, int], challenger: tuple[str, int],
    gates: GateRecipe, why: str,
) -> bool:  # fmt: skip
    """Both are (alias, number of the version that was tested). Whether it was done: False where an alias has moved.

    promote: the champion's alias points to the challenger's version, if its gates are met (GateNotMet). Else the
    challenger's alias points to the champion's version, which ends the trial.
    """
    pointed: Mapping[str, int] = aliases_of(ledger.connection, name)
    if pointed.get(champion[0]) != champion[1] or pointed.get(challenger[0]) != challenger[1]:
        return False
    if outcome == "promote":
        reference = VersionReference(name, challenger[1])
        alias_moves.promote(ledger, reference, champion[0], gates, force=False, why=why)
    else:
        ledger.move(outcome, name, challenger[0], champion[1], why=why)
    return True
