"""How evenly a curation fills its classes: as plain data, and as a table to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from poodle_lightning.data.curation import Retrieved, Verdict
from poodle_lightning.data.titles import TitleClass


def balance(
    classes: Sequence[TitleClass],
    retrieved: Retrieved,
    verdicts: Sequence[Verdict],
    listed: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What was found of every class, and how evenly.

    Args:
        classes: that were looked for.
        retrieved: by their titles.
        verdicts: one per candidate.
        listed: videos in the table.
        settings: plain data, put in as it is.

    Returns:
        ``videos``: ``listed``, ``retrieved`` and what became of those, by outcome. ``spread``: over classes,
        the videos kept of each; ``effective_classes`` is the exponential of the entropy of their shares: so
        many classes of equal size are as mixed. ``classes``: per class, titles that name it (``titles``), how
        many of them were ``retrieved`` and how many of these ``kept``; a video of two classes counts in both.
    """
    kept = np.zeros(len(classes), np.int64)
    for verdict in verdicts:
        kept[list(verdict.classes)] += verdict.outcome == "kept"
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    shares = kept[kept > 0] / max(kept.sum(), 1)
    spread = {
        "smallest": int(kept.min()),
        "median": float(np.median(kept)),
        "largest": int(kept.max()),
        "without_video": int((kept == 0).sum()),
        "effective_classes": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
    }
    rows = [
        {"class": one.key, "name": one.names[0], "titles": titles, "retrieved": taken, "kept": int(count)}
        for one, titles, taken, count in zip(classes, retrieved.matched, retrieved.taken, kept, strict=True)
    ]
    videos = {"listed": listed, "retrieved": len(verdicts), **dict(sorted(outcomes.items()))}
    return {"settings": dict(settings), "videos": videos, "spread": spread, "classes": rows}


def markdown(found: Mapping[str, Any]) -> str:
    """The same as tables: outcomes, spread, and the classes, the fullest first."""
    videos, spread = found["videos"], found["spread"]
    retrieved = max(videos["retrieved"], 1)
    lines = ["# Curated videos", "", "| videos | | of those retrieved |", "|---|---|---|"]
    lines.append(f"| in the table | {videos['listed']:,} | |")
    for name, count in videos.items():
        if name != "listed":
            lines.append(f"| {name.replace('_', ' ')} | {count:,} | {100 * count / retrieved:.1f} % |")
    lines += ["", "| kept per class | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in spread.items()]
    lines += ["", "| class | name | titles | retrieved | kept |", "|---|---|---|---|---|"]
    for row in sorted(found["classes"], key=lambda row: (-row["kept"], -row["retrieved"])):
        name = row["name"].replace("|", r"\|")
        key = row["class"].replace("|", r"\|")
        lines.append(f"| {key} | {name} | {row['titles']:,} | {row['retrieved']:,} | {row['kept']:,} |")
    return "\n".join(lines) + "\n"
