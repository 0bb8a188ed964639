"""Measurements of flowverify: one script a claim, each prints its figures."""
