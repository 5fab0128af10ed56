import math

import pytest
import torch
from device_reads import DeviceReads
from lightly.loss import NTXentLoss
from side_by_side import in_two

from poodle_lightning.losses import contrastive
from poodle_lightning.losses.contrastive import across_views, densest_match, info_nce, nt_xent
from poodle_lightning.ops import distributed
from poodle_lightning.ops.distributed import gather, mean_across

B, K, D = 5, 11, 4


def rows(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def one_loss(query, positive, negatives, temperature):
    """The definition: minus the logarithm of the positive's share."""
    top = math.exp(cosine(query, positive) / temperature)
    return -math.log(top / (top + sum(math.exp(cosine(query, n) / temperature) for n in negatives)))


# ---- one positive, shared negatives
def test_info_nce_equals_loops():
    q, p, n = rows(B, D), rows(B, D, seed=1), rows(K, D, seed=2)
    wanted = [one_loss(q[b], p[b], n, 0.2) for b in range(B)]
    assert float(info_nce(q, p, n, 0.2)) == pytest.approx(sum(wanted) / B, rel=1e-9)
    weight = torch.tensor([True, False, True, True, False])
    found = info_nce(q, p, n, 0.2, weight)
    assert float(found) == pytest.approx((wanted[0] + wanted[2] + wanted[3]) / 3, rel=1e-9)
    assert float(info_nce(q, p, n, 0.2, weight & False)) == 0.0


def published(q, p, n, temperature):
    """MoCo's form: a row of 1 + K logits, whose first is right."""
    q, p, n = (torch.nn.functional.normalize(x, dim=1) for x in (q, p, n))
    logits = torch.cat([(q * p).sum(dim=1, keepdim=True), q @ n.t()], dim=1) / temperature
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


@pytest.mark.parametrize("scores", [1, 2 * K, 1 << 24], ids=["row by row", "in blocks", "at once"])
def test_info_nce_and_its_gradients_in_blocks_of_any_size(scores, monkeypatch):
    monkeypatch.setattr(contrastive, "BLOCK_SCORES", scores)
    grads = []
    for form in (info_nce, published):
        q, p = rows(B, D).requires_grad_(), rows(B, D, seed=1).requires_grad_()
        loss = form(q, p, rows(K, D, seed=2), 0.2)
        loss.backward()
        grads.append((loss.detach(), q.grad, p.grad))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_info_nce_has_finite_differences_as_gradient():
    n = rows(K, D, seed=2)
    points = rows(B, D).requires_grad_(), rows(B, D, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: info_nce(q, p, n, 0.5), points)


def test_info_nce_equals_lightlys_with_a_memory_bank():
    reference = NTXentLoss(temperature=0.2, memory_bank_size=(K, D))
    q, p, n = (rows(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(B, D), (B, D), (K, D)]))
    reference.memory_bank.bank = torch.nn.functional.normalize(n, dim=1)
    torch.testing.assert_close(info_nce(q, p, n, 0.2), reference(q, p))


def test_negatives_may_change_before_the_backward_pass():
    grads = []
    for change in (False, True):
        q, n = rows(B, D).requires_grad_(), rows(K, D, seed=2)
        loss = info_nce(q, rows(B, D, seed=1), n)
        if change:
            n.zero_()
        loss.backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_scores_are_not_kept():
    kept = {}
    q, p, n = rows(8, D).float().requires_grad_(), rows(8, D, seed=1).float(), rows(4096, D).float()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x,
        lambda x: x,
    ):
        info_nce(q, p, n)
    assert sum(kept.values()) < 4096 * 4  # a row of scores is more


# ---- across views
def by_loops(online, target, start, temperature, negatives):
    views, clips = online.shape[:2]
    total = 0.0
    for b in range(clips):
        others = [n for n in range(target.shape[1]) if n != start + b]
        for i in range(views):
            for j in range(views):
                if i != j:
                    seen = range(views) if negatives == "all" else [j]
                    against = [target[v, n] for v in seen for n in others]
                    total += one_loss(online[i, b], target[j, start + b], against, temperature)
    return total / clips


@pytest.mark.parametrize("negatives", ["all", "partner"])
@pytest.mark.parametrize(("views", "start", "many"), [(2, 0, 3), (3, 0, 3), (3, 4, 9)])
def test_across_views_equals_loops(views, start, many, negatives):
    online, target = rows(views, 3, D), rows(views, many, D, seed=1)
    found = across_views(online, target, start, 0.1, negatives)
    assert float(found) == pytest.approx(by_loops(online, target, start, 0.1, negatives), rel=1e-8)


@pytest.mark.parametrize("negatives", ["all", "partner"])
def test_rescaled_projections_are_the_same_scores(negatives):
    """VITO's text: rows of length 1 / √τ and no temperature in the exponents."""
    online, target = rows(3, 4, D), rows(3, 4, D, seed=1)
    a, b = (torch.nn.functional.normalize(x, dim=2) / math.sqrt(0.1) for x in (online, target))
    total = 0.0
    for i, j, n in ((i, j, n) for i in range(3) for j in range(3) for n in range(4) if i != j):
        others = [m for m in range(4) if m != n]
        against = b[:, others].flatten(0, 1) if negatives == "all" else b[j, others]
        top = (a[i, n] @ b[j, n]).exp()
        total -= (top / (top + (against @ a[i, n]).exp().sum())).log()
    torch.testing.assert_close(across_views(online, target, 0, 0.1, negatives), total / 4)


