"""The gauge by which others see how a trial stands: the gateway sets it, an AnalysisTemplate of Argo reads it."""

from __future__ import annotations

VERDICT = "lora2serve_trial_verdict"  # labels: name
PROMOTE, UNDECIDED, WORSE = 1, 0, -1  # its values; WORSE is rollback and stop-shadow
