"""Methods that decide per token and layer, which no depth plan can express: they stand beside it for comparison."""
