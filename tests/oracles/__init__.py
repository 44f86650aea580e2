"""The formulas of the papers as slow Python loops: one loop per summation sign, no tensors, no masks multiplied."""
