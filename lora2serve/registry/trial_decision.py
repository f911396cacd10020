"""What live traffic may decide between two versions."""

from __future__ import annotations

from typing import Literal

TrialDecision = Literal["stop-shadow", "rollback", "promote"]
