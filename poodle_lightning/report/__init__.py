"""One self-contained HTML page from a run folder: what was trained, what the method saw, what it learned."""

from poodle_lightning.report.files import RunFiles
from poodle_lightning.report.material import (
    AttentionMaps,
    FeatureMaps,
    LabelReadout,
    Material,
    gather,
    read_labels,
)
from poodle_lightning.report.sections import write_report

__all__ = [
    "AttentionMaps",
    "FeatureMaps",
    "LabelReadout",
    "Material",
    "RunFiles",
    "gather",
    "read_labels",
    "write_report",
]
