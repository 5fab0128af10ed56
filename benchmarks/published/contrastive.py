"""Contrast pair by pair, as the formulas of PiCo (§2, Eq. 1) and VITO (§3.1) are read: loops over pairs.

``−log [ e^{q·k/τ} / (e^{q·k/τ} + Σ_n e^{q·n/τ}) ]`` of one pair at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from poodle_lightning.methods.moclr import MoCLR
from poodle_lightning.methods.pico import PiCo
from poodle_lightning.types import Clip


def pair_loss(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Of one query ``(D,)``, its positive ``(D,)`` and negatives ``(K, D)``."""
    query, positive, negatives = (normalize(x, dim=-1) for x in (query, positive, negatives))
    scores = torch.cat([(positive @ query)[None], negatives @ query]) / temperature
    return torch.logsumexp(scores, dim=0) - scores[0]


def pico(method: PiCo, clip: Clip) -> Tensor:
    """PiCo's loss, point by point: each is looked up, projected and contrasted by itself."""
    x_q, x_k, p_q, p_k, weight = method.views(clip)
    decoder, projector = method.target.module.decoder, method.target.module.projector
    with torch.no_grad():
        seen_q, seen_k = method.online.encoder(x_q), method.online.encoder(x_k)
        map_k = decoder(seen_k).last
    map_q = method.online.decoder(seen_q).last
    total, count = map_q.new_zeros(()), 0
    for row in range(len(p_k)):
        for point in range(p_k.shape[1]):
            if not weight[row, point]:
                continue
            image = row % len(p_q)
            query = method.online.projector(_cell(map_q[image], p_q[image, point]))
            with torch.no_grad():
                key = projector(_cell(map_k[row], p_k[row, point]))
            total = total + pair_loss(query.flatten(), key.flatten(), method.queue.rows, method.temperature)
            count += 1
    return total / max(count, 1)


def _cell(maps: Tensor, point: Tensor) -> Tensor:
    """The cell of ``maps (C, h, w)`` in which a point in extent coordinates lies, ``(1, C, 1, 1)``."""
    height, width = maps.shape[-2:]
    x = min(max(int((point[0] + 1) / 2 * width), 0), width - 1)
    y = min(max(int((point[1] + 1) / 2 * height), 0), height - 1)
    return maps[None, :, y : y + 1, x : x + 1]


def moclr(method: MoCLR, clip: Clip) -> Tensor:
    """MoCLR's and VITO's loss: each view of each clip by itself, pair by pair."""
    views = method.views(clip)
    online = [method.online.pooled(view) for view in views]
    with torch.no_grad():
        target = [method.target.module.pooled(view) for view in views]
    clips, total = len(clip), online[0].new_zeros(())
    for i, z in enumerate(online):
        for j, t in enumerate(target):
            for b in range(clips if i != j else 0):
                others = [side[n] for side in target for n in range(clips) if n != b]
                total = total + pair_loss(z[b], t[b], torch.stack(others), method.temperature)
    return total / clips
