"""The parts of ``benchmarks.street_readout``: settings, streets, training, readouts, what is written down."""