@pytest.mark.parametrize("negatives", ["all", "partner"])
def test_across_views_has_finite_differences_as_gradient(negatives):
    points = rows(3, 2, D).requires_grad_(), rows(3, 5, D, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda o, t: across_views(o, t, 2, 0.5, negatives), points)


@pytest.mark.parametrize("negatives", ["all", "partner"])
def test_a_single_clip_has_no_negatives_and_no_loss(negatives):
    online = rows(2, 1, D, dtype=torch.float32).requires_grad_()
    loss = across_views(online, rows(2, 1, D, dtype=torch.float32, seed=1), 0, 0.1, negatives)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert online.grad.abs().max() < 1e-5


def test_wrong_views_and_places_are_named():
    with pytest.raises(ValueError, match="2 views or more"):
        across_views(rows(1, 3, D), rows(1, 3, D))
    with pytest.raises(ValueError, match=r"targets of clips 1 to 4, not \(2, 3, 4\) and \(2, 3, 4\)"):
        across_views(rows(2, 3, D), rows(2, 3, D), start=1)


# ---- SimCLR
def test_nt_xent_equals_loops_and_lightlys():
    first, second = rows(B, D), rows(B, D, seed=1)
    every = [*first, *second]
    wanted = 0.0
    for i in range(2 * B):
        positive = (i + B) % (2 * B)
        against = [every[n] for n in range(2 * B) if n not in (i, positive)]
        wanted += one_loss(every[i], every[positive], against, 0.3) / (2 * B)
    assert float(nt_xent(first, second, 0.3)) == pytest.approx(wanted, rel=1e-8)
    grads = []
    for form in (lambda a, b: nt_xent(a, b, 0.3), NTXentLoss(temperature=0.3)):
        a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
        loss = form(a, b)
        loss.backward()
        grads.append((loss.detach(), a.grad, b.grad))
    torch.testing.assert_close(*grads)


# ---- two processes
def step(loss_of, data, weights):
    """Loss and gradient of a shared matrix, as DistributedDataParallel would have them."""
    matrix = weights.clone().requires_grad_()
    loss = loss_of(data @ matrix)
    loss.backward()
    return mean_across(loss), mean_across(matrix.grad)


def simclr(x):
    return nt_xent(x[0], x[1], 0.2)


def moclr(x):
    mine = across_views(x, gather(x.detach().flip(-1), dim=1), distributed.rank() * x.shape[1])
    return mine + across_views(x, gather(x, dim=1), distributed.rank() * x.shape[1], 0.3, "partner")


def weighted(x):
    negatives, weight = rows(K, 3, seed=7), x[0, :, 0].detach() > 3
    return info_nce(x[0], x[1].detach(), negatives, 0.2, weight)


def test_two_processes_equal_one():
    data, weights = rows(2, 8, 6), rows(6, 3, seed=1)
    counted = (data[0] @ weights)[:, 0] > 3
    assert 0 < counted[:4].sum() != counted[4:].sum() > 0  # the halves count unlike numbers of rows
    forms = [simclr, moclr, weighted]

    def act(rank):
        return [step(form, data[:, 4 * rank : 4 * rank + 4], weights) for form in forms]

    for found in in_two(act):
        for form, (loss, gradient) in zip(forms, found, strict=True):
            alone = step(form, data, weights)
            assert alone[1].abs().max() > 1e-2
            torch.testing.assert_close((loss, gradient), alone, rtol=1e-10, atol=1e-12)


def test_two_processes_equal_lightlys_gathered_loss():
    data = rows(2, 8, 6)

    def act(rank):
        mine = data[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
        nt_xent(mine[0], mine[1], 0.2).backward()
        theirs = mine.detach().clone().requires_grad_()
        NTXentLoss(temperature=0.2, gather_distributed=True)(theirs[0], theirs[1]).backward()
        return mine.grad, theirs.grad

    for found in in_two(act):
        torch.testing.assert_close(*found)


# ---- DenseCL
def test_densest_match_equals_loops():
    a, b = rows(2, D, 2, 3), rows(2, D, 3, 2, seed=1) * rows(1, 1, 3, 2, seed=2).abs()
    found = densest_match(a, b)
    assert found.shape == (2, 6)
    assert found.dtype == torch.int64
    for image in range(2):
        for cell in range(6):
            query = a[image, :, cell // 3, cell % 3]
            scores = [cosine(query, b[image, :, n // 2, n % 2]) for n in range(6)]
            assert int(found[image, cell]) == scores.index(max(scores))


# ---- precision and waiting
def test_half_precision_is_worked_on_in_float32():
    q, p, n = (rows(*s).bfloat16() for s in ((B, D), (B, D), (K, D)))
    views, targets = rows(3, 4, D).bfloat16(), rows(3, 4, D, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(q, p, n), across_views(views, targets), nt_xent(views[0], views[1])
    q, p, n, views, targets = (x.double() for x in (q, p, n, views, targets))
    wanted = info_nce(q, p, n), across_views(views, targets), nt_xent(views[0], views[1])
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_reads_nothing_back():
    q, p, n = rows(B, D).requires_grad_(), rows(B, D, seed=1), rows(K, D, seed=2)
    views, maps, weight = rows(3, 4, D, seed=3).requires_grad_(), rows(2, D, 2, 3), torch.ones(B)
    with DeviceReads([q, p, n, views, maps, weight]) as reads:
        loss = info_nce(q, p, n, 0.2, weight) + across_views(views, views.detach())
        (loss + nt_xent(views[0], views[1])).backward()
        densest_match(maps, maps)
    assert reads.found == []
