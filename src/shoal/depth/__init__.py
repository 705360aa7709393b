"""Depth plans: which layers a request runs at which clock, what that costs, and the policies that make one."""
