import pytest

from poodle_lightning.analysis.peaks import peak_flops


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        # NVIDIA's data sheets, dense
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312.0),
        ("NVIDIA A100-SXM4-80GB", "32-true", 156.0),
        ("NVIDIA H200", "bf16-mixed", 989.4),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.0),
        ("NVIDIA L40S", "bf16-mixed", 362.0),
        ("NVIDIA GH200 480GB", "bf16-mixed", 989.4),
        ("NVIDIA RTX A6000", "bf16-mixed", 154.8),
        ("Tesla V100-SXM2-32GB", "32-true", 15.7),
    ],
)
def test_a_card_is_found_by_its_full_name(device, precision, tflops):
    assert peak_flops(device, precision) == pytest.approx(1e12 * tflops)


def test_a_longer_name_is_not_taken_for_a_shorter_one():
    assert peak_flops("NVIDIA A10", "bf16-mixed") != peak_flops("NVIDIA A100 80GB PCIe", "bf16-mixed")
    assert peak_flops("NVIDIA L4", "bf16-mixed") != peak_flops("NVIDIA L40", "bf16-mixed")
    assert peak_flops("NVIDIA H200 NVL", "bf16-mixed") != peak_flops("NVIDIA H200", "bf16-mixed")


@pytest.mark.parametrize(
    "device",
    [
        *("NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA RTX A3000", "NVIDIA T400", "NVIDIA A10G"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 MIG 1g.10gb"),
    ],
)
def test_a_card_of_a_similar_name_is_not_known(device):
    assert peak_flops(device, "bf16-mixed") is None


def test_what_is_not_known_is_none():
    assert peak_flops("GeForce GTX 1080", "32-true") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "64-true") is None
