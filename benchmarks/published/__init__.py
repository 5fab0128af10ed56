"""The published formulations that benchmarks compare with, written anew from their formulas."""
