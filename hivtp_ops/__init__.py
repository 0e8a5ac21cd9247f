"""The HIVTP rule: the spec, its numpy definition, and the forms that are tested against it."""

from hivtp_ops.errors import HivtpError, ScoreError, SpecError
from hivtp_ops.selection import Selection, select
from hivtp_ops.spec import PRESETS, PruningSpec

__all__ = ["PruningSpec", "PRESETS", "Selection", "select", "HivtpError", "SpecError", "ScoreError"]
