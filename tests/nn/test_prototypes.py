import torch

from poodle_lightning.nn.prototypes import Prototypes


def test_scores_are_cosines_whatever_the_lengths():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 4).double()
    z = 3.0 * torch.randn(2, 5, 6, dtype=torch.float64)
    scores = prototypes(z)
    for v in range(2):
        for i in range(5):
            for k in range(4):
                wanted = torch.nn.functional.cosine_similarity(z[v, i], prototypes.weight[k], dim=0)
                torch.testing.assert_close(scores[v, i, k], wanted, rtol=1e-6, atol=1e-7)


def test_rows_have_length_one_from_the_start_and_again_when_asked():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 4)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(4))
    before = prototypes.weight.detach().clone()
    with torch.no_grad():
        prototypes.weight.mul_(torch.tensor([0.5, 2.0, 3.0, 1.0])[:, None])
    prototypes.renormalise()
    torch.testing.assert_close(prototypes.weight, before)


def test_scores_are_float32_under_autocast():
    prototypes = Prototypes(6, 4)
    z = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        rough = prototypes(z)
    assert torch.equal(rough, prototypes(z))
