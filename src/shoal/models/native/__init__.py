"""The CPU kernel: a whole pass, or one layer's attention, in one call."""
