"""Pure functions: tensors in, a loss out."""
